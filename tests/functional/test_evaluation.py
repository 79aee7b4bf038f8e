"""Loss and error: the mean over all examples, of what can be classified."""

import math

import pytest
import torch
from torch import nn

from lottery_callbacks.functional.evaluation import classification, evaluate_on


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))


def data(seed=0, sizes=(16, 16, 5)):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, 6, generator=generator), torch.randint(3, (n,), generator=generator)) for n in sizes]


def test_an_evaluation_is_the_mean_over_all_examples_in_eval_mode():
    one, batches = network(), data()
    found = evaluate_on(batches)(one)
    assert one.training
    inputs, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    with torch.no_grad():
        logits = one.eval()(inputs)
    assert found.loss == pytest.approx(float(nn.functional.cross_entropy(logits, labels)), rel=1e-5)
    assert found.error == float((logits.argmax(1) != labels).double().mean())
    assert 0 < found.error < 1


def test_a_loss_of_ones_own_may_know_of_no_error():
    def squares(one, inputs):
        assert not torch.is_grad_enabled()
        return one(inputs).square().mean(1)

    found = evaluate_on([inputs for inputs, _ in data()], squares)(network())
    assert found.loss > 0
    assert math.isnan(found.error)


def test_the_sums_of_several_processes_are_added_up():
    one, batches = network(), data()
    others = []
    evaluate_on(batches[1:], reduce=lambda sums: others.append(sums) or sums)(one)
    assert evaluate_on(batches[:1], reduce=lambda sums: sums + others[0])(one) == pytest.approx(
        evaluate_on(batches)(one), rel=1e-12
    )


def test_logits_of_low_precision_are_evaluated_in_float32():
    one, (inputs, labels) = network().bfloat16().eval(), data()[0]
    losses, wrong = classification(one, (inputs.bfloat16(), labels))
    assert losses.dtype == torch.float32
    assert losses.shape == wrong.shape == labels.shape


class Fixed(nn.Module):
    """No parameters; a buffer or nothing, and several outputs where asked for."""

    def __init__(self, weight=None, outputs=None):
        super().__init__()
        self.outputs = outputs
        if weight is not None:
            self.register_buffer("weight", weight)

    def forward(self, inputs):
        logits = inputs[:, :3] if not self._buffers else inputs @ self.weight
        return logits if self.outputs is None else self.outputs(logits)


def test_a_network_of_buffers_and_one_of_nothing_are_evaluated():
    expected = evaluate_on(data())(Fixed(torch.eye(6)[:, :3]))
    assert expected == evaluate_on(data())(Fixed())
    assert expected.loss > 0


def test_batches_come_to_the_device_of_the_buffers():
    losses, wrong = classification(Fixed(torch.eye(6, device="meta")[:, :3]), data()[0])
    assert losses.is_meta
    assert wrong.is_meta


@pytest.mark.parametrize(
    "batch",
    [
        data()[0][0],
        (*data()[0], torch.ones(16)),
        {"x": data()[0][0]},
        (data()[0][0], data()[0][1].tolist()),
        (torch.ones(4, 6), torch.ones(4, 3)),
    ],
)
def test_batches_that_are_no_inputs_and_class_labels_are_refused_in_one_line(batch):
    message = r"^the batches are no \(inputs, class labels\): give a loss that treats them$"
    with pytest.raises(ValueError, match=message):
        classification(network(), batch)


def test_outputs_that_are_no_tensor_are_refused_in_one_line():
    with pytest.raises(
        ValueError, match=r"^Fixed gives a tuple and no tensor: name the submodule that gives logits, or"
    ):
        classification(Fixed(outputs=lambda logits: (logits, logits)), data()[0])
