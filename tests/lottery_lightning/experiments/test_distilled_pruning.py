import contextlib
import csv
import io
import json
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch

from lottery_callbacks import ApplyTicket, Pruning, Ticket
from lottery_callbacks.functional import masks as M
from lottery_lightning.cli import main
from lottery_lightning.data import Digits, DistilledDataModule, DistilledSet
from lottery_lightning.experiments import DistilledPruning, Lines, Lottery, Route, Rule, Training
from lottery_lightning.experiments.distill_sets import cost_of
from lottery_lightning.experiments.instability import copy_seed
from lottery_lightning.experiments.runs import Runner
from lottery_lightning.experiments.store import write_json
from lottery_lightning.networks import Dense
from lottery_lightning.progress import ExperimentProgress
from lottery_lightning.tasks import ImageClassifier

OPTIONS = """
distilled-pruning:
  run_dir: {folder}/run
  levels: [1, 3]
  trials: 2
  copies: 3
  lines: {{points: 3}}
  routes:
    real: {{rule: {{pruning: {{scope: global}}}}}}
    distilled:
      distilled: {folder}/set.safetensors
      batch_size: 30
      training: {{max_steps: 40, val_every: 20it, threads: 1}}
      rule: {{pruning: {{scope: global}}}}
    as published:
      distilled: {folder}/set.safetensors
      batch_size: 30
      training: {{max_steps: 40, val_every: 20it, threads: 1}}
      rule: {{retrain: prunable_weights, pruning: {{scope: global}}}}
  model:
    class_path: ImageClassifier
    init_args: {{network: {{class_path: Dense, init_args: {{widths: [64, 20, 10]}}}}, steps_per_visit: 20}}
  data: {{class_path: Digits, init_args: {{batch_size: 60}}}}
  training: {{max_steps: 50, val_every: 25it, threads: 1}}
"""
GLOBAL = Pruning(scope="global")


def small_set(path, stored=20, factor=2):
    """Real images as a set; of factor 2 each is read as four tiles."""
    data = Digits()
    images, labels = data.load()["train"]
    chosen = torch.cat([torch.nonzero(labels == label)[: stored // 10, 0] for label in range(10)])
    write_json(cost_of(path), {"points": 1234, "seconds": 5.0})
    return DistilledSet(images[chosen], labels[chosen], data.preprocessing, factor=factor).save(path)


def task():
    return ImageClassifier(Dense([64, 20, 10]), steps_per_visit=5)


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def load(path):
    return torch.load(path, weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished experiment, its options and what it printed."""
    folder = tmp_path_factory.mktemp("distilled")
    small_set(folder / "set.safetensors")
    (folder / "options.yaml").write_text(OPTIONS.format(folder=folder))
    options = ["--config", str(folder / "options.yaml")]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(options) == 0
    return folder / "run", options, printed.getvalue().splitlines()


def test_a_row_is_a_pair_of_copies_of_each_route_and_level(finished):
    run, _, _ = finished
    rows = rows_of(run / "results.csv")
    places = [(row["route"], row["level"], row["trial"]) for row in rows]
    routes = ("real", "distilled", "as published", "layerwise_random")
    expected = [("dense", "0"), *((route, level) for level in ("1", "3") for route in routes)]
    assert places == [(*place, trial) for place in expected for trial in ("0", "1") for _ in range(3)]
    densities = {level: {row["density"] for row in rows if row["level"] == level} for level in ("0", "1", "3")}
    assert densities["0"] == {"1.0"}
    assert [len(some) for some in densities.values()] == [1, 1, 1]  # every route keeps as many
    for row in rows[-3:]:
        for copy, error in (("first", "error_first"), ("second", "error_second")):
            folder = run / "retrained" / f"trial_{row['trial']}" / f"layerwise_random_level_3_0it_{row[copy]}"
            record = json.loads((folder / "result.json").read_text())
            assert float(row[error]) == pytest.approx(1 - record["test_acc_end"], abs=1e-6)


@pytest.mark.parametrize("route", ["real", "distilled"])
def test_a_route_is_the_lottery_on_its_data(finished, tmp_path, route):
    run, _, _ = finished
    data, training = Digits(batch_size=60), Training(max_steps=50, val_every="25it", threads=1)
    if route == "distilled":
        data = DistilledDataModule(run.parent / "set.safetensors", data, batch_size=30)
        training = Training(max_steps=40, val_every="20it", threads=1)
    Lottery(task(), data, tmp_path, 2, 2, {}, Rule(pruning=GLOBAL), training).run()
    for trial in (0, 1):
        for level in range(4):
            name = f"trial_{trial}/tickets/level_{level:02d}.safetensors"
            assert (run / route / name).read_bytes() == (tmp_path / name).read_bytes()


@pytest.mark.parametrize(("route", "starts_trained"), [("distilled", False), ("as published", True)])
def test_only_a_partial_rewind_leaves_biases_trained_and_copies_start_from_the_ticket(finished, route, starts_trained):
    run, _, _ = finished
    dense = Ticket.load(run / route / "trial_1" / "tickets" / "level_00.safetensors").rewind.tensors
    ticket = Ticket.load(run / route / "trial_1" / "tickets" / "level_03.safetensors")
    trained = load(run / route / "trial_1" / "level_02" / "final.ckpt")
    for name, start in ticket.rewind.tensors.items():
        expected = trained[name] if starts_trained and name not in ticket.masks else dense[name]
        assert torch.equal(start, expected), name
        assert torch.equal(trained[name], dense[name]) is False
    seed = copy_seed(1, 2)
    data = Digits(batch_size=60, data_seed=seed)
    module = Runner(task(), data, Training(), "x").fresh_model(seed)
    quick_trainer(ApplyTicket(Ticket(ticket.masks, ticket.rewind))).fit(module, data)
    folder = run / "retrained" / "trial_1" / f"{route.replace(' ', '_')}_level_3_0it_2"
    last = load(folder / "final.ckpt")
    assert all(torch.equal(last[name], value) for name, value in module.state_dict().items())


def quick_trainer(*callbacks):
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return L.Trainer(max_steps=50, max_epochs=-1, callbacks=list(callbacks), limit_val_batches=0, **quiet)


def test_random_tickets_keep_the_counts_of_the_real_datas_and_its_start(finished):
    run, _, _ = finished
    for trial in (0, 1):
        for level in (1, 3):
            random, real = (
                Ticket.load(run / route / f"trial_{trial}" / "tickets" / f"level_{level:02d}.safetensors")
                for route in ("layerwise_random", "real")
            )
            assert M.kept(random.masks) == M.kept(real.masks)
            assert not any(torch.equal(random.masks[name], mask) for name, mask in real.masks.items())
            assert all(torch.equal(random.rewind.tensors[n], value) for n, value in real.rewind.tensors.items())


def test_the_ledger_counts_what_the_runs_before_a_ticket_drew(finished):
    run, _, printed = finished
    ledger = rows_of(run / "ledger.csv")
    assert [(row["route"], row["level"], row["trial"]) for row in ledger] == [
        (route, level, trial)
        for route in ("real", "distilled", "as published")
        for level in ("1", "3")
        for trial in ("0", "1")
    ]
    a_run = {"real": 2 * 1197 + 10 * 60, "distilled": 40 // 3 * 80 + 30, "as published": 40 // 3 * 80 + 30}
    for row in ledger:
        runs = int(row["level"])  # levels 0 to level - 1
        assert int(row["runs"]) == runs
        assert int(row["decoded_points"]) == runs * a_run[row["route"]]
        stored = 1 if row["route"] == "real" else 4
        assert float(row["stored_points"]) == runs * a_run[row["route"]] / stored
        assert row["making_points"] == ("0" if row["route"] == "real" else "1234")
        names = [run / row["route"] / f"trial_{row['trial']}" / f"level_{n:02d}" / "cost.json" for n in range(runs)]
        assert float(row["seconds"]) == pytest.approx(sum(json.loads(n.read_text())["seconds"] for n in names))
    last = json.loads(printed[-1])
    (cell,) = (cell for cell in last["tickets"] if (cell["route"], cell["level"]) == ("distilled", 3))
    assert cell["ratio_decoded"] == pytest.approx(a_run["real"] / a_run["distilled"], abs=1e-4)
    assert cell["ratio_stored"] == pytest.approx(4 * a_run["real"] / a_run["distilled"], abs=1e-4)


def test_a_rerun_trains_nothing_and_another_config_is_refused(finished, capsys):
    run, options, _ = finished
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name in ("cost.json", "final.ckpt")}
    assert len(before) == 2 * (2 * (3 * 3) + 2 * (3 + 8 * 3))
    assert main(options) == 0
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert "times fewer" in capsys.readouterr().out
    assert main([*options, "--copies", "2"]) == 1
    assert "holds another experiment: distilled-pruning.copies is 3 there and 2 now" in capsys.readouterr().err


def test_a_torn_experiment_goes_on_to_the_same_tables(tmp_path, monkeypatch):
    small_set(tmp_path / "set.safetensors", factor=1)
    training = Training(max_steps=20, val_every="10it", threads=1, checkpoint_seconds=0)

    def experiment(folder):
        routes = {"real": Route(), "distilled": Route(tmp_path / "set.safetensors")}
        return DistilledPruning(task(), Digits(), tmp_path / folder, routes, [2], 2, 2, Lines(3), training)

    experiment("whole").run()
    for place in (
        "real/trial_0/level_01",
        "distilled/trial_0/level_00",
        "retrained/trial_1/layerwise_random_level_2_0it_1",
    ):

        class Watch(ExperimentProgress):
            def visit_ends(self, per_epoch, last):
                return (13,)

            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, torn=place):
                if trainer.default_root_dir.endswith(torn) and trainer.global_step == 13:
                    raise RuntimeError("torn")

        monkeypatch.setattr("lottery_lightning.experiments.distilled_pruning.ExperimentProgress", Watch)
        with pytest.raises(RuntimeError, match="torn"):
            experiment("torn").run()
    monkeypatch.undo()
    experiment("torn").run()
    for name in ("results.csv", "lines.csv"):
        assert (tmp_path / "torn" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    tickets = sorted(path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*.safetensors"))
    assert len(tickets) == 2 * (3 + 3 + 1 + 1)
    for name in tickets:
        assert (tmp_path / "torn" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_the_bar_counts_every_step(tmp_path, monkeypatch):
    small_set(tmp_path / "set.safetensors")
    seen = []

    class Watch(ExperimentProgress):
        def __exit__(self, *_):
            (bar,) = self._bar.tasks
            seen.append((bar.completed, bar.total))

    monkeypatch.setattr("lottery_lightning.experiments.distilled_pruning.ExperimentProgress", Watch)
    longer = Training(max_steps=30, val_every="10it", threads=1)
    routes = {"real": Route(), "distilled": Route(tmp_path / "set.safetensors", training=longer)}
    short = Training(max_steps=20, val_every="10it", threads=1)
    DistilledPruning(task(), Digits(), tmp_path / "run", routes, [2], 1, 2, Lines(3), short).run()
    runs = 1 + 0.1 + 1 + 3 * (2 + 0.1)  # dense, its line and its copy; two copies and a line of each ticket
    assert seen == [(pytest.approx(2 * 20 + 2 * 30 + 20 * runs),) * 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"levels": []}, r"levels=\[\]: give levels from 1 on, each once"),
        ({"levels": [0, 2]}, r"levels=\[0, 2\]: give levels from 1 on"),
        ({"routes": {}}, "routes: give one at least"),
        (
            {"routes": {"random": Route()}},
            "names that differ in a letter and are none of dense, layerwise_random, random, retrained",
        ),
        ({"routes": {"a b": Route(), "a, b": Route()}}, "names that differ in a letter"),
        ({"routes": {"a/b": Route()}}, "routes: 'a/b' is the name of a folder"),
        ({"routes": {"..": Route()}}, r"routes: '\.\.' is the name of a folder"),
        ({"routes": {"a{b}": Route()}}, "routes: 'a{b}' is the name of a folder"),
        ({"routes": {"a": Route(), "b": Route(rule=Rule(rewind="5it"))}}, "routes have rewind 0it and 5it"),
        ({"routes": {"a": Route(), "b": Route(rule=Rule(rate=0.5))}}, "routes have rate 0.2 and 0.5"),
        ({"routes": {"a": Route(rule=Rule(retrain="fine_tune"))}}, "routes.a has retrain fine_tune"),
        ({"routes": {"a": Route(Path("x"), rule=Rule(rewind="5it"))}}, "routes.a rewinds to 5it, which is no step of"),
        ({"copies": 1}, "copies=1: an experiment has one trial and two copies at least"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(tmp_path, change, message):
    arguments = {"routes": {"real": Route()}, "levels": [1]} | change
    with pytest.raises(ValueError, match=message):
        DistilledPruning(task(), Digits(), tmp_path / "run", **arguments)


def test_what_is_of_distilled_images_is_refused_where_there_is_no_set():
    with pytest.raises(ValueError, match="which are of distilled images, and names no set"):
        Route(batch_size=10)


def quick(folder, routes, trials=1):
    short = Training(max_steps=5, val_every="5it", threads=1)
    return DistilledPruning(task(), Digits(), folder, routes, [1], trials, 2, Lines(2), short)


def test_a_set_replaced_under_its_name_is_refused_and_a_finished_experiment_needs_none(tmp_path, capsys):
    path = small_set(tmp_path / "set.safetensors")
    quick(tmp_path / "run", {"small": Route(path)}).run()
    table = capsys.readouterr().out.splitlines()[-1]
    path.unlink()
    cost_of(path).unlink()
    quick(tmp_path / "run", {"small": Route(path)}).run()
    assert capsys.readouterr().out.splitlines()[-1] == table
    small_set(path, stored=30)
    with pytest.raises(ValueError, match=r"is another set than the one that .*small began with"):
        quick(tmp_path / "run", {"small": Route(path)}, trials=2).run()


def test_routes_in_another_order_leave_the_random_tickets_as_they_are(tmp_path):
    routes = {name: Route(rule=Rule(pruning=Pruning(score))) for name, score in (("a", "magnitude"), ("b", "random"))}
    quick(tmp_path / "run", routes).run()
    (ticket,) = (tmp_path / "run" / "layerwise_random").rglob("level_01.safetensors")
    before = ticket.read_bytes()
    quick(tmp_path / "run", dict(reversed(routes.items()))).run()
    assert ticket.read_bytes() == before


@pytest.mark.parametrize("widths", [[64, 12, 10], [64, 20, 20, 10]])
def test_a_route_with_another_network_is_refused_before_the_first_run(tmp_path, widths):
    with pytest.raises(ValueError, match=r"routes\.other\.model is or begins as another network"):
        quick(tmp_path / "run", {"other": Route(model=ImageClassifier(Dense(widths)))}).run()
    assert not list((tmp_path / "run").rglob("level_*"))


def test_the_sentence_tells_stored_and_decoded_examples(tmp_path, capsys):
    path = small_set(tmp_path / "set.safetensors")
    quick(tmp_path / "run", {"real": Route(), "small": Route(path, batch_size=10)}).run()
    told = capsys.readouterr().out.splitlines()[-2]
    assert "found with 24.0 times (stored; 6.0 times decoded) fewer training examples" in told  # 5 x 60, 5 x 10 / 4


def test_a_set_of_another_split_is_refused(tmp_path):
    path = small_set(tmp_path / "set.safetensors")
    found = DistilledSet.load(path)
    DistilledSet(found.images, found.labels, found.preprocessing, provenance={"split_seed": 1}).save(path)
    with pytest.raises(ValueError, match="made of real data with split_seed 1 and these have 0"):
        quick(tmp_path / "run", {"small": Route(path)}).run()


def test_a_set_of_other_data_is_refused_before_the_first_run(tmp_path):
    path = small_set(tmp_path / "set.safetensors")
    found = DistilledSet.load(path)
    other = type(found.preprocessing)((0.1,), (0.3,))
    DistilledSet(found.images, found.labels, other).save(path)
    experiment = DistilledPruning(task(), Digits(), tmp_path / "run", {"real": Route(), "small": Route(path)}, [1])
    with pytest.raises(ValueError, match="preprocessed in another way"):
        experiment.run()
    assert not list(Path(tmp_path / "run").rglob("level_*"))
