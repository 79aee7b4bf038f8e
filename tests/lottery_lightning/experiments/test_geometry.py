import contextlib
import csv
import io
import json
import math

import pytest
import torch
from torch.func import functional_call, hessian
from torch.nn import functional as F

from lottery_callbacks import Ticket
from lottery_lightning.cli import main
from lottery_lightning.data import Digits
from lottery_lightning.experiments import Geometry, Lottery, Rule, Spectra, Training, Views
from lottery_lightning.experiments.finished import masks_of, weights_of
from lottery_lightning.experiments.geometry_report import cells, sentence
from lottery_lightning.figures import curvature_figure
from lottery_lightning.networks import Dense
from lottery_lightning.tasks import ImageClassifier

SHORT = Training(max_steps=40, val_every="20it", threads=1)
EXACT = Spectra(draws=400, spectrum_draws=2, steps=10)
COARSE = Views(points=3)


def task():
    return ImageClassifier(Dense([64, 4, 10]), steps_per_visit=5)


@pytest.fixture(scope="module")
def lottery(tmp_path_factory):
    """The folder of a finished lottery of two trials and two levels."""
    folder = tmp_path_factory.mktemp("geometry") / "lottery"
    with contextlib.redirect_stdout(io.StringIO()):
        Lottery(
            task(), Digits(), folder, levels=2, trials=2, controls={"random": 1}, rule=Rule(0.4), training=SHORT
        ).run()
    return folder


def networks(lottery):
    return {"dense": f"{lottery}/trial_{{trial}}/level_00", "ticket": f"{lottery}/trial_{{trial}}/level_02"}


def levels(lottery):
    return {"levels": [f"{lottery}/trial_{{trial}}/level_0{level}" for level in range(3)]}


@pytest.fixture(scope="module")
def measured(lottery, tmp_path_factory):
    """The folder of a finished geometry and what it printed."""
    folder = tmp_path_factory.mktemp("geometry") / "run"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        Geometry(
            task(), Digits(), folder, networks(lottery), levels(lottery), 2, 3, EXACT, COARSE, training=SHORT
        ).run()
    return folder, printed.getvalue()


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def batches(trial):
    """The first three training batches in the order of the trial's seed."""
    data = Digits(data_seed=trial)
    data.setup("fit")
    images, labels = zip(*(batch for batch, _ in zip(data.train_dataloader(), range(3), strict=False)), strict=True)
    return torch.cat(images), torch.cat(labels)


def dense_truth(lottery, trial, level):
    """The Hessian on kept weights and biases, of the loss of a run's last weights, and that loss."""
    network, images_labels = task(), batches(trial)
    run = lottery / f"trial_{trial}" / f"level_0{level}"
    network.load_state_dict(weights_of(run / "final.ckpt"))
    network.double()
    masks = masks_of(run)
    values = {name: p.detach() for name, p in network.named_parameters()}
    kept = torch.cat([masks.get(name, torch.ones_like(p, dtype=torch.bool)).flatten() for name, p in values.items()])
    flat = torch.cat([p.flatten() for p in values.values()])

    def loss(flat):
        parts = flat.split([p.numel() for p in values.values()])
        weights = {name: part.view(p.shape) for (name, p), part in zip(values.items(), parts, strict=True)}
        return F.cross_entropy(functional_call(network, weights, images_labels[0].double()), images_labels[1])

    return hessian(loss)(flat)[kept][:, kept], float(loss(flat))


@pytest.mark.parametrize(("trial", "level", "name"), [(0, 0, "dense"), (1, 2, "ticket")])
def test_curvature_is_that_of_the_dense_hessian_on_kept_weights(lottery, measured, trial, level, name):
    truth, loss = dense_truth(lottery, trial, level)
    found = json.loads((measured[0] / f"trial_{trial}" / f"curvature_{name}" / "result.json").read_text())
    assert found["coordinates"] == len(truth)
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert found["trace"] == pytest.approx(float(truth.trace()), rel=1e-4)
    values = torch.linalg.eigvalsh(truth)
    assert found["largest"] == pytest.approx(float(values[-1]), rel=1e-3)
    assert found["smallest"] == pytest.approx(float(values[0]), abs=1e-3 * float(values[-1]))
    sizes = truth.diagonal().abs()
    assert found["diagonal_95"] == pytest.approx(float(torch.quantile(sizes, 0.95)), rel=1e-3)
    histogram = found["histogram"]
    within = (truth.diagonal() >= 1e-2) & (truth.diagonal() < 10**-0.8)
    bins = [i for i, edge in enumerate(histogram["edges"][:-1]) if -2.01 < edge < -0.81]
    assert sum(histogram["positive"][i] for i in bins) == pytest.approx(float(within.double().mean()), abs=2e-3)
    assert found["density"] == pytest.approx(1.0 if name == "dense" else 0.36, abs=0.01)


def test_a_row_is_a_network_of_a_trial(measured):
    rows = rows_of(measured[0] / "results.csv")
    assert [(row["name"], row["trial"]) for row in rows] == [
        ("dense", "0"), ("dense", "1"), ("ticket", "0"), ("ticket", "1")
    ]  # fmt: skip
    summary = json.loads(measured[1].splitlines()[-1])
    (dense, ticket, plane) = summary["networks"]
    traces = [float(row["trace"]) for row in rows]
    assert dense["trace"] == pytest.approx(sum(traces[:2]) / 2, rel=1e-4)
    assert ticket["trace"] == pytest.approx(sum(traces[2:]) / 2, rel=1e-4)
    assert plane.keys() == {"name", "plane_loss", "plane_mean_rise", "plane_highest_rise"}
    for name in ("curvature", "around_map", "around_relief", "plane_map", "plane_relief"):
        assert (measured[0] / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_surfaces_hold_the_runs_own_losses(lottery, measured):
    _, loss = dense_truth(lottery, 0, 2)
    around = json.loads((measured[0] / "trial_0" / "around_ticket" / "result.json").read_text())["surface"]
    assert around["points"][0][:2] == [0.0, 0.0]
    assert around["losses"][1][1] == around["points"][0][2] == pytest.approx(loss, rel=1e-5)
    assert around["xs"] == [-1.0, 0.0, 1.0]
    through = json.loads((measured[0] / "trial_0" / "plane_levels" / "result.json").read_text())
    own = [point[2] for point in through["surface"]["points"]]
    assert own == pytest.approx([dense_truth(lottery, 0, level)[1] for level in range(3)], rel=1e-5)
    losses = [loss for row in through["surface"]["losses"] for loss in row]
    assert through["mean_rise"] == pytest.approx(sum(losses) / 9 - sum(own) / 3)
    assert through["highest_rise"] == pytest.approx(max(losses) - sum(own) / 3)


def test_a_rerun_shows_the_same_and_a_torn_surface_goes_on(lottery, measured, tmp_path, monkeypatch, capsys):
    def geometry():
        return Geometry(task(), Digits(), tmp_path / "run", networks(lottery), None, 1, 3, None, COARSE, training=SHORT)

    calls = []

    def torn(self, network):
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("torn")
        return own(self, network)

    from lottery_lightning.experiments.setting import Setting

    own = Setting.on_training
    monkeypatch.setattr(Setting, "on_training", torn)
    with pytest.raises(RuntimeError, match="torn"):
        geometry().run()
    points = tmp_path / "run" / "trial_0" / "around_dense" / "points.jsonl"
    assert len(points.read_text().splitlines()) == 4
    with points.open("a") as file:
        file.write("[1.0, ")  # as a killed process leaves it
    geometry().run()
    assert len(calls) == 5 + 6 + 10  # the other points of ten, and the second network
    for name in ("around_dense", "around_ticket"):
        kept, whole = (folder / "trial_0" / name / "result.json" for folder in (tmp_path / "run", measured[0]))
        assert json.loads(kept.read_text()) == json.loads(whole.read_text())
    capsys.readouterr()
    geometry().run()
    assert len(calls) == 21
    assert "geometry on training batches, means over trials: 1" in capsys.readouterr().out


def test_the_command_refuses_in_one_line(lottery, tmp_path, capsys):
    (tmp_path / "options.yaml").write_text(
        f"""
run_dir: {tmp_path}/run
networks: {{dense: "{lottery}/trial_{{trial}}/level_00"}}
model:
  class_path: ImageClassifier
  init_args: {{network: {{class_path: Dense, init_args: {{widths: [64, 4, 10]}}}}}}
data: {{class_path: Digits}}
"""
    )
    for words, message in (
        (["--networks", "{a: absent}"], "absent holds no finished run (final.ckpt, result.json): finish it, or name"),
        (["--networks", "{a: 'x_{level}'}"], "x_{level} names 'level', and only {trial} is known"),
        (["--networks", "{}"], "give one of each at least, and a network"),
        (["--planes", "{two: [a, b]}"], "planes.two names 2 runs: a plane goes through three or four"),
        (["--trials", "0"], "trials=0, batches=10"),
        (["--spectra.draws", "0"], "draws=0"),
        (["--views.points", "1"], "1 points make no line"),
        (["--spectra", "null", "--views.around", "false"], "nothing is to be measured"),
    ):
        assert main(["geometry", "--config", str(tmp_path / "options.yaml"), *words]) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_a_mask_is_seen_only_where_no_kept_weight_is_0(lottery, tmp_path):
    run = lottery / "trial_0" / "level_02"
    ticket = Ticket.load(lottery / "trial_0" / "tickets" / "level_02.safetensors")
    assert all(torch.equal(mask, ticket.masks[name]) for name, mask in masks_of(run).items())
    state = torch.load(run / "final.ckpt", weights_only=True)
    name = "network.hidden.0.weight"
    state["state_dict"][name].view(-1)[ticket.masks[name].flatten().nonzero()[0]] = 0
    torch.save(state, tmp_path / "final.ckpt")
    (tmp_path / "result.json").write_text((run / "result.json").read_text())
    with pytest.raises(ValueError, match=r"91 weights of network.hidden.0.weight are not 0, and the run keeps 92"):
        masks_of(tmp_path)


def test_the_sentence_names_the_flattest():
    found = [{"name": "a", "trace": 3.0, "around_mean_rise": 1.0}, {"name": "b", "trace": 5.0, "around_mean_rise": 0.5}]
    told = sentence(found)
    assert "a has the least trace, 3 (b 5)" in told
    assert "b has the least mean rise of the loss around it, 0.5 (a 1)" in told
    assert sentence(found[:1]) == "There is one network, and nothing to compare it with."


def test_the_figure_shows_each_network(measured, monkeypatch):
    kept = []
    monkeypatch.setattr("lottery_lightning.figures.curvature.png", lambda figure: kept.append(figure) or b"")
    rows = [json.loads(path.read_text()) for path in sorted(measured[0].glob("trial_*/curvature_*/result.json"))]
    curvature_figure([row | {"name": f"n{i % 2}", "trial": i // 2} for i, row in enumerate(rows)])
    entries, density, ends = kept[0].axes
    assert [text.get_text() for text in entries.get_legend().get_texts()] == ["n0, 100 %", "n1, 35.8 %"]
    assert density.get_xlabel() == "eigenvalue of the Hessian"
    assert [label.get_text() for label in ends.get_xticklabels()] == ["n0", "n1"]
    total = sum(sum(line.get_ydata()) for line in entries.get_lines() if len(line.get_xdata()) > 2)
    assert total == pytest.approx(200, abs=1e-6)  # % of the entries of both networks, none of them 0
    assert math.isclose(max(density.get_lines()[0].get_ydata()), max(rows[0]["spectrum"]["values"]))


def test_cells_are_means_over_trials():
    records = [
        {"what": "plane", "name": "p", "trial": trial, "loss": 1.0, "mean_rise": rise, "highest_rise": 3.0}
        for trial, rise in enumerate((1.0, 2.0))
    ]
    assert cells(records) == [{"name": "p", "plane_loss": 1.0, "plane_mean_rise": 1.5, "plane_highest_rise": 3.0}]
