"""The second derivatives of a network's mean loss on the weights that a mask keeps, as products with vectors.

What is computed from such products (diagonal, trace, eigenvalues, spectral density) is in `spectrum`.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from lottery_callbacks.functional.modes import evaluating
from lottery_callbacks.functional.names import find_parameters, named_parameters

Kind = Literal["hessian", "ggn"]
Loss = Callable[[Tensor, Tensor], Tensor]


class Curvature:
    """The Hessian or the generalised Gauss-Newton matrix (GGN) of L on the kept coordinates, n of them: `it @ vectors`.

    L(w) = 1/N sum_i l(f_w(x_i), y_i), the mean loss over all examples of the batches, whatever their sizes, with the
    network f in eval mode. The Hessian is d2L / dw2; the GGN (Schraudolph, 2002; Martens, arXiv 1412.1193) is
    1/N sum_i J_i' (d2l / df2) J_i with J_i = df_w(x_i) / dw, positive semidefinite where l is convex in f. The masked
    subspace is the principal submatrix: pruned weights stay what they are. Coordinates are those of the parameters in
    their order, row-major, a parameter without a mask whole.

    Deviations from the code of 2310.18769 (one batch, train mode, pruned coordinates too): all three put right.

    The Hessian is multiplied by differentiating twice in reverse mode. curvlinops 3.0.1 differentiates its Jacobian in
    forward mode, which torch 2.15 gets wrong, silently, through layer norm and instance norm (pytorch/pytorch 196699,
    196700), and cannot do for group norm; elsewhere the two agree. The GGN is that of curvlinops, whose one forward
    derivative is right.

    Cost of a product with a Hessian, over all batches: a forward and a backward pass, and two passes more a vector, of
    any number of vectors at once; memory as in training. With a GGN: three forward passes and a backward one a vector;
    memory grows with the vectors of one product. Sums over batches are float64.

    Kept: weights, gradients, modes, buffers and torch's random states; a network that draws in eval mode draws the same
    in each product with a Hessian. Kernels without second derivatives (of attention, recurrent layers, compiled code)
    are passed by.

    Args:
        network: maps the inputs of a batch to outputs, in float32 or float64.
        batches: pairs (inputs, targets), a loader or a list; they are read once and kept in memory, since a matrix
            needs the same data in each product, and moved to the network's device in each.
        loss: of outputs and targets, the mean over a batch; cross-entropy by default. Those of torch with class weights
            or ignored labels are averaged over all batches as over one large one.
        kind: "hessian" or "ggn".
        masks: by parameter name, True = kept.
        parameters: by name, those of the network to differentiate by (a layer's, for the block of a layer); all that
            require gradients if not given. Tied ones are one.
        count: read so many batches of the loader, not all.

    Attributes:
        shape: (n, n).
        sizes: kept coordinates of each parameter, by name.
        examples: N.
        products: vectors multiplied so far.

    Raises:
        ValueError: one line that names what fits not: no batch, no pair, an unknown name or kind, a mask of another
            shape, no kept coordinate, half precision, several devices, a loss that is a sum.
        ModuleNotFoundError: the GGN without curvlinops.
    """

    def __init__(
        self,
        network: nn.Module,
        batches: Iterable[Any],
        loss: Loss | None = None,
        kind: Kind = "hessian",
        masks: Mapping[str, Tensor] | None = None,
        parameters: Mapping[str, nn.Parameter] | None = None,
        count: int | None = None,
    ) -> None:
        if kind not in ("hessian", "ggn"):
            raise ValueError(f"kind={kind!r} is not known: choose hessian or ggn")
        network = network.module if isinstance(network, nn.DataParallel) else network  # torch.func refuses it
        self.network, self.kind, self.loss = network, kind, nn.CrossEntropyLoss() if loss is None else loss
        if getattr(self.loss, "reduction", "mean") != "mean":
            raise ValueError(f"the loss {self.loss} is no mean over a batch: give it reduction='mean'")
        if parameters is None:
            parameters = {name: p for name, p in named_parameters(network).items() if p.requires_grad}
        self.parameters = dict(parameters)
        self.dtype, self.device = _place(self.parameters)
        own = {parameter: name for name, parameter in network.named_parameters()}
        if strangers := [name for name, parameter in self.parameters.items() if parameter not in own]:
            raise ValueError(f"{strangers[0]} is no parameter of the network: give some of its named_parameters()")
        masks = masks or {}
        masked = find_parameters(network, masks) | {n: p for n, p in self.parameters.items() if n in masks}
        if unknown := [name for name in masks if name not in masked]:
            raise ValueError(f"the mask {unknown[0]} is of no parameter of the network: give masks by its names")
        self._names = [own[parameter] for parameter in self.parameters.values()]
        mask_of = {parameter: masks[name] for name, parameter in masked.items()}
        kept = [_kept(name, parameter, mask_of.get(parameter)) for name, parameter in self.parameters.items()]
        self.sizes = {name: int(mask.sum()) for name, mask in zip(self.parameters, kept, strict=True)}
        self._kept = torch.cat(kept).nonzero().flatten()  # places in the flat vector of all parameters
        if not len(self._kept):
            raise ValueError("the masks keep no coordinate of these parameters: give others")
        self.shape = (len(self._kept), len(self._kept))
        with self._twice_differentiable():
            self._batches = [_pair(batch) for batch in islice(batches, count)]
        weights = [float(_weight(self.loss, targets)) for _, targets in self._batches]
        self.examples = sum(weights)
        if not self.examples:
            raise ValueError("there is no example to differentiate on: give a loader or a list that is not empty")
        self._product = self._batch_ggn() if kind == "ggn" else self._batch_hessian
        self.products = 0

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """The products with vectors [n] or [n, k], in the same shape and type."""
        columns = vectors.reshape(len(self._kept), -1)
        whole = columns.new_zeros(sum(p.numel() for p in self.parameters.values()), columns.shape[1], dtype=self.dtype)
        whole[self._kept] = columns.to(self.dtype)
        total = torch.zeros_like(columns, dtype=torch.float64)
        for inputs, targets in self._batches:
            inputs = inputs.to(self.device) if isinstance(inputs, Tensor) else inputs
            with self._twice_differentiable():
                total += self._product(whole, inputs, targets.to(self.device))[self._kept]
        self.products += columns.shape[1]
        return (total / self.examples).to(vectors.dtype).reshape(vectors.shape)

    def unflatten(self, vector: Tensor, pruned: float = 0.0) -> dict[str, Tensor]:
        """A vector [n] as tensors of the parameters' shapes, by name, with `pruned` where the masks keep nothing."""
        shapes = {name: parameter.shape for name, parameter in self.parameters.items()}
        whole = vector.new_full((sum(shape.numel() for shape in shapes.values()),), pruned)
        whole[self._kept.to(vector.device)] = vector
        parts = whole.split([shape.numel() for shape in shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}

    def _batch_hessian(self, columns: Tensor, inputs: Any, targets: Tensor) -> Tensor:
        """Of the loss summed over one batch, times vectors [all coordinates, k]."""
        weights = [parameter.detach().requires_grad_() for parameter in self.parameters.values()]
        sizes, found = [weight.numel() for weight in weights], torch.zeros_like(columns)
        with torch.enable_grad():
            outputs = functional_call(self.network, dict(zip(self._names, weights, strict=True)), (inputs,))
            summed = self.loss(outputs, targets) * _weight(self.loss, targets)
            gradients = torch.autograd.grad(summed, weights, create_graph=True, materialize_grads=True)
            pairs = [
                (gradient.reshape(-1), place) for place, gradient in enumerate(gradients) if gradient.requires_grad
            ]
        for column in range(columns.shape[1] if pairs else 0):  # a loss that is linear in the weights has no pair
            vector = columns[:, column].split(sizes)
            along = [vector[place] for _, place in pairs]
            twice = torch.autograd.grad(
                [gradient for gradient, _ in pairs], weights, along, retain_graph=True, materialize_grads=True
            )
            found[:, column] = torch.cat([part.reshape(-1) for part in twice])
        return found

    def _batch_ggn(self) -> Callable[[Tensor, Any, Tensor], Tensor]:
        """The same of the GGN, by curvlinops; sums and the division by N are ours."""
        require_curvlinops()
        from curvlinops import GGNLinearOperator

        data = self._batches[:1]
        operator = GGNLinearOperator(
            self.network,
            _Summed(self.loss),
            list(self.parameters.values()),
            data,
            check_deterministic=False,  # would draw from the global random state
            num_data=1,
            batch_size_fn=lambda _: 1,
        )

        def product(columns: Tensor, inputs: Any, targets: Tensor) -> Tensor:
            data[0] = (inputs, targets)
            return operator @ columns  # pyright: ignore[reportReturnType] (of a tensor, a tensor)

        return product

    @contextmanager
    def _twice_differentiable(self) -> Iterator[None]:
        """Eval mode, plain kernels, and random states that are put back."""
        with ExitStack() as block:
            block.enter_context(evaluating(self.network))
            block.enter_context(torch.random.fork_rng([self.device] if self.device.type == "cuda" else []))
            block.enter_context(torch.compiler.set_stance("force_eager"))
            block.enter_context(sdpa_kernel(SDPBackend.MATH))
            block.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
            torch.backends.mha.set_fastpath_enabled(False)
            if any(isinstance(part, nn.RNNBase) for part in self.network.modules()):
                block.enter_context(torch.backends.mkldnn.flags(enabled=False))
                block.enter_context(torch.backends.cudnn.flags(enabled=False))
            yield


class _Summed(nn.Module):
    """The sum of a mean loss over its batch, as a module for curvlinops."""

    reduction = "sum"

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.loss(outputs, targets) * _weight(self.loss, targets)


def require_curvlinops() -> None:
    """Raises ModuleNotFoundError with the mend where curvlinops (or scipy, which comes with it) is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of torch, on what curvlinops imports
            import curvlinops  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'curvature needs {error.name}: pip install "lottery-lightning[curvature]"', name=error.name
        ) from None


def _place(parameters: Mapping[str, nn.Parameter]) -> tuple[torch.dtype, torch.device]:
    """The type and device that all share."""
    if not parameters:
        raise ValueError("there is no parameter to differentiate by: give some, or let them require gradients")
    places: dict[Any, str] = {}
    for name, parameter in parameters.items():
        places.setdefault((parameter.dtype, parameter.device), name)
    (dtype, device), name = list(places.items())[-1]
    if len(places) > 1:
        raise ValueError(f"{name} is {dtype} on {device}, and others are not: bring the network to one of each")
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name} is {dtype}, too coarse for second derivatives: give the network.float()")
    return dtype, device


def _kept(name: str, parameter: nn.Parameter, mask: Tensor | None) -> Tensor:
    if mask is None:
        return torch.ones(parameter.numel(), dtype=torch.bool, device=parameter.device)
    if mask.shape != parameter.shape:
        shapes = tuple(mask.shape), tuple(parameter.shape)
        raise ValueError(f"the mask of {name} is {shapes[0]}, and it is {shapes[1]}: give a mask of this network")
    return mask.to(parameter.device, torch.bool).reshape(-1)


def _pair(batch: Any) -> tuple[Any, Tensor]:
    if not (isinstance(batch, list | tuple) and len(batch) == 2 and isinstance(batch[1], Tensor)):
        raise ValueError(f"a batch is a {type(batch).__name__}, not (inputs, targets): give batches of such pairs")
    return batch[0], batch[1]


def _weight(loss: Loss, targets: Tensor) -> Tensor | int:
    """What the mean of a batch counts for: its examples, or the weight of its labels that are not ignored."""
    if isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss) and not targets.is_floating_point():
        counted = targets[targets != loss.ignore_index]
        return len(counted) if loss.weight is None else loss.weight[counted].sum()
    return len(targets)
