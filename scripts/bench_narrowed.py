"""How much smaller and faster networks become whose pruned columns are really cut out.

    python scripts/bench_narrowed.py --config configs/heavy_tails/mnist_width_small.yaml

Reads the finished runs of trial 0 of a heavy tails experiment. Of each the columns that may go within the budget of
squared error are cut out by `functional.narrowing.narrowed`, and the network is compared with the one that only has
zeros there: parameters, bytes of the state dict on disk, microseconds of a forward pass over one test batch
(interleaved rounds in one process, ratios within a round, medians), test accuracy of both, and the largest difference
of their outputs beside the largest output. The last line is JSON.
"""

import argparse
import io
import json
import sys
from collections.abc import Sequence
from typing import Any

import torch
from bench_measuring import interleaved, repeated, say
from bench_training import machine, quotients, rounded, spread

from lottery_callbacks.functional.compressibility import compressed
from lottery_callbacks.functional.in_place import load
from lottery_callbacks.functional.narrowing import narrowed
from lottery_lightning.cli import build, quiet
from lottery_lightning.experiments.compression import compressible
from lottery_lightning.experiments.finished import require_finished, weights_of
from lottery_lightning.experiments.heavy_tails import Arm, HeavyTails
from lottery_lightning.experiments.setting import Setting

Figures = dict[str, Any]


def measure(experiment: HeavyTails, arm: Arm, rounds: int) -> Figures:
    """The figures of one finished run."""
    run = experiment.plan(0)[arm]
    require_finished(run.run_dir)
    setting = Setting(experiment.models[arm.network], experiment.data, experiment.training, experiment.seed, 0)
    model = setting.model
    load(model, weights_of(run.run_dir / "final.ckpt"))
    images = next(iter(setting.test_batches))[0]
    chosen = compressible(model, experiment.compression.output, experiment.noise.first_convolution)
    found = compressed(chosen, "column", budget=experiment.compression.budget)
    load(model, found.state({name: value.clone() for name, value in model.state_dict().items()}))
    cut = narrowed(model, found.masks, images[:2])
    networks = {"zeros": model.eval(), "cut_out": cut.network.eval()}
    with torch.no_grad():
        outputs = [network(images) for network in networks.values()]
        timers = {name: lambda network=network: repeated(lambda: network(images)) for name, network in networks.items()}
        us, _ = interleaved(str(arm), timers, rounds, images.device)
    zeros, smaller = (_bytes(network) for network in networks.values())
    ratios = quotients(us["zeros"], us["cut_out"])
    return {
        "arm": str(arm),
        "columns_pruned": found.pruning_ratio,
        "parameters": cut.before,
        "parameters_left": cut.after,
        "bytes": zeros,
        "bytes_left": smaller,
        "batch": len(images),
        **{f"{name}_{key}": value for name, taken in us.items() for key, value in spread("us", taken).items()},
        **spread("faster", ratios),
        "accuracy": [1 - setting.on_test(network).error for network in networks.values()],
        "difference": float((outputs[0] - outputs[1]).abs().max()),
        "largest_output": float(outputs[0].abs().max()),
    }


def _bytes(network: torch.nn.Module) -> int:
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    return file.getbuffer().nbytes


def main(argv: Sequence[str] | None = None) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("--config", required=True, help="of the finished heavy tails experiment")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    args, more = parser.parse_known_args(argv)  # the rest are the experiment's own options, as --run_dir
    torch.set_num_threads(args.threads)
    quiet()
    experiment, _ = build("heavy-tails", ["--config", args.config, *more])
    rows = [measure(experiment, arm, args.rounds) for arm in experiment.arms]
    say("")
    device = "cuda" if next(iter(experiment.models.values())).device.type == "cuda" else "cpu"
    print(f"{machine(device)}; {args.rounds} interleaved rounds, batch {rows[0]['batch']}, median (min to max)\n")
    for row in rows:
        print(
            "{arm:<24} columns pruned {columns_pruned:6.1%}  parameters {parameters:>10,} -> {parameters_left:>10,}  "
            "bytes {bytes:>11,} -> {bytes_left:>11,}  {faster_median:.2f} times faster ({faster_min:.2f} to "
            "{faster_max:.2f})  difference {difference:.1e} of {largest_output:.3g}".format(**row)
        )
    told = {"device": machine(device), "rounds": args.rounds, "threads": args.threads, "rows": rows}
    print(json.dumps({key: rounded(value) if key != "rows" else value for key, value in told.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
