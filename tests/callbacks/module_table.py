"""Every class of torch.nn: how it is built, and how it is called on floats that a layer before it made."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Entry = tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor], Any]]


def shaped(values: Tensor, *shape: int) -> Tensor:
    """As many of the values as the shape has places, from the front again where there are fewer."""
    size = torch.Size(shape).numel()
    return values.flatten().repeat(-(-size // values.numel()))[:size].view(shape)


def on(shape: tuple[int, ...], make: Callable[[], nn.Module]) -> Entry:
    return make, lambda module, values: module(shaped(values, *shape))


def bare(name: str, shape: tuple[int, ...], *arguments: Any, **options: Any) -> Entry:
    return on(shape, lambda: getattr(nn, name)(*arguments, **options))


def loss_of(name: str, *targets: Tensor, inputs: int = 1, **options: Any) -> Entry:
    """A loss of predictions (4, 3); further predictions are multiples of the first."""

    def call(module: nn.Module, values: Tensor) -> Tensor:
        first = shaped(values, 4, 3)
        return module(*(first * (1 + 0.5 * index) for index in range(inputs)), *targets)

    return lambda: getattr(nn, name)(**options), call


def _unpooled(dimensions: int) -> Entry:
    def call(module: nn.Module, values: Tensor) -> Tensor:
        images = shaped(values, 2, 2, *(4,) * dimensions)
        pooled, indices = getattr(F, f"max_pool{dimensions}d")(images, 2, return_indices=True)
        return module(pooled, indices)

    return lambda: getattr(nn, f"MaxUnpool{dimensions}d")(2), call


def _indices(module: nn.Module, values: Tensor) -> Tensor:
    return module(torch.tensor([[0, 2, 1], [1, 1, 3]])) * values.mean()


def _held(make: Callable[[], nn.Module], used: Callable[[Any], Any]) -> Entry:
    return make, lambda module, values: used(module) * values.mean()


def _classes(module: nn.Module, values: Tensor) -> Tensor:
    return module(shaped(values, 4, 6), LABELS.repeat(2)[:4]).loss


def _pairs(module: nn.Module, values: Tensor) -> Tensor:
    return module(shaped(values, 4, 3), shaped(values * 2, 4, 3))


def _ctc(module: nn.Module, values: Tensor) -> Tensor:
    return module(
        shaped(values, 5, 2, 4).log_softmax(2),
        torch.tensor([[1, 2], [3, 1]]),
        torch.tensor([5, 5]),
        torch.tensor([2, 2]),
    )


def _sequences(module: nn.Module, values: Tensor) -> Tensor:
    return module(shaped(values, 2, 3, 4), shaped(values * 2, 2, 3, 4))


def _attention(module: nn.Module, values: Tensor) -> Tensor:
    queries = shaped(values, 3, 2, 4)
    return module(queries, queries, queries, need_weights=False)[0]


def _fused(module: nn.Module, values: Tensor) -> Tensor:
    return module(shaped(values, 4, 6), LABELS)


LABELS = torch.tensor([0, 2, 1, 0])
SIGNS = torch.tensor([1.0, -1.0, 1.0, -1.0])
FLOATS = torch.linspace(0, 1, 12).view(4, 3)
SHAPES = {1: (2, 2, 6), 2: (2, 2, 6, 6), 3: (2, 2, 6, 6, 6)}
SMALL = {"d_model": 4, "nhead": 2, "dim_feedforward": 4, "dropout": 0.0}
ELEMENTWISE = [
    "AlphaDropout", "CELU", "Dropout", "ELU", "FeatureAlphaDropout", "GELU", "Hardshrink", "Hardsigmoid", "Hardswish",
    "Hardtanh", "Identity", "LeakyReLU", "LogSigmoid", "LogSoftmax", "Mish", "PReLU", "RReLU", "ReLU", "ReLU6",
    "SELU", "SiLU", "Sigmoid", "Softmax", "Softmin", "Softplus", "Softshrink", "Softsign", "Tanh", "Tanhshrink",
]  # fmt: skip
NO_MODULES = {"Module", "Container", "RNNBase", "RNNCellBase"}  # bases, which nobody builds

TABLE: dict[str, Entry] = {name: bare(name, (4, 6)) for name in ELEMENTWISE}
for size, shape in SHAPES.items():
    for name, arguments in {
        "AdaptiveAvgPool": (2,), "AdaptiveMaxPool": (2,), "AvgPool": (2,), "MaxPool": (2,), "LPPool": (2, 2),
        "BatchNorm": (2,), "InstanceNorm": (2, 1e-5, 0.1, True, True), "Conv": (2, 3, 3), "ConvTranspose": (2, 3, 3),
        "CircularPad": (1,), "ConstantPad": (1, 0.5), "ReflectionPad": (1,), "ReplicationPad": (1,), "ZeroPad": (1,),
        "Dropout": (),
    }.items():  # fmt: skip
        TABLE[f"{name}{size}d"] = bare(f"{name}{size}d", shape, *arguments)
    TABLE[f"MaxUnpool{size}d"] = _unpooled(size)
    for name, arguments in {
        "BatchNorm": (),
        "InstanceNorm": (1e-5, 0.1, True),
        "Conv": (3, 3),
        "ConvTranspose": (3, 3),
    }.items():
        TABLE[f"Lazy{name}{size}d"] = bare(f"Lazy{name}{size}d", shape, *arguments)
TABLE |= {
    "AdaptiveLogSoftmaxWithLoss": (lambda: nn.AdaptiveLogSoftmaxWithLoss(6, 5, [2, 4]), _classes),
    "BCELoss": (nn.BCELoss, lambda module, values: module(shaped(values, 4, 3).sigmoid(), FLOATS)),
    "BCEWithLogitsLoss": loss_of("BCEWithLogitsLoss", FLOATS),
    "Bilinear": (lambda: nn.Bilinear(3, 3, 4), _pairs),
    "CTCLoss": (nn.CTCLoss, _ctc),
    "ChannelShuffle": bare("ChannelShuffle", (2, 4, 3, 3), 2),
    "CosineEmbeddingLoss": loss_of("CosineEmbeddingLoss", SIGNS, inputs=2),
    "CosineSimilarity": (nn.CosineSimilarity, _pairs),
    "CrossEntropyLoss": loss_of("CrossEntropyLoss", LABELS),
    "CrossMapLRN2d": bare("CrossMapLRN2d", SHAPES[2], 2),
    "DataParallel": on((4, 6), lambda: nn.DataParallel(nn.Linear(6, 6))),
    "Embedding": (lambda: nn.Embedding(5, 4), _indices),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(5, 4), _indices),
    "Flatten": bare("Flatten", SHAPES[2]),
    "Fold": bare("Fold", (2, 8, 9), (4, 4), 2),
    "FractionalMaxPool2d": bare("FractionalMaxPool2d", SHAPES[2], 2, output_size=3),
    "FractionalMaxPool3d": bare("FractionalMaxPool3d", SHAPES[3], 2, output_size=3),
    "GLU": bare("GLU", (4, 6)),
    "GRU": bare("GRU", (3, 2, 4), 4, 4, 2),
    "GRUCell": bare("GRUCell", (2, 4), 4, 4),
    "GaussianNLLLoss": loss_of("GaussianNLLLoss", FLOATS, FLOATS + 1),
    "GroupNorm": bare("GroupNorm", (2, 4, 3), 2, 4),
    "HingeEmbeddingLoss": loss_of("HingeEmbeddingLoss", SIGNS.unsqueeze(1)),
    "HuberLoss": loss_of("HuberLoss", FLOATS),
    "KLDivLoss": loss_of("KLDivLoss", FLOATS, reduction="batchmean"),
    "L1Loss": loss_of("L1Loss", FLOATS),
    "LSTM": bare("LSTM", (3, 2, 4), 4, 4, 2, proj_size=2, bidirectional=True),
    "LSTMCell": bare("LSTMCell", (2, 4), 4, 4),
    "LayerNorm": bare("LayerNorm", (4, 6), 6),
    "LazyLinear": bare("LazyLinear", (4, 6), 5),
    "Linear": bare("Linear", (4, 6), 6, 5),
    "LinearCrossEntropyLoss": (lambda: nn.LinearCrossEntropyLoss(6, 3), _fused),
    "LocalResponseNorm": bare("LocalResponseNorm", SHAPES[2], 2),
    "MSELoss": loss_of("MSELoss", FLOATS),
    "MarginRankingLoss": loss_of("MarginRankingLoss", SIGNS.unsqueeze(1), inputs=2),
    "ModuleDict": _held(lambda: nn.ModuleDict({"a": nn.Linear(3, 4)}), lambda own: own["a"].weight),
    "ModuleList": _held(lambda: nn.ModuleList([nn.Linear(3, 4)]), lambda own: own[0].weight),
    "MultiLabelMarginLoss": loss_of("MultiLabelMarginLoss", torch.tensor([[0, 1, -1]] * 4)),
    "MultiLabelSoftMarginLoss": loss_of("MultiLabelSoftMarginLoss", FLOATS.round()),
    "MultiMarginLoss": loss_of("MultiMarginLoss", LABELS),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(4, 2, add_bias_kv=True), _attention),
    "NLLLoss": loss_of("NLLLoss", LABELS),
    "NLLLoss2d": (
        nn.NLLLoss2d, lambda module, values: module(shaped(values, 2, 3, 2, 2), LABELS.repeat(2).view(2, 2, 2))
    ),
    "PairwiseDistance": (nn.PairwiseDistance, _pairs),
    "ParameterDict": _held(lambda: nn.ParameterDict({"weight": torch.ones(3, 4)}), lambda own: own["weight"]),
    "ParameterList": _held(lambda: nn.ParameterList([torch.ones(3, 4)]), lambda own: own[0]),
    "PixelShuffle": bare("PixelShuffle", (2, 4, 3, 3), 2),
    "PixelUnshuffle": bare("PixelUnshuffle", SHAPES[2], 2),
    "PoissonNLLLoss": loss_of("PoissonNLLLoss", FLOATS),
    "RMSNorm": bare("RMSNorm", (4, 6), 6),
    "RNN": bare("RNN", (3, 2, 4), 4, 4),
    "RNNCell": bare("RNNCell", (2, 4), 4, 4),
    "Sequential": on((4, 6), lambda: nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4))),
    "SmoothL1Loss": loss_of("SmoothL1Loss", FLOATS),
    "SoftMarginLoss": loss_of("SoftMarginLoss", FLOATS.round() * 2 - 1),
    "Softmax2d": bare("Softmax2d", SHAPES[2]),
    "SyncBatchNorm": bare("SyncBatchNorm", SHAPES[2], 2),
    "Threshold": bare("Threshold", (4, 6), 0.1, 0.0),
    "Transformer": (lambda: nn.Transformer(4, 2, 1, 1, 4, 0.0, batch_first=True), _sequences),
    "TransformerDecoder": (lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(**SMALL), 1), _sequences),
    "TransformerDecoderLayer": (lambda: nn.TransformerDecoderLayer(**SMALL), _sequences),
    "TransformerEncoder": on(
        (3, 2, 4), lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(**SMALL), 1, enable_nested_tensor=False)
    ),
    "TransformerEncoderLayer": on((3, 2, 4), lambda: nn.TransformerEncoderLayer(**SMALL)),
    "TripletMarginLoss": loss_of("TripletMarginLoss", inputs=3),
    "TripletMarginWithDistanceLoss": loss_of("TripletMarginWithDistanceLoss", inputs=3),
    "Unflatten": bare("Unflatten", (2, 6), 1, (2, 3)),
    "Unfold": bare("Unfold", SHAPES[2], 2),
    "Upsample": bare("Upsample", SHAPES[2], scale_factor=2),
    "UpsamplingBilinear2d": bare("UpsamplingBilinear2d", SHAPES[2], scale_factor=2),
    "UpsamplingNearest2d": bare("UpsamplingNearest2d", SHAPES[2], scale_factor=2),
}  # fmt: skip
# Forms of these classes with options that store weights otherwise.
FURTHER: dict[str, Entry] = {
    "Embedding, sparse": (lambda: nn.Embedding(5, 4, sparse=True), _indices),
    "EmbeddingBag, sparse": (lambda: nn.EmbeddingBag(5, 4, sparse=True), _indices),
    "Embedding, padding and norm": (lambda: nn.Embedding(5, 4, padding_idx=1, max_norm=1.0), _indices),
    "MultiheadAttention, other dimensions": (
        lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=5),
        lambda module, values: module(shaped(values, 3, 2, 4), shaped(values, 3, 2, 3), shaped(values, 3, 2, 5))[0],
    ),
    "Linear, no bias": bare("Linear", (4, 6), 6, 5, bias=False),
    "Linear, one output": bare("Linear", (4, 6), 6, 1),
    "Conv2d, depthwise": bare("Conv2d", SHAPES[2], 2, 2, 3, groups=2),
    "Conv2d, complex": on((2, 2, 4, 4), lambda: _Real(nn.Conv2d(2, 3, 3, dtype=torch.cfloat))),
    "Linear, complex": on((4, 6), lambda: _Real(nn.Linear(6, 5, dtype=torch.cfloat))),
    "Linear, half": on((4, 6), lambda: _Half(nn.Linear(6, 5, dtype=torch.bfloat16))),
    "Linear, double": on((4, 6), lambda: _Double(nn.Linear(6, 5, dtype=torch.float64))),
    "Linear, dynamically quantised": on((4, 6), lambda: _quantised(nn.Sequential(nn.Linear(6, 6)))),
    "LSTM, dynamically quantised": (
        lambda: _quantised(nn.ModuleList([nn.LSTM(4, 4)])), lambda module, values: module[0](shaped(values, 3, 2, 4))[0]
    ),
    "Linear, for quantised training": on((4, 6), lambda: _for_quantised_training()),
    "Linear, scripted": on((4, 6), lambda: torch.jit.script(nn.Linear(6, 5))),
    "Linear, empty": bare("Linear", (4, 6), 6, 0),
}  # fmt: skip


class _Real(nn.Module):
    dtype = torch.cfloat

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, values: Tensor) -> Tensor:
        found = self.inner(values.to(self.dtype))
        return found.abs() if found.is_complex() else found.to(values.dtype)


class _Half(_Real):
    dtype = torch.bfloat16


class _Double(_Real):
    dtype = torch.float64


def _quantised(module: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(module, {nn.Linear, nn.LSTM}, dtype=torch.qint8)


def _for_quantised_training() -> nn.Module:
    layer = nn.Sequential(nn.Linear(6, 6))
    layer.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")  # pyright: ignore[reportArgumentType]
    return torch.ao.quantization.prepare_qat(layer.train())
