"""A stream of noise is the concatenation of its blocks, and goes on from any state to the same bits."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lottery_callbacks.functional import noise_stream
from lottery_callbacks.functional.noise_stream import NoiseStream


def draw(shape, generator, out):
    return torch.randn(shape, generator=generator) if out is None else out.normal_(generator=generator)


def stream(steps, seed="0 0 weight"):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noise_stream, "BLOCK", 2 * steps + 1)
        made = NoiseStream(draw, (2,), "cpu", seed)
    assert made.steps == steps
    return made


def taken(stream, count):
    return torch.stack([stream.next().clone() for _ in range(count)])


@given(st.integers(1, 5), st.integers(0, 12), st.integers(0, 12))
def test_a_state_goes_on_as_the_stream_does(steps, cut, again):
    whole = taken(stream(steps), 30)
    first = stream(steps)
    for step in range(cut):
        assert torch.equal(first.next(), whole[step])
    state = first.state_dict()
    first.next()  # changes no state that was given away
    second = stream(steps, "anything else")
    assert second.load(state, "")
    for step in range(cut, cut + again):
        assert torch.equal(second.next(), whole[step])
    third = stream(steps)
    assert third.load(second.state_dict(), "")
    assert torch.equal(third.next(), whole[cut + again])


def test_blocks_follow_one_another_and_seeds_differ():
    one = stream(3)
    drawn = taken(one, 7)
    assert len(drawn.unique(dim=0)) == 7
    again = stream(3)
    assert torch.equal(drawn, taken(again, 7))
    other = stream(3, "1 0 weight")
    assert not torch.isin(taken(other, 7), drawn).any()


def test_a_state_of_another_kind_of_device_begins_other_noise():
    one, other = stream(3), stream(3)
    state = one.state_dict() | {"device": "cuda"}
    assert not other.load(state, "after step 5")
    found = taken(other, 9)
    assert not torch.isin(found, taken(one, 9)).any()
    third = stream(3)
    assert not third.load(state, "after step 6")
    assert not torch.isin(taken(third, 9), found).any()


def test_a_step_larger_than_a_block_is_drawn_alone_and_memory_is_used_again(monkeypatch):
    monkeypatch.setattr(noise_stream, "BLOCK", 10)
    large = NoiseStream(draw, (4, 3), "cpu", "")
    assert large.steps == 1
    places = {large.next().data_ptr() for _ in range(5)}
    assert len(places) == 1
    assert NoiseStream(draw, (0,), "cpu", "").next().shape == (0,)
