"""What methods that match synthetic to real images have in common."""

from collections.abc import Sequence

from torch import Tensor, nn

from lottery_callbacks.functional.running_statistics import batch_norms
from lottery_lightning.data.augment import SiameseAugmentation


class Matching:
    """A method of making a distilled set: what is matched, at which networks, and how fast images move.

    A method has hyperparameters and no state: what lasts from step to step is in the network and the memory that the
    `Distiller` gives it.

    Args:
        lr: learning rate of the images.
        momentum: of the images.
        real_batch: real images of each class a step.
    """

    name = ""  # what a distilled set's `method` says
    needs_features = False  # whether the network must have some, see `features`

    def __init__(self, lr: float, momentum: float, real_batch: int) -> None:
        if lr <= 0 or not 0 <= momentum < 1 or real_batch < 1:
            raise ValueError(
                f"lr={lr}, momentum={momentum}, real_batch={real_batch}: give lr above 0, momentum in [0, 1), an image"
            )
        self.lr, self.momentum, self.real_batch = lr, momentum, real_batch

    def points_per_step(self, classes: int) -> int:
        """Real images that a step reads."""
        return classes * self.real_batch

    def passes(self, classes: int, decoded: int) -> float:
        """About how many images a step, with its `prepare`, takes through the network, a backward pass counted as two.

        Progress bars go by it.

        Args:
            classes: their number.
            decoded: synthetic images that matching sees, of all classes.
        """
        raise NotImplementedError(f"{type(self).__name__} must define passes()")

    def memory(self, network: nn.Module) -> nn.Module:
        """What the method keeps from step to step beside the network, as parameters or buffers; nothing."""
        return nn.Module()

    def prepare(
        self,
        network: nn.Module,
        memory: nn.Module,
        images: Tensor,
        labels: Tensor,
        augment: SiameseAugmentation,
        seed: int,
        step: int,
    ) -> None:
        """Make `network` the one that `step` matches at, in place; draws come from (seed, step).

        Args:
            network: frozen; what the step before has left.
            memory: see `memory`.
            images: the present synthetic images, decoded, without gradient.
            labels: their classes.
            augment: for training the network on them.
            seed: of all draws.
            step: optimizer steps on the images so far.
        """
        raise NotImplementedError(f"{type(self).__name__} must define prepare()")

    def loss(self, network: nn.Module, real: Sequence[Tensor], synthetic: Sequence[Tensor]) -> Tensor:
        """The distance between real and synthetic images at `network`, differentiable in the synthetic ones.

        Args:
            network: frozen.
            real: images of each class, augmented.
            synthetic: images of each class, augmented in the same way.
        """
        raise NotImplementedError(f"{type(self).__name__} must define loss()")


def set_modes(network: nn.Module, batch_statistics: bool) -> None:
    """Batch norm computes with the statistics of its batch or with its running ones; dropout and the like are off."""
    network.eval()
    for norm in batch_norms(network):
        norm.train(batch_statistics)
