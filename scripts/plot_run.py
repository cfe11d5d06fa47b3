"""Draw a training run, or compare several: loss, learning rate, speed, metrics, and losses on held-out images.

Examples:
    python scripts/plot_run.py out/digits --out=out/digits/run.png
    python scripts/plot_run.py out/a out/b out/c --out=out/compared.png
"""

import json
import math
import os
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import click
import matplotlib

from dnnlib.cli import CommandLine
from dnnlib.errors import UserError
from dnnlib.files import atomic_write, read_records
from dnnlib.util import code_version
from training.config.training import OPTIONS_NAME

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STATUS = {"loss": "training loss", "lr": "learning rate", "images_per_second": "images per second"}
COLUMNS = 3
Point = tuple[float, float]


def records(path: Path) -> list[dict[str, Any]]:
    """What a run has reported in a file, with the images seen till then."""
    return [record for record in read_records(path) if "nimg" in record]


class Run:
    """What a run has reported.

    `curves` has points (images, value) by panel and by EMA profile ('' = the network in training); `errors`, errors on
    held-out images of the last snapshot, points (sigma, value).

    Raises:
        UserError: the folder holds no run.
    """

    def __init__(self, path: Path, name: str):
        stats = path / "stats.jsonl"
        if not stats.is_file():
            raise UserError(f"{path}: no run has reported anything there (stats.jsonl is missing)")
        self.name = name
        self.curves: dict[str, dict[str, list[Point]]] = defaultdict(lambda: defaultdict(list))
        self.errors: list[Point] = []
        extras = set()
        for record in records(stats):
            extras |= {name for name in record if name in ("bpd", "kl", "recon", "accuracy")}
            for name in (*STATUS, *sorted(extras)):
                if isinstance(record.get(name), (int, float)):
                    self.curves[STATUS.get(name, name)][""].append((record["nimg"], record[name]))
        for file in sorted(path.glob("metric-*.jsonl")):
            for record in records(file):
                self._add_metric(record)

    def _add_metric(self, record: dict[str, Any]) -> None:
        results = record.get("results", {})
        found = re.search(r"-\d+-(.+)\.\w+$", record.get("net", ""))
        for name, value in results.items():
            if not name.startswith("val_error_") and isinstance(value, (int, float)) and math.isfinite(value):
                panel = "loss on held-out images" if name == "val_loss" else name
                self.curves[panel][found[1] if found else ""].append((record["nimg"], value))
        errors = [(float(name[10:]), value) for name, value in results.items() if name.startswith("val_error_")]
        self.errors = sorted(errors) or self.errors


def options_of(path: Path) -> dict[str, Any]:
    file = path / OPTIONS_NAME
    return json.loads(file.read_text()) if file.is_file() else {}


def differences(paths: list[Path]) -> list[str]:
    """Which options that all runs have differ: a line each, with the values in the order of the runs."""
    options = [options_of(path) for path in paths]
    names = sorted(set.intersection(*map(set, options)) - {"dataset", "data"})
    rows = {name: [json.dumps(option[name]) for option in options] for name in names}
    return [f"{name}: {', '.join(values)}" for name, values in rows.items() if len(set(values)) > 1]


def draw(path: Path, runs: list[Run], notes: list[str]) -> None:
    panels = list(dict.fromkeys(name for run in runs for name in run.curves))
    with_errors = any(run.errors for run in runs)
    count = len(panels) + with_errors
    rows = math.ceil(count / COLUMNS)
    columns = min(count, COLUMNS)
    fig, axes = plt.subplots(rows, columns, figsize=(6.5 * columns, 4.8 * rows), layout="constrained", squeeze=False)
    for place, panel in zip(axes.flat, panels, strict=False):
        for number, run in enumerate(runs):
            for style, (profile, points) in zip(("-", "--", ":", "-."), run.curves[panel].items(), strict=False):
                label = " ".join(filter(None, (run.name if len(runs) > 1 else "", profile)))
                place.plot(*zip(*points, strict=True), style, color=f"C{number}", marker=".", label=label or None)
        place.set_title(panel, fontsize=14)
        place.set_xlabel("images")
        values = [value for run in runs for points in run.curves[panel].values() for _, value in points]
        if min(values) > 0 and max(values) > 3 * min(values):
            place.set_yscale("log")
    if with_errors:
        place = axes.flat[len(panels)]
        for number, run in enumerate(runs):
            if run.errors:
                place.loglog(*zip(*run.errors, strict=True), marker=".", color=f"C{number}", label=run.name)
        place.axhline(1, color="gray", linestyle="--", label="best denoiser of white noise")
        place.set_title("error on held-out images, last snapshot", fontsize=14)
        place.set_xlabel("noise level sigma")
    for place in axes.flat[count:]:
        place.axis("off")
    for place in axes.flat[:count]:
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
    common = os.path.commonpath([path.absolute().parent for path in paths])
    runs = [Run(path, os.path.relpath(path, common)) for path in paths]
    notes = differences(list(paths))
    for note in notes:
        print(note)
    draw(out, runs, notes)
    print(f"Picture: {out}")


if __name__ == "__main__":
    main()
