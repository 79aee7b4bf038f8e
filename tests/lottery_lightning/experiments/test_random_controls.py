"""The controls of random masks: their names, what they keep, and the seeds that published results were drawn from."""

from pathlib import Path

import pytest
import torch

from lottery_callbacks import Ticket
from lottery_callbacks.functional import masks as M
from lottery_lightning.cli import main
from lottery_lightning.data import Digits
from lottery_lightning.experiments import DistilledPruning, Lottery, Training
from lottery_lightning.experiments.routes import Route
from lottery_lightning.experiments.runs import Run, Runner, dense_fit, stable_seed
from lottery_lightning.networks import Dense
from lottery_lightning.tasks import ImageClassifier

QUICK = ["lottery", "--config", str(Path(__file__).parents[3] / "configs" / "quickstart.yaml")]
SHORT = Training(max_steps=4, val_every="2it", threads=1)


def dense():
    return ImageClassifier(Dense([64, 20, 10]))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The trial's folder of a lottery of one level with both random controls."""
    folder = tmp_path_factory.mktemp("random")
    controls = {"layerwise_random": 2, "global_random": 1}
    Lottery(dense(), Digits(), folder, levels=1, controls=controls, training=SHORT, seed=3).run()
    return folder / "trial_0"


def masks_at_the_end(run):
    state = torch.load(run / "final.ckpt", weights_only=True)["state_dict"]
    return {name: state[name] != 0 for name in ("network.hidden.0.weight", "network.output.weight")}


def test_layerwise_masks_are_those_of_the_seed_of_the_former_name(finished):
    ticket = Ticket.load(finished / "tickets" / "level_01.safetensors")
    for draw in (0, 1):
        generator = torch.Generator().manual_seed(stable_seed(3, 1, "random", draw, "control"))
        own = masks_at_the_end(finished / f"level_01_layerwise_random_{draw}")
        assert M.kept(own) == M.kept(ticket.masks)
        assert M.digest(own) == M.digest(M.shuffled(ticket.masks, generator))


def test_global_masks_keep_the_total_anywhere(finished):
    ticket = Ticket.load(finished / "tickets" / "level_01.safetensors")
    generator = torch.Generator().manual_seed(stable_seed(3, 1, "global_random", 0, "control"))
    own = masks_at_the_end(finished / "level_01_global_random_0")
    assert sum(M.kept(own).values()) == sum(M.kept(ticket.masks).values())
    assert M.digest(own) == M.digest(M.random_like(ticket.masks, generator))
    table = (finished.parent / "results.csv").read_text()
    assert [table.count(f",{arm},") for arm in ("layerwise_random", "global_random", "random")] == [2, 1, 0]


class Drawing(ImageClassifier):
    """Writes down a draw from the global random state at the start of its fit."""

    drawn: list[float] = []

    def on_train_start(self):
        super().on_train_start()
        self.drawn.append(torch.rand(()).item())


@pytest.mark.parametrize(
    ("arm", "former"),
    [
        ("layerwise_random", "random"),
        ("layerwise_random level 4 at 0it", "random level 4 at 0it"),
        ("global_random", "global_random"),
        ("layerwise_randomly", "layerwise_randomly"),
    ],
)
def test_dropout_of_a_run_has_the_seed_of_its_former_name(tmp_path, arm, former):
    model = Drawing(Dense([64, 20, 10]))
    Drawing.drawn.clear()
    Runner(model, Digits(), SHORT, "test").do(Run(tmp_path, 0, 1, arm, 2), 5, dense_fit(model, 5))
    (drawn,) = Drawing.drawn
    torch.manual_seed(stable_seed(5, 1, former, 2))
    assert drawn == torch.rand(()).item()


def test_random_alone_is_refused_by_the_command_in_one_line(tmp_path, capsys):
    assert main([*QUICK, "--run_dir", str(tmp_path / "run"), "--controls", "{random: 1}"]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "controls names random, which is ambiguous: choose layerwise_random" in line
    assert "what random meant here) or global_random (as many weights anywhere in the network)" in line
    assert not (tmp_path / "run").exists()


def test_a_folder_with_runs_of_the_former_name_is_refused_and_not_trained_again(tmp_path, finished):
    old = tmp_path / "trial_0" / "level_01_random_0"
    old.mkdir(parents=True)
    (tmp_path / "trial_0" / "level_01_layerwise_random_0").mkdir()
    with pytest.raises(ValueError, match="is a run of the control that is called layerwise_random now") as refusal:
        Lottery(dense(), Digits(), tmp_path, training=SHORT)
    assert str(old) in str(refusal.value)
    old.rename(tmp_path / "trial_0" / "level_01_global_random_0")
    Lottery(dense(), Digits(), tmp_path, training=SHORT)


def test_a_folder_with_copies_of_the_former_route_is_refused(tmp_path):
    (tmp_path / "random").mkdir()
    with pytest.raises(ValueError, match="random holds tickets of the route that is called layerwise_random now"):
        DistilledPruning(dense(), Digits(), tmp_path, {"real": Route()}, training=SHORT)
