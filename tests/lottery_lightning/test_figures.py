import random
import struct

import pytest
import torch

from lottery_callbacks import Ticket
from lottery_callbacks.rewinding import RewindPoint
from lottery_lightning.figures import kept_map, lottery_figure, mask_figure


def rows(trials=2, levels=4, arms=("ticket", "reinit", "layerwise_random", "global_random", "one_shot")):
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


def tickets(levels=5, trials=2, shapes=((30, 64), (10, 30)), seed=0):
    """Tickets whose layers lose weights at random, the second one half as fast."""
    for trial in range(trials):
        generator = torch.Generator().manual_seed(seed + trial)
        scores = [torch.rand(shape, generator=generator) for shape in shapes]
        for level in range(levels + 1):
            rates = (0.2, 0.1)
            masks = {
                f"layer{i}.weight": score < (1 - rates[min(i, 1)]) ** level if level else score > -1
                for i, score in enumerate(scores)
            }
            yield trial, Ticket(masks, RewindPoint(0, {}), {"level": level})


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
    mask_figure(tickets(levels=1, trials=1))
    assert global_rng() == before


def test_the_masks_of_a_lottery_are_drawn_and_equal_ones_give_equal_bytes():
    png = mask_figure(tickets(levels=1))
    width, height = size(png)
    assert width > height > 400
    assert mask_figure(tickets(levels=1)) == png
    assert mask_figure(tickets(levels=1, seed=1)) != png


@pytest.mark.parametrize(
    "made",
    [
        dict(levels=0, trials=1),
        dict(shapes=[(16, 3, 3, 3), *[(16, 16, 3, 3)] * 20, (10, 16)], levels=2, trials=1),
        dict(shapes=[(400, 3000), (10, 400)], levels=2, trials=1),
    ],
    ids=["dense alone", "many layers", "large layer"],
)
def test_few_levels_many_layers_and_large_ones_are_drawn(made):
    width, height = size(mask_figure(tickets(**made)))
    assert width > height > 400


@pytest.mark.parametrize("emptied", [1, 2])
def test_layers_that_lost_all_weights_are_drawn_too(emptied):
    drawn = list(tickets(levels=1, trials=1))
    last = drawn[-1][1]
    for name in list(last.masks)[:emptied]:
        last.masks[name].zero_()
    width, height = size(mask_figure(drawn))
    assert width > height > 400


def test_a_figure_of_no_ticket_is_refused():
    with pytest.raises(ValueError, match="no tickets to draw: give those of a run's tickets/ folder"):
        mask_figure([])


def test_as_many_maps_are_drawn_as_are_wanted_and_there_are_levels():
    widths = [size(mask_figure(tickets(levels, trials=1), maps))[0] for levels, maps in ((5, 1), (5, 2), (2, 4))]
    assert widths[0] < widths[1] == widths[2]


def test_a_dense_layer_of_images_is_shown_by_pixel():
    mask = torch.zeros(4, 9, dtype=torch.bool)
    mask[:, 4] = True
    mask[:2, 1] = True
    assert kept_map(mask).tolist() == [[0.0, 0.5, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    colours = torch.zeros(2, 3, 2, 2, dtype=torch.bool)
    colours[0, :, 0, 1] = True
    assert kept_map(colours.view(2, 12)).tolist() == [[0.0, 0.5], [0.0, 0.0]]


def test_any_other_layer_is_shown_as_its_bitmap_averaged_where_it_is_large():
    mask = torch.rand(8, 3, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.3
    assert torch.equal(kept_map(mask), mask.view(8, 27).float())
    blocks = torch.zeros(4, 6, dtype=torch.bool)
    blocks[:2, :3] = True
    blocks[3, 5] = True
    assert torch.allclose(kept_map(blocks, most=2), torch.tensor([[1.0, 0.0], [0.0, 1 / 6]]))
    large = kept_map(torch.ones(301, 1000, dtype=torch.bool))
    assert large.shape == (150, 150)
    assert large.eq(1).all()
