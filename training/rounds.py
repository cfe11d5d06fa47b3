"""What a step consists of: which of its images a process computes in which rounds, and their random seeds."""

from dataclasses import dataclass

import numpy as np

from torch_utils import distributed
from training.config.training import TrainConfig


def image_seeds(seed: int, run_indices: np.ndarray) -> np.ndarray:
    """Random seed of each image of a run, int64 [n]: all noise that an image meets depends on it alone."""
    return (seed * 0x9E3779B1 % 2**32 + run_indices) % 2**32


def round_size(config: TrainConfig, processes: int) -> int:
    """Images of a round: all of a process's share of a batch, or `batch_gpu` of them."""
    share = config.run.batch // processes
    return min(config.run.batch_gpu or share, share)


@dataclass(frozen=True)
class Share:
    """The part of each optimiser step that this process computes: rounds of `batch_gpu` of its images.

    Args:
        part: its images among those of the step.
    """

    rounds: int
    batch_gpu: int
    part: tuple[int, int]

    @staticmethod
    def of(config: TrainConfig) -> "Share":
        rank, world_size = distributed.get_rank(), distributed.get_world_size()
        batch_process = config.run.batch // world_size
        batch_gpu = round_size(config, world_size)
        rounds = batch_process // batch_gpu
        assert config.run.batch == batch_gpu * rounds * world_size
        return Share(rounds, batch_gpu, (rank * batch_process, (rank + 1) * batch_process))

    def starts(self, nimg: int) -> range:
        """Index in the run of the first image of each round of the step that begins at `nimg`."""
        return range(nimg + self.part[0], nimg + self.part[1], self.batch_gpu)
