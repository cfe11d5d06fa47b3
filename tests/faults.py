"""Faults of training processes, which are installed in them from outside: the code that is tested knows nothing of it."""

import os
import signal
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import dnnlib.files
from torch_utils import distributed
from training.monitoring import snapshots
from training.monitoring.previews import Previews
from training.monitoring.snapshot_metrics import SnapshotEvaluation
from training.monitoring.states import StateWriter
from training.networks import dropout
from training.training_loop import TrainingRun

# Where a process may be hit: in a step; while a training state is copied, written half, complete but without its name,
# with its name but beside those that it replaces; between two snapshots; while one has no name yet; while a picture is
# drawn; before and after metrics.
PLACES = (
    "training",
    "copying",
    "saving",
    "renaming",
    "renamed",
    "snapshots",
    "snapshot",
    "preview",
    "metrics",
    "measured",
)


def install(rank: int, job: dict[str, Any]) -> None:
    """Install in this process what a job asks for."""
    if job.get("progress"):
        note(Path(job["progress"]), rank)
    if job.get("fault") and job["fault"][0] == rank:
        _, nimg, where = job["fault"]
        fail_at(nimg, where)
    if job.get("slow"):
        be_slow(*job["slow"])
    if job.get("spoil") and job["spoil"][0] == rank:
        spoil_weights(job["spoil"][1])
    if job.get("draws"):
        write_draws(Path(job["draws"]))
    if job.get("count"):
        count_sums(Path(job["count"]))
    if job.get("signal") and job["signal"][0] == rank:
        _, number, where = job["signal"]
        fail_at(0, where, lambda: os.kill(os.getpid(), number))
    if job.get("hang") and job["hang"][0] == rank:
        _, nimg, where = job["hang"]
        fail_at(nimg, where, lambda: time.sleep(1000))


def kill() -> None:
    """End this process as if its machine had lost its power."""
    os.kill(os.getpid(), signal.SIGKILL)


def note(path: Path, rank: int) -> None:
    """Have a process write how many images it has seen after each step."""
    file = os.open(path.with_name(f"{path.name}.{rank}"), os.O_WRONLY | os.O_CREAT)
    _after(TrainingRun, "step", lambda run, *_: os.pwrite(file, b"%-20d" % run.nimg, 0))


def be_slow(timeout: float, seconds: float) -> None:
    """Have processes wait `timeout` minutes for each other, and the first one take `seconds` for pictures and states."""
    distributed.TIMEOUT_MINUTES = timeout
    _before(Previews, "draw", lambda *_: time.sleep(seconds))
    _before(StateWriter, "save", lambda *_: time.sleep(seconds))


def spoil_weights(nimg: int) -> None:
    """Have a bit of a weight of this process flip after `nimg` images."""

    def spoil(run: TrainingRun, *_args: object) -> None:
        if run.nimg == nimg:
            weight = max((p.detach() for p in run.net.parameters()), key=torch.Tensor.numel)
            weight.view(torch.int32)[(0,) * weight.ndim].bitwise_xor_(1 << 20)

    _after(TrainingRun, "step", spoil)


def write_draws(folder: Path) -> None:
    """Have a process write what each image of the run meets: digests of the image, its noise and noise level and its
    label, as the network gets them, and of all of its dropout masks, under the image's number."""
    current: dict[str, Any] = {"masks": []}
    original = dropout.keep

    def keep(*args: Any) -> torch.Tensor:
        mask = original(*args)
        current["masks"].append(mask)
        return mask

    dropout.keep = keep

    def begin_round(run: TrainingRun, first: int, *_batch: Any) -> None:
        current.update(first=first, masks=[])
        if current.get("run") is not run:
            current["run"] = run
            run.architecture.core(run.net).register_forward_pre_hook(lambda _net, args: current.update(inputs=args))

    def write(run: TrainingRun, first: int, images: torch.Tensor, *_labels: Any) -> None:
        tensors = [*_tensors(current["inputs"]), *current["masks"]]
        with open(folder / f"{type(run.net).__name__}-{os.getpid()}", "a") as f:
            for i in range(len(images)):
                own = b"".join(x[i].contiguous().numpy().tobytes() for x in tensors if len(x) == len(images))
                f.write(f"{first + i} {len(tensors)} {zlib.crc32(own)}\n")

    _before(TrainingRun, "loss_of_round", begin_round)
    _after(TrainingRun, "loss_of_round", write)


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value.detach()]
    return [x for part in value for x in _tensors(part)] if isinstance(value, (list, tuple)) else []


def count_sums(path: Path) -> None:
    """Have the first process write, after each step, how often tensors were summed over the processes in it, and their
    sizes; without the flags that it exchanges with the others, which are single numbers."""
    sizes: list[int] = []
    _before(torch.distributed, "all_reduce", lambda tensor: sizes.append(tensor.numel()))

    def write(run: TrainingRun, *_args: object) -> None:
        if torch.distributed.get_rank() == 0:
            with open(path, "a") as f:
                f.write(f"{type(run.net).__name__} {[size for size in sizes if size > 1]}\n")

    _before(TrainingRun, "step", lambda *_: sizes.clear())
    _after(TrainingRun, "step", write)


def fail_at(nimg: int, where: str, fault: Callable[[], object] = kill) -> None:
    """Have `fault` happen to this process, once, at the first time that it is at a place with at least `nimg` images."""
    state: dict[str, Any] = {"nimg": 0, "armed": True}

    def hit(*_args: object) -> None:
        if state["armed"] and state["nimg"] >= nimg:
            state["armed"] = False
            fault()

    def begin_step(run: TrainingRun, *_args: object) -> None:
        state["nimg"] = run.nimg

    _before(TrainingRun, "step", begin_step)
    _after(TrainingRun, "step", begin_step)
    if where == "loading":  # before there are any images
        _before(TrainingRun, "restore", hit)
        return
    places: dict[str, Callable[[], None]] = {
        "training": lambda: _after(TrainingRun, "loss_of_round", hit),
        "copying": lambda: _before(StateWriter, "save", hit),
        "saving": lambda: _within_save(hit),
        "renaming": lambda: _around_replace("training-state", before=hit),
        "renamed": lambda: _around_replace("training-state", after=hit),
        "snapshots": lambda: _after(snapshots, "save_network", hit),
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

    def save(value: Any, file: Any, **options: Any) -> None:
        original(value, file if options else _Hit(file, call), **options)  # with options, torch itself saves in memory

    torch.save = save


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
