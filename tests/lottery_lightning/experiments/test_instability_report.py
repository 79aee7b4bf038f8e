import io

import pytest
from rich.console import Console

from lottery_callbacks.functional.interpolation import Line
from lottery_lightning.experiments.instability_report import cells, finding, instability_table, sentence
from lottery_lightning.figures import instability_figure


def pair(network, k, instability, trial=0):
    errors = (0.1, 0.1 + instability, 0.1)
    line = {"t": (0.0, 0.5, 1.0), "losses": errors, "errors": errors, "norms": "average"}
    of = {"network": network, "density": 1.0, "at": f"{k}it", "k": k, "trial": trial, "first": 0, "second": 1}
    return of | {"lines": {"plain": Line(**line)}}


LEVELS = {"a": (0.01, 0.03, 0.019), "b": (0.0, 0.0, 0.5), "c": (0.5, 0.01, 0.01)}
ROWS = [pair(name, k, value) for name, own in LEVELS.items() for k, value in zip((0, 10, 500), own, strict=True)]


def test_stable_is_a_mean_below_2_percent_at_a_step_and_all_later_ones():
    assert finding(ROWS)["stable_from"] == {"a": 500, "b": None, "c": 10}
    found = cells(ROWS)
    assert [cell["instability_sd"] for cell in found] == [None] * 9
    told = sentence(found)
    assert "a (100.00% of the weights) is stable from step 500 on" in told
    assert "b (100.00% of the weights) is not stable from any of these steps on" in told
    two = [pair("a", 0, 0.01), pair("a", 0, 0.035, trial=1)]
    assert finding(two)["stable_from"] == {"a": None}
    assert finding(two)["instability"] == {"a at 0it": 0.0225}


def rendered(table):
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(table)
    return [[word.strip() for word in line.split("│")[1:-1]] for line in console.export_text().splitlines()]


def test_the_table_has_means_deviations_and_ranges_in_points():
    rows = [pair("a", 0, 0.01), pair("a", 0, 0.05, trial=1)]
    for row, height in zip(rows, (0.0, 0.004), strict=True):
        row["lines"]["aligned"] = pair("a", 0, height)["lines"]["plain"]
    found = cells(rows)
    lines = [line for line in rendered(instability_table(found, finding(rows))) if line[:1] in (["a"], ["a, matched"])]
    assert lines == [
        ["a", "100.00", "0", "2", "3.00", "2.83", "1.00 to 5.00", "0.0300", "90.00", "no"],
        ["a, matched", "100.00", "0", "2", "0.20", "0.28", "0.00 to 0.40", "0.0020", "90.00", "yes"],
    ]


def test_the_figure_shows_points_of_error_against_the_step(monkeypatch):
    kept = []
    monkeypatch.setattr("lottery_lightning.figures.instability.png", lambda figure: kept.append(figure) or b"")
    rows = [pair("a", k, value, trial) for k in (0, 10) for trial, value in enumerate((0.01, 0.05))]
    for row in rows:
        row["lines"]["aligned"] = pair("a", 0, 0.0)["lines"]["plain"]
    instability_figure(rows)
    against, along = kept[0].axes
    drawn = {line.get_label(): line for line in against.get_lines()}
    assert list(drawn["a, 100 %"].get_xdata()) == [0, 10]
    assert list(drawn["a, 100 %"].get_ydata()) == pytest.approx([3, 3])
    assert list(drawn["a, 100 %, matched"].get_ydata()) == pytest.approx([0, 0])
    assert drawn["a, 100 %"].get_linestyle() == "-"
    assert drawn["a, 100 %, matched"].get_linestyle() == ":"
    assert [2, 2] in [list(line.get_ydata()) for line in against.get_lines()]  # the border of what is stable
    assert against.get_ylabel() == "instability (points of test error)"
    inner = {line.get_label(): list(line.get_ydata()) for line in along.get_lines()}
    assert inner["a, k = 10"] == pytest.approx([10, 13, 10])
    assert along.get_ylabel() == "test error (%)"
    assert kept[0].get_suptitle().endswith("pairs: 2; statistics of batch norm: average")
