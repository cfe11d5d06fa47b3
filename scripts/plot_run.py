"""Draw a training run, or compare several: loss, learning rate, speed, metrics, and losses on held-out images; of runs
with --diagnose, also norms, sizes of activations, the loss by noise level, and the uncertainty that EDM2 learns of it.

Examples:
    python scripts/plot_run.py out/digits --out=out/digits/run.png
    python scripts/plot_run.py out/a out/b out/c --out=out/compared.png
"""

import itertools
import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import matplotlib

from dnnlib.cli import CommandLine
from dnnlib.errors import UserError
from dnnlib.files import atomic_write, read_records
from dnnlib.util import code_version
from torch_utils.pictures import check_picture
from training.config.training import OPTIONS_NAME

matplotlib.use("Agg")
import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STATUS = {"loss": "training loss", "lr": "learning rate", "images_per_second": "images per second"}
NORMS = {"gradient_norm": "norm of the gradients", "weight_norm": "norm of the weights"}
OF_PARTS = {
    "activation": "activations after each part, root mean square",
    "gradient_norm": "norm of the gradients of each part",
    "weight_norm": "norm of the weights of each part",
}
COLUMNS = 3
LINES = ("-", "--", ":", "-.")  # of profiles of the averaged weights
SEGMENTS = 5  # of a run, whose losses by noise level are averaged
LEAST = 20  # images of a noise level, below which their mean is left out
Point = tuple[float, float]
Draw = Callable[["Axes"], None]


def records(path: Path) -> list[dict[str, Any]]:
    """What a run has reported in a file, with the images seen till then; nothing where there is none."""
    return [record for record in read_records(path) if "nimg" in record] if path.is_file() else []


class Run:
    """What a run has reported.

    `curves` has points (images, value) by panel and by EMA profile ('' = the network in training); `errors`, errors on
    held-out images of the last snapshot, points (sigma, value); `diagnoses`, the records of --diagnose; `incidents`,
    the images after which gradients were not finite.

    Raises:
        UserError: the folder holds no run.
    """

    def __init__(self, path: Path, name: str):
        stats = records(path / "stats.jsonl")
        if not stats:
            raise UserError(f"{path}: no run has reported anything there (stats.jsonl is missing or empty)")
        self.name = name
        self.curves: dict[str, dict[str, list[Point]]] = defaultdict(lambda: defaultdict(list))
        self.errors: list[Point] = []
        extras = set()
        for record in stats:
            extras |= {name for name in record if name in ("bpd", "kl", "recon", "accuracy")}
            self._add_curves(record, {**STATUS, **{name: name for name in sorted(extras)}})
        for file in sorted(path.glob("metric-*.jsonl")):
            for record in records(file):
                self._add_metric(record)
        found = records(path / "diagnosis.jsonl")
        self.incidents = [record["nimg"] for record in found if "nonfinite" in record]
        self.diagnoses = [record for record in found if "parts" in record]
        for record in self.diagnoses:
            self._add_curves(record, NORMS)

    def _add_curves(self, record: dict[str, Any], titles: dict[str, str]) -> None:
        for name, title in titles.items():
            if isinstance(record.get(name), (int, float)):
                self.curves[title][""].append((record["nimg"], record[name]))

    def _add_metric(self, record: dict[str, Any]) -> None:
        results = record.get("results", {})
        found = re.search(r"-\d+-(.+)\.\w+$", record.get("net", ""))
        for name, value in results.items():
            if not name.startswith("val_error_") and isinstance(value, (int, float)) and math.isfinite(value):
                panel = "loss on held-out images" if name == "val_loss" else name
                self.curves[panel][found[1] if found else ""].append((record["nimg"], value))
        errors = [(float(name[10:]), value) for name, value in results.items() if name.startswith("val_error_")]
        self.errors = sorted(errors) or self.errors

    def levels(self, name: str) -> list[tuple[int, list[Point]]]:
        """Means (sigma, value) of `loss`, `error` or `logvar` by noise level, over segments of the run: for each, the
        images seen till its end; levels of few images are left out, and so are segments without any."""
        result = []
        ends = [len(self.diagnoses) * k // SEGMENTS for k in range(SEGMENTS + 1)]
        for start, end in itertools.pairwise(ends):
            segment = self.diagnoses[start:end]
            sums: dict[float, list[float]] = defaultdict(lambda: [0, 0])
            for found in (record["loss_by_sigma"] for record in segment):
                for sigma, count, value in zip(found["sigma"], found["count"], found.get(name, []), strict=False):
                    sums[sigma][0] += count
                    sums[sigma][1] += count * value
            points = [(sigma, total / count) for sigma, (count, total) in sorted(sums.items()) if count >= LEAST]
            if points:
                result.append((segment[-1]["nimg"], points))
        return result

    def of_parts(self, name: str) -> dict[str, list[Point]]:
        """Points (images, value) of `activation`, `gradient_norm` or `weight_norm`, by part of the network."""
        found: dict[str, list[Point]] = defaultdict(list)
        for record in self.diagnoses:
            for part, values in record["parts"].items():
                if values.get(name):
                    found[part].append((record["nimg"], values[name]))
        return found


def options_of(path: Path) -> dict[str, Any]:
    file = path / OPTIONS_NAME
    return json.loads(file.read_text()) if file.is_file() else {}


def differences(paths: list[Path]) -> list[str]:
    """Which options that all runs have differ: a line each, with the values in the order of the runs."""
    options = [options_of(path) for path in paths]
    names = sorted(set.intersection(*map(set, options)) - {"dataset", "data"})
    rows = {name: [json.dumps(option[name]) for option in options] for name in names}
    return [f"{name}: {', '.join(values)}" for name, values in rows.items() if len(set(values)) > 1]


# ---------------------------------------------------------------------------------------------------------
# Panels


def draw_curves(runs: list[Run], panel: str, place: "Axes") -> None:
    """What was reported over time."""
    for number, run in enumerate(runs):
        for style, (profile, points) in zip(itertools.cycle(LINES), run.curves[panel].items(), strict=False):
            label = " ".join(filter(None, (run.name if len(runs) > 1 else "", profile)))
            place.plot(*zip(*points, strict=True), style, color=f"C{number}", marker=".", label=label or None)
        if panel == STATUS["loss"]:
            for k, nimg in enumerate(run.incidents):
                place.axvline(nimg, color="crimson", linestyle=":", label=None if k else "gradients were not finite")
    place.set_xlabel("images")
    values = [value for run in runs for points in run.curves[panel].values() for _, value in points]
    if min(values) > 0 and max(values) > 3 * min(values):
        place.set_yscale("log")


def draw_errors(runs: list[Run], place: "Axes") -> None:
    """Errors on held-out images of the last snapshot."""
    for number, run in enumerate(runs):
        if run.errors:
            place.loglog(*zip(*run.errors, strict=True), marker=".", color=f"C{number}", label=run.name)
    place.axhline(1, color="gray", linestyle="--", label="best denoiser of white noise")
    place.set_xlabel("noise level sigma")


def draw_levels(runs: list[Run], place: "Axes") -> None:
    """The loss by noise level: of one run, over time; of several, at their ends."""
    for number, run in enumerate(runs):
        segments = run.levels("loss")
        for k, (nimg, points) in enumerate(segments if len(runs) == 1 else segments[-1:]):
            color = plt.get_cmap("viridis")(k / max(len(segments) - 1, 1)) if len(runs) == 1 else f"C{number}"
            label = f"till {nimg} images" if len(runs) == 1 else run.name
            place.semilogx(*zip(*points, strict=True), marker=".", color=color, label=label)
    place.set_xlabel("noise level sigma")


def draw_uncertainty(runs: list[Run], place: "Axes") -> None:
    """The error by noise level at the end, and exp(u) as the network has learned it, which is to equal it."""
    for number, run in enumerate(runs):
        name = f"{run.name}: " if len(runs) > 1 else ""
        for kind, marker, label in (("error", "o", "lambda |D - y|^2"), ("logvar", "-", "exp(u(sigma))")):
            if segments := run.levels(kind):
                sigma, values = zip(*segments[-1][1], strict=True)
                values = [math.exp(u) for u in values] if kind == "logvar" else values
                place.loglog(sigma, values, marker, color=f"C{number}", label=name + label)
    place.set_xlabel("noise level sigma")


def draw_parts(runs: list[Run], name: str, place: "Axes") -> None:
    """What was found in each part of the network: of one run, over time; of several, at their ends."""
    for number, run in enumerate(runs):
        found = run.of_parts(name)
        if len(runs) > 1:
            values = [points[-1][1] for points in found.values()]
            place.semilogy(values, marker=".", color=f"C{number}", label=run.name)
            place.set_xlabel("parts, from the first to the last")
            continue
        for k, (part, points) in enumerate(found.items()):
            color = plt.get_cmap("viridis")(k / max(len(found) - 1, 1))
            ends = k in (0, len(found) // 2, len(found) - 1)
            place.semilogy(*zip(*points, strict=True), color=color, label=part if ends else None)
            place.set_xlabel("images")


def panels_of(runs: list[Run]) -> dict[str, Draw]:
    """What is drawn, by title."""
    panels: dict[str, Draw] = {}
    for title in dict.fromkeys(name for run in runs for name in run.curves):
        panels[title] = partial(draw_curves, runs, title)
    if any(run.errors for run in runs):
        panels["error on held-out images, last snapshot"] = partial(draw_errors, runs)
    if any(run.levels("loss") for run in runs):
        panels["training loss by noise level"] = partial(draw_levels, runs)
    if any(run.levels("error") for run in runs):
        panels["weighted error and learned uncertainty, at the end"] = partial(draw_uncertainty, runs)
    for name, title in OF_PARTS.items():
        if any(run.of_parts(name) for run in runs):
            panels[title] = partial(draw_parts, runs, name)
    return panels


def draw(path: Path, runs: list[Run], notes: list[str]) -> None:
    panels = panels_of(runs)
    rows, columns = math.ceil(len(panels) / COLUMNS), min(len(panels), COLUMNS)
    fig, axes = plt.subplots(rows, columns, figsize=(6.5 * columns, 4.8 * rows), layout="constrained", squeeze=False)
    for place in axes.flat[len(panels) :]:
        place.axis("off")
    for place, (title, draw_panel) in zip(axes.flat, panels.items(), strict=False):
        draw_panel(place)
        place.set_title(title, fontsize=14)
        place.grid(alpha=0.3, which="both")
        if place.get_legend_handles_labels()[1]:
            place.legend()
    if notes:
        fig.suptitle("\n".join(notes[:8]) + ("\n..." if len(notes) > 8 else ""), fontsize=12)
    with atomic_write(path) as f:
        description = f"scripts/plot_run.py, OpenEDM2 {code_version()}"
        fig.savefig(f, format="png", dpi=80, metadata={"Description": description})
    plt.close(fig)


@click.command(cls=CommandLine, help=__doc__)
@click.argument("paths", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", help="Picture to write", metavar="FILE.png", type=click.Path(path_type=Path), required=True)
def main(paths: tuple[Path, ...], out: Path) -> None:
    check_picture("--out", out, {})
    common = os.path.commonpath([path.absolute().parent for path in paths])
    runs = [Run(path, os.path.relpath(path, common)) for path in paths]
    notes = differences(list(paths))
    for note in notes:
        print(note)
    draw(out, runs, notes)
    print(f"Picture: {out}")


if __name__ == "__main__":
    main()
