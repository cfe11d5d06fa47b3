"""Faults of training processes, which are installed in them from outside: the code that is tested knows nothing of it."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import dnnlib.files
from training import training_loop
from training.monitoring.previews import Previews
from training.monitoring.snapshot_metrics import SnapshotEvaluation
from training.monitoring.states import StateWriter
from training.training_loop import TrainingRun

# Where a process may be hit: in a step; while a training state is copied, written half, complete but without its name,
# with its name but beside those that it replaces; between two snapshots; while one has no name yet; while a picture is
# drawn; before and after metrics.
PLACES = ("training", "copying", "saving", "renaming", "renamed", "snapshots", "snapshot", "preview", "metrics", "measured")


def install(rank: int, job: dict[str, Any]) -> None:
    """Install in this process what a job asks for."""
    if job.get("progress"):
        note(Path(job["progress"]), rank)
    if job.get("fault") and job["fault"][0] == rank:
        _, nimg, where = job["fault"]
        fail_at(nimg, where)
    if job.get("signal") and job["signal"][0] == rank:
        _, number, where = job["signal"]
        fail_at(0, where, lambda: os.kill(os.getpid(), number))


def kill() -> None:
    """End this process as if its machine had lost its power."""
    os.kill(os.getpid(), signal.SIGKILL)


def note(path: Path, rank: int) -> None:
    """Have a process write how many images it has seen after each step."""
    file = os.open(path.with_name(f"{path.name}.{rank}"), os.O_WRONLY | os.O_CREAT)
    _after(TrainingRun, "step", lambda run, *_: os.pwrite(file, b"%-20d" % run.nimg, 0))


def fail_at(nimg: int, where: str, fault: Callable[[], object] = kill) -> None:
    """Have `fault` happen to this process, once, at the first time that it is at a place with at least `nimg` images."""
    assert where in PLACES, where
    state: dict[str, Any] = {"nimg": 0, "armed": True}

    def hit(*_args: object) -> None:
        if state["armed"] and state["nimg"] >= nimg:
            state["armed"] = False
            fault()

    def begin_step(run: TrainingRun, *_args: object) -> None:
        state["nimg"] = run.nimg

    _before(TrainingRun, "step", begin_step)
    _after(TrainingRun, "step", begin_step)
    places: dict[str, Callable[[], None]] = {
        "training": lambda: _after(TrainingRun, "loss_of_round", hit),
        "copying": lambda: _before(StateWriter, "save", hit),
        "saving": lambda: _within_save(hit),
        "renaming": lambda: _around_replace("training-state", before=hit),
        "renamed": lambda: _around_replace("training-state", after=hit),
        "snapshots": lambda: _after(training_loop, "save_network", hit),
        "snapshot": lambda: _around_replace("network-snapshot", before=hit),
        "preview": lambda: _before(Previews, "draw", hit),
        "metrics": lambda: _before(SnapshotEvaluation, "__call__", hit),
        "measured": lambda: _after(SnapshotEvaluation, "__call__", hit),
    }
    places[where]()


def _before(owner: Any, name: str, call: Callable[..., object]) -> None:
    original = getattr(owner, name)

    def patched(*args: Any, **kwargs: Any) -> Any:
        call(*args)
        return original(*args, **kwargs)

    setattr(owner, name, patched)


def _after(owner: Any, name: str, call: Callable[..., object]) -> None:
    original = getattr(owner, name)

    def patched(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        call(*args)
        return result

    setattr(owner, name, patched)


class _Hit:
    """A file that calls a function at the second piece that is written to it."""

    def __init__(self, file: Any, call: Callable[[], object]):
        self._file, self._call, self._pieces = file, call, 0

    def write(self, data: Any) -> int:
        self._pieces += 1
        if self._pieces == 2:
            self._file.flush()
            self._call()
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def _within_save(call: Callable[[], object]) -> None:
    original = torch.save
    torch.save = lambda value, file: original(value, _Hit(file, call))


def _around_replace(
    name: str, before: Callable[[], object] = lambda: None, after: Callable[[], object] = lambda: None
) -> None:
    """Around the moment in which files whose names begin with `name` get them."""
    original = os.replace

    def replace(source: Any, target: Any) -> None:
        of_name = Path(target).name.startswith(name)
        if of_name:
            before()
        original(source, target)
        if of_name:
            after()

    dnnlib.files.os.replace = replace
