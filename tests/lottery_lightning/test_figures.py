import random
import struct

import pytest

from lottery_lightning.figures import lottery_figure


def rows(trials=2, levels=4, arms=("ticket", "reinit", "random", "one_shot")):
    source = random.Random(0)
    return [
        {
            "trial": trial,
            "level": level,
            "arm": arm,
            "draw": 0,
            "density": 0.8**level,
            "early_stop_iteration": source.randrange(1_000, 9_000),
            "test_acc_early_stop": 0.9 + 0.05 * source.random(),
            "test_acc_end": 0.9 + 0.05 * source.random(),
        }
        for trial in range(trials)
        for level in range(levels + 1)
        for arm in arms
        if level or arm == "ticket"
    ]


def size(png):
    """Width and height, after a look at the signature and the last chunk."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert png[-12:] == b"\x00\x00\x00\x00IEND\xaeB`\x82"
    return struct.unpack(">2I", png[16:24])


def test_the_bytes_are_a_png_of_a_readable_size():
    png = lottery_figure(rows(), 50_000)
    width, height = size(png)
    assert 1_000 <= width <= 3_000
    assert 400 <= height <= 1_200
    assert 20_000 < len(png) < 1_000_000


def test_the_same_rows_give_the_same_bytes_and_other_rows_others():
    png = lottery_figure(rows(), 50_000)
    assert lottery_figure(rows(), 50_000) == png
    assert lottery_figure(list(reversed(rows())), 50_000) == png
    changed = rows()
    changed[-1]["test_acc_end"] = 0.5
    assert lottery_figure(changed, 50_000) != png
    assert lottery_figure(rows(), 10_000) != png


@pytest.mark.parametrize(
    "made",
    [rows(trials=1, levels=1), rows(arms=("ticket",)), rows(trials=1, levels=30, arms=("ticket", "one_shot"))],
    ids=["one level", "tickets alone", "many levels"],
)
def test_small_and_large_experiments_are_drawn(made):
    width, height = size(lottery_figure(made, 300))
    assert width > height > 400


def test_a_figure_draws_nothing_from_the_global_random_state(global_rng):
    before = global_rng()
    lottery_figure(rows(trials=1, levels=1), 300)
    assert global_rng() == before
