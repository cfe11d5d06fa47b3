"""Status reports of a training run, and whether it is to stop because of what they say."""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from dnnlib.errors import RunError
from torch_utils import distributed
from torch_utils.training_stats import Collector
from training.config.training import TrainConfig
from training.dataset.images import ImageFolderDataset
from training.dataset.listing import many
from training.encoders import Encoder
from training.flops import count_parameters
from training.monitoring.health import Divergence
from training.monitoring.journal import Journal, status_line
from training.monitoring.states import disk_needs
from training.optimizers import Optimizer
from training.rounds import Share


def opening_lines(
    config: TrainConfig, dataset: ImageFolderDataset, encoder: Encoder, net: Any, share: Share, nimg: int, outdir: Path
) -> list[str]:
    """What a run that begins, or resumes, at `nimg` images says of its data, network, rounds and disk, a line each."""
    assert config.dataset is not None
    parameters, device = count_parameters(net), next(net.parameters()).device
    return [
        *dataset.summary(),
        *([f"Encoder: {encoder.describe()}"] if encoder.vae_name else []),
        f"Training on {dataset.size_text()}, {many(config.dataset.label_dim, 'class')}: {parameters} parameters, "
        f"{net.precision}, {distributed.get_world_size()} x {device.type}, "
        f"{many(share.rounds, 'round')} of {many(share.batch_gpu, 'image')} per step",
        f"Disk: {disk_needs(config, parameters, nimg, outdir)}",
    ]


@dataclass
class Tick:
    """When the last status was reported, and what it reported."""

    nimg: int
    time: float
    nonfinite: int


class StatusReports:
    """Reports what happened since the last report; ends a run that has gone wrong.

    Args:
        config: of the run.
        journal: where it is reported.
        device: where the run computes.
        optimizer, objective, stats: of the run.
        nimg: images seen before.
        seconds: of training till then.
    """

    def __init__(
        self,
        config: TrainConfig,
        journal: Journal,
        device: torch.device,
        optimizer: Optimizer,
        objective: Any,
        stats: Collector,
        nimg: int,
        seconds: float,
    ):
        self.run, self.journal, self.device = config.run, journal, device
        self.optimizer, self.objective, self.stats = optimizer, objective, stats
        now = time.time()
        self.start_time = now - seconds
        self.tick = Tick(nimg, now, int(optimizer.nonfinite))
        self.diverged = Divergence(journal.outdir)

    def seconds(self) -> float:
        """How long the run has taken, all its starts together."""
        return time.time() - self.start_time

    def pause(self, seconds: float) -> None:
        """Leave out so many seconds, which no training was done in, of the next report's images per second."""
        self.tick.time += seconds

    def report(self, nimg: int, pauses: float) -> None:
        """Report what happened since the last report; to be called by all processes.

        Args:
            nimg: images seen so far.
            pauses: seconds without training that are to come.

        Raises:
            RunError: the run has gone wrong.
        """
        now = time.time()
        tick, nonfinite = self.tick, int(self.optimizer.nonfinite)
        on_gpu = self.device.type == "cuda"
        fields = {
            "nimg": nimg,
            **self.stats.collect(),
            "lr": self.optimizer.learning_rate(nimg),
            "nonfinite_gradients": nonfinite - tick.nonfinite,
            "images_per_second": (nimg - tick.nimg) / (now - tick.time),
            "seconds": now - self.start_time,
            "cpu_mem_gb": psutil.Process().memory_info().rss / 2**30,
            "gpu_mem_gb": torch.cuda.max_memory_allocated(self.device) / 2**30 if on_gpu else 0.0,
            "time": now,
        }
        self.journal.report(fields)
        self.journal.log(status_line(fields, self.run.duration, pauses))
        if details := ", ".join(f"{name} {fields[name]:.4g}" for name in self.objective.report()):
            self.journal.log(f"  {details}")
        if fields["nonfinite_gradients"] > 0:
            self.journal.log(f"Warning: {self.optimizer.describe_nonfinite(fields['nonfinite_gradients'])}")
        if math.isnan(fields["loss"]):
            raise RunError(
                f"the loss is not finite at {nimg} images: start in a new --outdir with a lower --lr or --ls; "
                f"or repeat the command with --precision=bf16 or fp32 to continue from the last training state"
            )
        self.object_to(self.diverged(fields["loss"]), nimg)
        self.tick = Tick(nimg, now, nonfinite)

    def object_to(self, problem: str | None, nimg: int) -> None:
        """Say that the run has gone wrong; with --on-divergence=stop, before anything more is saved of it.

        Raises:
            RunError: it has, and is to stop.
        """
        if problem is None:
            return
        text = f"training has diverged at {nimg} images: {problem}"
        if self.run.on_divergence == "stop":
            raise RunError(
                f"{text}. The training state before that is kept; start in a new --outdir with a lower --lr, "
                f"or continue regardless with --on-divergence=warn"
            )
        self.journal.log(f"Warning: {text}")
