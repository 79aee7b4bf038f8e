import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lottery_callbacks.functional import counter_random
from lottery_callbacks.functional.counter_random import WORD, philox, uniform

KNOWN = [  # Random123, kat_vectors: philox4x32 10
    ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((WORD, WORD, WORD, WORD), (WORD, WORD), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]
words = st.integers(0, WORD)


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers(counter, key, answer):
    assert " ".join(f"{int(word):08x}" for word in philox([torch.tensor(c) for c in counter], key)) == answer


def reference(counter, key):
    """Philox4x32-10 in Python's unbounded integers."""
    a, b, c, d = counter
    k, m = key
    for _ in range(10):
        left, right = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (right >> 32) ^ b ^ k, right & WORD, (left >> 32) ^ d ^ m, left & WORD
        k, m = (k + 0x9E3779B9) & WORD, (m + 0xBB67AE85) & WORD
    return a, b, c, d


@given(st.integers(0, 2**64 - 1), words, words, words, words)
def test_address_is_the_counter_and_seed_the_key(seed, layer, sublayer, row, column):
    word = reference((row, column, layer, sublayer), (seed & WORD, seed >> 32))[0]
    value = uniform(seed, layer, sublayer, torch.tensor(row), torch.tensor(column))
    assert value.dtype == torch.float32
    assert value.item() * 2**24 == 2 * (word >> 8) + 1 - 2**24


def test_a_weight_alone_is_that_of_the_block(monkeypatch):
    monkeypatch.setattr(counter_random, "PIECE", 7)
    rows, columns = torch.arange(5).unsqueeze(1), torch.arange(100, 111)
    block = uniform(3, 1, 0, rows, columns)
    assert block.shape == (5, 11)
    alone = [[uniform(3, 1, 0, torch.tensor(r), torch.tensor(c)) for c in range(100, 111)] for r in range(5)]
    assert torch.equal(block, torch.tensor(alone))
    for other in ((4, 1, 0), (3 + 2**32, 1, 0), (3, 0, 0), (3, 1, 1)):
        assert not torch.isin(block, uniform(*other, rows, columns)).any()


@pytest.mark.usefixtures("global_rng_untouched")
def test_uniform_on_the_open_interval():
    values = uniform(0, 0, 0, torch.arange(300).unsqueeze(1), torch.arange(700)).double()
    scaled = values * 2**24
    assert torch.equal(scaled, scaled.round())
    assert (scaled.long() % 2 == 1).all()
    assert values.abs().max() < 1
    ordered = values.flatten().sort().values
    even = torch.linspace(-1, 1, len(ordered), dtype=torch.float64)
    assert (ordered - even).abs().max() / 2 < 1.63 / len(ordered) ** 0.5  # Kolmogorov-Smirnov, 1 %
    for other in (values[1:] * values[:-1], values[:, 1:] * values[:, :-1]):
        assert abs(other.mean()) < 4 / 3 / other.numel() ** 0.5  # neighbours are uncorrelated: 4 standard errors


def test_out_of_range_is_refused():
    for seed, layer, sublayer in [(-1, 0, 0), (2**64, 0, 0), (0, -1, 0), (0, 0, 2**32)]:
        with pytest.raises(ValueError, match=f"seed={seed}, layer={layer}, sublayer={sublayer}"):
            uniform(seed, layer, sublayer, torch.tensor(0), torch.tensor(0))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_same_on_a_gpu():
    rows, columns = torch.arange(1000).unsqueeze(1), torch.arange(100)
    assert torch.equal(uniform(5, 1, 2, rows, columns), uniform(5, 1, 2, rows.cuda(), columns.cuda()).cpu())
