"""Figures of the distill experiment: the images as they form, and what training on each set reaches."""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from lottery_lightning.figures.drawing import canvas, errorbar, png

Row = dict[str, Any]
CEILING = "whole"


def images_figure(sets: Mapping[str, Tensor], classes: int, title: str) -> bytes:
    """Sets of images side by side: a row a class, a column an image, pixels enlarged without smoothing.

    Args:
        sets: by name, pixels in [0, 1], (n, channels, height, width), sorted by class and as many of each; where there
            are not 1 or 3 channels their mean is drawn.
        classes: their number.
        title: above all.
    """
    tiled = {name: tiles(pixels, classes) for name, pixels in sets.items()}
    first = next(iter(tiled.values()))
    height = max(2.5, 0.45 * classes)
    figure = canvas(len(tiled) * height * first.shape[1] / first.shape[0] + 0.6, height + 0.5)
    panels = figure.subplots(1, len(tiled), squeeze=False)[0]
    for axis, (name, grid) in zip(panels, tiled.items(), strict=True):
        axis.imshow(grid.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        one = grid.shape[0] / classes
        axis.set_yticks([one * (label + 0.5) for label in range(classes)], range(classes))
        axis.set_xticks([])
        axis.tick_params(length=0)
        axis.set_title(name, fontsize=9)
        for spine in axis.spines.values():
            spine.set_visible(False)
    panels[0].set_ylabel("class")
    figure.suptitle(title, fontsize=10)
    return png(figure)


def tiles(pixels: Tensor, classes: int) -> Tensor:
    """The images (n, channels, h, w), a row a class, as one (rows, columns, 3) or (rows, columns) with white seams."""
    pixels = pixels.cpu() if pixels.shape[1] in (1, 3) else pixels.cpu().mean(1, keepdim=True)
    bordered = torch.nn.functional.pad(pixels, (1, 1, 1, 1), value=1.0)
    n, channels, height, width = bordered.shape
    grid = bordered.view(classes, n // classes, channels, height, width).permute(0, 3, 1, 4, 2)
    whole = grid.reshape(classes * height, n // classes * width, channels)
    return whole.squeeze(2) if channels == 1 else whole


def distill_figure(rows: Sequence[Row], losses: Mapping[int, Sequence[tuple[int, float]]]) -> bytes:
    """Test accuracy at the end of training on each set, and the matching loss as the images form, a line a trial.

    Means with bars from the least to the greatest; the ceiling, training on all real images, is a grey line in a band.

    Args:
        rows: of the experiment's `results.csv`.
        losses: by trial, (step, loss of the method).
    """
    figure = canvas(11, 4.4)
    accuracy, matching = figure.subplots(1, 2)
    names = [name for name in dict.fromkeys(row["method"] for row in rows) if name != CEILING]
    for place, name in enumerate(names):
        values = [100 * row["test_acc"] for row in rows if row["method"] == name]
        errorbar(accuracy, place, values, marker="osD^vP*X"[place % 8], color=f"C{place % 10}")
        accuracy.annotate(f"{mean(values):.1f}", (place, mean(values)), (8, -3), textcoords="offset points", fontsize=9)
    ceiling = [100 * row["test_acc"] for row in rows if row["method"] == CEILING]
    accuracy.axhspan(min(ceiling), max(ceiling), color="grey", alpha=0.2, lw=0)
    accuracy.axhline(mean(ceiling), color="grey", lw=0.8, label="all real images")
    stored = next(row["stored"] for row in rows if row["method"] == names[0])
    accuracy.set_xlim(-0.5, len(names) - 0.3)
    accuracy.set_xticks(range(len(names)), [name.replace(" ", "\n") for name in names])
    accuracy.set(ylabel="test accuracy at the end (%)", xlabel=f"sets of {stored:,} stored images")
    accuracy.legend(frameon=False, loc="lower right")
    accuracy.grid(alpha=0.25, axis="y")
    for trial, points in losses.items():
        matching.plot(*zip(*points, strict=True), lw=0.9, color=f"C{trial % 10}", label=f"trial {trial}")
    matching.set(xlabel="step", ylabel=f"loss of {names[-1]}", yscale="log")
    matching.grid(alpha=0.25)
    matching.legend(frameon=False, fontsize=8)
    figure.suptitle(f"training on small sets; trials: {len(ceiling)}; mean, bars from min to max")
    return png(figure)
