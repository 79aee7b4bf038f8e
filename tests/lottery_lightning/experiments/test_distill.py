import contextlib
import csv
import io
import json
import re

import pytest
import torch
import yaml
from torch import nn

from lottery_lightning.cli import main
from lottery_lightning.data import Digits, DistilledDataModule, DistilledSet, decode
from lottery_lightning.distillation import Distiller, DistributionMatching, GradientMatching
from lottery_lightning.distillation.selection import herding
from lottery_lightning.experiments import Distill, Images, Making, Training
from lottery_lightning.experiments.distill_making import Told
from lottery_lightning.experiments.distill_report import cells, sentence
from lottery_lightning.experiments.distill_sets import Sets, tiled
from lottery_lightning.experiments.finished import weights_of
from lottery_lightning.experiments.runs import Run, Runner, dense_fit, stable_seed
from lottery_lightning.experiments.store import working_on
from lottery_lightning.figures.distill import images_figure, tiles
from lottery_lightning.networks import ConvNet
from lottery_lightning.tasks import ImageClassifier

SHORT = Training(max_steps=20, val_every="10it", threads=1)
MAKING = Making(max_steps=12, picture_every=6, checkpoint_seconds=0)
IMAGES = Images(per_class=2, augmentation="crop_scale")
METHOD = DistributionMatching(real_batch=8)
NAMES = ("whole", "random", "herding", "k-means", "distribution matching")


def task(lr=0.05):
    sgd = lambda parameters: torch.optim.SGD(parameters, lr=lr, momentum=0.9)  # noqa: E731
    return ImageClassifier(ConvNet(depth=1, width=4, size=8, channels=1), optimizer=sgd)


def wider():
    return ImageClassifier(ConvNet(depth=1, width=5, size=8, channels=1))


def experiment(folder, **options):
    given = {"method": METHOD, "images": IMAGES, "making": MAKING, "training": SHORT, "batch_size": 16}
    return Distill(task(), Digits(), folder, **given | options)


def run(*arguments, **options):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        experiment(*arguments, **options).run()
    return printed.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished experiment, and what it printed."""
    folder = tmp_path_factory.mktemp("distill") / "run"
    return folder, run(folder, trials=2)


@pytest.fixture(scope="module")
def real():
    data = Digits()
    return data.load()


def set_of(folder, name, trial=0):
    return DistilledSet.load(folder / f"trial_{trial}" / "sets" / f"{name.replace(' ', '_')}.safetensors")


def rows_of(folder):
    with (folder / "results.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_row_is_a_set_of_a_trial_and_the_last_line_their_means(finished):
    rows = rows_of(finished[0])
    assert [(row["trial"], row["method"]) for row in rows] == [(trial, name) for trial in "01" for name in NAMES]
    assert [(row["stored"], row["decoded"]) for row in rows[:5]] == [("1197", "1197")] + 4 * [("20", "20")]
    embedding = 20 * 60 - 3 + 1197  # 20 batches of 60, the last of the epoch of 57
    assert [int(row["making_real_points"]) for row in rows[:5]] == [0, 0, embedding, embedding, 12 * 10 * 8]
    assert [int(row["training_points"]) for row in rows[:5]] == [20 * 60 - 3] + 4 * [10 * 20]  # 16 and 4, alternately
    for row in rows:
        record = json.loads((finished[0] / f"trial_{row['trial']}/{slug(row)}/result.json").read_text())
        assert float(row["test_acc"]) == record["test_acc_end"]
        random = next(one for one in rows if (one["trial"], one["method"]) == (row["trial"], "random"))
        assert float(row["acc_minus_random"]) == float(row["test_acc"]) - float(random["test_acc"])
    summary = json.loads(finished[1].splitlines()[-1])
    assert [one["method"] for one in summary["sets"]] == list(NAMES)
    assert summary["sets"][4]["test_acc"] == pytest.approx(
        (float(rows[4]["test_acc"]) + float(rows[9]["test_acc"])) / 2, abs=1e-5
    )
    assert "Trained on 20 images made by distribution matching" in finished[1]


def slug(row):
    return row["method"].replace(" ", "_")


@pytest.mark.parametrize("trial", [0, 1])
@pytest.mark.parametrize("name", NAMES[1:])
def test_a_set_says_what_it_is(finished, real, trial, name):
    made = set_of(finished[0], name, trial)
    assert made.labels.tolist() == sorted(2 * list(range(10)))
    assert (made.method, made.augmentation, made.factor) == (name, "crop_scale", 1)
    assert made.network == "ConvNet of 698 parameters"
    assert made.preprocessing.difference(Digits().preprocessing) is None
    assert made.provenance["data"] == "Digits"
    assert made.provenance["split_seed"] == 0
    assert made.provenance["seed"] == trial
    if name == "distribution matching":
        assert (made.provenance["steps"], made.provenance["real_points"]) == (12, 960)
        assert made.provenance["start"] == "random"
        assert made.provenance["making_seed"] == stable_seed(trial, "making")
        assert made.provenance["hyperparameters"] == {"lr": 1.0, "momentum": 0.5, "real_batch": 8}
    else:
        chosen = made.provenance["indices"]
        assert torch.equal(made.images, real["train"][0][chosen])
        assert torch.equal(made.labels, real["train"][1][chosen])
        assert len(set(chosen)) == 20


def test_trials_differ(finished):
    for name in NAMES[1:]:
        one, other = (set_of(finished[0], name, trial) for trial in (0, 1))
        assert not torch.equal(one.images, other.images)


def test_herding_is_of_the_features_of_the_last_weights_that_saw_all_images(finished, real):
    model = task()
    model.load_state_dict(weights_of(finished[0] / "trial_0" / "whole" / "final.ckpt"))
    images, labels = real["train"]
    with torch.no_grad():
        embedded = model.network.features(images)
    classes = [torch.where(labels == label)[0] for label in range(10)]
    chosen = torch.cat([own[herding(embedded[own], 2)] for own in classes])
    assert set_of(finished[0], "herding").provenance["indices"] == chosen.tolist()


def test_making_begins_with_the_images_of_the_random_set_and_moves_them(finished, tmp_path):
    begun = experiment(tmp_path)
    begun.data.setup("fit")
    images, labels = begun.sets.begin(1)
    chosen, made = set_of(finished[0], "random", 1), set_of(finished[0], "distribution matching", 1)
    assert torch.equal(images, chosen.images)
    assert torch.equal(labels, chosen.labels)
    assert float((made.images - images).abs().max()) > 0.01


def test_each_set_is_trained_on_as_a_run_of_its_own_would(finished, tmp_path):
    path = finished[0] / "trial_1" / "sets" / "distribution_matching.safetensors"
    runner = Runner(task(), DistilledDataModule(path, Digits(), batch_size=16), SHORT, "alone")
    runner.do(Run(tmp_path, 1, 0, "distribution matching"), 1, dense_fit(task(), 1))
    alone, own = weights_of(tmp_path / "final.ckpt"), finished[0] / "trial_1" / "distribution_matching" / "final.ckpt"
    assert all(torch.equal(value, alone[name]) for name, value in weights_of(own).items())


def test_pictures_show_the_images_as_they_form(finished):
    folder = finished[0] / "trial_0" / "pictures"
    names = ["start_and_end.png", "step_00000.png", "step_00006.png", "step_00012.png"]
    assert sorted(path.name for path in folder.iterdir()) == names
    made = set_of(finished[0], "distribution matching")
    pixels = Digits().preprocessing.pixels(made.images)
    expected = images_figure({"step 12": pixels}, 10, "trial 0 distribution matching")
    assert (folder / "step_00012.png").read_bytes() == expected
    losses = json.loads((finished[0] / "trial_0" / "making" / "losses.json").read_text())
    assert [step for step, _ in losses] == list(range(1, 13))
    assert losses[-1][1] < losses[0][1]


def test_tiles_are_a_row_a_class_with_white_seams():
    pixels = torch.arange(6).view(6, 1, 1, 1) / 10 * torch.ones(1, 1, 2, 3)
    grid = tiles(pixels, classes=2)
    assert grid.shape == (2 * 4, 3 * 5)
    assert grid[1:3, 1:4].unique().tolist() == [0]
    assert grid[1:3, 6:9].unique().tolist() == pytest.approx([0.1])
    assert grid[5:7, 11:14].unique().tolist() == pytest.approx([0.5])
    assert grid[0].unique().tolist() == grid[:, 4].unique().tolist() == [1]
    assert tiles(pixels.repeat(1, 3, 1, 1), classes=3).shape == (3 * 4, 2 * 5, 3)
    several = torch.stack([pixels, 3 * pixels], 1).squeeze(2)  # no picture's channels: their mean
    assert tiles(several / 4, classes=2)[5:7, 11:14].unique().tolist() == pytest.approx([0.25])


def test_a_rerun_does_nothing_again(finished, monkeypatch):
    def content():
        return {path: path.read_bytes() for path in finished[0].rglob("*") if path.is_file()}

    before = content()
    monkeypatch.setattr("lightning.pytorch.Trainer.fit", None)
    printed = run(finished[0], trials=2)
    assert printed.splitlines()[-1] == finished[1].splitlines()[-1]
    assert content() == before


def test_a_torn_making_goes_on_to_the_same_bytes(finished, tmp_path, monkeypatch):
    tell = Told.on_train_batch_end

    def torn(self, trainer, pl_module, *others):
        tell(self, trainer, pl_module, *others)
        if isinstance(pl_module, Distiller) and trainer.global_step == 9:
            raise RuntimeError("torn")

    monkeypatch.setattr(Told, "on_train_batch_end", torn)
    with pytest.raises(RuntimeError, match="torn"):
        run(tmp_path, baselines=["random"])
    monkeypatch.undo()
    assert list((tmp_path / "trial_0" / "making" / "resume").iterdir())
    assert not (tmp_path / "trial_0" / "sets" / "distribution_matching.safetensors").exists()
    steps, threads = [], set()
    step = Distiller.training_step

    def counted(self, *batch):
        steps.append(self.global_step)
        threads.add(torch.get_num_threads())
        return step(self, *batch)

    torch.set_num_threads(2)  # what a rerun finds, where no run comes before the making
    monkeypatch.setattr(Distiller, "training_step", counted)
    monkeypatch.setattr(Distiller, "distilled_set", None)  # and once more, between the fit and the file
    with pytest.raises(TypeError, match="not callable"):
        run(tmp_path, baselines=["random"])
    assert threads == {1}
    assert steps == list(range(8, 12))  # checkpoints are at every second step, which divides 6 and 100
    monkeypatch.undo()
    run(tmp_path, baselines=["random"])
    for name in ("sets/distribution_matching.safetensors", "making/losses.json", "pictures/start_and_end.png"):
        assert (tmp_path / "trial_0" / name).read_bytes() == (finished[0] / "trial_0" / name).read_bytes()
    resume = tmp_path / "trial_0" / "making" / "resume"
    assert not resume.exists()
    resume.mkdir()  # as a kill leaves it between the set's file and the removal
    run(tmp_path, baselines=["random"])
    assert not resume.exists()


def test_images_that_are_not_finite_end_the_making_before_they_are_kept(tmp_path):
    method = DistributionMatching(1e38, real_batch=2)
    making = Making(max_steps=6, picture_every=4, checkpoint_seconds=0)
    with pytest.raises(ValueError, match=r"^an image is not finite at step 4: the making diverged, lower .*lr=1e\+38$"):
        run(tmp_path, method=method, making=making, baselines=[])
    assert [path.name for path in (tmp_path / "trial_0" / "pictures").iterdir()] == ["step_00000.png"]
    assert not list(tmp_path.rglob("resume-*.ckpt"))


def test_features_are_embedded_once_in_the_precision_of_the_run(tmp_path, real, monkeypatch):
    embed, found = Sets.embed, []
    monkeypatch.setattr(Sets, "embed", lambda *given: found.append(embed(*given)) or found[-1])
    whole = Training(max_steps=3, val_every="3it", threads=1, trainer={"precision": "64-true"})
    run(tmp_path, baselines=["herding", "k-means"], whole=whole, making=Making(max_steps=1))
    model = task().double()
    model.load_state_dict(weights_of(tmp_path / "trial_0" / "whole" / "final.ckpt"))
    with torch.no_grad():
        expected = model.network.features(real["train"][0].double())
    assert len(found) == 1
    torch.testing.assert_close(found[0], expected)
    assert rows_of(tmp_path)[1]["making_real_points"] == rows_of(tmp_path)[2]["making_real_points"]


def test_several_processes_are_refused_in_making_too(tmp_path):
    making = Making(max_steps=1, trainer={"accelerator": "cpu", "devices": 2, "strategy": "ddp_spawn"})
    with pytest.raises(ValueError, match="start the command once per device"):
        run(tmp_path, making=making, baselines=[])


def test_a_trial_that_another_process_works_on_is_left_to_it(tmp_path):
    with working_on(tmp_path / "trial_0"):
        printed = run(tmp_path, trials=2, baselines=[])
    assert "trial 0 is left to the process that works on it" in printed
    assert "2 runs are left to another process; the last to finish reports" in printed
    assert not (tmp_path / "results.csv").exists()
    run(tmp_path, trials=2, baselines=[])
    assert [row["method"] for row in rows_of(tmp_path)] == 2 * ["whole", "distribution matching"]


@pytest.mark.parametrize("start", ["random", "noise"])
def test_a_factor_decodes_more_images_than_are_stored(tmp_path, start):
    images = Images(per_class=1, factor=2, start=start, augmentation="crop")
    method, making = GradientMatching(real_batch=4, steps_per_network=2, training_epochs=1), Making(max_steps=3)
    whole = Training(max_steps=3, val_every="3it", threads=1)
    more = {"whole": whole, "whole_model": task(lr=0.01), "making": making}
    run(tmp_path, images=images, method=method, baselines=["random"], **more)
    assert [(row["stored"], row["decoded"], row["training_points"]) for row in rows_of(tmp_path)] == [
        ("1197", "1197", "180"),
        ("10", "10", "200"),
        ("10", "40", str(6 * 40 + 2 * 16)),
    ]
    made = set_of(tmp_path, "gradient matching")
    assert (made.factor, made.provenance["start"]) == (2, start)
    first = json.loads((tmp_path / "trial_0" / "making" / "losses.json").read_text())
    assert [step for step, _ in first] == [1, 2, 3]


def test_tiled_images_are_taken_apart_again():
    images = torch.rand(8, 2, 6, 4)
    stored = tiled(images, 2)
    small = nn.functional.avg_pool2d(images, 2)
    assert stored.shape == (2, 2, 6, 4)
    assert torch.allclose(stored[1, :, 3:, :2], small[6])
    expected = nn.functional.interpolate(small, (6, 4), mode="bilinear", align_corners=False)
    assert torch.allclose(decode(stored, 2), expected)
    assert tiled(images, 1) is images


def test_noise_is_standard_normal_and_of_the_trial(tmp_path):
    begun = experiment(tmp_path, images=Images(per_class=30, start="noise"))
    begun.data.setup("fit")
    images, labels = begun.sets.begin(0)
    assert labels.bincount().tolist() == 10 * [30]
    assert abs(float(images.mean())) < 0.05
    assert abs(float(images.std()) - 1) < 0.05
    assert torch.equal(images, begun.sets.begin(0)[0])
    assert not torch.equal(images, begun.sets.begin(1)[0])


def test_the_making_is_logged_as_runs_are_and_says_how_it_goes(tmp_path, monkeypatch):
    monkeypatch.setattr("lottery_lightning.experiments.distill_making.LOSSES", 1)
    making, training = Making(max_steps=50, picture_every=25), Training(2, "2it", 1, logger="csv")
    printed = run(tmp_path, making=making, training=training, baselines=[])
    (line,) = (line for line in printed.splitlines() if "step 25 of 50" in line)
    assert re.fullmatch(r"  trial 0 distribution matching, step 25 of 50: loss [\d.]+, under 1 min left", line)
    assert [step for step, _ in json.loads((tmp_path / "trial_0/making/losses.json").read_text())] == [50]
    (logged,) = (tmp_path / "trial_0" / "making").rglob("metrics.csv")
    assert "train/matching_loss" in logged.read_text().splitlines()[0]
    assert len(list(tmp_path.rglob("metrics.csv"))) == 3


def test_the_command_line_refuses_a_folder_of_another_experiment(tmp_path, capsys):
    network = {"class_path": "ConvNet", "init_args": {"depth": 1, "width": 2, "size": 8, "channels": 1}}
    content = {
        "run_dir": str(tmp_path / "run"),
        "method": {"class_path": "DistributionMatching", "init_args": {"real_batch": 2}},
        "images": {"per_class": 1, "augmentation": ""},
        "baselines": [],
        "making": {"max_steps": 1},
        "model": {"class_path": "ImageClassifier", "init_args": {"network": network}},
        "data": {"class_path": "Digits"},
        "training": {"max_steps": 1, "val_every": "1it", "threads": 1},
    }
    config = tmp_path / "distill.yaml"
    config.write_text(yaml.safe_dump({"distill": content}))
    assert main(["--config", str(config)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["experiment"] == "distill"
    assert main(["--config", str(config), "--method.init_args.lr", "2.0"]) == 1
    assert "holds another experiment: distill.method.init_args.lr is 1.0 there and 2.0 now" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trials": 0}, "trials=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"baselines": ["best"]}, "baselines names 'best': choose of random, herding, k-means"),
        ({"baselines": ["random", "random"]}, "baselines: give each of them once"),
        (
            {"whole_model": wider()},
            "^whole_model has another network than model: change its optimizer and schedule alone",
        ),
        ({"network": "body"}, "network='body' is no submodule of ImageClassifier"),
        ({"images": Images(per_class=500)}, "images, and per_class=500 are asked for"),
        ({"images": Images(per_class=60, factor=2)}, "images, and per_class=240 are asked for"),
        ({"images": Images(factor=3)}, "factor=3 does not cut images of 1 x 8 x 8"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_trained(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **options)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_data_and_networks_that_cannot_be_distilled_are_refused(tmp_path):
    silent = type("Silent", (Digits,), {"preprocessing": None})()
    with pytest.raises(ValueError, match="Silent states no `preprocessing`"):
        Distill(task(), silent, tmp_path, METHOD)
    model = task()
    model.network = nn.Sequential(nn.Conv2d(1, 10, 8), nn.Flatten())
    with pytest.raises(ValueError, match="Sequential has no Linear layer"):
        Distill(model, Digits(), tmp_path, METHOD, IMAGES, baselines=[]).run()
    with pytest.raises(ValueError, match="Sequential has no Linear layer"):
        Distill(model, Digits(), tmp_path, GradientMatching(), IMAGES, baselines=["random", "k-means"]).run()


def test_where_nothing_needs_features_the_network_may_have_none(tmp_path):
    method, making = GradientMatching(real_batch=2, training_epochs=0), Making(max_steps=1)
    sgd = lambda parameters: torch.optim.SGD(parameters, lr=0.1)  # noqa: E731
    model = ImageClassifier(nn.Sequential(nn.Conv2d(1, 10, 8), nn.Flatten()), optimizer=sgd)
    with contextlib.redirect_stdout(io.StringIO()):
        Distill(model, Digits(), tmp_path, method, IMAGES, ["random"], making=making, training=SHORT).run()
    assert [row["method"] for row in rows_of(tmp_path)] == ["whole", "random", "gradient matching"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Images(per_class=0), "per_class=0, factor=1"),
        (lambda: Images(factor=0), "per_class=10, factor=0"),
        (lambda: Images(start="zero"), "start='zero' is not known: choose random or noise"),
        (lambda: Images(augmentation="crop_blur"), "names 'blur'"),
        (lambda: Making(max_steps=0), "max_steps=0, picture_every=1000: give 1 at least"),
        (lambda: Making(picture_every=0), "picture_every=0: give 1 at least"),
        (
            lambda: Making(trainer={"max_epochs": 3}),
            "^making.trainer names max_epochs: the experiment sets that itself",
        ),
    ],
)
def test_what_no_set_can_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_means_deviations_and_margins_are_over_trials():
    def row(trial, method, accuracy, over):
        numbers = ("stored", "decoded", "making_real_points", "training_points", "making_seconds", "training_seconds")
        return {
            **dict.fromkeys(numbers, 10),
            "trial": trial,
            "method": method,
            "test_acc": accuracy,
            "test_acc_early_stop": accuracy,
            "acc_minus_random": over,
        }

    rows = [row(0, "whole", 0.9, 0.4), row(0, "random", 0.5, 0.0), row(0, "matching", 0.6, 0.1)]
    rows += [row(1, "whole", 0.9, 0.5), row(1, "random", 0.4, 0.0), row(1, "matching", 0.8, 0.4)]
    found = list(cells(rows))
    assert [one["acc_minus_random"] for one in found] == [0.45, 0.0, 0.25]
    assert (found[2]["test_acc"], found[2]["test_acc_min"], found[2]["test_acc_max"]) == (0.7, 0.6, 0.8)
    assert found[2]["test_acc_sd"] == pytest.approx(0.02**0.5, abs=1e-5)
    assert "70.00% test accuracy (mean of 2 trials), +25.00 points beside the best of as" in sentence(found, 2)
    assert "many real images (random: 45.00%)" in sentence(found, 2)
    assert sentence(found, 2).endswith("trained on all 10 real images it reaches 90.00%.")
    alone = list(cells([{**one, "acc_minus_random": None} for one in rows[::2][:2]]))
    assert (alone[0]["test_acc_sd"], alone[0]["acc_minus_random"]) == (None, None)
    assert "beside" not in sentence(alone, 1)
    assert "made by matching, the network reaches 60.00% test accuracy (one trial); trained" in sentence(alone, 1)
    decoded = sentence([found[0], {**found[2], "decoded": 40}], 2)
    assert decoded.startswith("Trained on 10 images (40 decoded) made by matching")
