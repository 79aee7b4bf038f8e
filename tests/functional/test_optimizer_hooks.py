"""Hooks on optimizers hold pruned weights at 0 in a loop by hand, and the check at the end finds what passed them."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lottery_callbacks.functional.optimizer_hooks import require_zeros, train_under_masks

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 0.01, amsgrad=True),
    "rprop": lambda parameters: torch.optim.Rprop(parameters, 0.01),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, 0.1, initial_accumulator_value=0.1),
}
STATE = {"momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "prev", "sum"}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def half(module, seed=1):
    generator = torch.Generator().manual_seed(seed)
    named = module.named_parameters()
    return {name: torch.rand(p.shape, generator=generator) < 0.5 for name, p in named if p.ndim == 2}


def batches(count=5):
    generator = torch.Generator().manual_seed(2)
    return [(torch.randn(7, 6, generator=generator), torch.arange(7) % 3) for _ in range(count)]


def zeros(module, masks):
    """+0.0 to the bit."""
    return all(not module.get_parameter(n)[~m].view(torch.int32).any() for n, m in masks.items())


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_weights_gradients_and_state_are_0_after_each_step_and_the_kept_take_the_masked_ones(make):
    module, masks = network(), half(network())
    optimizer = make(module.parameters())
    by_hand = network()
    reference = make(by_hand.parameters())
    with train_under_masks(module, masks, optimizer):
        assert zeros(module, masks)
        for name, mask in masks.items():
            by_hand.get_parameter(name).data.masked_fill_(~mask, 0)
        for images, labels in batches():
            for net, opt in ((module, optimizer), (by_hand, reference)):
                opt.zero_grad()
                F.cross_entropy(net(images), labels).backward()
                if net is by_hand:
                    for name, mask in masks.items():
                        net.get_parameter(name).grad.masked_fill_(~mask, 0)
                nn.utils.clip_grad_norm_(net.parameters(), 0.5)  # a norm of masked gradients
                opt.step()
            for name, mask in masks.items():
                by_hand.get_parameter(name).data.masked_fill_(~mask, 0)
                state = optimizer.state[module.get_parameter(name)]
                assert not any(value[~mask].any() for key, value in state.items() if key in STATE)
                assert not module.get_parameter(name).grad[~mask].any()
            assert zeros(module, masks)
    for one, other in zip(module.parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(one, other)


def test_accumulated_and_older_gradients_and_older_state_are_masked_too():
    module, masks = network(), half(network())
    optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
    for images, labels in batches(2):  # a dense step, then a gradient that stays
        F.cross_entropy(module(images), labels).backward()
        if not optimizer.state:
            optimizer.step()
    with train_under_masks(module, masks, optimizer):
        F.cross_entropy(module(images), labels).backward()
        optimizer.step()
        assert zeros(module, masks)
        for name, mask in masks.items():
            assert not optimizer.state[module.get_parameter(name)]["momentum_buffer"][~mask].any()


def test_a_removed_handle_leaves_the_training_dense():
    module, masks = network(), half(network())
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    handle = train_under_masks(module, masks, optimizer)
    handle.remove()
    handle.remove()
    images, labels = batches(1)[0]
    F.cross_entropy(module(images), labels).backward()
    optimizer.step()
    with pytest.raises(
        RuntimeError, match=r"at the end of the training: .* of 0\.weight are not 0, .* of 3\.weight are not 0; "
    ):
        require_zeros(module, masks)


def test_an_exception_in_the_block_passes_and_removes_the_hooks():
    module, masks = network(), half(network())
    optimizer = torch.optim.SGD(module.parameters(), 0.1)

    def train():
        with train_under_masks(module, masks, optimizer):
            module[0].weight.data.fill_(1.0)
            raise KeyError

    with pytest.raises(KeyError):
        train()
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_step_pre_hooks


class Writer:
    """What writes past the mask."""

    @staticmethod
    def value(module, masks):
        module[3].weight.data[~masks["3.weight"]] = 1e-30

    @staticmethod
    def nan(module, masks):
        module[3].weight.data[~masks["3.weight"]] = float("nan")

    @staticmethod
    def replacement(module, masks):
        module[3].weight = nn.Parameter(torch.ones(3, 8))

    @staticmethod
    def another_optimizer(module, masks):
        weight = nn.Parameter(module[3].weight.detach())  # another parameter in the same memory
        other = torch.optim.SGD([weight], 0.1)
        F.cross_entropy(F.linear(torch.ones(7, 8), weight), batches(1)[0][1]).backward()
        other.step()


@pytest.mark.parametrize("write", ["value", "nan", "replacement", "another_optimizer"])
def test_what_writes_past_the_mask_is_found_at_the_end_and_named(write):
    module, masks = network(), half(network())
    optimizer = torch.optim.AdamW(module.parameters())
    expected = r"^pruned weights are not 0 .*: \d+ of 10 pruned weights of 3\.weight are not 0; "
    with pytest.raises(RuntimeError, match=expected) as error, train_under_masks(module, masks, optimizer):
        getattr(Writer, write)(module, masks)
    assert "\n" not in str(error.value)


def test_the_check_takes_wrapped_modules_named_parameters_and_minus_0():
    module, masks = network(), half(network())
    for name, mask in masks.items():
        module.get_parameter(name).data.masked_fill_(~mask, -0.0)
    for of in (module, torch.compile(module), nn.DataParallel(module), dict(module.named_parameters())):
        require_zeros(of, masks)
    require_zeros(module, {})
    del module[3]
    with pytest.raises(RuntimeError, match=r"3\.weight has a mask of shape \(3, 8\), and is absent in the network"):
        require_zeros(module, masks)


def test_masks_and_optimizers_that_fit_nothing_are_refused_before_the_first_step():
    module, masks = network(), half(network())
    before = [parameter.clone() for parameter in module.parameters()]
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    for wrong, says in (
        ({"weight": masks["0.weight"]}, "no parameter has the mask's name and shape: weight;"),
        ({"0.weight": masks["3.weight"]}, r"no parameter has the mask's name and shape: 0\.weight;"),
        ({"0.weight": masks["0.weight"] * 0.5}, r"the mask of 0\.weight is float32 and holds 0\.5"),
    ):
        with pytest.raises(ValueError, match=f"^{says}"):
            train_under_masks(module, wrong, optimizer)
    for others in ((), (torch.optim.SGD(network().parameters(), 0.1),)):
        with pytest.raises(ValueError, match=r"^the optimizers hold no masked parameter"):
            train_under_masks(module, masks, *others)
    assert all(torch.equal(one, other) for one, other in zip(before, module.parameters(), strict=True))


def test_sparse_gradients_and_state_of_another_shape_are_refused():
    words = nn.Embedding(5, 3, sparse=True)
    with train_under_masks(words, {}, torch.optim.SparseAdam(words.parameters())):
        pass
    with pytest.raises(RuntimeError, match=r"^weight has sparse gradients"):  # noqa: SIM117
        with train_under_masks(words, {"weight": torch.eye(5, 3) > 0}, torch.optim.SparseAdam(words.parameters())):
            words(torch.tensor([1])).sum().backward()
    module, masks = network(), half(network())
    optimizer = torch.optim.Adafactor(module.parameters())
    images, labels = batches(1)[0]
    with train_under_masks(module, masks, optimizer):
        F.cross_entropy(module(images), labels).backward()
        with pytest.raises(RuntimeError, match=r"^Adafactor keeps state of another shape"):
            optimizer.step()


def test_complex_weights_of_either_precision_are_held():
    for dtype in (torch.complex64, torch.complex128):
        weight = nn.Parameter(torch.full((3, 3), 1 + 1j, dtype=dtype))
        mask = torch.eye(3) > 0
        optimizer = torch.optim.SGD([weight], 0.1, momentum=0.9)
        with train_under_masks({"w": weight}, {"w": mask}, optimizer):
            for _ in range(2):
                (weight * (2 - 1j)).abs().sum().backward()
                optimizer.step()
        assert torch.equal(weight != 0, mask)


def test_a_gradient_scaler_and_a_second_order_loss_work():
    module, masks = network(), half(network())
    optimizer = torch.optim.Adam(module.parameters())
    images, labels = batches(1)[0]
    with train_under_masks(module, masks, optimizer):
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
        scaler.scale(F.cross_entropy(module(images), labels)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        loss = F.cross_entropy(module(images), labels)
        loss.backward(create_graph=True)
        penalty = sum(parameter.grad.square().sum() for parameter in module.parameters())
        gradients = torch.autograd.grad(penalty, list(module.parameters()), allow_unused=True)
        assert gradients[0] is not None
        optimizer.step()
    assert zeros(module, masks)
