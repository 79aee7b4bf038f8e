import contextlib
import csv
import io
import json

import pytest
import torch

from lottery_callbacks.functional.subset_sum import subset_sum
from lottery_lightning.cli import build, main
from lottery_lightning.experiments.runs import stable_seed

WORDS = ("name", "question")
LAYERS = {"network.hidden.0.weight": 12, "network.output.weight": 10}
OPTIONS = """
run_dir: {folder}
n: 10
sizes: [2, 3]
tolerances: [0.005, 0.05]
trials: {trials}
model:
  class_path: ImageClassifier
  init_args: {{network: {{class_path: Dense, init_args: {{widths: [64, 12, 10]}}}}}}
data: {{class_path: Digits, init_args: {{batch_size: 60}}}}
training: {{max_steps: 40, val_every: 20it, threads: 1, logger: csv}}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished experiment, its options and what it printed."""
    folder = tmp_path_factory.mktemp("network")
    config = folder / "options.yaml"
    config.write_text(OPTIONS.format(folder=folder / "run", trials=2))
    options = ["subset-sum-network", "--config", str(config)]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(options) == 0
    return folder / "run", options, printed.getvalue().strip().splitlines()


def weights_of(run, trial=0):
    saved = torch.load(run / f"trial_{trial}" / "target" / "final.ckpt", weights_only=True)["state_dict"]
    return {name: saved[name] for name in LAYERS}


def samples_of(weights, trial=0):
    """As the docstring has them: of a row, uniform between the least and the greatest weight."""
    low, high = min(float(w.min()) for w in weights.values()), max(float(w.max()) for w in weights.values())
    found = {}
    for name, weight in weights.items():
        generator = torch.Generator().manual_seed(stable_seed(trial, name, "samples"))
        found[name] = torch.rand(len(weight), 10, generator=generator, dtype=torch.float64) * (high - low) + low
    return found


def rows_of(run, trial=0):
    with (run / "results.csv").open() as file:
        rows = [{k: v if k in WORDS else float(v or "nan") for k, v in row.items()} for row in csv.DictReader(file)]
    return {row["question"]: row for row in rows if row["trial"] == trial}


def test_every_arm_is_what_the_solver_says_of_each_row(finished):
    run, _, _ = finished
    weights = weights_of(run, 1)
    samples, rows = samples_of(weights, 1), rows_of(run, 1)
    questions = {"any size": {}, "k = 2": {"size": 2}, "k = 3": {"size": 3}}
    for tolerance in (0.005, 0.05):
        questions[f"smallest, {tolerance}"] = {"tolerance": tolerance}
        questions[f"smallest from 1, {tolerance}"] = {"tolerance": tolerance, "min_size": 1}
    assert rows.keys() == {*questions, "magnitude, 0.005", "magnitude, 0.05"}
    for key, question in questions.items():
        found = [subset_sum(weights[name], samples[name], **question) for name in LAYERS]
        errors = torch.cat([answer.errors.flatten() for answer in found])
        assert rows[key]["weights"] == 64 * 12 + 12 * 10
        assert rows[key]["kept"] == sum(int(answer.sizes.sum()) for answer in found)
        assert rows[key]["empty"] == sum(int(answer.empty.sum()) for answer in found)
        assert rows[key]["misses"] == (errors > question.get("tolerance", 0.005)).sum()
        assert rows[key]["max_error"] == pytest.approx(errors.max().item(), abs=1e-7)  # as float32 weights
        assert rows[key]["kept_ratio"] == rows[key]["kept"] / rows[key]["weights"]
    assert rows["k = 3"]["kept"] == 3 * 888
    assert rows["any size"]["max_error"] <= min(row["max_error"] for key, row in rows.items() if key.startswith("k"))


def test_accuracies_are_those_of_a_network_with_these_weights(finished):
    run, options, _ = finished
    experiment, _ = build("subset-sum-network", options[1:])
    experiment.targets.data.setup("test")
    images, labels = experiment.targets.data.splits["test"]
    weights = weights_of(run)
    samples, rows = samples_of(weights), rows_of(run)
    saved = torch.load(run / "trial_0" / "target" / "final.ckpt", weights_only=True)["state_dict"]
    network = experiment.targets.model.eval()

    def accuracy():
        with torch.no_grad():
            return (network(images).argmax(1) == labels).double().mean().item()

    network.load_state_dict(saved)
    assert rows["any size"]["target_accuracy"] == pytest.approx(accuracy())
    with torch.no_grad():
        for name in LAYERS:
            network.get_parameter(name).copy_(subset_sum(weights[name], samples[name], size=2).sums)
    assert rows["k = 2"]["accuracy"] == pytest.approx(accuracy())
    network.load_state_dict(saved)
    with torch.no_grad():
        for name in LAYERS:
            network.get_parameter(name).mul_(weights[name].abs() > 0.05)
    control = rows["magnitude, 0.05"]
    assert control["accuracy"] == pytest.approx(accuracy())
    assert control["kept"] == sum(int((weight.abs() > 0.05).sum()) for weight in weights.values())
    assert control["empty"] + control["kept"] == 888
    assert 0 < control["max_error"] <= 0.05


def test_misses_are_listed_one_by_one(finished):
    run, _, _ = finished
    weights = weights_of(run)
    with (run / "trial_0" / "k__2" / "misses.csv").open() as file:
        misses = list(csv.DictReader(file))
    assert len(misses) == rows_of(run)["k = 2"]["misses"] > 0
    for miss in misses:
        assert float(miss["weight"]) == weights[miss["layer"]][int(miss["row"]), int(miss["column"])].item()
        assert abs(float(miss["weight"]) - float(miss["sum"])) > 0.005


def test_table_finding_and_json_tell_the_same(finished):
    run, _, printed = finished
    summary = json.loads(printed[-1])
    assert summary == json.loads((run / "results.json").read_text())
    assert (summary["weights"], summary["samples"], summary["trials"]) == (888, 8880, 2)
    assert summary["questions"]["k = 3"]["kept_ratio"] == 3
    assert "8,880 random samples approximate 888 weights" in printed[-2]
    assert (run / "subset_sum_network.png").read_bytes().startswith(b"\x89PNG")


def test_a_rerun_goes_on_where_it_stopped_and_ends_with_the_same_rows(finished):
    run, options, _ = finished
    before, target = (run / "results.csv").read_text(), run / "trial_0" / "target" / "final.ckpt"
    trained = target.stat().st_mtime_ns
    for name in ("k__3", "magnitude_0.05"):
        (run / "trial_0" / name / "result.json").unlink()
    assert main(options) == 0
    assert target.stat().st_mtime_ns == trained
    assert without_seconds((run / "results.csv").read_text()) == without_seconds(before)


def without_seconds(table):
    return [{**row, "seconds": None} for row in csv.DictReader(table.splitlines())]


def test_another_config_is_refused_by_the_name_of_its_key(finished, capsys):
    _, options, _ = finished
    assert main([*options, "--n", "9"]) == 1
    assert "subset-sum-network.n is 10 there and 9 now" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--n", "41"], "choose n of 1 to 40"),
        (["--sizes", "[11]"], "sizes of 1 to n"),
        (["--tolerances", "[]"], "give one or more, above 0"),
        (["--tolerances", "[0]"], "above 0"),
        (["--trials", "0"], "trials=0"),
        (["--tolerances", "[0.01, 0.0100000001]"], "give each of them once"),
        (["--sizes", "[2, 2]"], "give each of them once"),
    ],
)
def test_what_cannot_be_run_is_refused_before_it_begins(tmp_path, capsys, words, message):
    config = tmp_path / "options.yaml"
    config.write_text(OPTIONS.format(folder=tmp_path / "run", trials=1))
    assert main(["subset-sum-network", "--config", str(config), *words]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
