"""What looks at the averaged networks of a training run: pictures, metrics, losses on other images."""

import time
from collections.abc import Callable
from typing import Any

import torch

from torch_utils import distributed
from training.config.training import TrainConfig
from training.dataset.images import ImageFolderDataset
from training.encoders import Encoder
from training.monitoring.journal import Journal
from training.monitoring.outdir import is_owed, owes_picture, picture_name, snapshot_name, unmeasured
from training.monitoring.previews import Previews
from training.monitoring.snapshot_metrics import SnapshotEvaluation
from training.monitoring.tracker import Tracker
from training.monitoring.validation import Validation
from training.optimizers import EMA


class Observers:
    """The observers that a configuration asks for; creating them checks what they need, and begins to report.

    Args:
        config: of the run.
        dataset, encoder, net, device: of the run.
        journal: where they report.
        nimg: images seen before.
        stop: whether this process was asked to stop, so that what is under way is to be left.

    Raises:
        UserError, RunError: what is asked for cannot be measured or reported.
    """

    def __init__(
        self,
        config: TrainConfig,
        dataset: ImageFolderDataset,
        encoder: Encoder,
        net: Any,
        device: torch.device,
        journal: Journal,
        nimg: int,
        stop: Callable[[], bool],
    ):
        run = config.run
        self.run, self.stop = run, stop
        self.owes = distributed.from_first(is_owed(journal.outdir, run, nimg))  # since the start before
        self.journal, self.outdir, self.duration = journal, journal.outdir, run.duration
        self.preview_seconds = 0.0  # that the last preview took
        self.evaluation: SnapshotEvaluation | None = None
        self.validation: Validation | None = None
        self.previews: Previews | None = None
        if run.metrics:
            measured = (run.metrics, run.metrics_ref, run.metrics_num)
            self.evaluation = SnapshotEvaluation(*measured, net, encoder, device, config.sampler(), stop)
        with distributed.fail_together():
            if run.val_data or config.data.val_fraction:
                self.validation = Validation(config, encoder, net, device)
                journal.log(self.validation.describe())
            if run.tracker != "none" and distributed.get_rank() == 0:
                journal.report_to(Tracker(run.tracker, self.outdir, config.to_json(), journal.log))
        with distributed.fail_together():
            if distributed.get_rank() == 0 and run.preview_interval != 0:
                shown = (config.sampler(run.preview_steps), run.preview_images)
                self.previews = Previews(dataset, encoder, device, self.outdir, journal.log, *shown)
                journal.show(self.outdir / "reals.png", nimg)

    def look(self, ema: EMA, nimg: int, due: Callable[[int], bool]) -> float:
        """Draw and measure what is due, or is owed since the start before, which was ended before it had; returns the
        seconds it took. To be called by all processes.

        Args:
            due: interval -> whether it is the time for what is done so often.
        """
        owed, self.owes = self.owes, False
        seconds = 0.0
        picture_owed = owed and distributed.from_first(owes_picture(self.outdir, self.run, nimg))
        if picture_owed or (self.run.preview_interval != 0 and due(self.run.preview_interval)):
            seconds += self.draw(ema, nimg)
        if self.evaluation is not None and (due(self.run.snapshot) or owed):
            seconds += self.measure(self.evaluation, ema, nimg)
        return seconds

    def measure(self, observer: SnapshotEvaluation | Validation, ema: EMA, nimg: int) -> float:
        """Measure the snapshots that were just saved; returns the seconds it took. To be called by all processes.

        What a request to stop cuts short is not recorded, and the log says so.
        """
        begin = time.time()
        for ema_net, suffix in ema.get():
            path = self.outdir / snapshot_name(nimg, suffix)
            if observer is self.evaluation and not distributed.from_first(self._lacks(path.name, nimg)):
                continue
            results = observer(ema_net, path, nimg)
            if results or distributed.get_rank() > 0:
                self.journal.report_metrics(nimg, f"EMA{suffix}", results)
            else:
                self.journal.log(f"EMA{suffix} at {nimg} images is not measured: the run is to stop")
        return time.time() - begin

    def _lacks(self, snapshot: str, nimg: int) -> list[str]:
        """Metrics of a snapshot that are not recorded."""
        return [metric for metric in self.run.metrics if snapshot in unmeasured(self.outdir, metric, nimg)]

    def draw(self, ema: EMA, nimg: int) -> float:
        """Draw what the last averaged network makes, on the first process; returns the seconds it took. To be called by
        all processes.

        A request to stop cuts it short.
        """
        begin = time.time()
        ema_net, _ = ema.get()[-1]  # where weights are shared out, by all processes together
        if self.previews is None:
            distributed.wait_for_first()
            return 0.0
        path = self.outdir / picture_name(nimg)
        self.previews.draw(ema_net, path, self.stop)
        self.journal.show(path, nimg)
        distributed.wait_for_first()
        self.preview_seconds = time.time() - begin
        return self.preview_seconds

    def seconds_of_previews_left(self, nimg: int) -> float:
        """How long the previews still to come will take, going by the last one."""
        interval, left = self.run.preview_interval, self.duration - nimg
        return -(-left // interval) * self.preview_seconds if interval > 0 else 0.0
