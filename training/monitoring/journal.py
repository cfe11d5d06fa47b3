"""Progress, log and statistics files of a training run."""

import fcntl
import json
import math
import sys
from pathlib import Path

from tqdm import tqdm

from dnnlib.errors import UserError
from dnnlib.files import append_line, atomic_write
from torch_utils import distributed


class Journal:
    """A run's progress bar, log.txt, stats.jsonl and TensorBoard events; only the first process shows and writes.

    While it is open, it keeps other runs out of the directory, and it clears away what killed ones left half-written.

    Raises:
        UserError: another run has the directory open.
    """

    def __init__(self, outdir: Path):
        self.outdir = outdir
        self.active = distributed.get_rank() == 0
        self.lock = None
        if self.active:
            outdir.mkdir(parents=True, exist_ok=True)
            self.lock = open(outdir / "log.txt", "a")  # noqa: SIM115 - stays open to hold the lock
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.lock.close()
                raise UserError(f"{outdir} is in use by another training run: wait for it, or stop it") from None
            for name in ("training", "network-snapshot", "fakes", "reals", "stats", "metric"):
                for partial in outdir.glob(f".{name}*.tmp"):
                    partial.unlink()
        hidden = not self.active or not sys.stderr.isatty()
        self.progress = tqdm(unit="img", unit_scale=True, disable=hidden, dynamic_ncols=True)
        self.tensorboard = None

    def log(self, message: str) -> None:
        """Show a line and add it to log.txt."""
        if self.active:
            self.progress.write(message)
            append_line(self.outdir / "log.txt", message)

    def start(self, nimg: int, duration: int) -> None:
        """Begin, or go on, at `nimg` of `duration` images: what was told about later ones is withdrawn."""
        if self.active:
            from torch.utils.tensorboard import SummaryWriter  # slow to import; only this process needs it

            self.tensorboard = SummaryWriter(self.outdir, purge_step=nimg + 1)
            for path in [*self.outdir.glob("stats.jsonl"), *self.outdir.glob("metric-*.jsonl")]:
                lines = [line for line in path.read_text(errors="replace").splitlines() if _is_status(line, nimg)]
                with atomic_write(path, "w") as f:
                    f.writelines(line + "\n" for line in lines)
        self.progress.reset(duration)
        self.progress.initial = self.progress.n = self.progress.last_print_n = nimg  # done before, not just now
        self.progress.refresh()

    def advance(self, count: int) -> None:
        self.progress.update(count)

    def report(self, fields: dict[str, float]) -> None:
        """Record numbers; `fields["nimg"]` says when."""
        if self.tensorboard is not None:
            # NaN and infinity are no JSON.
            line = json.dumps({k: v if math.isfinite(v) else None for k, v in fields.items()})
            append_line(self.outdir / "stats.jsonl", line)
            for name, value in fields.items():
                if name not in ("nimg", "time"):  # TensorBoard has its own axes
                    self.tensorboard.add_scalar(name, value, global_step=int(fields["nimg"]))
            self.tensorboard.flush()

    def report_metrics(self, nimg: int, snapshot: str, results: dict[str, float]) -> None:
        """Show results of a snapshot."""
        if self.tensorboard is not None:
            for name, value in results.items():
                self.tensorboard.add_scalar(f"{name}/{snapshot}", value, global_step=nimg)
            self.tensorboard.flush()
        self.log(f"{snapshot} at {nimg} images: " + ", ".join(f"{name} {value:.6g}" for name, value in results.items()))

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *exc_info) -> None:
        self.progress.close()
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.lock is not None:
            self.lock.close()


def _is_status(line: str, nimg: int) -> bool:
    """Whether a line is a whole one, from no later than `nimg`: a full disk or lost power can spoil lines.

    Metrics that are not the run's own say no `nimg`.
    """
    try:
        return json.loads(line).get("nimg", 0) <= nimg
    except (ValueError, TypeError, AttributeError):
        return False
