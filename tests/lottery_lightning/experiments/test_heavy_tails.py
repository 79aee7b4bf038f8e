import contextlib
import csv
import io
import json
import math

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from torch import nn

from lottery_callbacks.functional.tail_index import centred, hill, log_moment
from lottery_lightning.cli import main
from lottery_lightning.data import Digits
from lottery_lightning.experiments import Compression, HeavyTails, Noise, Training
from lottery_lightning.experiments.compression import compressible
from lottery_lightning.experiments.finished import weights_of
from lottery_lightning.experiments.heavy_tails_report import cells, heavy_tails_table, sentence, theorem_rate
from lottery_lightning.figures import heavy_tails_figure
from lottery_lightning.networks import Dense, MeanField
from lottery_lightning.tasks import ImageClassifier

SHORT = Training(max_steps=40, val_every="20it", threads=1, checkpoint_seconds=0)
NOISE = Noise(scale=0.02)
RATIOS = Compression(budget=0.2, ratios=(0.0, 0.5, 1.0))


def task(network=None):
    sgd = lambda parameters: torch.optim.SGD(parameters, lr=0.3)  # noqa: E731
    return ImageClassifier(network or Dense([64, 16, 10]), optimizer=sgd, steps_per_visit=5)


def experiment(folder, **options):
    networks = {"wide": Dense([64, 32, 10]), "narrow": Dense([64, 16, 10])}
    given = {"alphas": [1.5, None], "noise": NOISE, "compression": RATIOS, "networks": networks, "training": SHORT}
    return HeavyTails(task(), Digits(), folder, **given | options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished experiment, and what it printed."""
    folder = tmp_path_factory.mktemp("heavy_tails") / "run"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        experiment(folder, trials=2).run()
    return folder, printed.getvalue()


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_a_row_is_a_run_the_narrowest_first_and_without_noise(finished):
    rows = rows_of(finished[0] / "results.csv")
    assert [(row["network"], row["alpha"], row["trial"]) for row in rows] == [
        (network, alpha, trial) for network in ("narrow", "wide") for alpha in ("", "1.5") for trial in "01"
    ]
    assert {row["width"] for row in rows[:4]} == {"16"}
    assert {row["lr"] for row in rows} == {"0.3"}
    assert {row["steps"] for row in rows} == {"40"}
    summary = json.loads(finished[1].splitlines()[-1])
    assert [arm["column_ratio"] for arm in summary["arms"]] == pytest.approx(
        [
            (float(one["column_ratio"]) + float(two["column_ratio"])) / 2
            for one, two in zip(rows[::2], rows[1::2], strict=True)
        ],
        abs=1e-5,
    )


@pytest.mark.parametrize("arm", ["narrow_no_noise", "narrow_alpha_1.5"])
def test_columns_are_pruned_to_the_budget_and_the_rest_is_tested(finished, arm):
    run = finished[0] / "trial_0" / arm
    state, found = weights_of(run / "final.ckpt"), json.loads((run / "compression.json").read_text())
    weight = state["network.hidden.0.weight"].double()
    energy = weight.square().sum(1)
    order = energy.argsort()
    lost = energy[order].cumsum(0) / energy.sum()
    removed = int((lost <= 0.2).sum())
    assert 0 < removed < 16
    assert found["column_ratio"] == pytest.approx(removed / 16)
    assert found["column_error"] == pytest.approx(float(lost[removed - 1]))
    assert found["test_acc"] == pytest.approx(json.loads((run / "result.json").read_text())["test_acc_end"])
    assert found["column_acc"] == pytest.approx(accuracy(state, order[:removed]))
    half = next(point for point in found["curves"] if point["by"] == "column" and point["ratio"] == 0.5)
    assert half["test_acc"] == pytest.approx(accuracy(state, order[:8]))
    assert half["error"] == pytest.approx(float(lost[7]))
    assert found["parameters"] == 64 * 16 + 16 + 16 * 10 + 10
    assert found["narrowed"] <= found["parameters"] - removed * (64 + 10)  # and constant units, biases, if any


def accuracy(state, gone):
    data = Digits()
    data.setup("test")
    images, labels = data.splits["test"]
    network = task()
    network.load_state_dict(state)
    with torch.no_grad():
        network.network.hidden[0].weight[gone] = 0
        return float((network(images).argmax(1) == labels).double().mean())


def test_without_noise_it_is_a_plain_fit_and_with_noise_it_is_not(finished, tmp_path):
    alone = experiment(tmp_path / "alone", alphas=[None, 2.0], networks=None)
    alone.run()
    plain, noisy = (
        weights_of(finished[0] / "trial_0" / f"narrow_{arm}" / "final.ckpt") for arm in ("no_noise", "alpha_1.5")
    )
    same = weights_of(tmp_path / "alone" / "trial_0" / "Dense_no_noise" / "final.ckpt")
    assert all(torch.equal(plain[name], same[name]) for name in plain)
    gaussian = weights_of(tmp_path / "alone" / "trial_0" / "Dense_alpha_2" / "final.ckpt")
    name = "network.hidden.0.weight"
    assert not torch.equal(noisy[name], plain[name])
    assert not torch.equal(noisy[name], gaussian[name])


def test_a_run_ends_at_the_accuracy_asked_for(tmp_path):
    training = Training(max_steps=400, val_every="20it", threads=1)
    experiment(tmp_path, alphas=[None], networks=None, until=0.8, training=training).run()
    record = json.loads((tmp_path / "trial_0" / "Dense_no_noise" / "result.json").read_text())
    accuracies = [row["val/acc"] for row in record["curve"]]
    assert accuracies[-1] >= 0.8
    assert max(accuracies[:-1]) < 0.8
    (row,) = rows_of(tmp_path / "results.csv")
    assert int(row["steps"]) == record["curve"][-1]["iteration"] < 400


def test_a_run_that_was_torn_after_its_last_validation_ends_where_an_unbroken_one_does(tmp_path, monkeypatch):
    def early(folder):
        training = Training(max_steps=400, val_every="20it", threads=1, checkpoint_seconds=0)
        return experiment(folder, alphas=[None], networks=None, until=0.8, training=training)

    early(tmp_path / "whole").run()
    monkeypatch.setattr("lottery_lightning.experiments.runs.Runner._test", None)
    with pytest.raises(TypeError, match="not callable"):
        early(tmp_path / "torn").run()
    monkeypatch.undo()
    early(tmp_path / "torn").run()
    torn, whole = (tmp_path / name / "trial_0" / "Dense_no_noise" for name in ("torn", "whole"))
    assert json.loads((torn / "result.json").read_text()) == json.loads((whole / "result.json").read_text())


def test_an_arm_that_diverges_is_shown_as_such(tmp_path, capsys):
    noise, networks = Noise(scale=3e38), {"one": Dense([64, 16, 10]), "unit": Dense([64, 1, 10])}
    experiment(tmp_path, alphas=[None, 1.2], noise=noise, networks=networks).run()
    rows = rows_of(tmp_path / "results.csv")
    assert [row["column_ratio"] == "nan" for row in rows] == [False, True, False, True]
    assert rows[0]["hill_of_norms"] == "nan"  # of one unit, the narrowest
    arms = json.loads(capsys.readouterr().out.splitlines()[-1])["arms"]
    assert [math.isnan(arm["column_ratio"]) for arm in arms] == [False, True, False, True]
    assert (tmp_path / "heavy_tails.png").exists()


def test_the_layers_that_are_compressed_are_those_that_noise_is_added_to():
    module = nn.Module()
    module.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(24, 10))
    module.table = nn.Embedding(5, 3)
    assert list(compressible(module, output=False, first_convolution=True)) == ["body.0.weight", "body.1.weight"]
    assert list(compressible(module, output=True, first_convolution=False)) == ["body.1.weight", "body.3.weight"]
    with pytest.raises(ValueError, match="no layer is left to compress"):
        compressible(nn.Linear(3, 2), output=False, first_convolution=True)


def test_the_tail_index_is_that_of_the_first_layer_s_weights(finished):
    run = finished[0] / "trial_0" / "wide_alpha_1.5"
    weight = weights_of(run / "final.ckpt")["network.hidden.0.weight"]
    found = json.loads((run / "compression.json").read_text())
    assert found["tail_index"] == pytest.approx(log_moment(centred(weight)).alpha)
    assert found["hill_of_norms"] == pytest.approx(hill(weight.norm(dim=1)).alpha)


def test_a_torn_experiment_goes_on_to_the_same_bits(finished, tmp_path, monkeypatch):
    class Torn(Callback):
        def visit_ends(self, per_epoch, last):
            return ()

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 30:
                raise RuntimeError("torn")

    begun = experiment(tmp_path / "run", alphas=[1.5, None])
    monkeypatch.setattr("lottery_lightning.experiments.heavy_tails.StopAt", lambda accuracy: Torn())
    begun.until = 1.0
    with pytest.raises(RuntimeError, match="torn"):
        begun.run()
    assert not (tmp_path / "run" / "results.csv").exists()
    again = experiment(tmp_path / "run", alphas=[1.5, None])
    again.run()
    for arm in ("wide_alpha_1.5", "narrow_no_noise"):
        torn, whole = (folder / "trial_0" / arm / "final.ckpt" for folder in (tmp_path / "run", finished[0]))
        assert all(torch.equal(value, weights_of(whole)[name]) for name, value in weights_of(torn).items())
    assert rows_of(tmp_path / "run" / "results.csv") == [
        row for row in rows_of(finished[0] / "results.csv") if row["trial"] == "0"
    ]


def test_the_mean_field_layer_is_compressed_where_it_is_asked_for(tmp_path):
    noise, compression = Noise(scale=0.01, kind="rotation", include=["*hidden.weight"]), Compression(output=True)
    experiment(tmp_path, alphas=[1.5], networks={"n": MeanField(64, 30)}, noise=noise, compression=compression).run()
    (row,) = rows_of(tmp_path / "results.csv")
    assert row["width"] == "30"
    assert float(row["column_ratio"]) > 0
    assert row["narrowed"] == ""  # its forward names the width


def test_what_cannot_be_run_is_refused_in_one_line(tmp_path, capsys):
    (tmp_path / "options.yaml").write_text(
        f"""
run_dir: {tmp_path}/run
model:
  class_path: ImageClassifier
  init_args: {{network: {{class_path: Dense, init_args: {{widths: [64, 16, 10]}}}}}}
data: {{class_path: Digits}}
"""
    )
    for words, message in (
        (["--alphas", "[2.5]"], "alpha=2.5 is outside (0, 2]"),
        (["--alphas", "[]"], "alphas, networks: give one of each at least"),
        (["--alphas", "[1.5, 1.5]"], "each of them once"),
        (["--alphas", "[1.5, 1.50000001]"], "each of them once, and names that differ"),
        (["--until", "95"], "until=95.0 is outside (0, 1]"),
        (["--compression.ratios", "[]"], "compression.ratios is empty"),
        (["--noise.scale", "-1"], "scale=-1.0 is no scale of noise"),
        (["--noise.exclude", "['*']"], "no weight is left for noise"),
        (["--compression.budget", "1"], "compression.budget=1.0 is outside [0, 1)"),
        (["--compression.ratios", "[0.5, 2]"], "compression.ratios names 2"),
        (["--network", "body"], "network='body' is no submodule of ImageClassifier"),
        (["--trials", "0"], "trials=0"),
    ):
        assert main(["heavy-tails", "--config", str(tmp_path / "options.yaml"), *words]) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not list((tmp_path / "run").rglob("*.ckpt"))


def row(width, alpha, ratio, trial=0):
    found = {
        key: 0.5
        for key in ("test_acc", "column_acc", "magnitude_ratio", "magnitude_acc", "singular_ratio", "singular_acc")
    }
    curves = [
        {"by": by, "ratio": at, "pruning_ratio": at, "error": at**2, "test_acc": 1 - at}
        for by in ("column", "magnitude")
        for at in (0.0, 0.5)
    ]
    of = {"network": f"n{width}", "width": width, "alpha": alpha, "trial": trial, "steps": 10, "lr": 0.1}
    return of | found | {"column_ratio": ratio, "tail_index": 1.9, "parameters": 10, "narrowed": 8, "curves": curves}


def test_table_and_sentence_have_means_over_trials():
    rows = [row(100, None, 0.1), row(100, 1.5, 0.3), row(100, 1.5, 0.5, trial=1)]
    found = list(cells(rows))
    assert [cell["column_ratio"] for cell in found] == [0.1, 0.4]
    assert sentence(found) == (
        "Of the columns of n100 (width 100) can go, at the budget: 10.0 % (no noise: test accuracy 50.00%, then "
        "50.00%), 40.0 % (alpha 1.5: test accuracy 50.00%, then 50.00%)."
    )
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(heavy_tails_table(found, rows, 2))
    text = console.export_text()
    assert "30.0 to 50.0" in text
    assert f"{theorem_rate(100, 1.5):.1e}" in text
    assert theorem_rate(100, 2.0) == pytest.approx(1e-4)


def test_the_figure_shows_ratio_error_accuracy_and_width(monkeypatch):
    kept = []
    monkeypatch.setattr("lottery_lightning.figures.heavy_tails.png", lambda figure: kept.append(figure) or b"")
    heavy_tails_figure([row(100, None, 0.1), row(100, 1.5, 0.4), row(400, None, 0.2), row(400, 1.5, 0.6)])
    against, errors, accuracies, wide = kept[0].axes
    lines = {line.get_label(): list(line.get_ydata()) for line in against.get_lines()}
    assert lines["n100"] == pytest.approx([10, 40])
    assert lines["n400"] == pytest.approx([20, 60])
    assert [label.get_text() for label in against.get_xticklabels()] == ["none", "1.5"]
    assert list(errors.get_lines()[0].get_ydata()) == pytest.approx([0, 25])
    assert list(accuracies.get_lines()[0].get_ydata()) == pytest.approx([100, 50])
    half = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in wide.get_lines()}
    assert half["1.5"] == ([100, 400], pytest.approx([50, 50]))
