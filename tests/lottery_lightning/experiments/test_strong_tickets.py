import contextlib
import csv
import io
import json
import re

import pytest
import torch

from lottery_callbacks import strong_network
from lottery_lightning.cli import build, main
from lottery_lightning.experiments.runs import stable_seed

OPTIONS = """
run_dir: {folder}
ns: [6, 12]
any_size: [6, 12]
sizes: [2]
tolerances: [0.05]
trials: 2
search_steps: 20
model:
  class_path: ImageClassifier
  init_args: {{network: {{class_path: Dense, init_args: {{widths: [64, 8, 10]}}}}}}
data: {{class_path: Digits, init_args: {{batch_size: 60}}}}
training: {{max_steps: 60, val_every: 20it, threads: 1, logger: csv}}
"""
QUESTIONS = {"any size": {}, "k = 2": {"size": 2}, "smallest, 0.05": {"tolerance": 0.05}}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished experiment, its options and what it printed."""
    folder = tmp_path_factory.mktemp("strong")
    (folder / "options.yaml").write_text(OPTIONS.format(folder=folder / "run"))
    options = ["strong-ticket", "--config", str(folder / "options.yaml")]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(options) == 0
    return folder / "run", options, printed.getvalue().strip().splitlines()


def rows_of(run):
    with (run / "results.csv").open() as file:
        return {(int(row["trial"]), row["question"]): row for row in csv.DictReader(file)}


def test_every_row_is_the_ticket_of_the_trained_network(finished):
    run, options, _ = finished
    rows = rows_of(run)
    assert set(rows) == {(trial, f"n = {n}, {name}") for trial in (0, 1) for n in (6, 12) for name in QUESTIONS}
    model = build("strong-ticket", options[1:])[0].targets.model.eval()
    model.load_state_dict(torch.load(run / "trial_1" / "target" / "final.ckpt", weights_only=True)["state_dict"])
    data = build("strong-ticket", options[1:])[0].targets.data
    data.setup("test")
    images, labels = data.splits["test"]
    for n in (6, 12):
        for name, question in QUESTIONS.items():
            row = rows[1, f"n = {n}, {name}"]
            ticket = strong_network(model.network, seed=stable_seed(1, "strong ticket", n), n=n, **question)
            assert [int(row[key]) for key in ("first", "second", "constant")] == list(ticket.counts)
            assert float(row["density"]) == pytest.approx(ticket.density)
            assert int(row["parameters"]) == ticket.random_parameters
            assert float(row["overparameterisation"]) == pytest.approx(ticket.random_parameters / int(row["weights"]))
            assert float(row["certified"]) == pytest.approx(ticket.certificate().normalised)
            assert 0 < float(row["found"]) <= float(row["certified"])
            accuracy = (ticket(images).argmax(1) == labels).double().mean().item()
            assert float(row["accuracy"]) == pytest.approx(accuracy)
            accuracy = (model(images).argmax(1) == labels).double().mean().item()
            assert float(row["target_accuracy"]) == pytest.approx(accuracy)
    assert int(rows[0, "n = 12, any size"]["weights"]) == 64 * 8 + 8 + 8 * 10 + 10


def test_what_went_wrong_is_listed_one_by_one(finished):
    run, _, _ = finished
    row = rows_of(run)[0, "n = 6, k = 2"]
    with (run / "trial_0" / "n__6_k__2" / "problems.csv").open() as file:
        problems = list(csv.DictReader(file))
    kinds = [problem["problem"] for problem in problems]
    found = [kinds.count(kind) for kind in ("miss", "too few units", "out of reach")]
    assert found == [int(row[key]) for key in ("misses", "infeasible", "out_of_reach")]
    assert found[0] > 0
    assert all(float(problem["error"]) > 0.05 for problem in problems if problem["problem"] == "miss")
    assert {problem["layer"] for problem in problems} <= {"network.hidden.0", "hidden.0", "output"}


def test_the_finding_is_the_last_line_and_a_rerun_changes_nothing(finished):
    run, options, printed = finished
    assert json.loads(printed[-1]) == json.loads((run / "results.json").read_text())
    assert (run / "strong_tickets.png").read_bytes().startswith(b"\x89PNG")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main(options) == 0
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ns", "[0]", "--any_size", "[]"], "all are above 0"),
        (["--any_size", "[7]"], "none of ns"),
        (["--ns", "[6, 6]", "--any_size", "[6]"], "give each of them once"),
        (["--sizes", "[]", "--tolerances", "[]", "--any_size", "[]"], "one question at least"),
        (["--model.init_args.network", "ResNet20"], "cannot be treated|does not take"),
    ],
)
def test_what_cannot_be_run_is_refused_before_it_begins(tmp_path, capsys, words, message):
    (tmp_path / "options.yaml").write_text(OPTIONS.format(folder=tmp_path / "run"))
    assert main(["strong-ticket", "--config", str(tmp_path / "options.yaml"), *words]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()
