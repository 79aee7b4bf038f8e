"""Running statistics that are computed anew: means over batches, in any precision and of any batch norm."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from lottery_callbacks.functional.running_statistics import batch_norms, estimate_anew, treatment


def batches(count, size=64):
    generator = torch.Generator().manual_seed(0)
    return [2 * torch.randn(size, 2, generator=generator) + 5 for _ in range(count)]


def norm(**options):
    made = nn.BatchNorm1d(2, **options)
    with torch.no_grad():
        made.weight.copy_(torch.tensor([1.3, -0.7]))
    return made


def test_statistics_are_those_of_torchs_own_cumulative_average():
    one, other, data = norm(momentum=0.3).eval(), norm(momentum=None), batches(5)
    estimate_anew(one, lambda network: [network(inputs) for inputs in data])
    for inputs in data:
        other(inputs)
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])
    assert (one.momentum, one.training) == (0.3, False)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_in_low_precision_many_batches_have_their_true_mean(kind):
    one, data = norm().to(kind), [inputs.to(kind) for inputs in batches(300)]
    parameters = {name: (p, p.data_ptr(), p.detach().clone()) for name, p in one.named_parameters()}
    estimate_anew(one, lambda network: [network(inputs) for inputs in data])
    every = torch.stack(data).double()
    unit = torch.finfo(kind).eps
    assert one.running_mean.dtype == one.running_var.dtype == kind
    assert torch.allclose(one.running_mean.double(), every.mean((0, 1)), rtol=unit)
    assert torch.allclose(one.running_var.double(), every.var(1).mean(0), rtol=unit)
    for name, (parameter, place, value) in parameters.items():
        assert one.get_parameter(name) is parameter
        assert parameter.data_ptr() == place
        assert parameter.dtype == kind
        assert torch.equal(parameter, value)
    assert one.training


def test_batch_norm_without_a_counter_is_averaged_and_has_none_afterwards():
    one, other = norm(), norm()
    one.num_batches_tracked = None
    for made in (one, other):
        estimate_anew(made, lambda network: [network(inputs) for inputs in batches(4)])
    assert torch.equal(one.running_mean, other.running_mean)
    assert torch.equal(one.running_var, other.running_var)
    assert one.num_batches_tracked is None
    assert other.num_batches_tracked == 4
    with pytest.raises(ValueError, match="reestimate ran no batch"):
        estimate_anew(one, lambda network: None)


def test_after_an_error_layers_are_as_before_but_for_their_statistics():
    one = norm().bfloat16()
    before = deepcopy(one)
    with pytest.raises(ZeroDivisionError):
        estimate_anew(one, lambda network: 1 / 0)
    assert {p.dtype for p in one.parameters()} == {one.running_mean.dtype} == {torch.bfloat16}
    assert torch.equal(one.weight, before.weight)
    assert (one.momentum, one.training) == (0.1, True)


def test_only_batch_norm_is_reestimated_and_what_is_done_is_recorded():
    tracked, instance = nn.BatchNorm1d(2), nn.InstanceNorm1d(2, track_running_stats=True)
    without = nn.BatchNorm1d(2, track_running_stats=False), nn.InstanceNorm1d(2), nn.Linear(2, 2)
    assert batch_norms(nn.Sequential(tracked, instance, *without)) == [tracked]
    for parts, expected in (
        ([tracked, instance, *without], ("average", "reestimate")),
        ([instance, *without], ("average", "average")),
        (without, ("none", "none")),
    ):
        network = nn.Sequential(*parts)
        assert (treatment(network, "average"), treatment(network, "reestimate")) == expected
