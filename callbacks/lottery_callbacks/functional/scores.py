"""Scores: functions that rank weights; the highest are kept. A new score is one function and one entry below."""

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from lottery_callbacks.functional.score_options import Positive

Tensors = dict[str, Tensor]
Mode = Literal["training", "evaluation"]
Statistics = Literal["neutral", "running"]
AS_TRAINED = {"mode": "training", "temperature": 1.0}  # the loss that `Evidence.losses` makes without arguments


@dataclass(frozen=True)
class Evidence:
    """What a score may look at; everything is by parameter name, in the shapes of the weights.

    Attributes:
        weights: the present weights, zero where pruned.
        generator: for scores that draw, on the CPU.
        losses: makes the training loss of each batch of the evidence, differentiable in `weights`; with `mode` or
            `temperature`, as far as a score asks for another one than is trained.
        scale: what these losses were multiplied by, against underflow in half precision.
        flow: makes dR/d|w| of the synaptic flow R, see `synflow`; with `statistics`, if they are not neutral.
        movement: the sum over the steps of the fit so far of -gradient * weight.
        average: the mean of a tensor over processes.
        slices: weights in which each slice along a dimension keeps one at least, see `functional.slices`.
    """

    weights: Mapping[str, Tensor]
    generator: torch.Generator = field(default_factory=torch.Generator)
    losses: Callable[..., Iterable[Tensor]] | None = None
    scale: float = 1.0
    flow: Callable[..., Tensors] | None = None
    movement: Mapping[str, Tensor] | None = None
    average: Callable[[Tensor], Tensor] = lambda tensor: tensor
    slices: Mapping[str, int] = field(default_factory=dict)

    def gradient(self, **options: Any) -> Tensors:
        """The gradient dL/dw of L, the mean training loss over batches and processes. One backward pass a batch.

        Args:
            options: `mode` "training" (dropout, batch statistics of norm layers) or "evaluation", of the whole
                network; `temperature` T, by which the logits are divided (see `functional.temperature`).
        """
        return self._mean(lambda loss: self._differentiate(loss), options)

    def hessian_vector(self, vector: Mapping[str, Tensor], **options: Any) -> Tensors:
        """The product H v with the Hessian of the same loss. Two backward passes a batch."""

        def product(loss: Tensor) -> list[Tensor]:
            gradients = self._differentiate(loss, create_graph=True)
            along = [(g * vector[n]).sum() for n, g in zip(self.weights, gradients, strict=True) if g.requires_grad]
            return self._differentiate(sum(along)) if along else gradients

        return self._mean(product, options)

    def _mean(self, of: Callable[[Tensor], list[Tensor]], options: Mapping[str, Any]) -> Tensors:
        asked = {name: value for name, value in options.items() if value != AS_TRAINED.get(name)}
        total, count = [torch.zeros_like(weight) for weight in self.weights.values()], 0
        for loss in known("the training loss", self.losses)(**asked):
            total, count = [t + d.detach() for t, d in zip(total, of(loss), strict=True)], count + 1
        if not count:
            raise ValueError("no batch of the evidence has a loss: give the rule more `batches`, or another score")
        return {name: self.average(t / (count * self.scale)) for name, t in zip(self.weights, total, strict=True)}

    def _differentiate(self, scalar: Any, create_graph: bool = False) -> list[Tensor]:
        weights = list(self.weights.values())
        try:
            return list(torch.autograd.grad(scalar, weights, create_graph=create_graph, materialize_grads=True))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # such as an operation without a second derivative
            reason = " ".join(str(error).split())[:160]
            raise ValueError(
                f"torch cannot differentiate the loss as the score needs it ({reason}): choose another score"
            ) from error


Score = Callable[..., Tensors]  # of evidence, and by keyword of its options, each with a default


def needs(what: str) -> Callable[[Score], Score]:
    """Mark a score that needs training "batches", or the "movement" of a fit, to be collected for it.

    Raises:
        ValueError: it is neither.
    """
    if what not in ("batches", "movement"):
        raise ValueError(f"needs({what!r}) is not known: choose batches or movement")

    def mark(score: Score) -> Score:
        try:
            score.needs = what  # pyright: ignore[reportFunctionMemberAccess]
        except AttributeError:  # a bound method, or an object with slots
            score = functools.partial(score)
            score.needs = what  # pyright: ignore[reportAttributeAccessIssue]
        return score

    return mark


def known(name: str, value: Any) -> Any:
    """`value`, or a ValueError where this evidence has none."""
    if value is None:
        raise ValueError(f"the score needs {name}, which only a running fit has: choose magnitude or random here")
    return value


def magnitude(evidence: Evidence) -> Tensors:
    """|w|, the score of iterative magnitude pruning (Frankle & Carbin, arXiv 1803.03635). Draws nothing."""
    return {name: weight.detach().abs() for name, weight in evidence.weights.items()}


def random(evidence: Evidence) -> Tensors:
    """Uniform in [0, 1), independent of the weights: the floor that a score must beat."""
    return {
        name: torch.rand(weight.shape, generator=evidence.generator, dtype=torch.float32).to(weight.device)
        for name, weight in evidence.weights.items()
    }


@needs("batches")
def gradient(evidence: Evidence, mode: Mode = "training") -> Tensors:
    """The size |g| of the loss gradient: what would change fastest (Blalock et al., arXiv 2003.03033).

    Args:
        evidence: with losses.
        mode: as in `snip`.
    """
    return {name: g.abs() for name, g in evidence.gradient(mode=mode).items()}


@needs("batches")
def snip(evidence: Evidence, mode: Mode = "training") -> Tensors:
    """|g w|, connection sensitivity (Lee et al., arXiv 1810.02340): |dL/dc| of a gate c = 1 on the weight.

    The paper divides by the sum over all weights, which changes no ranking and is left out.

    Args:
        evidence: with losses.
        mode: "training", the default, scores the loss that is trained: norm layers use the batch's statistics, and
            dropout is on, drawn from a copy of the global random state. "evaluation" is the whole network in eval
            mode, dropout and norm layers of one's own included, as in the authors' code; at initialisation norm
            layers then do nothing but scale. With batch norm the two masks differ much (overlap 0.4 at 90 %).
    """
    return {name: (g * evidence.weights[name]).abs().detach() for name, g in evidence.gradient(mode=mode).items()}


@needs("batches")
def grasp(evidence: Evidence, mode: Mode = "training", temperature: Positive = 1.0) -> Tensors:
    """The product w (H g): what keeps the gradient flowing stays (Wang et al., arXiv 2002.07376).

    The paper removes the highest of -w (H g). Deviation: batches are the fit's own instead of ten images a class.

    Args:
        evidence: with losses.
        mode: as in `snip`.
        temperature: T, by which the logits are divided in the loss, for g and H alike; see `functional.temperature`.
            The default of 1 scores the loss that is trained; the published code has T = 200, near which all classes
            are equally likely (overlap of the masks 0.4 on a VGG).
    """
    slope = evidence.gradient(mode=mode, temperature=temperature)
    product = evidence.hessian_vector(slope, mode=mode, temperature=temperature)
    return {name: (weight * product[name]).detach() for name, weight in evidence.weights.items()}


@needs("batches")
def synflow(evidence: Evidence, statistics: Statistics = "neutral") -> Tensors:
    """|w| dR/d|w|, synaptic flow (Tanaka et al., arXiv 2006.05467), R = 1' (product of the layers' |w|) 1.

    R is the sum of the outputs for an input of ones through the network of absolute parameters. It needs no
    data, only an input's shape. The paper prunes in 100 rounds; see `GradualPruning(rounds=100)`. The published code
    truncates the counts of these rounds, which are rounded here unless `Pruning(counts="truncated")`.

    Args:
        evidence: with a flow.
        statistics: of batch norm. "neutral", the default, is mean 0 and variance 1: R is what the paper defines, a sum
            of products of absolute weights, whatever the network has seen. "running" takes the absolute values of
            those that training has left, as the published code does: then |mean| is subtracted, and ReLUs that it
            closes stop the flow. On a new network both are the same.
    """
    make = known("the synaptic flow", evidence.flow)
    flow = make() if statistics == "neutral" else make(statistics=statistics)
    return {name: weight.detach().abs() * flow[name] for name, weight in evidence.weights.items()}


@needs("movement")
def movement(evidence: Evidence) -> Tensors:
    """-sum over steps of g w (Sanh et al., arXiv 2005.07683): high where training moved a weight away from zero.

    Deviation: the weights themselves are trained, without the paper's scores in the forward pass.
    """
    return dict(known("the movement of the weights", evidence.movement))


SCORES: dict[str, Score] = {
    score.__name__: score for score in (magnitude, random, gradient, snip, grasp, synflow, movement)
}
