"""The element-wise optimizers of torch leave pruned weights at +0.0, so that no mask is needed after their step."""

import pytest
import torch
from torch import nn, optim

from lottery_callbacks.masked_training import KEEP_ZEROS, keeps_zeros

OPTIONS = [
    {},
    {"weight_decay": 0.1},
    {"maximize": True},
    {"foreach": True},
    {"fused": True},
    {"amsgrad": True},
    {"momentum": 0.9, "weight_decay": 0.1},
    {"momentum": 0.9, "nesterov": True},
    {"centered": True, "momentum": 0.9},
    {"lr": torch.tensor(0.1)},
]


def make(cls, weight, options):
    try:
        return cls([weight], **{"lr": 0.1} | options)
    except (TypeError, ValueError, RuntimeError):
        return None  # this optimizer has no such option


@pytest.mark.parametrize("cls", sorted(KEEP_ZEROS, key=str), ids=lambda cls: cls.__name__)
def test_a_step_leaves_zeros_of_every_bit(cls):
    tried = 0
    for options in OPTIONS:
        generator = torch.Generator().manual_seed(0)
        mask = torch.rand(33, generator=generator) < 0.3
        weight = nn.Parameter(torch.where(mask, torch.randn(33, generator=generator), 0.0))
        start = weight.detach().clone()
        if (optimizer := make(cls, weight, options)) is None:
            continue
        for size in (1.0, 1e-30, 1e30, 1.0, 1.0):  # also where the steps of the others under- and overflow
            weight.grad = torch.where(mask, size * torch.randn(33, generator=generator), 0.0)
            try:
                optimizer.step()
            except (RuntimeError, ValueError):
                break
        else:
            tried += 1
            assert keeps_zeros(optimizer)
            assert weight.detach().view(torch.int32)[~mask].count_nonzero() == 0, options
            assert not torch.equal(weight.detach()[mask], start[mask])
    assert tried >= 3


def test_other_optimizers_and_hooks_of_others_are_masked_after():
    weight = nn.Parameter(torch.zeros(3))

    class Noisy(optim.SGD):
        pass

    assert not keeps_zeros(Noisy([weight], lr=0.1))
    plain = optim.SGD([weight], lr=0.1)
    assert keeps_zeros(plain)
    plain.register_step_post_hook(lambda *_: None)  # as ours
    assert keeps_zeros(plain)
    plain.register_step_post_hook(lambda *_: None)
    assert not keeps_zeros(plain)
