"""The picture of a sweep."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dnnlib.files import atomic_write
from dnnlib.util import code_version
from torch_utils import distributed
from torch_utils.pictures import image_grid
from training.sweep.measuring import Sweep
from training.sweep.searches import grid
from training.sweep.settings import NETWORKS, Axis, Setting

SHOWN = 8  # images per setting
Strip = tuple[Setting, np.ndarray]  # a setting and its images, uint8 [N, C, H, W]


def sample_strips(sweep: Sweep, settings: Sequence[Setting]) -> list[Strip]:
    """Images of the first seeds with each of some settings, on the first process; none on the others.

    To be called by all processes.
    """
    strips = []
    for setting in settings:
        with distributed.fail_together():
            batches = sweep.generator(setting).images(sweep.seeds[:SHOWN], max_batch_size=SHOWN, verbose=False)
            images = [batch.images.cpu() for batch in batches]
        if images:
            strips.append((setting, torch.cat(images).numpy()))
    return strips


def draw(
    path: Path,
    sweep: Sweep,
    axes: Sequence[Axis],
    name: str,
    best: Setting,
    strips: Sequence[Strip],
    scattered: bool,
) -> None:
    """Draw a result against each axis, against two of them, and images.

    Args:
        axes: those of the sweep, with the values that are drawn.
        strips: of settings that differ in the first axis.
        scattered: whether settings lie anywhere, and not on the lines of a grid with the others at their best.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = [axis for axis in axes if len(axis.values) > 1] or axes[:1]
    with_map = len(drawn) > 1
    count = len(drawn) + with_map + 1
    columns = min(count, 4)
    rows = -(-count // columns)
    fig, grid_of_places = plt.subplots(
        rows, columns, figsize=(6 * columns, 5 * rows), layout="constrained", squeeze=False
    )
    places = list(grid_of_places.flat)
    for place, axis in zip(places, drawn, strict=False):
        if scattered:
            _draw_tried(place, axis, sweep, name, best)
        else:
            _draw_lines(place, axis, drawn, sweep, name, best)
        place.set(xlabel=axis.name, ylabel=name)
        place.grid(alpha=0.3)
    if with_map:
        draw_map = _draw_scattered_map if scattered else _draw_map
        draw_map(fig, places[len(drawn)], sweep, drawn[0], drawn[1], name, best)
    picture = image_grid(np.concatenate([images for _, images in strips]), SHOWN)[0]
    places[count - 1].imshow(picture, cmap="gray", vmin=0, vmax=255)
    shown = ", ".join(setting[axes[0].name] for setting, _ in strips)
    places[count - 1].set_title(f"rows: {axes[0].name} {shown}", fontsize=10)
    for place in places[count - 1 :]:
        place.axis("off")
    setting = ", ".join(f"{key} {v}" for key, v in best.items())
    value = sweep.results[sweep.key(best)]["results"][name]
    fig.suptitle(f"{name} of {len(sweep.seeds)} images each; best {value:.4g} with {setting}")
    with atomic_write(path) as f:
        description = f"calculate_metrics.py sweep, OpenEDM2 {code_version()}"
        fig.savefig(f, format="png", dpi=80, metadata={"Description": description})
    plt.close(fig)


def _draw_lines(place: Any, axis: Axis, axes: Sequence[Axis], sweep: Sweep, name: str, best: Setting) -> None:
    """A line for each value of one other axis; the rest are at their best."""
    x: Sequence[Any] = axis.numbers() or axis.values
    others = [a for a in axes if a is not axis]
    for setting in grid(others[:1]) if others else [{}]:
        records = [sweep.results.get(sweep.key(best | setting | {axis.name: v})) for v in axis.values]
        line = [math.nan if record is None else record["results"][name] for record in records]
        if any(math.isfinite(v) for v in line):
            label = ", ".join(f"{key} {v}" for key, v in setting.items())
            place.plot(x, line, marker="o", label=label or None)
    if others:
        place.legend()


def _draw_tried(place: Any, axis: Axis, sweep: Sweep, name: str, best: Setting) -> None:
    """A point for each setting, later ones darker, and a star for the best."""
    found = [(record["setting"][axis.name], record["results"][name]) for record in sweep.results.values()]
    numbers = dict(zip(axis.values, axis.numbers() or range(len(axis.values)), strict=True))
    x, y = [numbers[value] for value, _ in found], [value for _, value in found]
    place.scatter(x, y, c=range(len(found)), cmap="viridis_r", label="settings, later ones darker")
    place.plot(
        numbers[best[axis.name]], sweep.results[sweep.key(best)]["results"][name], "r*", markersize=14, label="best"
    )
    if axis.numbers() is None:
        place.set_xticks(range(len(axis.values)), axis.values)
    if axis.name in NETWORKS:
        _make_logarithmic(place, place.xaxis)
    place.legend()


def _make_logarithmic(place: Any, axis: Any) -> None:
    """An axis of widths, with numbers as they are written."""
    (place.set_xscale if axis is place.xaxis else place.set_yscale)("log")
    axis.set_major_formatter("{x:.3g}")
    axis.set_minor_formatter("{x:.3g}")


def _draw_scattered_map(
    fig: Any, place: Any, sweep: Sweep, first: Axis, second: Axis, name: str, best: Setting
) -> None:
    """A point for each setting by its values of two axes, whose colour is the result, and a star for the best."""
    places = [
        dict(zip(axis.values, axis.numbers() or range(len(axis.values)), strict=True)) for axis in (first, second)
    ]
    found = [(record["setting"], record["results"][name]) for record in sweep.results.values()]
    x, y = ([at[setting[axis.name]] for setting, _ in found] for at, axis in zip(places, (first, second), strict=True))
    points = place.scatter(x, y, c=[value for _, value in found], cmap="viridis", s=60)
    place.plot(places[0][best[first.name]], places[1][best[second.name]], "r*", markersize=14)
    for axis, set_ticks in ((first, place.set_xticks), (second, place.set_yticks)):
        if axis.numbers() is None:
            set_ticks(range(len(axis.values)), axis.values)
    for axis, of_place in ((first, place.xaxis), (second, place.yaxis)):
        if axis.name in NETWORKS:
            _make_logarithmic(place, of_place)
    place.set(xlabel=first.name, ylabel=second.name)
    fig.colorbar(points, ax=place, label=name)


def _draw_map(fig: Any, place: Any, sweep: Sweep, first: Axis, second: Axis, name: str, best: Setting) -> None:
    """A result by the values of two axes, with the others at their best."""
    keys = [[sweep.key(best | {first.name: a, second.name: b}) for a in first.values] for b in second.values]
    rows = [[sweep.results[key]["results"][name] if key in sweep.results else math.nan for key in row] for row in keys]
    image = place.imshow(rows, origin="lower", aspect="auto", cmap="viridis")
    place.set_xticks(range(len(first.values)), first.values)
    place.set_yticks(range(len(second.values)), second.values)
    for j, row in enumerate(rows):
        for i, v in enumerate(row):
            if math.isfinite(v):
                place.text(i, j, f"{v:.3g}", ha="center", va="center", color="white")
    place.set(xlabel=first.name, ylabel=second.name)
    fig.colorbar(image, ax=place, label=name)
