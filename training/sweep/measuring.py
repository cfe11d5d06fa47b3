"""A sweep: settings, measured once each, and what is kept of them."""

import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from dnnlib.errors import UserError
from dnnlib.files import append_line, atomic_write, read_records
from dnnlib.util import code_version
from torch_utils import distributed
from training.config.fields import click_options
from training.config.generation import KEPT_NETWORKS, GenerationConfig
from training.generation import LoadedGenerator, load
from training.guides import architecture_of_file, check_makes_images
from training.metrics.evaluation import Evaluation
from training.shelf import Shelf
from training.snapshot.reconstruction import list_averages, reconstruct_phema
from training.sweep.settings import KIMG, NETWORKS, Axis, Setting

AT_A_TIME = 2  # networks that a setting has


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


@dataclass(frozen=True)
class Room:
    """How many bytes of networks are kept, beside those in use: in memory, and reconstructed ones on the disk.

    None = all of them.
    """

    memory: int = KEPT_NETWORKS
    disk: int | None = None


class Sweep:
    """Measures settings, each once, and keeps what it finds in {outdir}/sweep.jsonl.

    Args:
        axes: what is varied.
        fixed: options of generation that all settings share, as words of a command line.
        evaluation: the metrics.
        num_images, seed, batch: images of each setting, their first seed, and how many at a time.
        outdir: where results and reconstructed networks go.
        facts: what else results depend on, as plain JSON values.
        room: for networks, which settings share.

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
        room: Room = Room(),
    ):
        self.axes, self.evaluation, self.batch, self.outdir = axes, evaluation, batch, outdir
        self.fixed = list(fixed)
        self.seeds = range(seed, seed + num_images)
        self.results: dict[tuple[str, ...], dict[str, Any]] = {}
        self.by_effect: dict[tuple[str, ...], dict[str, Any]] = {}  # the same, by what settings come to
        self.networks: OrderedDict[tuple[str, str, int | None], Path] = OrderedDict()  # the latest one last
        self.room, self.shelf = room, Shelf(None, room.memory, AT_A_TIME)
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
            if base.net is not None and (architecture := architecture_of_file(base.net, base.arch)) is not None:
                check_makes_images(architecture, base.net)
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
                self._keep(record)

    def _keep(self, record: dict[str, Any]) -> None:
        self.results[self.key(record["setting"])] = record
        self.by_effect.setdefault(self._effect(record["setting"]), record)

    def key(self, setting: Mapping[str, str]) -> tuple[str, ...]:
        """Under which its record is in `results`."""
        return tuple(setting[axis.name] for axis in self.axes)

    def words(self, setting: Mapping[str, str]) -> list[str]:
        """The options of generation that a setting is; networks are reconstructed where it takes that.

        To be called by all processes.
        """
        return self._words(setting, self._network)

    def _effect(self, setting: Mapping[str, str]) -> tuple[str, ...]:
        """What a setting comes to: the same for settings that differ in what has no effect."""
        return tuple(self._words(setting, lambda _run, _prefix, std, kimg: f"{std}-{kimg}"))

    def _words(self, setting: Mapping[str, str], network: Callable[[Path, str, str, int | None], object]) -> list[str]:
        """As `words`; `network` gives what a network is called: of a run, its option, a width and a time."""
        kimg = int(setting[KIMG]) if KIMG in setting else None
        wanted: dict[str, tuple[Path, str, str, int | None]] = {}
        for axis, option in NETWORKS.items():
            run = self.runs[option]
            if axis in setting or (kimg is not None and run):
                if axis not in setting:
                    raise UserError(f"--vary={KIMG} chooses among snapshots: vary {axis}, too, be it with one value")
                wanted[f"--{option}"] = Path(run), option, setting[axis], kimg
        others = [f"--{name}={value}" for name, value in setting.items() if name not in NETWORKS and name != KIMG]
        words = [*(word for word in self.fixed if word.partition("=")[0] not in wanted), *others]
        placed = [f"{option}={run}" for option, (run, *_) in wanted.items()]
        if not read_options([*words, *placed]).sampling.guidance.acts:
            words = [word for word in words if not word.startswith("--gnet=")]
            wanted.pop("--gnet", None)
        return [*words, *(f"{option}={network(*what)}" for option, what in wanted.items())]

    def _network(self, run: Path, prefix: str, std: str, kimg: int | None) -> Path:
        """The file of a reconstructed network, made by the first process where it is not there.

        When it is asked for first, by all processes.
        """
        wanted = (prefix, std, kimg)
        if wanted not in self.networks:
            path, deleted = None, []
            with distributed.fail_together():
                if distributed.get_rank() == 0:
                    inputs, folder = list_averages(run), self.outdir / "networks"
                    (path,) = reconstruct_phema(inputs, folder, prefix, [float(std)], kimg, skip=True)
                    deleted = self._delete_beyond_room(path)
            path, deleted = distributed.from_first((path, deleted))
            self.networks = OrderedDict((key, old) for key, old in self.networks.items() if str(old) not in deleted)
            self.networks[wanted] = Path(path)
        self.networks.move_to_end(wanted)
        return self.networks[wanted]

    def _delete_beyond_room(self, new: Path) -> list[str]:
        """Delete reconstructed networks until they fit on the disk: those of earlier starts first, then the oldest.

        The new one stays, and the one before it, with which it may be used.
        """
        if self.room.disk is None:
            return []
        mine = list(self.networks.values())
        strange = [path for path in sorted(new.parent.glob("[!.]*")) if path not in (*mine, new)]
        total = sum(path.stat().st_size for path in (*strange, *mine, new))
        deleted = []
        for path in (*strange, *mine[: -(AT_A_TIME - 1)]):
            if total <= self.room.disk:
                break
            total -= path.stat().st_size
            path.unlink()
            deleted.append(str(path))
        return deleted

    def knows(self, setting: Mapping[str, str]) -> bool:
        """Whether a setting has been measured."""
        return self.key(setting) in self.results

    def generator(self, setting: Mapping[str, str]) -> LoadedGenerator:
        """The networks of a setting, ready to generate. To be called by all processes."""
        return load(read_options(self.words(setting)), self.shelf)

    def __call__(self, setting: Setting) -> dict[str, float]:
        """Values of the metrics of a setting, measured unless they are known; the same on all processes."""
        if not self.knows(setting):
            same = self.by_effect.get(self._effect(setting))
            record = self._measure(setting) if same is None else {**same, "setting": setting}
            if distributed.get_rank() == 0:
                append_line(self.file, json.dumps(record, allow_nan=False))
            self._keep(record)
        return self.results[self.key(setting)]["results"]

    def costs(self, setting: Setting) -> int:
        """Images that are made to know a setting."""
        known = self.knows(setting) or self._effect(setting) in self.by_effect
        return 0 if known else len(self.seeds)

    def _measure(self, setting: Setting) -> dict[str, Any]:
        """The record of a setting, on all processes."""
        with distributed.fail_together():
            generator = self.generator(setting)
            facts = generator.describe(self.seeds)
            images = generator.images(self.seeds, max_batch_size=self.batch, verbose=False)
        if not self.results:
            self.evaluation.check(len(self.seeds), generator.resolution)
        records = self.evaluation(images, facts, verbose=False)
        self.measured += len(self.seeds)
        results = {name: value for record in records for name, value in record["results"].items()}
        return distributed.from_first({"setting": setting, "results": results, "provenance": facts})
