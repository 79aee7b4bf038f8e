"""Tensors as bytes: their checksum, and the safetensors format, which safetensors itself writes with NumPy alone."""

import ctypes
import json
from collections.abc import Mapping
from hashlib import sha256

import torch
from torch import Tensor

NAMES = {  # in the order in which they lie in a file: the widest first
    torch.uint64: "U64", torch.int64: "I64", torch.float64: "F64", torch.complex64: "C64",
    torch.float32: "F32", torch.uint32: "U32", torch.int32: "I32",
    torch.bfloat16: "BF16", torch.float16: "F16", torch.uint16: "U16", torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip


def raw(tensor: Tensor) -> bytes:
    r"""The values of `tensor` in row-major order, as they lie in memory.

    >>> raw(torch.tensor([[True, False]]))
    b'\x01\x00'
    """
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return ctypes.string_at(plain.data_ptr(), plain.numel() * plain.element_size()) if plain.numel() else b""


def checksum(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """SHA-256 of `text` and of each tensor's name, dtype, shape and bits, whatever the order of the names."""
    sha = sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        sha.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(raw(tensor))
    return sha.hexdigest()


def require_storable(tensors: Mapping[str, Tensor]) -> None:
    """Check that a safetensors file can hold `tensors`.

    Raises:
        ValueError: names a tensor that is sparse, without values (meta) or of a dtype that the format does not have.
    """
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in NAMES:
            kind = "on the meta device" if tensor.is_meta else f"a {tensor.layout} tensor of {tensor.dtype}"
            raise ValueError(f"{name} is {kind}, which no safetensors file can hold: convert it or leave it out")


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file of `tensors`, with the bytes that `safetensors.torch.save` gives. Needs no NumPy.

    The tensors lie by dtype in the order of `NAMES`, then by name, so that each is aligned.

    Raises:
        ValueError: a tensor that `require_storable` refuses.
    """
    require_storable(tensors)
    ranks = {dtype: rank for rank, dtype in enumerate(NAMES)}
    order = sorted(tensors, key=lambda name: (ranks[tensors[name].dtype], name))
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    parts, end = [], 0
    for name in order:
        part = raw(tensors[name])
        dtype, shape = NAMES[tensors[name].dtype], list(tensors[name].shape)
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end := end + len(part)]}
        parts.append(part)
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    return b"".join([len(header).to_bytes(8, "little"), header, *parts])
