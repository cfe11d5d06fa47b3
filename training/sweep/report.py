"""Sweeps from their settings to what the user gets: a table, the best setting, and a picture."""

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence

from dnnlib.errors import UserError
from torch_utils import distributed
from training.config.generation import GenerationConfig
from training.sweep.figure import draw, sample_strips
from training.sweep.measuring import Sweep, read_options
from training.sweep.searches import by_coordinates, by_golden_section, grid
from training.sweep.settings import Axis, Setting

LARGER_IS_BETTER = ("is", "precision", "recall", "density", "coverage", "vendi")
TOLERANCE = 0.05  # share of a range within which --search=golden finds a value
STRIPS = 8  # settings whose images are shown, at most


def run(sweep: Sweep, search: str, budget: int | None, tolerance: float = TOLERANCE) -> None:
    """Measure settings, print each, and at the end all of them, and the best as a command and a preset; draw a picture.

    Args:
        search: 'grid', 'coordinate' or 'golden'.
        budget: images that this start may make; None = any number.
        tolerance: of 'golden', see `by_golden_section`.

    Raises:
        UserError: nothing can be measured within the budget, or `search` and the axes do not go together.
    """
    axes, num_images = sweep.axes, len(sweep.seeds)
    name = ""

    def loss(setting: Setting) -> float:
        value = sweep(setting)[name]
        return -value if is_better_larger(name) else value

    settings: Iterator[Setting] = {
        "grid": lambda: grid(axes),
        "coordinate": lambda: by_coordinates(axes, loss),
        "golden": lambda: by_golden_section(axes, loss, tolerance),
    }[search]()
    listed = [] if search == "golden" else list(grid(axes))
    complete = True
    for setting in settings:
        known = sweep.knows(setting)
        if budget is not None and sweep.measured + sweep.costs(setting) > budget:
            if sweep.measured == 0:
                raise UserError(f"--budget={budget} is less than the {num_images} images of one setting")
            complete = False
            break
        results = sweep(setting)
        name = name or next(iter(results))
        text = " ".join(f"{key}={value}" for key, value in setting.items())
        values = ", ".join(f"{key} {value:.5g}" for key, value in results.items())
        if not known:
            count = f"{sum(map(sweep.knows, listed))} of {len(listed)}" if listed else len(sweep.results)
            distributed.print0(f"[{count}] {text}: {values}")
    rows = [(record["setting"], record["results"]) for record in sweep.results.values()]
    best = min((setting for setting, _ in rows), key=loss)
    ranges = [axis.name for axis in axes if search == "golden" and axis.is_range]
    if search == "golden":
        axes = [_measured(axis, rows) for axis in axes]
    shown = [best | {axes[0].name: value} for value in _thinned(axes[0].values)]
    strips = sample_strips(sweep, shown)
    words = sweep.words(best)
    if distributed.get_rank() == 0:
        print(f"\n{table(axes, rows)}\n")
        if not complete:
            print(f"--budget={budget} is used up; repeat the command to continue.")
        for axis in axes:
            at_end = len(axis.values) > 1 and best[axis.name] in (axis.values[0], axis.values[-1])
            if at_end and (complete or axis.name not in ranges):  # else the search was still on its way
                where = "next to the end of its range" if axis.name in ranges else "at the end of its values"
                print(f"Note: {axis.name}={best[axis.name]} is {where}; beyond, it may be better still")
        command = " ".join(["python generate_images.py", *map(shlex.quote, words), "--outdir=out"])
        value = sweep(best)[name]
        print(f"Best {name}, {value:.5g}:\n{command}")
        print(f"As a preset (training/config/edm2.py):\n{preset(read_options(words), name, value)}")
        draw(sweep.outdir / "sweep.png", sweep, axes, name, best, strips, scattered=search == "golden")
        print(f"Picture: {sweep.outdir / 'sweep.png'}")
    distributed.shutdown()


def preset(config: GenerationConfig, metric: str, value: float) -> str:
    """The networks and the guidance weight of a configuration as an entry of `GENERATION_PRESETS`.

    Other options than these stand in no preset.
    """
    arguments = {"net": config.networks.net, "metric": metric, "value": float(f"{value:.4g}")}
    if config.networks.gnet is not None:
        arguments["gnet"] = config.networks.gnet
    arguments["guidance"] = config.sampling.guidance.guidance
    return f'    presets["NAME"] = GenerationPreset({", ".join(f"{key}={v!r}" for key, v in arguments.items())})'


def is_better_larger(name: str) -> bool:
    """Whether larger values of a metric, by the name of its result, are better."""
    return name.split("_")[0] in LARGER_IS_BETTER


def _measured(axis: Axis, rows: Sequence[tuple[Setting, Mapping[str, float]]]) -> Axis:
    """An axis with the values that searches have tried, in order; at the end those of earlier starts alone."""
    values = dict.fromkeys(setting[axis.name] for setting, _ in rows)
    if axis.is_range:
        return Axis(axis.name, tuple(sorted(values, key=float)))
    return Axis(axis.name, tuple(dict.fromkeys([*(v for v in axis.values if v in values), *values])))


def _thinned(values: Sequence[str]) -> list[str]:
    """At most `STRIPS` of some values, evenly spaced, with both ends."""
    if len(values) <= STRIPS:
        return list(values)
    return [values[round(i * (len(values) - 1) / (STRIPS - 1))] for i in range(STRIPS)]


def table(axes: Sequence[Axis], rows: Iterable[tuple[Setting, Mapping[str, float]]]) -> str:
    """Settings and their results, a line each."""
    found = list(rows)
    names = list(found[0][1])
    cells = [[axis.name for axis in axes] + names]
    cells += [[s[axis.name] for axis in axes] + [f"{results[name]:.5g}" for name in names] for s, results in found]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in cells)
