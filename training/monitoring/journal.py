"""Progress, log and statistics files of a training run."""

import itertools
import json
import math
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dnnlib.errors import UserError
from dnnlib.files import append_line, atomic_write, leftovers, locked
from dnnlib.progress import Lines, format_time
from torch_utils import distributed
from training.monitoring.tracker import Tracker

LOCK = ".lock"  # in the directory of a run
DIAGNOSIS = "diagnosis.jsonl"  # likewise


class Journal:
    """A run's progress bar, log.txt, stats.jsonl, TensorBoard events and tracker, of the first process.

    While it is open, it keeps other runs out of the directory. It clears away what killed ones left half-written.

    Args:
        silent: leave the directory alone, and report nothing.

    Raises:
        UserError: another run has the directory open.
    """

    def __init__(self, outdir: Path, silent: bool = False):
        self.outdir = outdir
        self.active = distributed.get_rank() == 0 and not silent
        self._resources = ExitStack()
        if self.active:
            outdir.mkdir(parents=True, exist_ok=True)
            self._resources.enter_context(locked(outdir / LOCK, self._refuse))
            for name in ("training", "network-snapshot", "fakes", "reals", "stats", "diagnosis", "metric"):
                for partial in leftovers(outdir, name):
                    partial.unlink(missing_ok=True)
        hidden = not self.active or not sys.stderr.isatty()
        progress = tqdm(unit="img", unit_scale=True, disable=hidden, dynamic_ncols=True)
        self.progress = self._resources.enter_context(progress)
        self.tensorboard = None
        self.lines: Lines | None = None  # where there is no terminal, once training has begun
        self.tracker: Tracker | None = None

    def _refuse(self) -> None:
        raise UserError(f"{self.outdir} is in use by another training run: wait for it, or stop it")

    def log(self, message: str) -> None:
        """Show a line and add it to log.txt."""
        if self.active:
            self.progress.write(message)
            if self.lines is not None:
                self.lines.postpone()
            append_line(self.outdir / "log.txt", message)

    def start(self, nimg: int, duration: int) -> None:
        """Begin, or resume, at `nimg` of `duration` images: records of later ones, now to be repeated, are removed."""
        if self.active:
            from torch.utils.tensorboard import SummaryWriter  # slow to import; only this process needs it

            self.tensorboard = self._resources.enter_context(SummaryWriter(self.outdir, purge_step=nimg + 1))
            kept = ("stats.jsonl", DIAGNOSIS, "metric-*.jsonl")
            for path in itertools.chain(*map(self.outdir.glob, kept)):
                lines = [line for line in path.read_text(errors="replace").splitlines() if _is_status(line, nimg)]
                with atomic_write(path, "w") as f:
                    f.writelines(line + "\n" for line in lines)
        if self.active and self.progress.disable:
            self.lines = Lines("img", duration, nimg)
        self.progress.reset(duration)
        self.progress.initial = self.progress.n = self.progress.last_print_n = nimg  # done before, not just now
        self.progress.refresh()

    def report_to(self, tracker: Tracker) -> None:
        """From now on, report to a tracker as well; on the first process."""
        self.tracker = tracker
        self._resources.callback(tracker.close)

    def advance(self, count: int) -> None:
        """Move the progress bar by `count` images, or print a line where there is none and nothing else is printed."""
        self.progress.update(count)
        if self.lines is not None:
            self.lines.update(count)

    def report(self, fields: dict[str, float]) -> None:
        """Record numbers; `fields["nimg"]` says when."""
        if self.tensorboard is not None:
            # NaN and infinity are no JSON.
            line = json.dumps({k: v if math.isfinite(v) else None for k, v in fields.items()})
            append_line(self.outdir / "stats.jsonl", line)
        self._chart(fields)

    def _chart(self, fields: Mapping[str, float]) -> None:
        """Show numbers in TensorBoard and the tracker."""
        if self.tensorboard is not None:
            for name, value in fields.items():
                if name not in ("nimg", "time"):  # TensorBoard has its own axes
                    self.tensorboard.add_scalar(name, value, global_step=int(fields["nimg"]))
            self.tensorboard.flush()
        if self.tracker is not None:
            self.tracker.numbers(fields)

    def record(self, diagnosis: dict[str, Any]) -> None:
        """Add a line to diagnosis.jsonl; its `nimg` says when. Numbers beside it are shown as others are."""
        if self.active:
            append_line(self.outdir / DIAGNOSIS, json.dumps(diagnosis))
        numbers = {name: value for name, value in diagnosis.items() if isinstance(value, (int, float))}
        if len(numbers) > 1:
            self._chart(numbers)

    def show(self, path: Path, nimg: int) -> None:
        """Record a picture that was made at `nimg` images."""
        if self.tracker is not None and path.is_file():
            self.tracker.picture(path.stem.split("-")[0], path, nimg)

    def report_metrics(self, nimg: int, snapshot: str, results: dict[str, float]) -> None:
        """Show metrics of a snapshot, made at `nimg` images."""
        if self.tensorboard is not None:
            for name, value in results.items():
                self.tensorboard.add_scalar(f"{name}/{snapshot}", value, global_step=nimg)
            self.tensorboard.flush()
        if self.tracker is not None:
            self.tracker.numbers({f"{name}/{snapshot}": value for name, value in results.items()} | {"nimg": nimg})
        self.log(f"{snapshot} at {nimg} images: " + ", ".join(f"{name} {value:.6g}" for name, value in results.items()))

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *exc_info) -> None:
        self._resources.close()


def status_line(fields: dict[str, float], duration: int, pauses: float) -> str:
    """What the terminal and the log show of a status report; `pauses` = seconds without training that are to come."""
    left = (duration - fields["nimg"]) / fields["images_per_second"] + pauses
    gpu = f"  gpu {fields['gpu_mem_gb']:.1f} GB" if fields["gpu_mem_gb"] else ""
    return (
        f"nimg {fields['nimg']:<10d} loss {fields['loss']:<8.4f} lr {fields['lr']:<8.5f} "
        f"{fields['images_per_second']:.1f} img/s  elapsed {format_time(fields['seconds'])}  "
        f"left {format_time(left)}  mem {fields['cpu_mem_gb']:.1f} GB{gpu}"
    )


def first_report(outdir: Path) -> dict[str, float]:
    """The first status report of a run; empty if there is none."""
    path = outdir / "stats.jsonl"
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    return next((json.loads(line) for line in lines if _is_status(line, sys.maxsize)), {})


def _is_status(line: str, nimg: int) -> bool:
    """Whether a line is undamaged (a full disk or a power failure can spoil some) and of no later than `nimg`.

    Lines without `nimg` stay: metrics that are not the run's own.
    """
    try:
        return json.loads(line).get("nimg", 0) <= nimg
    except (ValueError, TypeError, AttributeError):
        return False
