import json
import math
import struct
from dataclasses import asdict

import pytest
from mpl_toolkits.mplot3d import Axes3D

from lottery_callbacks.functional.landscape import Point, Surface
from lottery_lightning.figures.landscape import landscape_figure, relief_figure

FIGURES = [landscape_figure, relief_figure]
XS, YS = (-1.0, 0.0, 1.0, 2.0), (-1.0, 0.0, 2.0)


def bowl(x, y):
    return 0.1 + x**2 + 2 * y**2


def surface(loss=bowl, norms="average", networks=((0.0, 0.0), (1.0, 1.0)), unit="L2 distance"):
    """Of which the error is a tenth of the loss."""
    losses = tuple(tuple(loss(x, y) for x in XS) for y in YS)
    errors = tuple(tuple(value / 10 for value in row) for row in losses)
    points = tuple(Point(x, y, loss(x, y), loss(x, y) / 10) for x, y in networks)
    return Surface(XS, YS, losses, errors, norms, points, unit)


def size(png):
    """Width and height, after a look at the signature and the last chunk."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert png[-12:] == b"\x00\x00\x00\x00IEND\xaeB`\x82"
    return struct.unpack(">2I", png[16:24])


@pytest.fixture
def drawn(monkeypatch):
    """Draws, and gives the panels' axes, the bar's and the figure."""

    def draw(figure, *arguments):
        kept = []
        with monkeypatch.context() as patch:
            patch.setattr("lottery_lightning.figures.landscape.png", lambda made: kept.append(made) or b"")
            figure(*arguments)
        *panels, bar = kept[0].axes
        return panels, bar, kept[0]

    return draw


def texts(axis):
    return [text.get_text() for text in axis.texts]


def ticks(bar):
    return [label.get_text() for label in bar.get_yticklabels()]


# ---- both kinds


@pytest.mark.parametrize("figure", FIGURES)
def test_the_same_surfaces_give_the_same_png_and_others_another(figure, global_rng):
    before = global_rng()
    png = figure({"dense": surface()}, ["one", "other"])
    width, height = size(png)
    assert width > height > 400
    assert figure({"dense": surface()}, ["one", "other"]) == png
    stored = Surface(**json.loads(json.dumps(asdict(surface()))))
    assert figure({"dense": stored}, ["one", "other"]) == png
    assert global_rng() == before
    for other, names in (
        (surface(lambda x, y: bowl(x, 1.1 * y)), ["one", "other"]),
        (surface(networks=((0.0, 0.0), (1.0, 0.5))), ["one", "other"]),
        (surface(), ["one", "another"]),
    ):
        assert figure({"dense": other}, names) != png


@pytest.mark.parametrize("figure", FIGURES)
def test_panels_have_titles_units_and_one_bar_and_the_title_names_the_statistics(figure, drawn):
    panels, bar, whole = drawn(figure, {"dense": surface(), "sparse": surface(norms="none", unit="filter norms")})
    assert [axis.get_title() for axis in panels] == ["dense", "sparse"]
    assert [axis.get_xlabel() for axis in panels] == ["x (L2 distance)", "x (filter norms)"]
    assert [axis.get_ylabel() for axis in panels] == ["y (L2 distance)", "y (filter norms)"]
    assert bar.get_ylabel() == "loss"
    assert whole.get_suptitle() == "loss on planes of networks; statistics of batch norm: average, none"


@pytest.mark.parametrize("figure", FIGURES)
@pytest.mark.parametrize(("count", "rows", "columns"), [(1, 1, 1), (3, 1, 3), (4, 2, 2), (5, 2, 3)])
def test_surfaces_stand_in_rows_of_three_at_most(figure, drawn, count, rows, columns):
    panels, _, _ = drawn(figure, {str(number): surface() for number in range(count)})
    assert len(panels) == count
    assert panels[0].get_gridspec().get_geometry() == (rows, columns)


@pytest.mark.parametrize("figure", FIGURES)
def test_networks_without_a_name_are_numbered(figure, drawn):
    panels, _, _ = drawn(figure, {"dense": surface(), "one": surface(networks=((0.0, 0.0),))}, ["first"])
    assert [texts(axis) for axis in panels] == [["first", "2"], ["first"]]


@pytest.mark.parametrize("figure", FIGURES)
@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (lambda x, y: 1 + x + 1, ["1", "1.5", "2", "2.5", "3", "3.5", "4"]),  # 1 to 4
        (lambda x, y: 2 * 30 ** ((x + 1) / 3), ["2", "5", "10", "20", "50"]),  # 2 to 60
        (lambda x, y: 1e4 ** ((x + 1) / 3) / 10, ["0.1", "1", "10", "100", "1000"]),
        (lambda x, y: max(0, x) * 1e3, ["0.1", "1", "10", "100", "1000"]),  # five decades below 2000 begin at 0.02
        (lambda x, y: x**2 - y**2, ["-3", "-1.5", "0", "1.5", "3"]),  # below 0 there are no logarithms
        (lambda x, y: 2.0, ["1.6", "1.8", "2", "2.2", "2.4"]),
        (lambda x, y: 0.0, ["-0.4", "-0.2", "0", "0.2", "0.4"]),
    ],
)
def test_the_bar_has_round_numbers_and_is_logarithmic_where_values_range_widely(figure, drawn, loss, expected):
    _, bar, _ = drawn(figure, {"dense": surface(loss)})
    assert ticks(bar) == expected
    assert (bar.get_yscale() == "log") == (expected[0] in ("2", "0.1"))


@pytest.mark.parametrize("figure", FIGURES)
def test_errors_are_drawn_in_percent(figure, drawn):
    _, bar, whole = drawn(figure, {"dense": surface(lambda x, y: 3 + x)}, (), "error")  # 20 to 50 %
    assert ticks(bar) == ["20", "25", "30", "35", "40", "45", "50"]
    assert bar.get_ylabel() == "error (%)"
    assert whole.get_suptitle().startswith("error (%) on planes")


@pytest.mark.parametrize("figure", FIGURES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_surfaces_without_a_number_are_refused(figure, value):
    with pytest.raises(ValueError, match="no loss of these surfaces is a number: there is nothing to draw"):
        figure({"dense": surface(lambda x, y: value), "sparse": surface(lambda x, y: value)})


# ---- contours


def test_all_panels_have_one_scale_from_the_lowest_to_the_highest(drawn):
    surfaces = {"dense": surface(), "sparse": surface(lambda x, y: 30 * bowl(x, y))}
    panels, _, _ = drawn(landscape_figure, surfaces)
    filled = [axis.collections[0] for axis in panels]
    highest = 30 * bowl(2, 2)
    for one in filled:
        assert (one.levels[0], one.levels[-1]) == pytest.approx((0.1, highest))
        assert (one.norm.vmin, one.norm.vmax) == pytest.approx((0.1, highest))
        assert len(one.levels) == 25
        assert one.levels[1] / one.levels[0] == pytest.approx(one.levels[-1] / one.levels[-2])
    assert [(one.zmin, one.zmax) for one in filled] == [(0.1, bowl(2, 2)), (30 * 0.1, highest)]
    assert [axis.get_aspect() for axis in panels] == [1, 1]


def test_a_network_below_the_grid_belongs_to_the_scale(drawn):
    one = surface(networks=((0.5, 0.5),), loss=lambda x, y: 0.01 if x == 0.5 else 1 + x**2)
    panels, _, _ = drawn(landscape_figure, {"dense": one})
    assert panels[0].collections[0].levels[0] == pytest.approx(0.01)


def test_networks_are_marked_where_they_are(drawn):
    panels, _, _ = drawn(landscape_figure, {"dense": surface()}, ["one", "other"])
    assert [(list(mark.get_xdata()), list(mark.get_ydata())) for mark in panels[0].lines] == [([0], [0]), ([1], [1])]
    assert [text.xy for text in panels[0].texts] == [(0, 0), (1, 1)]


def test_what_is_no_number_is_left_out(drawn):
    gone = {(2.0, 2.0): math.inf, (-1.0, -1.0): math.nan}
    panels, _, _ = drawn(landscape_figure, {"dense": surface(lambda x, y: gone.get((x, y), bowl(x, y)))})
    assert panels[0].collections[0].zmax == bowl(1, 2)
    assert panels[0].get_facecolor()[:3] == pytest.approx((0.827, 0.827, 0.827), abs=1e-3)  # lightgrey


# ---- reliefs


def points_3d(axis):
    return [tuple(float(value[0]) for value in line.get_data_3d()) for line in axis.lines if line.get_marker() == "o"]


def test_networks_lie_at_their_heights(drawn):
    panels, _, _ = drawn(relief_figure, {"dense": surface()})  # 0.1 to 12.1, in logarithms
    assert points_3d(panels[0]) == [pytest.approx((0, 0, -1)), pytest.approx((1, 1, math.log10(3.1)))]
    low, high = panels[0].get_zlim()
    assert high == pytest.approx(math.log10(bowl(2, 2)))
    assert low < -1
    assert [label.get_text() for label in panels[0].get_zticklabels()] == ["0.1", "0.2", "0.5", "1", "2", "5", "10"]
    linear, _, _ = drawn(relief_figure, {"dense": surface(lambda x, y: 2 + x)}, (), "error")
    assert points_3d(linear[0]) == [pytest.approx((0, 0, 20)), pytest.approx((1, 1, 30))]


def test_a_line_joins_each_network_and_the_ground(drawn):
    panels, _, _ = drawn(relief_figure, {"dense": surface()})
    ground = panels[0].get_zlim()[0]
    stems = [[list(map(float, values)) for values in line.get_data_3d()] for line in panels[0].lines[::2]]
    assert stems == [[[0, 0], [0, 0], [ground, -1]], [[1, 1], [1, 1], [ground, pytest.approx(math.log10(3.1))]]]


def test_a_network_that_gives_no_number_lies_on_the_ground(drawn):
    loss = {(1.0, 1.0): math.inf}
    panels, _, _ = drawn(relief_figure, {"dense": surface(lambda x, y: loss.get((x, y), bowl(x, y)))})
    assert points_3d(panels[0])[1] == (1, 1, panels[0].get_zlim()[0])


def test_what_is_no_number_is_a_hole(drawn, monkeypatch):
    kept = []
    monkeypatch.setattr(Axes3D, "plot_surface", lambda axis, x, y, z, **_: kept.append((x, y, z)))
    drawn(relief_figure, {"dense": surface(lambda x, y: math.inf if (x, y) == (2, -1) else bowl(x, y))})
    for x, y, z in zip(*(values.flatten().tolist() for values in kept[0]), strict=True):
        expected = math.nan if (x, y) == (2, -1) else math.log10(bowl(x, y))
        assert z == pytest.approx(expected, nan_ok=True)
    assert kept[0][2].shape == (3, 4)
