import contextlib
import csv
import io
import json
import math
import shutil

import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian
from torch.nn import functional as F

from lottery_callbacks import Ticket
from lottery_callbacks.functional.landscape import Point, Surface
from lottery_lightning.cli import main
from lottery_lightning.data import Digits
from lottery_lightning.experiments import Geometry, Lottery, Rule, Spectra, Training, Views
from lottery_lightning.experiments.finished import masks_of, weights_of
from lottery_lightning.experiments.geometry_measures import summary
from lottery_lightning.experiments.geometry_report import cells, sentence
from lottery_lightning.experiments.setting import Setting
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
            task(),
            Digits(),
            folder,
            levels=2,
            trials=2,
            controls={"layerwise_random": 1},
            rule=Rule(0.4),
            training=SHORT,
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


def test_the_gauss_newton_matrix_is_measured_where_it_is_asked_for(lottery, tmp_path):
    spectra = Spectra(kind="ggn", draws=400, spectrum_draws=1, steps=2)
    of = {"dense": networks(lottery)["dense"]}
    Geometry(task(), Digits(), tmp_path, of, None, 1, 3, spectra, Views(around=False), training=SHORT).run()
    (row,) = rows_of(tmp_path / "results.csv")
    network, (images, labels) = task(), batches(0)
    network.load_state_dict(weights_of(lottery / "trial_0" / "level_00" / "final.ckpt"))
    network.double()
    trace = 0.0
    for image in images.double():  # of the softmax p: sum over classes a, b of dz_a (p_a delta_ab - p_a p_b) dz_b
        logits = network(image.unsqueeze(0))[0]
        rows = [torch.autograd.grad(one, list(network.parameters()), retain_graph=True) for one in logits]
        jacobian = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
        p = logits.softmax(0)
        trace += float(((p.diag() - p.outer(p)) * (jacobian @ jacobian.T)).sum()) / len(labels)
    assert float(row["trace"]) == pytest.approx(trace, rel=1e-4)
    assert float(row["trace_error"]) == 0  # more draws than weights: exact
    assert float(row["smallest"]) > -1e-3 * float(row["largest"])


def test_a_run_that_has_diverged_is_shown_as_such_and_never_the_flattest(lottery, tmp_path, capsys):
    shutil.copytree(lottery / "trial_0" / "level_00", tmp_path / "diverged")
    state = torch.load(tmp_path / "diverged" / "final.ckpt", weights_only=True)
    state["state_dict"]["network.output.bias"][0] = torch.nan
    torch.save(state, tmp_path / "diverged" / "final.ckpt")
    of = {"diverged": str(tmp_path / "diverged"), **networks(lottery)}
    Geometry(task(), Digits(), tmp_path / "run", of, None, 1, 3, EXACT, COARSE, training=SHORT).run()
    rows = rows_of(tmp_path / "run" / "results.csv")
    assert [row["trace"] == "nan" for row in rows] == [True, False, False]
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert math.isnan(summary["networks"][0]["trace"])
    assert summary["networks"][0]["around_diverged"] == 1
    assert "diverged" not in sentence(summary["networks"])
    assert (tmp_path / "run" / "around_map.png").exists()


def test_a_surface_that_diverges_somewhere_has_no_finite_highest_loss():
    points = (Point(0.0, 0.0, 1.0, 0.1),)
    rows = ((1.0, math.inf), (math.nan, 3.0))
    found = summary(Surface((0.0, 1.0), (0.0, 1.0), rows, rows, "none", points, "filter norms"))
    assert found == {"loss": 1.0, "diverged": 0.5, "mean_rise": 1.0, "highest_rise": math.inf}


def test_statistics_of_batch_norm_are_made_anew_on_planes_of_every_trial(tmp_path):
    normed = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 10))
    with contextlib.redirect_stdout(io.StringIO()):
        lottery = Lottery(ImageClassifier(normed), Digits(), tmp_path / "lottery", 2, 2, {}, Rule(0.4), SHORT)
        lottery.run()
    found = {}
    for norms in ("average", "reestimate"):
        views, folder = Views(points=3, around=False, norms=norms), tmp_path / norms
        model, dense = ImageClassifier(normed), {"dense": networks(tmp_path / "lottery")["dense"]}
        Geometry(model, Digits(), folder, dense, levels(tmp_path / "lottery"), 2, 3, None, views, SHORT).run()
        kept = json.loads((folder / "trial_1" / "plane_levels" / "result.json").read_text())["surface"]
        assert kept["norms"] == norms
        found[norms] = kept
    assert found["average"]["points"] == found["reestimate"]["points"]
    assert found["average"]["losses"] != found["reestimate"]["losses"]


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
    figures = {"plane_loss", "plane_diverged", "plane_mean_rise", "plane_highest_rise", "plane_mean_rise_range"}
    assert plane.keys() == {"name", *figures}
    assert dense["trace_range"] == pytest.approx(sorted(traces[:2]), rel=1e-4)
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
        if len(calls) == 6:
            raise RuntimeError("torn")
        return own(self, network)

    own = Setting.on_training
    monkeypatch.setattr(Setting, "on_training", torn)
    with pytest.raises(RuntimeError, match="torn"):
        geometry().run()
    points = tmp_path / "run" / "trial_0" / "around_dense" / "points.jsonl"
    assert len(points.read_text().splitlines()) == 4
    with points.open("a") as file:
        file.write("[1.0, ")  # as a killed process leaves it
    geometry().run()
    assert len(calls) == 6 + 1 + 6 + 10  # one for the time, the other points of ten, and the second network
    for name in ("around_dense", "around_ticket"):
        kept, whole = (folder / "trial_0" / name / "result.json" for folder in (tmp_path / "run", measured[0]))
        assert json.loads(kept.read_text()) == json.loads(whole.read_text())
    capsys.readouterr()
    geometry().run()
    assert len(calls) == 23
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
        (["--training.trainer", "{precision: bf16-true}"], "training.trainer.precision is too coarse"),
        (
            ["--model.init_args.network.init_args.widths", "[64, 5, 10]"],
            "level_00 is of another architecture: network.",
        ),
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
    with pytest.raises(ValueError, match=r"91 weights of network.hidden.0.weight are not 0, and the run keeps 92, so"):
        masks_of(tmp_path)
    record = json.loads((tmp_path / "result.json").read_text())
    record["kept_per_layer"][name] = ticket.masks[name].numel()
    (tmp_path / "result.json").write_text(json.dumps(record))
    assert masks_of(tmp_path)[name].all()  # a layer that is kept whole needs no mask to be seen


def test_the_sentence_names_the_flattest_and_says_where_ranges_overlap():
    found = [
        {
            "name": "a",
            "trace": 3.0,
            "trace_range": [2.0, 4.0],
            "around_mean_rise": 1.0,
            "around_mean_rise_range": [1.0, 1.0],
        },
        {
            "name": "b",
            "trace": 5.0,
            "trace_range": [3.5, 6.5],
            "around_mean_rise": 0.5,
            "around_mean_rise_range": [0.5, 0.5],
        },
    ]
    told = sentence(found)
    assert "a has the least trace, 3 [2 to 4] (b 5 [3.5 to 6.5], by means alone: ranges over trials overlap)" in told
    assert "b has the least mean rise of the loss around it, 0.5 (a 1)" in told
    found[1]["around_diverged"] = 0.1
    assert "rise" not in sentence(found)
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
        {
            "what": "plane",
            "name": "p",
            "trial": trial,
            "loss": 1.0,
            "diverged": 0.0,
            "mean_rise": rise,
            "highest_rise": 3.0,
        }
        for trial, rise in enumerate((1.0, 2.0))
    ]
    (cell,) = cells(records)
    assert cell["plane_mean_rise"] == 1.5
    assert cell["plane_mean_rise_range"] == [1.0, 2.0]
    assert (cell["plane_loss"], cell["plane_highest_rise"]) == (1.0, 3.0)
