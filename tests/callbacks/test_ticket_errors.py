import json

import pytest
import safetensors.torch
import torch
from torch import nn

from lottery_callbacks import RewindPoint, Ticket
from lottery_callbacks.rewinding import load_snapshot, snapshot


def dense_ticket(module):
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in module.named_parameters() if p.ndim > 1}
    return Ticket(masks, RewindPoint(0, snapshot(module)))


def bits(module):
    return {name: tensor.numpy().tobytes() for name, tensor in module.state_dict().items()}


def refused(path):
    with pytest.raises(ValueError, match="ticket") as error:
        Ticket.load(path)
    message = str(error.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message


@pytest.mark.parametrize("left", [0, 1, 7, 8, 9, 100, 0.25, 0.5, 0.9, -1], ids=str)
def test_a_truncated_file_is_refused_in_one_line_that_names_it(tmp_path, left):
    path = dense_ticket(nn.Linear(20, 10)).save(tmp_path / "level_03.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[: round(left * len(whole)) if isinstance(left, float) else left])
    assert "is missing or torn" in refused(path)


def test_a_missing_file_a_folder_and_garbage_are_refused(tmp_path):
    assert "is missing or torn" in refused(tmp_path / "absent.safetensors")
    assert "is missing or torn" in refused(tmp_path)
    (tmp_path / "garbage").write_bytes(bytes(range(256)) * 8)
    assert "is missing or torn" in refused(tmp_path / "garbage")
    torch.save({"w": torch.ones(3)}, tmp_path / "pickle.ckpt")
    assert "is missing or torn" in refused(tmp_path / "pickle.ckpt")


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {"format": "pt"},
        {"ticket": '{"format": "lottery-ticket/2"}'},
        {"ticket": "{}"},
        {"ticket": "no json"},
        {"ticket": "[]"},
        {"ticket": '{"format": "lottery-ticket/1"}'},
    ],
    ids=str,
)
def test_safetensors_that_are_no_ticket_are_refused(tmp_path, metadata):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"mask/w": torch.ones(3, dtype=torch.bool)}, path, metadata)
    refused(path)


def test_a_ticket_of_another_width_is_refused_by_name_and_shapes():
    module = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    ticket = dense_ticket(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5, bias=False)))
    before = bits(module)
    message = (
        "the ticket is for another architecture: 1.weight is (5, 3) in the ticket and (2, 3) in the network; "
        "build the network that the ticket was found on"
    )
    for action in (ticket.check, ticket.apply_):
        with pytest.raises(ValueError, match="architecture") as error:
            action(module)
        assert str(error.value) == message
    assert bits(module) == before


def test_a_mask_without_a_parameter_is_refused():
    ticket = dense_ticket(nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}))
    with pytest.raises(ValueError, match=r"b\.weight is \(2, 2\) in the ticket and absent in the network"):
        ticket.check(nn.ModuleDict({"a": nn.Linear(2, 2)}))


def test_a_parameter_or_buffer_that_the_ticket_lacks_is_refused_and_nothing_is_loaded():
    ticket = dense_ticket(nn.Sequential(nn.Linear(4, 3, bias=False)))
    module = nn.Sequential(nn.Linear(4, 3))
    before = bits(module)
    with pytest.raises(ValueError, match=r"0\.bias is absent in the ticket and \(3,\) in the network"):
        ticket.apply_(module)
    with pytest.raises(ValueError, match=r"1\.running_mean is absent in the ticket"):
        load_snapshot(
            nn.Sequential(nn.Identity(), nn.BatchNorm1d(3, affine=False, track_running_stats=True)),
            {
                "1.running_var": torch.ones(3),
                "1.num_batches_tracked": torch.tensor(0),
            },
        )
    assert bits(module) == before


def test_of_many_differences_the_first_in_the_network_is_named():
    narrow, wide = (nn.Sequential(*(nn.Linear(width, width) for _ in range(20))) for width in (3, 4))
    with pytest.raises(ValueError, match=r"architecture: 0\.weight is \(3, 3\) in the ticket"):
        dense_ticket(narrow).apply_(wide)


def test_a_header_with_an_empty_training_state_is_no_ticket(tmp_path):
    header = {"format": "lottery-ticket/1", "step": 0, "provenance": {}, "training": {}}
    path = tmp_path / "empty.safetensors"
    safetensors.torch.save_file({"mask/a": torch.ones(1)}, path, metadata={"ticket": json.dumps(header)})
    with pytest.raises(ValueError, match=r"empty\.safetensors is no ticket of format"):
        Ticket.load(path)
