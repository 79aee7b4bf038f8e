import contextlib
import csv
import io
import json
import re
import shutil
from statistics import mean, stdev

import lightning.pytorch as L
import pytest
import torch
from torch import nn

from lottery_callbacks import ApplyTicket, RewindPoint, Ticket
from lottery_callbacks.apply_ticket import reinitialise
from lottery_callbacks.functional.interpolation import interpolate
from lottery_callbacks.functional.permutations import permuted
from lottery_callbacks.rewinding import snapshot
from lottery_lightning.cli import build, main
from lottery_lightning.data import Digits
from lottery_lightning.experiments import Instability, Lines, Training
from lottery_lightning.experiments.between import Between
from lottery_lightning.experiments.instability import LINE
from lottery_lightning.experiments.runs import Run, Runner
from lottery_lightning.networks import Dense
from lottery_lightning.progress import ExperimentProgress
from lottery_lightning.tasks import ImageClassifier

OPTIONS = """
run_dir: {folder}/run
at: [0it, 1ep]
copies: 3
trials: 2
lines: {{points: 5}}
tickets: {{"half": "{folder}/half_{{trial}}.safetensors"}}
model:
  class_path: ImageClassifier
  init_args:
    network: {{class_path: Dense, init_args: {{widths: [64, 20, 10]}}}}
    optimizer: {{class_path: torch.optim.Adam, init_args: {{lr: 3.0e-3}}}}
    steps_per_visit: 20
data: {{class_path: Digits, init_args: {{batch_size: 60}}}}
training: {{max_steps: 60, val_every: 30it, threads: 1, logger: csv}}
"""
SHORT = Training(max_steps=20, val_every="10it", threads=1)
EPOCH = 20  # steps: 1,197 images by 60


def task(network=None):
    return ImageClassifier(network or Dense([64, 20, 10]), steps_per_visit=5)


def half(model, seed):
    """A ticket of the upper half of each first layer's weights, at the initialisation of a trial."""
    reinitialise(model, seed)
    tensors = snapshot(model)
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 2)
    weights = tensors[name].abs()
    return Ticket({name: weights > weights.median()}, RewindPoint(0, tensors), {"level": 3})


def weights_of(path):
    return torch.load(path, weights_only=True)["state_dict"]


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished experiment, its options and what it printed."""
    folder = tmp_path_factory.mktemp("instability")
    (folder / "options.yaml").write_text(OPTIONS.format(folder=folder))
    for trial in (0, 1):
        half(task(), trial).save(folder / f"half_{trial}.safetensors")
    options = ["instability", "--config", str(folder / "options.yaml")]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(options) == 0
    return folder / "run", options, printed.getvalue().splitlines()


def runs_of(run, row):
    """The folders of a row's two copies."""
    names = [f"{row['network']}_{row['at']}_{row[copy]}" for copy in ("first", "second")]
    return [run / f"trial_{row['trial']}" / re.sub(r"dense_\w+_0$", "dense", name) for name in names]


def test_a_row_is_a_pair_and_its_ends_are_the_runs(finished):
    run, _, _ = finished
    rows, points = rows_of(run / "results.csv"), rows_of(run / "lines.csv")
    pairs = [("0", "1"), ("0", "2"), ("1", "2")]
    assert [tuple(row[key] for key in ("network", "at", "trial", "first", "second")) for row in rows] == [
        (network, at, trial, *pair)
        for network in ("dense", "half")
        for at in ("0it", "1ep")
        for trial in ("0", "1")
        for pair in pairs
    ]
    assert len(points) == 5 * len(rows)
    for number, row in enumerate(rows):
        errors, losses = ([float(p[key]) for p in points[5 * number : 5 * number + 5]] for key in ("error", "loss"))
        for error, folder in zip((errors[0], errors[-1]), runs_of(run, row), strict=True):
            record = json.loads((folder / "result.json").read_text())
            assert error == pytest.approx(1 - record["test_acc_end"], abs=1e-6)
        assert float(row["instability"]) == pytest.approx(max(errors) - (errors[0] + errors[-1]) / 2)
        chord = [losses[0] + i / 4 * (losses[-1] - losses[0]) for i in range(5)]
        rise = max(loss - level for loss, level in zip(losses, chord, strict=True))
        assert float(row["barrier"]) == pytest.approx(max(0, rise), abs=1e-12)
        assert int(row["k"]) == {"0it": 0, "1ep": EPOCH}[row["at"]]
        assert float(row["density"]) == pytest.approx(1 if row["network"] == "dense" else 0.5)


def test_the_middle_of_a_line_is_the_mean_of_the_weights(finished):
    run, options, _ = finished
    experiment = build("instability", options[1:])[0]
    experiment.data.setup("test")
    images, labels = experiment.data.splits["test"]
    row = rows_of(run / "results.csv")[-1]
    one, other = (weights_of(folder / "final.ckpt") for folder in runs_of(run, row))
    model = experiment.model.eval()
    model.load_state_dict(interpolate(one, other, 0.5))
    with torch.no_grad():
        logits = model(images)
    middle = rows_of(run / "lines.csv")[-3]
    assert float(middle["t"]) == 0.5
    assert float(middle["error"]) == pytest.approx((logits.argmax(1) != labels).double().mean().item())
    assert float(middle["loss"]) == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), abs=1e-5)


def test_copies_differ_from_each_other_and_start_alike(finished):
    run, _, _ = finished
    rows = rows_of(run / "results.csv")
    last = {folder: weights_of(folder / "final.ckpt") for row in rows for folder in runs_of(run, row)}
    assert len(last) == 2 * (1 + 2 + 2 + 3 + 3)
    for name in ("network.hidden.0.weight", "network.output.bias"):
        assert len({tuple(state[name].flatten().tolist()) for state in last.values()}) == len(last)
    records = [json.loads((folder / "result.json").read_text()) for folder in last]
    assert {record["curve"][-1]["iteration"] for record in records} == {60}
    first = {record["arm"]: record["curve"][0]["iteration"] for record in records}
    assert first == dict.fromkeys(first, 30)


def test_states_are_those_of_the_dense_run_on_its_way(finished):
    run, options, _ = finished
    for trial in (0, 1):
        zero, epoch = (Ticket.load(run / f"trial_{trial}" / "tickets" / f"{at}.safetensors") for at in ("0it", "1ep"))
        fresh = build("instability", options[1:])[0].model
        reinitialise(fresh, trial)
        expected = snapshot(fresh)
        assert all(torch.equal(zero.rewind.tensors[name], tensor) for name, tensor in expected.items())
        assert (zero.rewind.step, epoch.rewind.step) == (0, EPOCH)
        assert zero.density == epoch.density == 1
        name = "network.hidden.0.weight"
        assert not torch.equal(zero.rewind.tensors[name], epoch.rewind.tensors[name])


def test_the_dense_run_is_copy_0_of_each_of_its_states(finished, tmp_path):
    run, options, _ = finished
    experiment = build("instability", options[1:])[0]
    runner = Runner(experiment.model, experiment.data, experiment.training, "again")
    dense = weights_of(run / "trial_1" / "dense" / "final.ckpt")
    for at in ("0it", "1ep"):
        ticket = ApplyTicket(run / "trial_1" / "tickets" / f"{at}.safetensors")
        runner.do(Run(tmp_path / at, 1, 0, at), 1, ticket)
        again = weights_of(tmp_path / at / "final.ckpt")
        assert all(torch.equal(dense[name], value) for name, value in again.items())


def test_masks_stay_at_every_copy_s_end(finished):
    run, _, _ = finished
    for trial in (0, 1):
        ((name, mask),) = Ticket.load(run.parent / f"half_{trial}.safetensors").masks.items()
        for at in ("0it", "1ep"):
            for copy in range(3):
                last = weights_of(run / f"trial_{trial}" / f"half_{at}_{copy}" / "final.ckpt")
                assert not last[name][~mask].any()
                assert last[name][mask].count_nonzero() == mask.sum() == 640


def test_the_finding_is_the_last_line_and_a_rerun_only_shows_the_table(finished, capsys):
    run, options, printed = finished
    found = json.loads((run / "results.json").read_text())
    starts, rows = found.pop("starts"), rows_of(run / "results.csv")
    assert json.loads(printed[-1]) == found
    assert (found["experiment"], found["trials"], found["copies"], found["points"]) == ("instability", 2, 3, 5)
    assert found["norms"] == "none"
    for start in starts:
        own = [row for row in rows if (row["network"], row["at"]) == (start["network"], start["at"])]
        values = [float(row["instability"]) for row in own]
        assert start["pairs"] == len(own) == 6
        expected = (mean(values), stdev(values), min(values), max(values))
        keys = ("instability", "instability_sd", "instability_min", "instability_max")
        assert [start[key] for key in keys] == pytest.approx(expected)
        ends = [float(row[key]) for row in own for key in ("error_first", "error_second")]
        assert start["test_acc"] == pytest.approx(1 - mean(ends))
        assert start["stable"] == (mean(values) < 0.02)
    assert (run / "instability.png").read_bytes().startswith(b"\x89PNG")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main(options) == 0
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    table = next(place for place, line in enumerate(printed) if "trials: 2, copies: 3" in line)
    assert len(printed[:table]) == 22  # the lines of the runs
    assert capsys.readouterr().out.splitlines() == printed[table:]


def test_equal_noise_gives_one_network_and_no_barrier(tmp_path, monkeypatch):
    monkeypatch.setattr("lottery_lightning.experiments.instability.copy_seed", lambda seed, copy: seed)
    Instability(task(), Digits(), tmp_path, ["0it", "7it"], copies=2, lines=Lines(3), training=SHORT).run()
    rows = rows_of(tmp_path / "results.csv")
    assert [(row["k"], row["instability"], row["barrier"]) for row in rows] == [
        ("0", "0.0", "0.0"),
        ("7", "0.0", "0.0"),
    ]


class TurnedTask(ImageClassifier):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return (-3 * batch[0], batch[1]) if isinstance(batch, list | tuple) else batch


class ShiftedDigits(Digits):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return (batch[0] / 2 + self.trainer.testing, batch[1]) if isinstance(batch, list | tuple) else batch


@pytest.mark.parametrize(("kind", "data"), [(TurnedTask, Digits), (ImageClassifier, ShiftedDigits)])
def test_batches_pass_the_hooks_of_the_module_and_of_the_data(tmp_path, kind, data):
    model = kind(Dense([64, 20, 10]))
    training = Training(max_steps=60, val_every="30it", threads=1)
    Instability(model, data(), tmp_path, "0it", 2, lines=Lines(3), training=training).run()
    (row,) = rows_of(tmp_path / "results.csv")
    for end, run in (("error_first", "dense"), ("error_second", "dense_0it_1")):
        record = json.loads((tmp_path / "trial_0" / run / "result.json").read_text())
        assert float(row[end]) == pytest.approx(1 - record["test_acc_end"], abs=1e-6)


def test_statistics_of_batch_norm_are_averaged_or_made_anew(tmp_path):
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 10))
    errors = {}
    for norms in ("average", "reestimate", "again"):
        lines = Lines(3, norms="average" if norms == "average" else "reestimate", norm_batches=4)
        training = Training(max_steps=20, val_every="10it", threads=1)
        Instability(task(network), Digits(), tmp_path, "0it", 2, lines=lines, training=training, seed=3).run()
        assert json.loads((tmp_path / "results.json").read_text())["norms"] == lines.norms
        errors[norms] = [row["loss"] for row in rows_of(tmp_path / "lines.csv")]
        shutil.rmtree(tmp_path / "trial_0" / "lines")
    assert errors["average"][::2] == errors["reestimate"][::2]
    assert errors["average"][1] != errors["reestimate"][1]
    assert errors["again"] == errors["reestimate"]  # from finished runs alone: the training batches are the same


def test_matching_undoes_a_permutation_of_the_second_copy(tmp_path):
    Instability(task(), Digits(), tmp_path, "0it", 2, lines=Lines(5, align=True), training=SHORT).run()
    (row,) = rows_of(tmp_path / "results.csv")
    assert {"aligned_instability", "aligned_barrier"} <= row.keys()
    assert [line["line"] for line in rows_of(tmp_path / "lines.csv")] == ["plain"] * 5 + ["aligned"] * 5
    first, second = (tmp_path / "trial_0" / name / "final.ckpt" for name in ("dense", "dense_0it_1"))
    between = Between(task(), Digits(), SHORT, 0, 5, "average", 1, align=True)
    plain = between.lines(first, second)
    assert plain["plain"].instability == float(row["instability"])
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    moved = permuted(weights_of(second), between.groups, dict.fromkeys(between.groups, order))
    torch.save({"state_dict": moved}, tmp_path / "moved.ckpt")
    apart = between.lines(first, tmp_path / "moved.ckpt")
    assert apart["plain"].barrier > 10 * plain["aligned"].barrier
    assert apart["aligned"].losses == pytest.approx(plain["aligned"].losses, rel=1e-5)


def test_a_torn_experiment_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    training = Training(max_steps=20, val_every="5it", threads=1, checkpoint_seconds=0)
    half(task(), 0).save(tmp_path / "half.safetensors")

    def experiment(folder):
        tickets = {"half": str(tmp_path / "half.safetensors")}
        at = ["0it", "7it", "12it"]
        return Instability(task(), Digits(), tmp_path / folder, at, 2, 1, tickets, Lines(3), training)

    experiment("whole").run()
    begun = []
    for place, step in (("dense", 8), ("dense", 14), ("dense_7it_1", 13), ("half_12it_1", 16)):

        class Watch(ExperimentProgress):
            def visit_ends(self, per_epoch, last):
                return (8, 13, 14, 16)

            def on_train_start(self, trainer, pl_module):
                begun.append((trainer.default_root_dir.split("/")[-1], trainer.global_step))

            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, torn=(place, step)):
                if (trainer.default_root_dir.split("/")[-1], trainer.global_step) == torn:
                    raise RuntimeError("torn")

        monkeypatch.setattr("lottery_lightning.experiments.instability.ExperimentProgress", Watch)
        with pytest.raises(RuntimeError, match="torn"):
            experiment("torn").run()
    monkeypatch.undo()
    monkeypatch.setattr("lottery_lightning.experiments.instability.write_json", None)
    with pytest.raises(TypeError, match="not callable"):  # after the copies, before their line
        experiment("torn").run()
    monkeypatch.undo()
    assert not (tmp_path / "torn" / "results.csv").exists()
    experiment("torn").run()
    first, again, *_ = (step for folder, step in begun if folder == "dense")
    assert first == 0 < again < 8  # before the second state, which is captured again
    for name in ("results.csv", "lines.csv", "instability.png"):
        assert (tmp_path / "torn" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    files = (tmp_path / "whole" / "trial_0").rglob("*")
    compared = [path for path in files if path.suffix in (".safetensors", ".json") and path.name != "cost.json"]
    assert len(compared) == 3 + 10 + 6  # states, runs, lines
    for path in compared:
        assert (tmp_path / "torn" / path.relative_to(tmp_path / "whole")).read_bytes() == path.read_bytes()


def test_the_bar_counts_the_steps_that_a_copy_takes(tmp_path, monkeypatch):
    bars, shown = [], []

    class Watch(ExperimentProgress):
        def __init__(self, *args):
            super().__init__(*args, every=5)
            bars.append(self._bar)

        def visit_ends(self, per_epoch, last):
            return (5, 10, 15, 20)

        def on_train_batch_end(self, *args):
            super().on_train_batch_end(*args)
            shown.append(self._bar.tasks[0].completed)

    monkeypatch.setattr("lottery_lightning.experiments.instability.ExperimentProgress", Watch)
    Instability(task(), Digits(), tmp_path / "run", "0it,10it", 3, 1, lines=Lines(3), training=SHORT).run()
    lines = 3 * LINE * 20  # 3 pairs
    dense, late = [5, 10, 15, 20], [5, 10]
    starts = [0, 20, 40, 60 + lines, 70 + lines]
    runs = [dense, dense, dense, late, late]
    expected = [begun + step for begun, steps in zip(starts, runs, strict=True) for step in steps]
    assert list(dict.fromkeys(shown)) == pytest.approx([0, *expected])
    assert bars[0].tasks[0].completed == pytest.approx(bars[0].tasks[0].total) == pytest.approx(80 + 2 * lines)


def test_trials_are_shared_between_processes(tmp_path, monkeypatch, capsys):
    @contextlib.contextmanager
    def taken(folder):
        yield folder.name != "trial_1"

    monkeypatch.setattr("lottery_lightning.experiments.store.working_on", taken)
    Instability(task(), Digits(), tmp_path, "0it", 2, 2, lines=Lines(3), training=SHORT).run()
    shown = capsys.readouterr().out
    assert "trial 1 is left to the process that works on it" in shown
    assert "1 lines are left to another process" in shown
    assert not (tmp_path / "results.csv").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--at", "[60it]"], "at=60it is not before training.max_steps=60"),
        (["--at", "3ep"], "3ep is step 60, and the run's last step is 60: take an earlier one"),
        (["--at", "0it,3ep"], "3ep is step 60, and the run's last step is 60: take an earlier one"),
        (["--at", "20it,1ep"], "20it and 1ep are both step 20: give one of them"),
        (["--at", "0it,0it"], "at, tickets: give each once"),
        (["--at", "[]"], "one step at least"),
        (["--at", "soon"], "'soon' is no step string"),
        (["--copies", "1"], "copies=1: an experiment has one trial and two copies at least"),
        (["--trials", "0"], "trials=0"),
        (["--lines.points", "1"], "1 points make no line"),
        (["--lines.norms", "fresh"], "fresh"),
        (["--lines.norm_batches", "0"], "norm_batches=0"),
        (["--tickets", "{dense: x}"], "no ticket the name 'dense'"),
        (["--tickets", "{a: 'x_{trial}_{level}'}"], "names 'level', and only {trial} and {at} are known"),
        (["--tickets", "{a: 'absent_{trial}'}"], "absent_0 is missing or torn"),
        (["--tickets", "{a: absent}"], "absent is one file for 2 trials: put {trial} in its path"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line(tmp_path, capsys, words, message):
    (tmp_path / "options.yaml").write_text(OPTIONS.format(folder=tmp_path))
    tickets = [] if "--tickets" in words else ["--tickets", "null"]
    assert main(["instability", "--config", str(tmp_path / "options.yaml"), *tickets, *words]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list((tmp_path / "run").rglob("*.ckpt")) + list((tmp_path / "run").rglob("*.safetensors"))
    mended = ["--at", "0it,1ep", "--tickets", "null", "--training.max_steps", "1", "--copies", "1"]
    main(["instability", "--config", str(tmp_path / "options.yaml"), *mended])
    assert "holds another experiment" not in capsys.readouterr().err


def test_a_ticket_of_another_network_is_refused_before_the_first_run(tmp_path):
    def experiment(ticket, at="0it"):
        ticket.save(tmp_path / "ticket.safetensors")
        tickets = {"half": str(tmp_path / "ticket.safetensors")}
        return Instability(task(), Digits(), tmp_path / "run", at, 2, 1, tickets, Lines(3), SHORT)

    with pytest.raises(ValueError, match=r"another architecture: network.hidden.0.weight is \(30, 64\) in the ticket"):
        experiment(half(task(Dense([64, 30, 10])), 0)).run()
    for at in ("0it", "10it"):
        with pytest.raises(
            ValueError, match=r"ticket 'half' of trial 0 starts from other weights at step 0 \(1\d\d% aw"
        ):
            experiment(half(task(), 1), at).run()
    experiment(half(task(), 0), "10it").check_tickets()


def test_a_ticket_rewound_to_a_later_step_is_compared_there_before_any_copy(tmp_path):
    ticket = half(task(), 1)
    Ticket(ticket.masks, RewindPoint(10, ticket.rewind.tensors)).save(tmp_path / "ticket.safetensors")
    tickets = {"half": str(tmp_path / "ticket.safetensors")}
    with pytest.raises(ValueError, match=r"starts from other weights at step 10 \(1\d\d% away\)"):
        Instability(task(), Digits(), tmp_path / "run", "5it,10it", 2, 1, tickets, Lines(3), SHORT).run()
    assert {path.parent.name for path in (tmp_path / "run").rglob("final.ckpt")} == {"dense"}


def test_a_module_needs_a_forward(tmp_path):
    class Bare(L.LightningModule):
        pass

    with pytest.raises(ValueError, match="Bare has no forward: give it one that maps inputs to logits"):
        Instability(Bare(), Digits(), tmp_path)
