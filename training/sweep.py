"""Sweeps: metrics of the networks of a run over EMA widths, guidance and whatever else generation can vary.

Which EMA length is best depends on guidance, sampler and metric, and is found after the training (EDM2, Section 3;
arXiv 2312.02696). Every setting uses the same seeds, so that differences are those of the settings.
"""

import itertools
import json
import math
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

from dnnlib.errors import UserError
from dnnlib.files import append_line, atomic_write, read_records
from dnnlib.util import code_version
from torch_utils import distributed
from torch_utils.pictures import image_grid
from training.config.ema import parse_std_list
from training.config.fields import all_fields, click_options
from training.config.generation import GenerationConfig
from training.generation import LoadedGenerator, load
from training.guides import check_makes_images
from training.metrics.evaluation import Evaluation
from training.snapshot.reconstruction import list_averages, reconstruct_phema

NETWORKS = {"ema-std": "net", "guide-std": "gnet"}  # axes that choose networks, and the option that they set
KIMG = "kimg"  # likewise: the training time of both
LARGER_IS_BETTER = ("is", "precision", "recall", "density", "coverage", "vendi")
SHOWN = 8  # images per setting in the picture
Setting = dict[str, str]  # values by axis, as on a command line


@dataclass(frozen=True)
class Axis:
    """What is varied: an option of generation by its name, or EMA widths, and its values."""

    name: str
    values: tuple[str, ...]

    @staticmethod
    def parse(text: str) -> "Axis":
        """An axis of the form 'NAME=VALUE,VALUE,...'; where values hold commas, with ';' between them.

        Raises:
            UserError: of another form, nothing that can be varied, or one value twice.
        """
        name, equals, values = text.partition("=")
        name = name.removeprefix("--")
        fields = [field for field in all_fields(GenerationConfig) if field.option.flag is not None]
        flags = {field.flag.removeprefix("--") for field in fields}
        if not equals or not values:
            raise UserError(
                f"--vary={text}: give a name and values, such as ema-std=0.05,0.10,0.15 or guidance=1,1.5,2"
            )
        if name not in flags | NETWORKS.keys() | {KIMG}:
            raise UserError(
                f"--vary={text}: {name} is neither an option of generate_images.py nor {', '.join(NETWORKS)} or {KIMG}"
            )
        if name in NETWORKS:
            try:
                found = [f"{std:.3f}" for std in parse_std_list(values)]
            except ValueError as err:
                raise UserError(f"--vary={text}: {err}") from None
        else:
            found = [value.strip() for value in values.split(";" if ";" in values else ",")]
        if len(set(found)) < len(found):
            raise UserError(f"--vary={text}: the same value twice")
        return Axis(name, tuple(found))

    def numbers(self) -> list[float] | None:
        """The values as numbers; None = they are none."""
        try:
            return [float(value) for value in self.values]
        except ValueError:
            return None


@click.command(params=[])
def _options() -> None:
    """Reads options of generation as generate_images.py does."""


for _decorate in click_options(GenerationConfig):
    _options = _decorate(_options)


def read_options(words: Sequence[str]) -> GenerationConfig:
    """The configuration that options stand for on a command line.

    Raises:
        UserError: they are refused there.
    """
    try:
        return GenerationConfig.take(dict(_options.make_context("sweep", list(words)).params))
    except click.UsageError as err:
        raise UserError(err.format_message()) from None


class Sweep:
    """Measures settings, each once, and keeps what it finds in {outdir}/sweep.jsonl.

    Args:
        axes: what is varied.
        fixed: options of generation that all settings share, as words of a command line.
        evaluation: the metrics.
        num_images, seed, batch: images of each setting, their first seed, and how many at a time.
        outdir: where results and reconstructed networks go.
        facts: what else results depend on, as plain JSON values.

    Raises:
        UserError: `outdir` holds another sweep, an EMA width is asked for without a run, or a network makes no images.
    """

    def __init__(
        self,
        axes: Sequence[Axis],
        fixed: Sequence[str],
        evaluation: Evaluation,
        num_images: int,
        seed: int,
        batch: int,
        outdir: Path,
        facts: Mapping[str, Any],
    ):
        self.axes, self.evaluation, self.batch, self.outdir = axes, evaluation, batch, outdir
        self.fixed = list(fixed)
        self.seeds = range(seed, seed + num_images)
        self.results: dict[tuple[str, ...], dict[str, Any]] = {}
        self.networks: dict[tuple[str, str, int | None], Path] = {}
        self.measured = 0  # images of this start
        self.file = outdir / "sweep.jsonl"
        task = {"fixed": self.fixed, "num_images": num_images, "seed": seed, **facts}
        with distributed.fail_together():
            base = read_options(self.fixed).networks
            self.runs = {option: getattr(base, option) for option in NETWORKS.values()}
            for axis in axes:
                option = NETWORKS.get(axis.name)
                if option is not None and not (self.runs[option] and Path(self.runs[option]).is_dir()):
                    raise UserError(f"--vary={axis.name}: needs --{option}=DIR, the folder of a training run")
            if base.net is not None:
                check_makes_images(base.net, base.arch)
            self._read(task)

    def _read(self, task: Mapping[str, Any]) -> None:
        self.outdir.mkdir(parents=True, exist_ok=True)
        found = read_records(self.file) if self.file.is_file() else []
        records = found or [{"task": task, "code_version": code_version()}]
        if records[0].get("task") != task:
            raise UserError(f"{self.file} is of another sweep: choose another --outdir, or remove it")
        if distributed.get_rank() == 0:  # without lines that are spoiled
            with atomic_write(self.file, "w") as f:
                f.writelines(json.dumps(record) + "\n" for record in records)
        for record in records[1:]:
            if record["setting"].keys() == {axis.name for axis in self.axes}:
                self.results[self.key(record["setting"])] = record

    def key(self, setting: Mapping[str, str]) -> tuple[str, ...]:
        """Under which its record is in `results`."""
        return tuple(setting[axis.name] for axis in self.axes)

    def words(self, setting: Mapping[str, str]) -> list[str]:
        """The options of generation that a setting is; networks are reconstructed where it takes that."""
        kimg = int(setting[KIMG]) if KIMG in setting else None
        chosen = []
        for axis, option in NETWORKS.items():
            run = self.runs[option]
            if axis in setting or (kimg is not None and run):
                if axis not in setting:
                    raise UserError(f"--vary={KIMG} chooses among snapshots: vary {axis}, too, be it with one value")
                chosen.append(f"--{option}={self._network(Path(run), option, setting[axis], kimg)}")
        others = [f"--{name}={value}" for name, value in setting.items() if name not in NETWORKS and name != KIMG]
        replaced = {word.partition("=")[0] for word in chosen}
        words = [*(word for word in self.fixed if word.partition("=")[0] not in replaced), *chosen, *others]
        if not read_options(words).sampling.guidance.acts:
            words = [word for word in words if not word.startswith("--gnet=")]
        return words

    def _network(self, run: Path, prefix: str, std: str, kimg: int | None) -> Path:
        """The file of a reconstructed network, made by the first process where it is not there.

        When it is asked for first, by all processes.
        """
        wanted = (prefix, std, kimg)
        if wanted not in self.networks:
            path = None
            with distributed.fail_together():
                if distributed.get_rank() == 0:
                    inputs = list_averages(run)
                    (path,) = reconstruct_phema(inputs, self.outdir / "networks", prefix, [float(std)], kimg, skip=True)
            self.networks[wanted] = Path(distributed.from_first(path))
        return self.networks[wanted]

    def knows(self, setting: Mapping[str, str]) -> bool:
        """Whether a setting has been measured."""
        return self.key(setting) in self.results

    def generator(self, setting: Mapping[str, str]) -> LoadedGenerator:
        return load(read_options(self.words(setting)))

    def __call__(self, setting: Setting) -> dict[str, float]:
        """Values of the metrics of a setting, measured unless they are known; the same on all processes."""
        key = self.key(setting)
        if key not in self.results:
            with distributed.fail_together():
                generator = self.generator(setting)
                facts = generator.describe(self.seeds)
                images = generator.images(self.seeds, max_batch_size=self.batch, verbose=False)
            if not self.results:
                self.evaluation.check(len(self.seeds), generator.resolution)
            records = self.evaluation(images, facts, verbose=False)
            self.measured += len(self.seeds)
            results = {name: value for record in records for name, value in record["results"].items()}
            record = {"setting": setting, "results": results, "provenance": facts}
            if distributed.get_rank() == 0:
                append_line(self.file, json.dumps(record, allow_nan=False))
            self.results[key] = distributed.from_first(record)
        return self.results[key]["results"]


def grid(axes: Sequence[Axis]) -> Iterator[Setting]:
    """All settings."""
    for values in itertools.product(*(axis.values for axis in axes)):
        yield {axis.name: value for axis, value in zip(axes, values, strict=True)}


def by_coordinates(axes: Sequence[Axis], measure: Callable[[Setting], float]) -> Iterator[Setting]:
    """Settings of a search from the middle of all axes along one axis after the other, until none improves.

    Args:
        measure: what is to be small.
    """
    best = {axis.name: axis.values[len(axis.values) // 2] for axis in axes}
    yield best
    while True:
        before = dict(best)
        for axis in axes:
            tried = [best | {axis.name: value} for value in axis.values]
            yield from tried
            best = min(tried, key=measure)
        if best == before:
            return


def run(sweep: Sweep, search: str, budget: int | None) -> None:
    """Measure settings, print each, and at the end all of them, the best as a command, and draw a picture.

    Args:
        search: 'grid' or 'coordinate'.
        budget: images that this start may make; None = any number.
    """
    axes, num_images = sweep.axes, len(sweep.seeds)
    if budget is not None and budget < num_images and not sweep.results:
        raise UserError(f"--budget={budget} is less than the {num_images} images of one setting")
    name = ""

    def loss(setting: Setting) -> float:
        value = sweep(setting)[name]
        return -value if is_better_larger(name) else value

    total = math.prod(len(axis.values) for axis in axes)
    settings = grid(axes) if search == "grid" else by_coordinates(axes, loss)
    complete = True
    for setting in settings:
        known = sweep.knows(setting)
        if not known and budget is not None and sweep.measured + num_images > budget:
            complete = False
            break
        results = sweep(setting)
        name = name or next(iter(results))
        text = " ".join(f"{key}={value}" for key, value in setting.items())
        values = ", ".join(f"{key} {value:.5g}" for key, value in results.items())
        if not known:
            distributed.print0(f"[{len(sweep.results)} of {total}] {text}: {values}")
    rows = [(record["setting"], record["results"]) for record in sweep.results.values()]
    best = min((setting for setting, _ in rows), key=loss)
    shown = [best | {axes[0].name: value} for value in axes[0].values]
    for setting in shown:
        sweep.words(setting)  # reconstructs what only the first process looks at from here on
    if distributed.get_rank() == 0:
        print(f"\n{table(axes, rows)}\n")
        if not complete:
            print(f"--budget={budget} is used up; repeat the command to continue.")
        for axis in axes:
            if len(axis.values) > 1 and best[axis.name] in (axis.values[0], axis.values[-1]):
                print(
                    f"Note: {axis.name}={best[axis.name]} is at the end of its values; beyond, it may be better still"
                )
        command = " ".join(["python generate_images.py", *map(shlex.quote, sweep.words(best)), "--outdir=out"])
        print(f"Best {name}, {sweep(best)[name]:.5g}:\n{command}")
        draw(sweep.outdir / "sweep.png", sweep, name, best, shown)
        print(f"Picture: {sweep.outdir / 'sweep.png'}")
    distributed.shutdown()


def is_better_larger(name: str) -> bool:
    """Whether larger values of a metric, by the name of its result, are better."""
    return name.split("_")[0] in LARGER_IS_BETTER


def table(axes: Sequence[Axis], rows: Iterable[tuple[Setting, Mapping[str, float]]]) -> str:
    """Settings and their results, a line each."""
    found = list(rows)
    names = list(found[0][1])
    cells = [[axis.name for axis in axes] + names]
    cells += [[s[axis.name] for axis in axes] + [f"{results[name]:.5g}" for name in names] for s, results in found]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in cells)


def draw(path: Path, sweep: Sweep, name: str, best: Setting, settings: Sequence[Setting]) -> None:
    """Draw a result against each axis with the others at their best, all pairs of two axes, and images of `settings`,
    which are those of the first axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    axes = [axis for axis in sweep.axes if len(axis.values) > 1] or sweep.axes[:1]
    value = {key: record["results"][name] for key, record in sweep.results.items()}
    with_map = len(axes) > 1
    count = len(axes) + with_map + 1
    columns = min(count, 4)
    rows = -(-count // columns)
    fig, grid_of_places = plt.subplots(
        rows, columns, figsize=(6 * columns, 5 * rows), layout="constrained", squeeze=False
    )
    places = list(grid_of_places.flat)
    for place, axis in zip(places, axes, strict=False):
        x: Sequence[Any] = axis.numbers() or axis.values
        others = [a for a in axes if a is not axis]
        # A line for each value of one other axis; the rest are at their best.
        for setting in grid(others[:1]) if others else [{}]:
            line = [value.get(sweep.key(best | setting | {axis.name: v}), math.nan) for v in axis.values]
            if any(math.isfinite(v) for v in line):
                label = ", ".join(f"{key} {v}" for key, v in setting.items())
                place.plot(x, line, marker="o", label=label or None)
        place.set(xlabel=axis.name, ylabel=name)
        place.grid(alpha=0.3)
        if others:
            place.legend()
    if with_map:
        _draw_map(fig, places[len(axes)], sweep, axes[0], axes[1], name, best)
    shown = []
    for setting in settings:
        generator = sweep.generator(setting)
        images = generator.images(sweep.seeds[:SHOWN], max_batch_size=SHOWN, verbose=False)
        shown.append(torch.cat([batch.images for batch in images]))
    picture = image_grid(torch.cat(shown).numpy(), SHOWN)[0]
    places[count - 1].imshow(picture, cmap="gray", vmin=0, vmax=255)
    places[count - 1].set_title(f"rows: {sweep.axes[0].name} {', '.join(sweep.axes[0].values)}", fontsize=10)
    for place in places[count - 1 :]:
        place.axis("off")
    setting = ", ".join(f"{key} {v}" for key, v in best.items())
    fig.suptitle(f"{name} of {len(sweep.seeds)} images each; best {value[sweep.key(best)]:.4g} with {setting}")
    with atomic_write(path) as f:
        description = f"calculate_metrics.py sweep, OpenEDM2 {code_version()}"
        fig.savefig(f, format="png", dpi=80, metadata={"Description": description})
    plt.close(fig)


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
