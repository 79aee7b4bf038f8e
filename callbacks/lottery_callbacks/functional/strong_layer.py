"""The strong ticket of a layer: two random layers, pruned and never trained, that compute W x + b up to a small error.

Pensia et al. (arXiv 2006.07990, lemma 3) and, with sums of a fixed size, Natale et al. (arXiv 2410.14754, theorem 3).
A hidden unit that keeps its weight u from input j alone gives ReLU(u x_j), which is u x_j+ for u > 0 and |u| x_j- for
u < 0, where x = x+ - x-. Hence for each output o and input j a subset of the units with u > 0, of sum_r v_or u_r near
W_oj, and one of those with u < 0, of sum_r v_or |u_r| near -W_oj, make W_oj x_j. All outputs share the units of an
input; what distinguishes them is which v they keep. A bias is a sum over units that are constant.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lottery_callbacks.functional.strong_edges import Counts, Inputs, KeptEdges, RandomLayer, Split
from lottery_callbacks.functional.subset_sum import Progress, subset_sum
from lottery_callbacks.functional.subset_sum_search import LARGEST

NUMBERS = 1 << 21  # products held at once; float64 and their work space take about 50 bytes each


class Block(NamedTuple):
    """The units that answer to the positive (sign 1) or negative (-1) part of an input; input -1 is the constant."""

    input: int
    sign: int


class OutOfReach(NamedTuple):
    """A target beyond all sums that its block has for this output."""

    block: Block
    output: int
    target: float
    error: float


@dataclass(frozen=True)
class StrongLayer:
    """The ticket of a layer W (out, in), b.

    Attributes:
        random: the random layers that it prunes.
        edges: what it keeps of them.
        errors: |target - sum| (parts, out, in) of each weight in float64: for x+, then for x- unless inputs are known
            to be >= 0.
        bias_errors: the same (biases,) of each bias.
        infeasible: blocks with fewer usable units than a sum needs; nothing is kept of them, for any output.
        out_of_reach: targets beyond the sums of a block that is feasible.
        tolerance: errors above it are misses.
    """

    random: RandomLayer
    edges: KeptEdges
    errors: Tensor
    bias_errors: Tensor
    infeasible: list[Block]
    out_of_reach: list[OutOfReach]
    tolerance: float | None

    @property
    def counts(self) -> Counts:
        """Kept weights of the first and the second random layer, and kept hidden biases."""
        return self.edges.counts

    @property
    def misses(self) -> int:
        """Number of errors above the tolerance; 0 without one."""
        if self.tolerance is None:
            return 0
        return int((self.errors > self.tolerance).sum() + (self.bias_errors > self.tolerance).sum())

    def effective(self) -> tuple[Tensor, Tensor, Tensor]:
        """P, N (out, in) and c (out,) in float64: the layer computes P x+ + N x- + c; N = 0 for inputs >= 0."""
        return self.edges.effective(self.random.shape)


def strong_layer(
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    seed: int,
    layer: int,
    n: int,
    size: int | None = None,
    tolerance: float | None = None,
    min_size: int = 0,
    split: Split = "sign",
    inputs: Inputs = "any",
    progress: Progress | None = None,
) -> StrongLayer:
    """The strong ticket of x -> weight x + bias in two random layers with 2n hidden units for each input.

    Sums are of any size, of exactly `size`, or the smallest within the tolerance, each the nearest that there is: see
    `subset_sum`. At most 40 usable units of a block enter, the first; of 2n units split by their sign that matters from
    n = 30 or so. Cost: T subset sums on n or so samples of their own, T = 2 out in (half for inputs >= 0), plus biases.

    Args:
        weight: (out, in), scaled so that targets are in reach: |weight| <= 1/2, say.
        bias: (biases,), where biases divides out: for the first of each out / biases outputs.
        seed: of the random network, 0 <= seed < 2^64.
        layer: number of this layer in it.
        n: half the hidden units of an input.
        size: exactly that many products a sum, also where the target is 0.
        tolerance: of the smallest sums; with `size` it only says which errors are misses.
        min_size: without `size`, at least that many.
        split: "sign" or "assigned", see `RandomLayer`.
        inputs: "nonnegative" leaves out the negative part, where the inputs are known to be >= 0.
        progress: called as progress(done, total) with targets.

    >>> ticket = strong_layer(torch.tensor([[0.25, -0.5]]), torch.tensor([0.1]), seed=0, layer=0, n=12, size=3)
    >>> ticket.counts, bool(ticket.errors.max() < 0.02)
    (Counts(first=12, second=15, constant=3), True)

    Raises:
        ValueError: shapes do not fit, a number is not finite, or the question contradicts itself.
    """
    if weight.ndim != 2 or (bias is not None and (bias.ndim != 1 or not len(bias) or len(weight) % len(bias))):
        shapes = [*weight.shape], None if bias is None else [*bias.shape]
        raise ValueError(f"weight {shapes[0]} and bias {shapes[1]} do not fit: give (out, in) and a divisor of out")
    if n < 1 or (size is not None and not 1 <= size <= LARGEST) or split not in ("sign", "assigned"):
        raise ValueError(
            f"n={n}, size={size}, split={split!r}: choose 1 or more, a size up to {LARGEST}, split 'sign' or 'assigned'"
        )
    if inputs not in ("any", "nonnegative"):
        raise ValueError(f"inputs={inputs!r}: choose 'any' or 'nonnegative'")
    targets = weight.detach().double()
    biases = targets.new_zeros(0) if bias is None else bias.detach().double()
    random = RandomLayer(seed, layer, n, (len(weight), weight.shape[1]), len(biases), split, inputs)
    question = {"size": size, "min_size": min_size, "tolerance": tolerance if size is None else None}
    solver = _Solver(random, question, len(random.signs) * targets.numel() + len(biases), progress)
    errors = torch.empty(len(random.signs), *weight.shape, dtype=torch.float64, device=weight.device)
    everything = torch.arange(weight.shape[1], device=weight.device)
    outputs = torch.arange(len(weight), device=weight.device)
    for part, sign in zip(errors, random.signs, strict=True):
        for columns in everything.split(max(1, NUMBERS // (len(weight) * min(2 * n, LARGEST)))):
            part[:, columns] = solver.solve(columns, sign, outputs, sign * targets[:, columns].T).T
    bias_errors = biases
    if len(biases):
        constant, first_of_each = everything.new_tensor([weight.shape[1]]), outputs[:: len(weight) // len(biases)]
        bias_errors = solver.solve(constant, 1, first_of_each, biases.unsqueeze(0)).squeeze(0)
    kept = solver.kept(weight.device)
    return StrongLayer(random, kept, errors, bias_errors, solver.infeasible, solver.out_of_reach, tolerance)


class _Solver:
    """Blocks of a random layer one after the other, and what is kept of them."""

    def __init__(self, random: RandomLayer, question: dict[str, Any], total: int, progress: Progress | None) -> None:
        self.random, self.question, self.total, self.progress = random, question, total, progress
        self.done = 0
        self.infeasible: list[Block] = []
        self.out_of_reach: list[OutOfReach] = []
        self._edges: list[tuple[Tensor, Tensor, Tensor]] = []

    def solve(self, blocks: Tensor, sign: int, outputs: Tensor, targets: Tensor) -> Tensor:
        """Keep the sums nearest to the targets (blocks, outputs); their errors."""
        units = self.random.units(blocks)
        first = self.random.first(units)
        usable = self.random.usable(units, first, sign)
        width = min(LARGEST, max(1, int(usable.sum(1).max())))
        places = usable.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :width]
        units, first, usable = (t.gather(1, places) for t in (units, first, usable))
        second = self.random.second(outputs.unsqueeze(1), units.unsqueeze(1))
        products = second.double() * first.double().abs().unsqueeze(1)
        valid = usable.unsqueeze(1).expand_as(products)
        answer = subset_sum(
            targets.flatten(),
            products.flatten(0, 1),
            valid=valid.flatten(0, 1),
            progress=lambda done, total: self._report(targets.numel() * done // total),
            **self.question,
        )
        self.done += targets.numel()
        block, place, unit = answer.chosen.view_as(products).nonzero().unbind(1)
        self._edges.append((outputs[place], units[block, unit], second[block, place, unit]))
        errors = (targets - answer.sums.view_as(targets)).abs()
        feasible = usable.sum(1) >= max(self.question["size"] or 0, self.question["min_size"])
        self._list(blocks, sign, outputs, targets, errors, feasible, products.masked_fill_(~valid, torch.nan))
        return errors

    def kept(self, device: torch.device) -> KeptEdges:
        """All kept edges, in ascending order."""
        outputs, rows, second = (torch.cat(parts) for parts in zip(*self._edges, strict=True))
        units, places = rows.unique(return_inverse=True)
        order = (outputs * max(1, len(units)) + places).argsort()
        first, inputs = self.random.first(units), units // (2 * self.random.n)
        inputs = inputs.masked_fill_(inputs == self.random.shape[1], -1)
        return KeptEdges(units, inputs, first, outputs[order], places[order], second[order])

    def _list(self, blocks, sign, outputs, targets, errors, feasible, products) -> None:
        constant = self.random.shape[1]
        names = [Block(-1 if block == constant else block, sign) for block in blocks.tolist()]
        self.infeasible += [name for name, enough in zip(names, feasible.tolist(), strict=True) if not enough]
        most, least = self._reach(products), -self._reach(-products)
        beyond = ((targets > most) | (targets < least)) & feasible.unsqueeze(1)
        for block, place in beyond.nonzero().tolist():
            target, error = float(targets[block, place]), float(errors[block, place])
            self.out_of_reach.append(OutOfReach(names[block], int(outputs[place]), target, error))

    def _reach(self, products: Tensor) -> Tensor:
        """The greatest sum of admissible size; products that are not there are NaN."""
        size, least = self.question["size"], min(self.question["min_size"], products.shape[2])
        if size is not None:
            return products.nan_to_num(-torch.inf).topk(min(size, products.shape[2]), dim=2, sorted=False).values.sum(2)
        needed = products.nan_to_num(-torch.inf).topk(least, dim=2, sorted=False).values.clamp(max=0.0).sum(2)
        return products.nan_to_num(0.0).clamp(min=0.0).sum(2) + needed

    def _report(self, done: int) -> None:
        if self.progress:
            self.progress(self.done + done, self.total)
