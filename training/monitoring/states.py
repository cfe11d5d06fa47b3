"""Training states on disk: written while the training continues, and removed when there are enough newer ones."""

import copy
import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from dnnlib.errors import RunError
from torch_utils import distributed
from torch_utils.checkpoint import save_state
from training.config.training import TrainConfig
from training.monitoring.outdir import STATE_PATTERN, state_name

MOMENTS = 2  # of Adam and Adamax, for each parameter


def on_cpu(value: Any) -> Any:
    """A copy of a state that later changes of its tensors do not reach, on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        copied: Any = copy.copy(value)  # keeps what state dicts say of themselves
        copied.update((key, on_cpu(item)) for key, item in value.items())
        return copied
    if isinstance(value, (list, tuple)):
        return type(value)(map(on_cpu, value))
    return value


def bytes_of(value: Any) -> int:
    """Size of the tensors of a state."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, Mapping):
        return sum(map(bytes_of, value.values()))
    return sum(map(bytes_of, value)) if isinstance(value, (list, tuple)) else 0


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f} MB"


def averages(config: TrainConfig) -> int:
    """Number of averages of the weights that a run tracks."""
    return len(config.ema.ema_std) + bool(getattr(config.ema, "ema_rate", 0))


def stored_copies(config: TrainConfig) -> int:
    """How often each parameter is in a training state: as it is, with its moments, and averaged."""
    return 1 + MOMENTS + averages(config)


def kept_bytes(config: TrainConfig, parameters: int) -> int:
    """What a run holds in memory all the time: each parameter as in a training state, and its gradient."""
    return 4 * parameters * (stored_copies(config) + 1)


def disk_needs(config: TrainConfig, parameters: int, nimg: int, outdir: Path) -> str:
    """What a run will write from `nimg` images on, beside the room that there is; about, as reports are small.

    Numbers of states are 4 bytes each, those of snapshots 2.
    """
    run = config.run
    state = 4 * parameters * stored_copies(config)
    states = run.keep_checkpoints + (run.duration // run.milestones if run.milestones else 0)
    times = -(-run.duration // run.snapshot) - nimg // run.snapshot if run.snapshot else 1
    snapshots = max(times, 1) * max(averages(config), 1)
    total = (states + 1) * state + snapshots * 2 * parameters  # one more while it is written
    free = shutil.disk_usage(next(path for path in (outdir, *outdir.absolute().parents) if path.exists())).free
    text = (
        f"{states} training states of {megabytes(state)} and {snapshots} snapshots of {megabytes(2 * parameters)}; "
        f"{megabytes(free)} are free"
    )
    if total <= free:
        return text
    return f"{text}. Warning: that is not enough, {megabytes(total)} are needed: see --snapshot, --keep-checkpoints"


class StateWriter:
    """Writes the training states of a run; on the first process.

    The training waits for a copy only; a thread writes it. A state has its name only once it is complete, and older
    ones go only after that. As a context, it leaves no thread behind.

    Args:
        outdir: where they go.
        keep: how many of the newest are kept.
        milestones: interval in images of those that are kept for good; 0 = none are.
        log: takes a line.
    """

    def __init__(self, outdir: Path, keep: int, milestones: int, log: Callable[[str], object]):
        self.outdir, self.keep, self.milestones, self._log = outdir, keep, milestones, log
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._last = time.monotonic()

    def __enter__(self) -> "StateWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_exc_info: object) -> None:
        if kind is None:
            self.wait()
        elif self._thread is not None:
            self._thread.join()

    def age(self) -> float:
        """Seconds since the last state was taken, or since the start."""
        return time.monotonic() - self._last

    def save(self, nimg: int, state: dict[str, Any]) -> None:
        """Write a state of `nimg` images.

        Raises:
            RunError: there is no room for it.
            OSError: an earlier one could not be written.
        """
        begin = time.perf_counter()
        self.wait()
        needed = self._check_room(bytes_of(state))
        copied = on_cpu(state)
        self._thread = threading.Thread(target=self._write, args=(nimg, copied), name="training state")
        self._thread.start()
        self._last = time.monotonic()
        pause = (time.perf_counter() - begin) * 1000
        self._log(f"Saving a training state of {megabytes(needed)}: training waited {pause:.0f} ms")

    def save_together(self, nimg: int, size: int, write: Callable[[Path], None]) -> None:
        """Have all processes write their pieces of a state of `nimg` images, before training continues.

        Args:
            size: bytes that all write together.
            write: writes the state under a path; called on all processes.

        Raises:
            RunError: there is no room for it, or it could not be written.
        """
        begin = time.perf_counter()
        with distributed.fail_together():
            if distributed.get_rank() == 0:
                self._check_room(size)
        name = state_name(nimg, in_pieces=True)
        write(self.outdir / name)
        if distributed.get_rank() == 0:
            self._remove_old(name)
        self._last = time.monotonic()
        pause = (time.perf_counter() - begin) * 1000
        self._log(f"Saved a training state of {megabytes(size)} in pieces: training waited {pause:.0f} ms")

    def _check_room(self, needed: int) -> int:
        """Check that so many bytes are free, and return them.

        Raises:
            RunError: they are not.
        """
        free = shutil.disk_usage(self.outdir).free
        if needed > free:
            raise RunError(
                f"{self.outdir}: a training state needs {megabytes(needed)}, and {megabytes(free)} are free: make "
                f"room, and repeat the command to continue from the last one"
            )
        return needed

    def wait(self) -> None:
        """Wait until the last state is on disk.

        Raises:
            OSError: it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.raise_failure()

    def raise_failure(self) -> None:
        """Raise what kept the last state from being written, if anything did."""
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _write(self, nimg: int, state: dict[str, Any]) -> None:
        try:
            save_state(self.outdir / state_name(nimg), state)
            self._remove_old(state_name(nimg))
        except BaseException as err:  # for the training, which ends by it
            self._failure = err

    def _remove_old(self, written: str) -> None:
        """Remove what is neither the state just written, nor among the newest, nor a milestone."""
        found = [(int(m[1]), p) for p in self.outdir.iterdir() if (m := re.fullmatch(STATE_PATTERN, p.name))]
        others = sorted((k, path) for k, path in found if path.name != written and not self._is_milestone(k))
        for _, path in others[: max(len(others) - (self.keep - 1), 0)]:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def _is_milestone(self, kimg: int) -> bool:
        """Whether the name of a state is that of a milestone."""
        interval = self.milestones
        return interval > 0 and -(-kimg * 1000 // interval) * interval // 1000 == kimg
