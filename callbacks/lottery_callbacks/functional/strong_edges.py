"""The two random layers that a strong ticket prunes, of which nothing is stored, and the edges that it keeps."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lottery_callbacks.functional.bounds import parameters, survivors_bound
from lottery_callbacks.functional.counter_random import uniform

Split = Literal["sign", "assigned"]
Inputs = Literal["any", "nonnegative"]
FIRST, SECOND, BIAS = range(3)  # the random matrices of a layer


class Counts(NamedTuple):
    """Kept weights: from an input to a hidden unit, from a hidden unit to an output, and hidden biases."""

    first: int
    second: int
    constant: int


@dataclass(frozen=True)
class RandomLayer:
    """The random layers that stand for one target layer W (out, in): hidden units, ReLU, outputs.

    The hidden unit r = 2n j + s belongs to input j: of its first-layer weights only u_r, from that input, may be kept.
    Where the target has biases, 2n more units r = 2n in + s keep no input edge but their bias, and are constant. All
    weights are uniform on (-1, 1), and known by (seed, layer, row, column) alone.

    Attributes:
        seed: of the network.
        layer: number of the target layer.
        n: half the hidden units of an input.
        shape: (out, in).
        biases: number of outputs that have one, 0 or a divisor of out: the first of each out / biases outputs.
        split: "sign": a unit of input j answers to its positive or negative part by the sign of u_r. "assigned": the
            first n units to the positive (and to a constant) and the others to the negative, as in the proofs; units of
            the wrong sign are unusable.
        inputs: "nonnegative" where inputs are known to be: then the units with u_r < 0 are unusable.
    """

    seed: int
    layer: int
    n: int
    shape: tuple[int, int]
    biases: int = 0
    split: Split = "sign"
    inputs: Inputs = "any"

    @property
    def parameters(self) -> int:
        """Weights of both random layers, and hidden biases: those of `bounds.parameters`, a bias as one more input."""
        return parameters(self._widths, [self.n])

    def survivors_bound(self, size: int) -> float:
        """The most that a ticket of `size` edges for each weight and sign keeps, by `bounds.survivors_bound`."""
        return survivors_bound(self._widths, [self.n], [size], shared=True)

    @property
    def _widths(self) -> list[int]:
        outputs, inputs = self.shape
        return [inputs + bool(self.biases), outputs]

    def units(self, blocks: Tensor) -> Tensor:
        """The hidden units (B, 2n) of these inputs; `in` is the constant."""
        return 2 * self.n * blocks.unsqueeze(1) + torch.arange(2 * self.n, device=blocks.device)

    def first(self, units: Tensor) -> Tensor:
        """u_r of hidden units, or the bias of constant ones."""
        blocks, layer = units // (2 * self.n), (self.seed, self.layer)
        constant = blocks == self.shape[1]
        weights = uniform(*layer, FIRST, units, blocks)
        return torch.where(constant, uniform(*layer, BIAS, units, blocks * 0), weights) if constant.any() else weights

    def second(self, outputs: Tensor, units: Tensor) -> Tensor:
        """The second-layer weights v of outputs and hidden units, which broadcast."""
        return uniform(self.seed, self.layer, SECOND, outputs, units)

    def usable(self, units: Tensor, first: Tensor, sign: int) -> Tensor:
        """Which of these units, with these weights, answer to the positive or negative part (sign 1, -1)."""
        right = first * sign > 0
        return right if self.split == "sign" else right & ((units % (2 * self.n) < self.n) == (sign > 0))

    @property
    def signs(self) -> tuple[int, ...]:
        """Parts of an input that are asked for: 1, and -1 for its negative part."""
        return (1, -1) if self.inputs == "any" else (1,)


@dataclass(frozen=True)
class KeptEdges:
    """The edges of a ticket, in ascending order.

    Attributes:
        units: hidden units (U,) with an edge, by their row r in the random layer.
        inputs: the input (U,) of each; -1 is the constant.
        first: u_r (U,), or the constant unit's bias; float32.
        outputs: of each second-layer edge (E,).
        places: the place (E,) of its hidden unit in `units`.
        second: v (E,), float32.
    """

    units: Tensor
    inputs: Tensor
    first: Tensor
    outputs: Tensor
    places: Tensor
    second: Tensor

    @property
    def counts(self) -> Counts:
        """Number of kept weights."""
        constant = int((self.inputs < 0).sum())
        return Counts(len(self.units) - constant, len(self.outputs), constant)

    def effective(self, shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """P, N (out, in) and c (out,) in float64: the layer computes P x+ + N x- + c, x = x+ - x-."""
        outputs, inputs = shape
        flat = self.first.new_zeros(outputs * (2 * inputs + 1), dtype=torch.float64)
        values = self.second.double() * self.first.double().abs()[self.places]
        flat.index_add_(0, self.outputs * (2 * inputs + 1) + self._blocks(inputs)[self.places], values)
        positive, negative, constant = flat.view(outputs, -1).split([inputs, inputs, 1], dim=1)
        return positive, negative, constant.squeeze(1)

    def verify(self, random: RandomLayer, counts: Counts, size: int | None) -> None:
        """Regenerate each kept weight bit for bit, and check what is kept against the construction.

        Raises:
            RuntimeError: what is wrong.
        """
        for problem, present in self._problems(random, counts, size):
            if present:
                raise RuntimeError(problem)

    def _problems(self, random: RandomLayer, counts: Counts, size: int | None) -> Iterator[tuple[str, bool]]:
        outputs, inputs = random.shape
        width = 2 * random.n
        constant = self.units // width == inputs
        yield f"{counts} were recorded, {self.counts} are kept", counts != self.counts
        yield "units are not in ascending order", not _ascending(self.units)
        beyond = inputs + bool(random.biases)
        yield "units are not there", _outside(self.units, width * beyond) or len(self.inputs) != len(self.units)
        owners = torch.where(constant, -1, self.units // width)
        yield "units keep an edge from another input", not torch.equal(self.inputs, owners)
        yield "first-layer weights are not the random ones", not _same(random.first(self.units), self.first)
        usable = random.usable(self.units, self.first, 1)
        if random.inputs == "any":
            usable |= random.usable(self.units, self.first, -1) & ~constant
        yield "units are of an unusable sign", not usable.all()
        yield "edges lead nowhere", _outside(self.outputs, outputs) or _outside(self.places, len(self.units))
        yield "edges are not in ascending order", not _ascending(self.outputs * len(self.units) + self.places)
        yield "units lead nowhere", len(self.places.unique()) != len(self.units)
        second = random.second(self.outputs, self.units[self.places])
        yield "second-layer weights are not the random ones", not _same(second, self.second)
        group = outputs // max(1, random.biases)
        yield "constants lead to outputs without a bias", bool((self.outputs[constant[self.places]] % group).any())
        if size is not None:
            sizes = (self.outputs * (2 * inputs + 1) + self._blocks(inputs)[self.places]).unique(return_counts=True)[1]
            complete = len(sizes) == _sums(random, size, self.units.device) and bool((sizes == size).all())
            yield f"sums are not of {size} products each", not complete

    def _blocks(self, inputs: int) -> Tensor:
        """The block of each unit: its input, in + input for the negative part, 2 in for the constant."""
        signed = torch.where(self.first < 0, self.inputs + inputs, self.inputs)
        return torch.where(self.inputs < 0, 2 * inputs, signed)


def _sums(random: RandomLayer, size: int, device: torch.device) -> int:
    """Number of sums that have enough usable units."""
    units = random.units(torch.arange(random.shape[1] + bool(random.biases), device=device))
    first, feasible = random.first(units), 0
    for sign in random.signs:
        enough = random.usable(units, first, sign).sum(1) >= size
        feasible += random.shape[0] * int(enough[: random.shape[1]].sum())
        feasible += random.biases * int(enough[-1]) if sign > 0 and random.biases else 0
    return feasible


def _ascending(numbers: Tensor) -> bool:
    return bool((numbers.diff() > 0).all())


def _outside(numbers: Tensor, end: int) -> bool:
    return bool(((numbers < 0) | (numbers >= end)).any())


def _same(regenerated: Tensor, kept: Tensor) -> bool:
    return torch.equal(regenerated.double(), kept.double())
