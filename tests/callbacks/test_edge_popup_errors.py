"""Edge-popup: what cannot be searched is refused in one line."""

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    LearningRateFinder,
    StochasticWeightAveraging,
    WeightAveraging,
)
from popup_fits import Searched, fit, sgd
from stranger import Net, seeded, ticket_of
from torch import nn

from lottery_callbacks import ApplyTicket, EdgePopup
from lottery_callbacks.functional import masks as M


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.0}, r"^sparsity=1\.0 is outside \[0, 1\): it is the fraction of weights removed$"),
        ({"sparsity": -0.1}, r"^sparsity=-0\.1 is outside"),
        (
            {"scope": "erk"},
            "^scope='erk' is not known: choose one of layerwise, layerwise_truncated, global, threshold$",
        ),
        ({"weights": "ones"}, "^weights='ones' is not known: choose one of kaiming_normal, signed_constant, sc"),
        ({"scores": "random"}, "^scores='random' is not known: choose one of kaiming_uniform, magnitude$"),
        ({"norms": "none"}, "^norms='none' is not known: choose one of frozen, trained$"),
        ({"end": "soon"}, "^'soon' is no step string"),
        ({"end": "3it", "scope": "threshold"}, "^end='3it' has no meaning where scope='threshold' learns"),
        ({"scores": "magnitude"}, "^weights='signed_constant' have one magnitude: take scores='kaiming_uniform'$"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(arguments, message):
    with pytest.raises(ValueError, match=message):
        EdgePopup(**arguments)


class Elsewhere(Net):
    def configure_optimizers(self):
        return sgd(self.net[5].parameters())


class Parametrized(Net):
    def __init__(self):
        super().__init__()
        nn.utils.parametrizations.weight_norm(self.net[1])


class Lazy(Net):
    def __init__(self):
        super().__init__()
        self.lazy = nn.LazyLinear(3)


class Shared(Net):
    def configure_optimizers(self):
        return [sgd(self.parameters()), sgd(self.net[1].parameters())]


class WithoutNorms(Net):
    def configure_optimizers(self):
        return sgd([self.net[1].weight, self.net[5].weight])


AVERAGES = "^an average over changing masks is no strong ticket: leave averaging of weights out$"
REFUSED = {
    "nothing": (Net, EdgePopup(exclude=["*"]), [], "^nothing to score: no trainable weight matrix is left; exclude fe"),
    "no parameter": (Net, EdgePopup(exclude=["*head*"]), [], r"^exclude names '\*head\*', which is no parameter"),
    "no optimizer": (Elsewhere, EdgePopup(), [], r"^no optimizer has net\.1\.weight, whose scores would never change"),
    "late": (Net, EdgePopup(end="21it"), [], "^end=21it is step 21, and the run's last step is 20: end earlier or"),
    "masks": (
        Net,
        EdgePopup(),
        [ApplyTicket(ticket_of(Net()))],
        "^EdgePopup and ApplyTicket both set masks: give a Trainer one of them$",
    ),
    "average": (Net, EdgePopup(), [WeightAveraging()], AVERAGES),
    "swa": (Net, EdgePopup(), [StochasticWeightAveraging(0.1)], AVERAGES),
    "rate": (Net, EdgePopup(), [LearningRateFinder()], "^LearningRateFinder trains within the fit of EdgePopup"),
    "batch size": (Net, EdgePopup(), [BatchSizeFinder()], "^BatchSizeFinder trains within the fit of EdgePopup"),
    "parametrized": (Parametrized, EdgePopup(), [], r"^net\.1 has parametrizations: make them permanent"),
    "norms": (WithoutNorms, EdgePopup(norms="trained"), [], "^no optimizer has some of the norms"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_searched_is_refused_in_one_line(tmp_path, name):
    make, popup, others, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, popup, *others, module=make())


def test_weights_without_a_shape_are_refused(tmp_path):
    module = Lazy()
    with pytest.raises(ValueError, match=r"^lazy\.weight, lazy\.bias have no shape yet: run the module on one batch"):
        fit(tmp_path, EdgePopup(), module=module)
    module.lazy(torch.rand(1, 2))  # what has no shape cannot be counted by tests of memory


def test_a_weight_in_two_optimizers_is_refused(tmp_path):
    class Manual(Shared):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(ValueError, match=r"^several optimizers have net\.1\.weight: give each weight to one$"):
        fit(tmp_path, EdgePopup(), module=Manual())


def test_a_checkpoint_of_other_weights_is_refused(tmp_path):
    module = fit(tmp_path, EdgePopup())
    module.trainer.save_checkpoint(tmp_path / "last.ckpt")
    other = seeded(1, Searched)
    other.net[5].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"scored net\.1\.weight, net\.5\.weight, not net\.1\.weight: resume it with"):
        fit(tmp_path, EdgePopup(), module=other, ckpt_path=tmp_path / "last.ckpt")


def test_a_layer_that_keeps_nothing_is_named(tmp_path):
    popup = EdgePopup(0.97, "global")
    with pytest.warns(UserWarning, match=r"keeps no weight: search with scope='layerwise', or at a lower sparsity$"):
        fit(tmp_path, popup, max_steps=40)
    assert 0 in M.kept(popup.masks).values()


def test_a_run_that_ends_before_the_schedule_says_so(tmp_path):
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = trainer.global_step == 5

    with pytest.warns(UserWarning, match=r"the run ended after 5 steps, before end=20it: density is 0\.7\d+$"):
        fit(tmp_path, EdgePopup(0.5, end="20it"), Stop())
