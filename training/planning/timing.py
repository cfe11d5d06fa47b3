"""How fast a configuration trains on this machine."""

import dataclasses
import time
from pathlib import Path

import torch

from torch_utils import distributed
from training.config.training import TrainConfig
from training.dataset.images import ImageFolderDataset
from training.monitoring.journal import Journal
from training.rounds import round_size
from training.training_loop import TrainingRun

SECONDS, STEPS = 3.0, 3  # that are timed, at least


def images_per_second(config: TrainConfig, dataset: ImageFolderDataset) -> tuple[float, int, int]:
    """Speed of a few training steps of all processes, their number, and the images of each; to be called by all.

    A step is a round (`--batch-gpu`) here, which takes less memory and as long per image as a batch.
    """
    processes = distributed.get_world_size()
    images = processes * round_size(config, processes)
    timed = dataclasses.replace(config.run, batch=images, status=0, snapshot=0, preview=0, checkpoint=0, milestones=0)
    config = dataclasses.replace(config, run=timed, data=dataclasses.replace(config.data, workers=0))
    nowhere = Path(".")
    with Journal(nowhere, silent=True) as journal:
        training = TrainingRun(config, dataset, nowhere, journal)
        training.net.train()
        batches = training.load_batches()
        training.step(batches)  # makes buffers, and lets cuDNN choose
        start, steps = _clock(training.device), 0
        while distributed.any_rank(steps < STEPS or _clock(training.device) - start < SECONDS):
            training.step(batches)
            steps += 1
    return steps * images / (_clock(training.device) - start), steps, images


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
