"""The strong ticket of a trained network: a random network of twice the depth, pruned, without a weight changed."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lottery_callbacks.chain_of import TREATED, chain_of
from lottery_callbacks.functional import strong_certificate
from lottery_callbacks.functional.strong_certificate import Approximated, Error
from lottery_callbacks.functional.strong_edges import Counts, Inputs, Split
from lottery_callbacks.functional.strong_layer import StrongLayer, strong_layer
from lottery_callbacks.functional.subset_sum import Progress
from lottery_callbacks.strong_modules import StrongLinear, StrongModule, form_of, matrix_of

REACH = 0.5  # products u v are dense on [-1/2, 1/2]


class StrongNetwork(nn.Module):
    """What `strong_network` builds: computes what the target does, up to an error that is bounded.

    Attributes:
        layers: a `StrongModule` for each layer of the target that has weights, and what was between them.
        tickets: as built, for each of those: errors, infeasible blocks, targets out of reach.
        scales: what each layer's weight was divided by; the output is multiplied by their product.
    """

    def __init__(self, layers: nn.Sequential, tickets: list[StrongLayer], targets: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.layers, self.tickets, self._targets = layers, tickets, targets

    def forward(self, values: Tensor) -> Tensor:
        """The target's outputs, nearly; computed in float32, the weights' type, and given in the type of `values`.

        Raises:
            ValueError: the ticket relies on inputs >= 0, and some are below.
        """
        first = next(layer for layer in self.layers if isinstance(layer, StrongModule | nn.ReLU))
        if isinstance(first, StrongModule) and first.random.inputs == "nonnegative" and (values < 0).any():
            raise ValueError("the ticket relies on inputs >= 0 and some are below: build it with inputs='any'")
        outputs = self.layers(values.to(self.strong[0].first.dtype)) * prod(self.scales)
        return outputs.to(values.dtype) if values.is_floating_point() else outputs

    @property
    def strong(self) -> list[StrongModule]:
        """The layers that are tickets."""
        return [layer for layer in self.layers if isinstance(layer, StrongModule)]

    @property
    def scales(self) -> list[float]:
        return [layer.scale for layer in self.strong]

    @property
    def counts(self) -> Counts:
        """Kept weights of all layers."""
        return Counts(*(sum(counts) for counts in zip(*(layer.counts for layer in self.strong), strict=True)))

    @property
    def errors(self) -> Tensor:
        """|target - sum| of all weights, for each sign, and of all biases, of the rescaled network."""
        return torch.cat([part.flatten() for one in self.tickets for part in (one.errors, one.bias_errors)])

    @property
    def weights(self) -> int:
        """Weights and biases of the target that sums stand for, m_t; a batch norm is a bias."""
        return sum(prod(layer.random.shape) + layer.random.biases for layer in self.strong)

    @property
    def random_parameters(self) -> int:
        """Weights of the random network, which is never materialised; of convolutions see `StrongConv2d`."""
        return sum(layer.random.parameters for layer in self.strong)

    @property
    def density(self) -> float:
        """Fraction of the random network's weights that is kept."""
        return sum(self.counts) / self.random_parameters

    def verify(self) -> None:
        """Regenerate each kept weight bit for bit from its address, and check the counts of the construction.

        Raises:
            RuntimeError: names the layer, and what is wrong.
        """
        for layer in self.strong:
            layer.verify()

    def certificate(self, shape: Sequence[int] | None = None, behind_relu: bool = False, radius: float = 1.0) -> Error:
        """An upper bound of |ticket - target| on inputs of norm `radius` or less, of the rescaled network in float64.

        See `functional.strong_certificate`. The normalised value, divided by the radius and the layers' norms, is that
        of the target itself: scales cancel. Float32 adds its rounding to a forward pass.

        Args:
            shape: of one input, without the batch; may be left out where the first layer is a Linear.
            behind_relu: the sharper bound that uses that values are >= 0 there.
            radius: of the ball of inputs. Where there are biases the error does not scale with it.
        """
        return strong_certificate.certificate(self._steps(), self._shape(shape), behind_relu, radius)

    def searched_error(
        self,
        steps: int = 200,
        restarts: int = 8,
        shape: Sequence[int] | None = None,
        seed: int = 0,
        radius: float = 1.0,
    ) -> Error:
        """The largest |ticket - target| found there by gradient ascent: a lower bound of the largest that there is."""
        return strong_certificate.searched_error(self._steps(), self._shape(shape), steps, restarts, seed, radius)

    def _steps(self) -> list[Approximated | nn.Module]:
        targets, steps = iter(self._targets), []
        for layer in self.layers:
            if isinstance(layer, StrongModule):
                layer = layer.approximates(*(tensor.to(layer.first.device) for tensor in next(targets)))
            steps.append(layer)
        return steps

    def _shape(self, shape: Sequence[int] | None) -> Sequence[int]:
        first = self.strong[0]
        if shape is None and not isinstance(first, StrongLinear):
            raise ValueError(f"{first.name} is a convolution, on images of any size: give the `shape` of one input")
        return (first.random.shape[1],) if shape is None else shape


def strong_network(
    network: nn.Module,
    *,
    seed: int,
    n: int,
    size: int | None = None,
    tolerance: float | None = None,
    min_size: int = 0,
    split: Split = "sign",
    inputs: Inputs = "any",
    progress: Progress | None = None,
) -> StrongNetwork:
    """The strong ticket of `network`, on the device of its weights and in evaluation.

    Pensia et al. (arXiv 2006.07990, theorem 1); with `size`, Natale et al. (arXiv 2410.14754, theorems 3 and 4). Each
    Linear and Conv2d becomes a `StrongLinear` or `StrongConv2d` of 2n hidden units (channels) for each input (channel);
    what is between them stays, and a batch norm is folded before. Of a layer that is equivariant under a group the
    coefficients are approximated, never the expanded weights: masks keep it equivariant. By positive homogeneity,
    f(s x) = s f(x) for s > 0, layers are rescaled: weights are divided by s_i, biases by s_1 .. s_i, such that none is
    above 1/2, and the output is multiplied by all s_i. Where a bias is the largest, weights are below 1/2, and errors,
    which are absolute, weigh more.

    Args:
        network: a chain of Linear, Conv2d, batch norm, ReLU, pooling, Flatten and Dropout, also where these are called
            as functions; it is traced by `torch.fx` and not changed. See `chain_of`.
        seed: of the random network, 0 <= seed < 2^64.
        n: half the hidden units of an input.
        size: exactly that many products for each weight and sign.
        tolerance: of the smallest sums, in units of the rescaled weights; with `size` it only says what is a miss.
        min_size: without `size`, at least that many.
        split: "sign" or the papers' "assigned": see `RandomLayer`.
        inputs: "nonnegative" says that the network's own inputs are >= 0, and uses that, and that values after a ReLU
            are; the ticket is then half as large. Each layer's `random.inputs` records what it relies on.
        progress: called as progress(done, total) with subset sums.

    Raises:
        ValueError: names a layer or call that cannot be treated, or a layer whose weights are not finite.
    """
    chain = chain_of(network)
    known = known_inputs(chain, inputs)
    if not known:
        raise ValueError(f"{type(network).__name__} has no layer to approximate: give {TREATED}")
    layers = [layer for _, layer in chain if form_of(layer)]
    ends = [0, *accumulate(_sums(layer, of) for layer, of in zip(layers, known, strict=True))]

    def solved(place: int, name: str, layer: Any, before: float) -> Part:
        weight, bias, scale = _rescaled(name, layer, before)
        ticket = strong_layer(
            matrix_of(weight),
            None if layer.bias is None else bias,
            seed=seed,
            layer=place,
            n=n,
            size=size,
            tolerance=tolerance,
            min_size=min_size,
            split=split,
            inputs=known[place],
            progress=_after(ends[place], ends[-1], progress),
        )
        return Part(ticket, size, scale, weight, bias)

    return assembled(chain, solved)


class Part(NamedTuple):
    """The ticket of one layer, products of each of its sums, its scale, and its target so scaled, in float64."""

    ticket: StrongLayer
    size: int | None
    scale: float
    weight: Tensor
    bias: Tensor


def assembled(chain: list[tuple[str, nn.Module]], part: Callable[[int, str, Any, float], Part]) -> StrongNetwork:
    """The chain with a ticket in the place of each layer that has weights.

    Args:
        chain: names and modules, of `chain_of`.
        part: (place, name, layer, product of the scales before) -> its ticket.
    """
    before, modules, parts = 1.0, [], []
    for name, layer in chain:
        if form := form_of(layer):
            one = part(len(parts), name, layer, before)
            before *= one.scale
            layer = form(name, one.ticket, one.size, one.scale, layer)
            parts.append(one)
        modules.append(layer)
    targets = [(one.weight.cpu(), one.bias.cpu()) for one in parts]
    return StrongNetwork(nn.Sequential(*modules), [one.ticket for one in parts], targets).eval()


def _after(start: int, total: int, progress: Progress | None) -> Progress | None:
    """Progress of a layer as that of the network, of whose sums `start` are done before."""
    return progress and (lambda done, _: progress(start + done, total))


def known_inputs(chain: list[tuple[str, nn.Module]], inputs: Inputs) -> list[Inputs]:
    """What each layer may rely on: values after a ReLU are >= 0, and pooling and flattening leave them so."""
    known: list[Inputs] = []
    now = inputs
    for _, layer in chain:
        if form_of(layer):
            known.append(now)
            now = "any"
        elif isinstance(layer, nn.ReLU):
            now = inputs
    return known


def _sums(layer: Any, inputs: Inputs) -> int:
    """Number of subset sums of a layer's ticket."""
    bias = 0 if layer.bias is None else len(layer.bias)
    return layer.weight.numel() * (2 if inputs == "any" else 1) + bias


def _rescaled(name: str, layer: Any, before: float) -> tuple[Tensor, Tensor, float]:
    """Weight and bias in float64, none above 1/2, and what the weight was divided by."""
    weight = layer.weight.detach().double()
    bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach().double() / before
    largest = float(torch.maximum(weight.abs().max(), bias.abs().max()))
    if not largest < float("inf"):
        raise ValueError(f"{name} has weights that are not finite: did the training diverge?")
    own = largest / REACH or 1.0
    return weight / own, bias / own, own
