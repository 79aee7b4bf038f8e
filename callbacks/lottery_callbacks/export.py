"""Sparse networks as plain dense ONNX files."""

import os
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lottery_callbacks.functional.modes import evaluating
from lottery_callbacks.names import canonical
from lottery_callbacks.ticket import write_atomically


def export_onnx(
    network: nn.Module, example: Tensor | Sequence[Tensor], path: str | os.PathLike[str], **options: Any
) -> dict[str, int]:
    """Write `network` as it stands, in eval mode, as one plain ONNX file; pruned weights are ordinary zeros in it.

    ```python
    ticket.for_submodule("network").apply_(network)  # or load a trained checkpoint
    zeros = export_onnx(network, images[:1], "network.onnx", dynamic_shapes=({0: "batch"},))
    assert zeros["0.weight"] == int((~masks["0.weight"]).sum())
    ```

    Every weight is in the file to the bit and under its own name, since the graph is written unoptimised: a runtime
    folds and fuses when it loads it. Tied weights are there once. The file has the dense network's size and speed.

    Args:
        network: a plain network, or one within which `torch.compile` is used; its modes are as before afterwards.
        example: its input, or its inputs in order; shapes are fixed to theirs unless `dynamic_shapes` frees them.
        path: where the file is written, atomically.
        options: of `torch.onnx.export`: dynamic_shapes, input_names, output_names, opset_version.

    Returns:
        The number of zeros in each parameter and buffer, counted in the file as written, by its name.

    Raises:
        RuntimeError: onnx or onnxscript is missing.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401 (torch's exporter imports it)
    except ImportError as error:
        raise RuntimeError(f"{error.name} is missing: pip install 'lottery-lightning[export]'") from error
    inputs = (example,) if isinstance(example, Tensor) else tuple(example)
    with evaluating(network), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*_flat_weights.* were assigned during export")  # an LSTM's own aliases
        program = torch.onnx.export(network, inputs, dynamo=True, optimize=False, verbose=False, **options)
    assert program is not None
    for name, value in list(program.model.graph.initializers.items()):
        value.name = canonical(name)
    write_atomically(path, program.model_proto.SerializeToString())
    arrays = ((tensor.name, onnx.numpy_helper.to_array(tensor)) for tensor in onnx.load(path).graph.initializer)
    return {name: int((array == 0).sum()) for name, array in arrays}
