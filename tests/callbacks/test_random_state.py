import random

import numpy as np
import pytest
import torch

from lottery_callbacks import random_state


def draw():
    return torch.rand(3).tolist(), random.random(), random.gauss(0, 1), np.random.rand(3).tolist(), np.random.randn()  # noqa: NPY002


@pytest.fixture(autouse=True)
def _the_state_of_other_tests_is_put_back(global_rng):
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    yield
    random.setstate(before[0])
    np.random.set_state(before[1])  # noqa: NPY002
    torch.set_rng_state(before[2])


def test_restore_repeats_the_draws_of_torch_python_and_numpy():
    draw()  # leaves a second Gaussian waiting in Python and NumPy
    state = random_state.collect()
    first, second = draw(), draw()
    assert first != second
    random_state.restore(state)
    assert (draw(), draw()) == (first, second)
    random_state.restore(state)
    assert draw() == first


def test_collect_draws_nothing_and_is_a_copy(global_rng):
    before = global_rng()
    state = random_state.collect()
    assert global_rng() == before
    kept = state["torch"].clone()
    draw()
    assert torch.equal(state["torch"], kept)
    random_state.restore(state)
    assert global_rng() == before


def test_the_state_survives_a_file_of_tensors_and_primitives(tmp_path, global_rng):
    torch.save(random_state.collect(), tmp_path / "state.pt")
    before = global_rng()
    draw()
    random_state.restore(torch.load(tmp_path / "state.pt", weights_only=True))
    assert global_rng() == before


def test_forked_puts_the_state_back(global_rng):
    before = global_rng()
    with random_state.forked():
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        inside = draw()
        assert global_rng() != before
    assert global_rng() == before
    assert draw() != inside


def test_forked_puts_the_state_back_after_an_error(global_rng):
    def draw_and_fail():
        draw()
        raise ValueError("inside")

    before = global_rng()
    with pytest.raises(ValueError, match="inside"), random_state.forked():
        draw_and_fail()
    assert global_rng() == before
