"""The checksum of a ticket's file: a flipped bit is never a ticket, a torn file is called torn, old files load."""

import json
import re

import pytest
import safetensors.torch
import torch
from torch import nn

from lottery_callbacks import RewindPoint, Ticket
from lottery_callbacks.functional.tensor_bytes import NAMES, checksum, safetensors_bytes
from lottery_callbacks.rewinding import snapshot


def ticket(step=3, **provenance):
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(6.0).view(2, 3))
        layer.bias.copy_(torch.tensor([0.5, -0.25]))
    training = {"optimizers": [{"state": {0: {"exp_avg": torch.ones(2, 3)}}}]}
    masks = {"weight": torch.tensor([[True, False, True], [True, True, False]])}
    return Ticket(masks, RewindPoint(step, snapshot(layer), training), provenance or {"level": 1})


def header_of(path):
    with safetensors.safe_open(path, "pt") as file:
        return json.loads(file.metadata()["ticket"])


def rewrite(path, header):
    """The same tensors under another header, as another program would write them."""
    safetensors.torch.save_file(safetensors.torch.load_file(path), path, {"ticket": json.dumps(header)})


def test_any_flipped_bit_is_refused_in_one_line(tmp_path):
    path = ticket().save(tmp_path / "ticket.safetensors")
    whole = path.read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    damaged = torn = 0
    for place in range(len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            loaded = Ticket.load(path)
        except ValueError as error:
            message = str(error)
            assert message.startswith(str(path))
            assert "\n" not in message
            damaged += "damaged" in message
            torn += "torn" in message
            assert "damaged" in message or place < length, place  # of a tensor's bits it is always said
        else:  # the key `checksum` itself, without which the file is one of an older version
            assert loaded.save(tmp_path / "other").read_bytes() == whole
            assert place < length
    assert damaged > 0.8 * len(whole)
    assert torn < 0.2 * length


def test_every_bit_of_a_tensor_counts_and_the_message_says_what_happened(tmp_path):
    path = ticket().save(tmp_path / "ticket.safetensors")
    whole = path.read_bytes()
    for place in (-1, -6, -7, -20, -50):  # masks, rewind tensors, moments
        for bit in (0, 3, 7):
            flipped = bytearray(whole)
            flipped[place] ^= 1 << bit
            path.write_bytes(flipped)
            with pytest.raises(ValueError, match=re.escape(str(path)) + " is damaged, its checksum differs: a bit fl"):
                Ticket.load(path)


@pytest.mark.parametrize("change", [{"step": 4}, {"provenance": {"level": 2}}, {"density": 0.1}, {"extra": 1}], ids=str)
def test_an_edited_header_is_refused_and_another_order_of_its_keys_is_not(tmp_path, change):
    path = ticket().save(tmp_path / "ticket")
    header = header_of(path)
    rewrite(path, dict(reversed(header.items())))
    assert Ticket.load(path).rewind.step == 3
    rewrite(path, header | change)
    with pytest.raises(ValueError, match="checksum differs"):
        Ticket.load(path)


def test_swapped_tensors_of_equal_shape_are_refused(tmp_path):
    both = {"a": torch.ones(2), "b": torch.zeros(2)}
    path = Ticket({}, RewindPoint(0, both)).save(tmp_path / "ticket")
    header = header_of(path)
    safetensors.torch.save_file({"rewind/a": both["b"], "rewind/b": both["a"]}, path, {"ticket": json.dumps(header)})
    with pytest.raises(ValueError, match="checksum differs"):
        Ticket.load(path)


def test_a_file_of_an_older_version_has_no_checksum_and_loads(tmp_path):
    path = ticket().save(tmp_path / "ticket")
    new = path.read_bytes()
    header = header_of(path)
    assert len(header.pop("checksum")) == 64
    assert header["format"] == "lottery-ticket/1"  # an older version reads the new file as well
    rewrite(path, header)
    assert Ticket.load(path).save(tmp_path / "again").read_bytes() == new


def test_masks_of_a_file_are_checked_like_those_made_by_hand(tmp_path):
    path = ticket().save(tmp_path / "ticket")
    header = header_of(path)
    header.pop("checksum")
    tensors = safetensors.torch.load_file(path)
    tensors["mask/weight"] = tensors["mask/weight"].to(torch.uint8) * 255
    safetensors.torch.save_file(tensors, path, {"ticket": json.dumps(header)})
    with pytest.raises(ValueError, match=r"ticket is no valid ticket: the mask of weight is uint8 and holds 255"):
        Ticket.load(path)


def test_torn_and_overlong_files_are_told_from_damaged_ones(tmp_path):
    path = ticket().save(tmp_path / "ticket")
    whole = path.read_bytes()
    for left in (0, 5, 50, len(whole) - 1):
        path.write_bytes(whole[:left])
        with pytest.raises(ValueError, match="is missing or torn"):
            Ticket.load(path)
    for other in (whole + b"\0", whole[:20] + b"#" + whole[21:]):
        path.write_bytes(other)
        with pytest.raises(ValueError, match="is damaged"):
            Ticket.load(path)


def test_equal_provenance_gives_equal_bytes_before_and_after_a_file(tmp_path):
    first = ticket(rates={10: 0.1, 9: 0.2}, of=(1, 2)).save(tmp_path / "one")
    assert Ticket.load(first).save(tmp_path / "two").read_bytes() == first.read_bytes()
    with pytest.raises(ValueError, match=r"^the provenance is no JSON .*set"):
        ticket(names={"a"}).save(tmp_path / "three")


def test_what_a_file_cannot_hold_is_refused_by_name(tmp_path):
    for tensor, says in ((torch.eye(2).to_sparse(), "sparse"), (torch.eye(2, device="meta"), "meta")):
        with pytest.raises(ValueError, match=rf"^rewind/w is .*{says}"):
            Ticket({}, RewindPoint(0, {"w": tensor})).save(tmp_path / "t")
    with pytest.raises(ValueError, match=r"^rewind/w is a torch\.strided tensor of torch\.complex128"):
        Ticket({}, RewindPoint(0, {"w": torch.ones(2, dtype=torch.complex128)})).save(tmp_path / "t")


def test_the_bytes_are_those_of_safetensors_for_every_dtype_shape_and_layout():
    tensors = {f"{name}": torch.tensor([0, 1, 1]).to(dtype) for dtype, name in NAMES.items()}
    tensors |= {"é 'x\"\\/": torch.ones(2), "none": torch.empty(0, 3), "scalar": torch.tensor(2.0), "a": torch.ones(1)}
    metadata = {"ticket": '{"ä": "\\n"}'}
    assert safetensors_bytes(tensors, metadata) == safetensors.torch.save(tensors, metadata)
    assert safetensors_bytes({}, {}) == safetensors.torch.save({})
    turned = torch.arange(6.0).view(2, 3).t()
    read = safetensors.torch.load(safetensors_bytes({"t": turned, "c": torch.tensor([1j]).conj()}, {}))
    assert torch.equal(read["t"], turned)
    assert torch.equal(read["c"], torch.tensor([-1j]))


def test_the_checksum_sees_names_dtypes_shapes_and_bits_and_no_order():
    base = {"a": torch.zeros(4), "b": torch.ones(2)}
    assert checksum(base) == checksum(dict(reversed(base.items())))
    others = [
        {"a": torch.zeros(2, 2), "b": torch.ones(2)},
        {"a": torch.zeros(4, dtype=torch.int32), "b": torch.ones(2)},
        {"a": -torch.zeros(4), "b": torch.ones(2)},
        {"a": torch.zeros(4), "c": torch.ones(2)},
        {"a": torch.zeros(4)},
    ]
    assert len({checksum(base), checksum(base, "text"), *map(checksum, others)}) == 7
