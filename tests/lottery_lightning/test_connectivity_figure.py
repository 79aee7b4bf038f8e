import struct

import pytest

from lottery_callbacks.functional.interpolation import Line, even
from lottery_lightning.figures import connectivity_figure


def line(height=1.0, norms="average", points=30):
    t = even(points)
    hill = [height * at * (1 - at) for at in t]
    return Line(t, tuple(0.1 + h for h in hill), tuple(0.02 + h / 10 for h in hill), norms)


def size(png):
    """Width and height, after a look at the signature and the last chunk."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert png[-12:] == b"\x00\x00\x00\x00IEND\xaeB`\x82"
    return struct.unpack(">2I", png[16:24])


def test_the_same_lines_give_the_same_png_and_others_another():
    lines = {"previous": line(), "level_00": line(3.0)}
    png = connectivity_figure(lines)
    width, height = size(png)
    assert 1_000 <= width <= 3_000
    assert 400 <= height <= 1_200
    assert connectivity_figure(dict(lines)) == png
    assert connectivity_figure(lines | {"level_00": line(3.1)}) != png
    assert connectivity_figure({"previous": lines["previous"], "level_01": lines["level_00"]}) != png
    assert connectivity_figure({name: line(norms="reestimate") for name in lines}) != connectivity_figure(
        {name: line() for name in lines}
    )


def test_legends_hold_barrier_and_instability_and_the_title_the_statistics(monkeypatch):
    kept = []
    monkeypatch.setattr("lottery_lightning.figures.connectivity.png", lambda figure: kept.append(figure) or b"")
    connectivity_figure({"previous": line(points=5), "one": line(2.0, "none", points=3)})
    losses, errors = kept[0].axes
    legends = [[text.get_text() for text in axis.get_legend().get_texts()] for axis in (losses, errors)]
    assert legends[0] == ["previous: barrier 0.25", "one: barrier 0.5"]
    assert legends[1] == ["previous: instability 2.5 points", "one: instability 5 points"]
    assert [list(drawn.get_xdata()) for drawn in losses.get_lines()[::2]] == [list(even(5)), list(even(3))]
    assert list(errors.get_lines()[0].get_ydata()) == pytest.approx([100 * error for error in line(points=5).errors])
    assert kept[0].get_suptitle().endswith("batch norm: average, none")


def test_a_line_without_errors_is_drawn():
    one = line()
    assert size(connectivity_figure({"previous": Line(one.t, one.losses, (float("nan"),) * 30, "none")}))


def test_a_figure_of_no_line_is_refused():
    with pytest.raises(ValueError, match="no lines to draw: the first level has none before it, and no checkpoint"):
        connectivity_figure({})


def test_a_figure_draws_nothing_from_the_global_random_state(global_rng):
    before = global_rng()
    connectivity_figure({"previous": line()})
    assert global_rng() == before
