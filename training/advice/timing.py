"""How fast a configuration trains on this machine."""

import dataclasses
import time
from pathlib import Path

import torch

from training.config.training import TrainConfig
from training.dataset.images import ImageFolderDataset
from training.monitoring.journal import Journal
from training.training_loop import TrainingRun

SECONDS, STEPS = 3.0, 3  # that are timed, at least


def images_per_second(config: TrainConfig, dataset: ImageFolderDataset) -> tuple[float, int, int]:
    """Speed of a few training steps on this machine, their number, and the images of each.

    A step is a round (`--batch-gpu`) here, which takes less memory and as long per image as a batch.
    """
    run = config.run
    round_size = min(run.batch_gpu or run.batch, run.batch)
    timed = dataclasses.replace(run, batch=round_size, status=0, snapshot=0, preview=0, checkpoint=0)
    config = dataclasses.replace(config, run=timed, data=dataclasses.replace(config.data, workers=0))
    nowhere = Path(".")
    with Journal(nowhere, silent=True) as journal:
        training = TrainingRun(config, dataset, nowhere, journal)
        training.net.train()
        batches = training.load_batches()
        training.step(batches)  # makes buffers, and lets cuDNN choose
        start, steps = _clock(training.device), 0
        while steps < STEPS or _clock(training.device) - start < SECONDS:
            training.step(batches)
            steps += 1
    return steps * round_size / (_clock(training.device) - start), steps, round_size


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
