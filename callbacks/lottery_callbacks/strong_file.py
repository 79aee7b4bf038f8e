"""The file of a strong ticket: which edges are kept. Their weights are not in it, since seed and place give them."""

import json
import os
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from lottery_callbacks.chain_of import chain_of
from lottery_callbacks.functional.strong_edges import KeptEdges, RandomLayer
from lottery_callbacks.functional.strong_layer import StrongLayer
from lottery_callbacks.strong_modules import StrongModule, form_of, matrix_of
from lottery_callbacks.strong_network import Part, StrongNetwork, assembled, known_inputs
from lottery_callbacks.ticket import write_atomically

FORMAT = "strong-ticket/2"
KEPT = ("units", "outputs", "places")


def save_strong_ticket(ticket: StrongNetwork, path: str | os.PathLike[str]) -> Path:
    """Write atomically, as safetensors; equal tickets give equal bytes. 8 bytes a kept edge, and 4 a hidden unit.

    Of each layer: its name, the address of its random layers (seed, number, n, shape and rules), scale and counts, a
    digest of the kept weights, and which units and edges are kept. Lists of misses and the like stay behind.
    """
    tensors = {
        f"{place}.{name}": getattr(layer, name).cpu().int()
        for place, layer in enumerate(ticket.strong)
        for name in KEPT
    }
    header = {"format": FORMAT, "layers": [_described(layer) for layer in ticket.strong]}
    metadata = {"ticket": json.dumps(header, sort_keys=True)}  # one entry: safetensors does not keep their order
    return write_atomically(path, safetensors.torch.save(tensors, metadata))


def load_strong_ticket(path: str | os.PathLike[str], network: nn.Module) -> StrongNetwork:
    """The ticket, on the CPU: its weights are regenerated, and it is verified.

    Args:
        path: a file of `save_strong_ticket`.
        network: a module of the target's architecture. Errors, certificate and search compare with its weights, so that
            they say something if these are the target's; the ticket itself does not depend on them.

    Raises:
        ValueError: the file is missing, torn or no strong ticket; it is of another architecture; or the weights
            regenerated are not those of the file.
        RuntimeError: what is kept is no ticket of that construction; see `StrongNetwork.verify`.
    """
    layers, tensors = _read(path)
    chain = chain_of(network)
    names = [name for name, module in chain if form_of(module)]
    if names != [layer["name"] for layer in layers]:
        raise ValueError(
            f"{path} is a ticket of {', '.join(layer['name'] for layer in layers)}: the network has {names}"
        )

    known = known_inputs(chain, "nonnegative")

    def read(place: int, name: str, module: Any, before: float) -> Part:
        own = layers[place]
        weight = module.weight.detach().cpu().double() / own["scale"]
        bias = torch.zeros(len(weight), dtype=torch.float64) if module.bias is None else module.bias.detach().cpu()
        bias = bias.double() / (before * own["scale"])
        matrix = matrix_of(weight)
        random = RandomLayer(**own["random"] | {"shape": tuple(own["random"]["shape"])})
        biases = 0 if module.bias is None else len(bias)
        if random.shape != tuple(matrix.shape) or random.biases != biases:
            raise ValueError(
                f"{path} has {name} as a matrix {[*random.shape]} with {random.biases} biases: the network's is "
                f"{[*matrix.shape]} with {biases}"
            )
        if random.inputs == "nonnegative" and known[place] == "any":
            raise ValueError(f"{path} relies on inputs >= 0 of {name}: no ReLU is before it in the network")
        kept = [tensors[f"{place}.{kept}"].long() for kept in KEPT]
        ticket = _layer(random, kept, matrix, bias, module.bias is not None)
        if _digest(ticket.edges) != own["digest"] or ticket.counts._asdict() != own["counts"]:
            raise ValueError(f"{path}: the weights of {name} are not those that were saved: this generator differs")
        return Part(ticket, own["size"], own["scale"], weight, bias)

    found = assembled(chain, read)
    for layer, own in zip(found.strong, layers, strict=True):
        if layer.kind != own["kind"]:
            raise ValueError(f"{path} has {layer.name} as a {own['kind']}: the network's is a {layer.kind}")
    found.verify()
    return found


def _described(layer: StrongModule) -> dict[str, Any]:
    return {
        "name": layer.name,
        "kind": layer.kind,
        "random": asdict(layer.random),
        "scale": layer.scale,
        "size": layer.size,
        "counts": layer.counts._asdict(),
        "digest": _digest(layer.edges),
    }


def _digest(edges: KeptEdges) -> str:
    weights = torch.cat([edges.first.cpu(), edges.second.cpu()]).float().numpy()
    return sha256(weights.astype("<f4").tobytes()).hexdigest()


def _read(path: str | os.PathLike[str]) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("ticket", "{}"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no iterator)
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path} is missing or torn ({error}): restore it, or find the ticket again") from error
    if header.get("format") != FORMAT:
        raise ValueError(f"{path} is no ticket of format {FORMAT}: give a file of save_strong_ticket")
    return header["layers"], tensors


def _layer(random: RandomLayer, kept: list[Tensor], matrix: Tensor, bias: Tensor, has_bias: bool) -> StrongLayer:
    """The ticket of a layer from its kept units, outputs and places, its errors by the target's weights."""
    units, outputs, places = kept
    inputs = units // (2 * random.n)
    inputs = inputs.masked_fill(inputs == random.shape[1], -1)
    second = random.second(outputs, units[places])
    edges = KeptEdges(units, inputs, random.first(units), outputs, places, second)
    positive, negative, constant = edges.effective(random.shape)
    errors = [(positive - matrix).abs(), (negative + matrix).abs()][: len(random.signs)]
    group = random.shape[0] // max(1, random.biases)
    bias_errors = (constant[::group] - bias).abs() if has_bias else bias[:0]
    return StrongLayer(random, edges, torch.stack(errors), bias_errors, [], [], None)
