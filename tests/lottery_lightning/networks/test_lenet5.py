import pytest
import torch

from lottery_lightning.networks import LeNet5


def test_it_has_the_papers_parameter_counts():
    parameters = dict(LeNet5().named_parameters())
    assert sum(p.numel() for name, p in parameters.items() if name.endswith("weight")) == 61_470
    assert sum(p.numel() for name, p in parameters.items() if name.endswith("bias")) == 236
    assert [tuple(p.shape) for name, p in parameters.items() if name.endswith("weight")] == [
        (6, 1, 5, 5), (16, 6, 5, 5), (120, 400), (84, 120), (10, 84),
    ]  # fmt: skip
    assert list(parameters)[-2:] == ["output.weight", "output.bias"]


def test_images_of_28_by_28_give_logits():
    assert LeNet5()(torch.randn(3, 1, 28, 28)).shape == (3, 10)
    assert LeNet5(classes=4)(torch.randn(2, 1, 28, 28)).shape == (2, 4)


def test_images_of_another_size_do_not_pass():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        LeNet5()(torch.randn(2, 1, 32, 32))


def test_every_pixel_of_the_image_reaches_the_logits():
    image = torch.randn(1, 1, 28, 28, requires_grad=True)
    torch.manual_seed(0)
    LeNet5()(image).square().sum().backward()
    touched = (image.grad != 0)[0, 0]
    assert touched.any(0).all()
    assert touched.any(1).all()


def test_reset_parameters_redraws_every_weight_from_the_global_seed():
    torch.manual_seed(1)
    network = LeNet5(init="kaiming_normal")
    first = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.reset_parameters()
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, first[name]) == name.endswith("bias"), name
    assert all((tensor == 0).all() for name, tensor in network.state_dict().items() if name.endswith("bias"))
