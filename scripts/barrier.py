"""Are two finished runs connected? Loss and error on the straight line between them, before and after matching.

    python scripts/barrier.py --config configs/lmc/lenet_mnist_instability_small.yaml RUN RUN --out barrier.png

Each RUN is a folder with a `final.ckpt`, as experiments leave them, or a checkpoint of Lightning. Model, data and
Trainer are those of the config, of an instability experiment. "matched": the second network's hidden units in the order
that weight matching finds (arXiv 2209.04836); its outputs are the same. Test set; the last line is JSON.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from lottery_callbacks.ticket import write_atomically
from lottery_lightning.cli import build, quiet
from lottery_lightning.experiments.between import Between
from lottery_lightning.figures import connectivity_figure


def main(argv: Sequence[str] | None = None) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("--config", required=True, help="of an instability experiment")
    parser.add_argument("--out", type=Path, help="where the figure is written")
    parser.add_argument("runs", nargs=2, type=Path)
    args, more = parser.parse_known_args(argv)  # the rest are the experiment's own options, as --lines.points
    quiet()
    experiment, _ = build("instability", ["--config", args.config, *more, "--lines.align", "true"])
    one, other = (path / "final.ckpt" if path.is_dir() else path for path in args.runs)
    between = Between(
        experiment.model, experiment.data, experiment.training, experiment.seed, **asdict(experiment.lines)
    )
    lines = {"plain": "plain", "aligned": "matched"}
    found = {lines[kind]: line for kind, line in between.lines(one, other).items()}
    for name, line in found.items():
        ends = f"{100 * line.errors[0]:.2f} and {100 * line.errors[-1]:.2f} % error at the ends"
        print(f"{name:<8} loss barrier {line.barrier:.4f}, instability {100 * line.instability:.2f} points; {ends}")
    if args.out:
        write_atomically(args.out, connectivity_figure(found))
    told = {name: {"barrier": line.barrier, "instability": line.instability} for name, line in found.items()}
    print(json.dumps(told | {"points": len(found["plain"].t), "norms": found["plain"].norms}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
