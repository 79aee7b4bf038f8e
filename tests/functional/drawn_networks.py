"""What the tests of hidden units share: networks that are not all alike inside, and what they compute."""

from copy import deepcopy

import torch


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def drawn(make, seed=0):
    """A network whose norm layers and biases are not all alike, and its state."""
    torch.manual_seed(seed)
    network = make()
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.endswith(("running_mean", "running_var", "bias")) or (tensor.ndim == 1 and "weight" in name):
                tensor.uniform_(0.5, 1.5)
    return network, {name: tensor.clone() for name, tensor in network.state_dict().items()}


def outputs(network, state, inputs):
    """In float64 and evaluation, with the weights of `state`."""
    other = deepcopy(network).double().eval()
    other.load_state_dict(state)
    with torch.no_grad():
        return other(inputs.double())
