import contextlib
import csv
import io
import json
import re
from statistics import mean

import pytest
import torch
from torch import nn

from lottery_callbacks import Ticket
from lottery_callbacks.functional.popup import random_weights
from lottery_lightning.cli import build, main
from lottery_lightning.data import Digits
from lottery_lightning.experiments import EdgePopupSearch, Search, Training
from lottery_lightning.experiments.edge_popup_report import cells, finding, sentence
from lottery_lightning.networks import Dense
from lottery_lightning.progress import ExperimentProgress
from lottery_lightning.tasks import ImageClassifier

OPTIONS = """
run_dir: {folder}
sparsities: [0.5, 0.83]
weights: [signed_constant, kaiming_normal]
trials: 2
model:
  class_path: ImageClassifier
  init_args:
    network: {{class_path: Dense, init_args: {{widths: [64, 100, 10], bias: false}}}}
    optimizer: {{class_path: torch.optim.SGD, init_args: {{lr: 0.1, momentum: 0.9, weight_decay: 1.0e-4}}}}
    scheduler: {{class_path: torch.optim.lr_scheduler.CosineAnnealingLR, init_args: {{T_max: 300}}}}
    steps_per_visit: 50
dense:
  class_path: ImageClassifier
  init_args: {{network: {{class_path: Dense, init_args: {{widths: [64, 100, 10], bias: false}}}}, steps_per_visit: 50}}
data: {{class_path: Digits, init_args: {{batch_size: 60}}}}
training: {{max_steps: 300, val_every: 100it, threads: 1, logger: csv}}
"""
LAYERS = {"network.hidden.0.weight": (100, 64), "network.output.weight": (10, 100)}
SHORT = Training(max_steps=20, val_every="10it", threads=1)


def task(*widths):
    return ImageClassifier(Dense(widths or [64, 20, 10]), steps_per_visit=5)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished experiment, its options and what it printed."""
    folder = tmp_path_factory.mktemp("edge_popup")
    (folder / "options.yaml").write_text(OPTIONS.format(folder=folder / "run"))
    options = ["edge-popup", "--config", str(folder / "options.yaml")]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(options) == 0
    return folder / "run", options, printed.getvalue().splitlines()


def rows_of(run):
    with (run / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {(int(row["trial"]), row["network"], row["weights"], float(row["sparsity"])): row for row in rows}


def weights_of(path):
    return torch.load(path, weights_only=True)["state_dict"]


def test_rows_are_the_runs_and_their_figures_those_of_the_last_weights(finished):
    run, options, _ = finished
    rows, searches = rows_of(run), [(w, s) for w in ("signed_constant", "kaiming_normal") for s in (0.5, 0.83)]
    expected = [
        (trial, *arm) for trial in (0, 1) for arm in [("dense", "trained", 0.0), *(("Dense", *s) for s in searches)]
    ]
    assert list(rows) == expected
    experiment = build("edge-popup", options[1:])[0]
    experiment.data.setup("test")
    images, labels = experiment.data.splits["test"]
    for (trial, network, weights, sparsity), row in rows.items():
        name = "dense" if network == "dense" else f"Dense_{weights}_{sparsity:g}"
        folder = run / f"trial_{trial}" / name
        record = json.loads((folder / "result.json").read_text())
        model = experiment.models[network].eval()
        model.load_state_dict(weights_of(folder / "final.ckpt"))
        accuracy = (model(images).argmax(1) == labels).double().mean().item()
        assert float(row["test_acc_end"]) == pytest.approx(accuracy)
        assert float(row["test_acc_early_stop"]) == record["test_acc_early_stop"]
        assert int(row["early_stop_iteration"]) == record["early_stop_iteration"] > 0
        assert float(row["val_loss_end"]) == record["curve"][-1]["val/loss"]
        assert record["curve"][-1]["iteration"] == 300
        assert int(row["prunable"]) == 7400
        assert int(row["kept"]) == {0.0: 7400, 0.5: 3700, 0.83: 6400 - 5312 + 1000 - 830}[sparsity]
        assert float(row["density"]) == pytest.approx(int(row["kept"]) / 7400)
        dense = float(rows[trial, "dense", "trained", 0.0]["test_acc_end"])
        assert float(row["dense_acc"]) == dense
        assert float(row["acc_minus_dense"]) == pytest.approx(float(row["test_acc_end"]) - dense)
    assert (
        len({rows[0, "dense", "trained", 0.0]["val_loss_end"], rows[1, "dense", "trained", 0.0]["val_loss_end"]}) == 2
    )


def test_a_search_beats_chance_by_far_and_comes_near_the_trained_network(finished):
    rows = rows_of(finished[0])
    for trial in (0, 1):
        assert float(rows[trial, "dense", "trained", 0.0]["test_acc_end"]) > 0.9
        for weights in ("signed_constant", "kaiming_normal"):
            assert float(rows[trial, "Dense", weights, 0.5]["test_acc_end"]) > 0.8


@pytest.mark.parametrize("weights", ["signed_constant", "kaiming_normal"])
def test_the_last_checkpoint_and_the_ticket_hold_the_random_weights_or_0(finished, weights):
    run = finished[0]
    for trial in (0, 1):
        masks = {}
        for sparsity in (0.5, 0.83):
            folder = run / f"trial_{trial}" / f"Dense_{weights}_{sparsity}"
            last, ticket = weights_of(folder / "final.ckpt"), Ticket.load(folder / "ticket.safetensors")
            for name, shape in LAYERS.items():
                drawn = random_weights(name, torch.Size(shape), weights, 1, trial)
                mask = ticket.masks[name]
                assert int(mask.sum()) == mask.numel() - round(sparsity * mask.numel())
                assert torch.equal(last[name], torch.where(mask, drawn, 0.0))
                masks.setdefault(name, []).append(mask)
            if weights == "signed_constant":
                values = last["network.hidden.0.weight"].abs().unique()
                assert values.tolist() == pytest.approx([0, (2 / 64) ** 0.5])
            fresh = build("edge-popup", finished[1][1:])[0].models["Dense"]
            ticket.apply_(fresh)
            assert all(torch.equal(fresh.state_dict()[name], last[name]) for name in LAYERS)
        assert all(bool((few & ~many).any()) for many, few in masks.values())  # searched apart, and not nested


def test_the_finding_is_the_last_line_and_a_rerun_only_shows_the_table(finished, capsys):
    run, options, printed = finished
    found = json.loads((run / "results.json").read_text())
    arms = found.pop("arms")
    assert json.loads(printed[-1]) == found
    assert found["experiment"] == "edge-popup"
    assert found["best"] in arms
    assert [arm["kept"] for arm in arms] == [3700, 1258] * 2
    assert (run / "edge_popup.png").read_bytes().startswith(b"\x89PNG")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main(options) == 0
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    table = next(place for place, line in enumerate(printed) if "edge-popup, trials: 2" in line)
    assert len(printed[:table]) == 10  # the lines of the runs
    assert capsys.readouterr().out.splitlines() == printed[table:]


def test_loggers_get_the_densities_of_each_search(finished):
    run = finished[0]
    logs = next((run / "trial_0" / "Dense_signed_constant_0.83" / "logs").rglob("metrics.csv"))
    with logs.open() as file:
        last = [row["prune/density"] for row in csv.DictReader(file) if row["prune/density"]][-1]
    assert float(last) == pytest.approx(1258 / 7400)


def test_the_best_search_is_chosen_on_the_validation_set(finished):
    rows = [{**row, "trial": trial} for trial, row in enumerate(map(parsed, rows_of(finished[0]).values()))]
    for number, row in enumerate(row for row in rows if row["weights"] != "trained"):
        row["val_loss_end"], row["test_acc_end"] = 1.0 + number % 4, 0.5 + 0.1 * (number % 4)
        row["acc_minus_dense"] = row["test_acc_end"] - row["dense_acc"]
    found, _ = finding(rows)
    dense = mean(row["dense_acc"] for row in rows if row["weights"] != "trained" and row["sparsity"] == 0.5)
    assert (found["best"]["weights"], found["best"]["sparsity"]) == ("signed_constant", 0.5)
    assert found["best"]["test_acc"] == pytest.approx(0.5)
    assert found["best"]["acc_minus_dense"] == pytest.approx(0.5 - dense, abs=1e-5)
    assert re.search(r"at sparsity 0\.5, keeps 3,700 random weights \(50\.00%\).* reaches 50\.00%", sentence(found))
    assert [cell[0]["weights"] for cell in cells(rows)] == [
        "trained",
        *["signed_constant"] * 2,
        *["kaiming_normal"] * 2,
    ]


def parsed(row):
    return {key: value if key in ("network", "weights") else float(value) for key, value in row.items()}


def test_a_torn_experiment_goes_on_to_the_same_bits(tmp_path, monkeypatch, capsys):
    def experiment(folder):
        training = Training(max_steps=20, val_every="5it", threads=1, checkpoint_seconds=0)
        return EdgePopupSearch(task(), Digits(), tmp_path / folder, [0.3, 0.6], dense=task(), training=training)

    experiment("whole").run()
    begun = []
    for torn in (("0.3", 8), ("0.6", 15)):  # in the midst of a search; after a finished one, at a checkpoint's step

        class Watch(ExperimentProgress):
            def visit_ends(self, per_epoch, last):
                return (8, 15)

            def on_train_start(self, trainer, pl_module):
                begun.append((trainer.default_root_dir.split("_")[-1], trainer.global_step))

            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, torn=torn):
                if trainer.default_root_dir.endswith(torn[0]) and trainer.global_step == torn[1]:
                    raise RuntimeError("torn")

        monkeypatch.setattr("lottery_lightning.experiments.edge_popup.ExperimentProgress", Watch)
        with pytest.raises(RuntimeError, match="torn"):
            experiment("torn").run()
    monkeypatch.undo()
    monkeypatch.setattr("lottery_lightning.experiments.runs.write_json", None)
    with pytest.raises(TypeError, match="not callable"):  # at the end of the fit, before its record
        experiment("torn").run()
    monkeypatch.undo()
    assert not (tmp_path / "torn" / "trial_0" / "Dense_signed_constant_0.6" / "result.json").exists()
    assert not (tmp_path / "torn" / "results.csv").exists()
    experiment("torn").run()
    assert [step for _, step in begun] == [0, 0, 5, 0]  # dense; torn at 8, goes on from 5; the next one, torn at 15
    for name in ("results.csv", "edge_popup.png"):
        assert (tmp_path / "torn" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    for path in (tmp_path / "whole" / "trial_0").rglob("*"):
        other = tmp_path / "torn" / path.relative_to(tmp_path / "whole")
        if path.suffix in (".safetensors", ".json") and path.name != "cost.json":
            assert other.read_bytes() == path.read_bytes()
        if path.name == "final.ckpt":
            assert all(torch.equal(value, weights_of(other)[name]) for name, value in weights_of(path).items())


def test_networks_take_the_place_of_the_submodule_and_outside_nothing_is_searched(tmp_path):
    class Headed(ImageClassifier):
        def __init__(self):
            super().__init__(Dense([64, 20]), steps_per_visit=5)
            self.head = nn.Linear(20, 10)

        def reset_parameters(self):
            """Its parts reset themselves."""

        def forward(self, images):
            return self.head(self.network(images).relu())

    networks: dict[str, nn.Module] = {"narrow": Dense([64, 20]), "deep": Dense([64, 30, 20])}
    search = Search(scope="global", exclude=["*output.bias"])
    EdgePopupSearch(Headed(), Digits(), tmp_path, [0.5], search=search, networks=networks, training=SHORT).run()
    rows = rows_of(tmp_path)
    totals = {"narrow": 1280, "deep": 64 * 30 + 30 * 20}
    assert {row[1]: int(rows[row]["prunable"]) for row in rows} == totals
    assert {row[1]: int(rows[row]["kept"]) for row in rows} == {name: total // 2 for name, total in totals.items()}
    assert all(row["dense_acc"] == row["acc_minus_dense"] == "" for row in rows.values())
    heads = []
    for name in totals:
        last = weights_of(tmp_path / "trial_0" / f"{name}_signed_constant_0.5" / "final.ckpt")
        assert last["head.weight"].count_nonzero() == 200
        heads.append(last["head.weight"])
        assert set(Ticket.load(tmp_path / "trial_0" / f"{name}_signed_constant_0.5" / "ticket.safetensors").masks) == {
            key for key in last if key.startswith("network.") and key.endswith("weight")
        }
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["dense_acc"] is None
    assert "trained network" not in sentence(found)


def test_a_search_is_the_same_alone_or_beside_others(tmp_path):
    plans = {"whole": ([0.3, 0.6], task()), "alone": ([0.6], None)}
    for name, (sparsities, dense) in plans.items():
        training = Training(max_steps=10, val_every="5it", threads=1)
        EdgePopupSearch(
            task(), Digits(), tmp_path / name, sparsities, dense=dense, trials=2, training=training, seed=3
        ).run()
    for trial in (0, 1):
        folders = [tmp_path / name / f"trial_{trial}" / "Dense_signed_constant_0.6" for name in plans]
        for file in ("result.json", "ticket.safetensors"):
            whole, alone = ((folder / file).read_bytes() for folder in folders)
            assert whole == alone


def test_trials_are_shared_between_processes(tmp_path, monkeypatch, capsys):
    @contextlib.contextmanager
    def taken(folder):
        yield folder.name != "trial_1"

    monkeypatch.setattr("lottery_lightning.experiments.store.working_on", taken)
    EdgePopupSearch(task(), Digits(), tmp_path, [0.3, 0.6], trials=2, training=SHORT).run()
    shown = capsys.readouterr().out
    assert "trial 1 is left to the process that works on it" in shown
    assert "2 runs are left to another process" in shown
    assert len(list(tmp_path.rglob("result.json"))) == 2
    assert not (tmp_path / "results.csv").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--network", "net"], "network='net' is no submodule of ImageClassifier: there are network"),
        (["--sparsities", "[1.0]"], r"sparsity=1.0 is outside \[0, 1\)"),
        (["--sparsities", "[0.5, 0.5]"], "each of them once"),
        (["--search.end", "900it"], "search.end=900it lies beyond training.max_steps="),
        (["--sparsities", "[]"], "one of each at least"),
        (["--networks", "{}"], "one of each at least"),
        (["--weights", "[constant]"], "constant"),
        (["--search.scope", "erk"], "erk"),
        (["--search.exclude", "[head]"], "exclude names 'head', which is no parameter"),
        (["--search.exclude", "['*']"], "nothing to (prune|score)"),
        (["--search.scores", "magnitude"], "have one magnitude"),
        (["--trials", "0"], "trials=0"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line_before_it_begins(tmp_path, capsys, words, message):
    (tmp_path / "options.yaml").write_text(OPTIONS.format(folder=tmp_path / "run"))
    assert main(["edge-popup", "--config", str(tmp_path / "options.yaml"), *words]) == 1
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_network_must_not_have_the_trained_arm_s_name(tmp_path):
    with pytest.raises(ValueError, match="networks names 'dense', which is the trained arm: give it another name"):
        EdgePopupSearch(task(), Digits(), tmp_path, [0.5], networks={"dense": task().network}, dense=task())
