"""Distillation by matching the means of features at random networks."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lottery_lightning.data.augment import SiameseAugmentation
from lottery_lightning.distillation.draws import draw_network
from lottery_lightning.distillation.features import features
from lottery_lightning.distillation.matching import Matching, set_modes

CHUNK = 32  # images at a time on CPUs: 640 of them pass a ConvNet of width 32 in 0.13 s so, in 0.33 s at once


class DistributionMatching(Matching):
    """Distribution matching (Zhao & Bilen, arXiv 2110.04181), by default as published; there it makes 20,000 steps.

    Each step draws a network and minimises, over classes c, sum_c ||mean f(A_c(real_c)) - mean f(A_c(synthetic_c))||^2,
    where f is the input of the network's last linear layer and A_c the class's augmentation, which both share.
    The real images go through the network without gradients; all classes in one batch where the device is no CPU, and
    everywhere where there is batch norm, which takes the statistics of its batch, as in the published code. Deviation:
    dropout is off.

    Cost: a forward pass over the real images, a forward and a backward pass over the synthetic ones.

    Args:
        lr: learning rate of the images.
        momentum: of the images.
        real_batch: real images of each class a step.
    """

    name = "distribution matching"
    needs_features = True

    def __init__(self, lr: float = 1.0, momentum: float = 0.5, real_batch: int = 256) -> None:
        super().__init__(lr, momentum, real_batch)

    def passes(self, classes: int, decoded: int) -> float:
        return self.points_per_step(classes) + 3 * decoded

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
        draw_network(network, seed, "network", step)

    def loss(self, network: nn.Module, real: Sequence[Tensor], synthetic: Sequence[Tensor]) -> Tensor:
        set_modes(network, batch_statistics=True)
        with torch.no_grad():
            wanted = _means(network, real)
        return (_means(network, synthetic) - wanted).square().sum()


def _means(network: nn.Module, images: Sequence[Tensor]) -> Tensor:
    together = torch.cat(list(images))
    norms = any(isinstance(part, _BatchNorm) for part in network.modules())  # also those without running statistics
    apart = together.device.type == "cpu" and not norms
    found = torch.cat([features(network, chunk) for chunk in (together.split(CHUNK) if apart else [together])])
    return torch.stack([part.mean(0) for part in found.split([len(part) for part in images])])
