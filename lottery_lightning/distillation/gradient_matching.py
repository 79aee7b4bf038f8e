"""Distillation by matching the gradients of a network that trains on the images."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from lottery_callbacks.functional.running_statistics import batch_norms, estimate_anew
from lottery_lightning.data.augment import SiameseAugmentation
from lottery_lightning.data.draws import generator
from lottery_lightning.distillation.draws import draw_network
from lottery_lightning.distillation.matching import Matching, set_modes

# Images a class -> (steps at one network, epochs of its training between two), as the published code has them.
SCHEDULES = {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}
STATISTICS_BATCH = 16  # real images of a class that batch norm's statistics are taken of, as published


class GradientMatching(Matching):
    """Gradient matching (DC, Zhao et al., arXiv 2006.05929; with augmentation DSA, arXiv 2102.08259).

    Every `steps_per_network` steps a network is drawn; between two steps it trains on the synthetic images,
    `training_epochs` times over, by SGD on batches of 256, each augmented image by image. A step minimises, over the
    classes, the distance between the gradients of the cross entropy on real and on synthetic images of that class, at
    the same augmentation: the sum over the weights' output units of 1 - cos(real, synthetic). As in the published code
    tensors with one dimension (biases, norms) do not count, and 10^-6 is added to the product of the norms. Published
    are 1,000 networks, that is 1,000 `steps_per_network` steps. Units that no forward pass uses count as 1 each.

    Batch norm: before each step its running statistics become those of 16 of the step's augmented real images a class,
    and both gradients are taken with these, fixed; the network's training takes the statistics of its batches. (The
    published code draws other images for them, does not augment these, and moves its statistics a tenth of the way to
    theirs; real points count what matching reads, and the 16 are of it.) Batch norm without running statistics takes
    those of each class's own images. Deviation: dropout is off.

    Cost: a step takes one backward pass on the real images and two on the synthetic ones, and keeps the graphs of all
    classes; the training before it takes `training_epochs` epochs, which is most of the time where they are 50.

    Args:
        lr: learning rate of the images.
        momentum: of the images.
        real_batch: real images of each class a step.
        steps_per_network: matching steps at one network. None: 1, 10 or 50 for 1, 10 or 50 images a class (decoded)
            as published; for other numbers those of the nearest in the code's table, which has 20, 30 and 40 too.
        training_epochs: epochs of the network's training between two steps. None: likewise, 1, 50 or 10.
        network_lr: learning rate of that training.
        network_momentum: its momentum; 0.5 is that of the first code, of arXiv 2006.05929. That of DSA has none: give 0
            for it.
    """

    name = "gradient matching"

    def __init__(
        self,
        lr: float = 0.1,
        momentum: float = 0.5,
        real_batch: int = 256,
        steps_per_network: int | None = None,
        training_epochs: int | None = None,
        network_lr: float = 0.01,
        network_momentum: float = 0.5,
    ) -> None:
        super().__init__(lr, momentum, real_batch)
        if steps_per_network is not None and steps_per_network < 1:
            raise ValueError(f"steps_per_network={steps_per_network}: a network serves one step at least")
        if training_epochs is not None and training_epochs < 0:
            raise ValueError(f"training_epochs={training_epochs}: give 0 or more, or null for the published number")
        if network_lr <= 0 or not 0 <= network_momentum < 1:
            raise ValueError(
                f"network_lr={network_lr}, network_momentum={network_momentum}: give a rate above 0, momentum in [0, 1)"
            )
        self.steps_per_network, self.training_epochs = steps_per_network, training_epochs
        self.network_lr, self.network_momentum = network_lr, network_momentum

    def schedule(self, images_per_class: int) -> tuple[int, int]:
        """(steps at one network, epochs of training between two) for so many decoded images a class."""
        steps, epochs = SCHEDULES[min(SCHEDULES, key=lambda known: abs(known - images_per_class))]
        return self.steps_per_network or steps, epochs if self.training_epochs is None else self.training_epochs

    def passes(self, classes: int, decoded: int) -> float:
        lasts, epochs = self.schedule(decoded // classes)
        return 3 * self.points_per_step(classes) + (5 + 3 * epochs * (1 - 1 / lasts)) * decoded

    def memory(self, network: nn.Module) -> nn.Module:
        """The momentum of the network's training: a network whose parameters are the velocities."""
        return copy.deepcopy(network).requires_grad_(False)

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
        """Draw a network, or train the present one on the images."""
        lasts, epochs = self.schedule(len(labels) // (int(labels.max()) + 1))
        if step % lasts == 0:
            draw_network(network, seed, "network", step // lasts)
            for velocity in memory.parameters():
                velocity.zero_()
            return
        set_modes(network, batch_statistics=True)
        source = generator(seed, "training", step)
        for _ in range(epochs):
            for batch in torch.randperm(len(labels), generator=source).to(labels.device).split(256):
                self._train(network, memory, augment(images[batch], source), labels[batch])

    def _train(self, network: nn.Module, memory: nn.Module, images: Tensor, labels: Tensor) -> None:
        weights = _leaves(network)
        loss = cross_entropy(functional_call(network, weights, images), labels)
        gradients = torch.autograd.grad(loss, list(weights.values()), materialize_grads=True)  # zeros of unused ones
        for weight, velocity, gradient in zip(network.parameters(), memory.parameters(), gradients, strict=True):
            velocity.mul_(self.network_momentum).add_(gradient)
            weight.sub_(velocity, alpha=self.network_lr)

    def loss(self, network: nn.Module, real: Sequence[Tensor], synthetic: Sequence[Tensor]) -> Tensor:
        if batch_norms(network):
            some = torch.cat([images[:STATISTICS_BATCH] for images in real])
            estimate_anew(network, lambda still: still(some))
        set_modes(network, batch_statistics=False)
        weights = {name: weight for name, weight in _leaves(network).items() if weight.dim() > 1}
        matched = list(weights.values())

        def gradients(images: Tensor, label: int, differentiable: bool = False) -> Sequence[Tensor]:
            labels = torch.full((len(images),), label, device=images.device)
            entropy = cross_entropy(functional_call(network, weights, images), labels)
            return torch.autograd.grad(entropy, matched, create_graph=differentiable, materialize_grads=True)

        pairs = enumerate(zip(real, synthetic, strict=True))
        return torch.stack(
            [distance(gradients(s, c, differentiable=True), gradients(r, c)) for c, (r, s) in pairs]
        ).sum()


def distance(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """The sum over layers and output units, the rows of each tensor, of 1 - cos(found, wanted)."""
    layers = []
    for one, other in zip(found, wanted, strict=True):
        one, other = one.flatten(1), other.flatten(1)
        norms = one.norm(dim=1) * other.norm(dim=1)
        layers.append((1 - (one * other).sum(1) / (norms + 1e-6)).sum())
    return torch.stack(layers).sum()


def _leaves(network: nn.Module) -> dict[str, Tensor]:
    """The frozen parameters as leaves to differentiate by, on the same memory."""
    return {name: weight.detach().requires_grad_() for name, weight in network.named_parameters()}
