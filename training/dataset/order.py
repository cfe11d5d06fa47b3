"""Which images training sees when, and how they are put together into batches."""

import functools
import math
import multiprocessing.resource_tracker
import multiprocessing.util
import os
import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def subset(count: int, max_size: int | None, seed: int) -> np.ndarray:
    """A random choice of up to `max_size` of the indices below `count`, ascending: the same as the published tools'."""
    indices = np.arange(count)
    if max_size is not None and count > max_size:
        np.random.RandomState(seed % (1 << 31)).shuffle(indices)
        indices = np.sort(indices[:max_size])
    return indices


def evenly_spaced(count: int, most: int) -> np.ndarray:
    """Up to `most` of the indices below `count`, from the first to the last."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(int)


def dataset_indices(run_indices: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Which item of a dataset each image of the run shows, int64 [n].

    Each pass over the dataset is a permutation that depends on (seed, pass) alone.

    Args:
        run_indices: indices of images in the run, int64 [n], ascending.
        count: items in the dataset.
        seed: seed of the run.
    """
    epochs, positions = np.divmod(run_indices, count)
    result = np.empty_like(run_indices)
    for epoch in np.unique(epochs):
        result[epochs == epoch] = _epoch_order(count, seed, int(epoch))[positions[epochs == epoch]]
    return result


@functools.lru_cache(maxsize=2)
def _epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    # RandomState is the generator whose numbers NumPy promises not to change.
    return np.random.RandomState([seed, epoch]).permutation(count)


class RunSampler(torch.utils.data.Sampler[list[int]]):
    """Endless batches of dataset indices for one process, a function of (seed, image index) alone.

    Args:
        count: items in the dataset.
        seed: seed of the run.
        start: index in the run of the first image of the first optimiser step.
        batch: images per optimiser step, over all processes.
        part: this process's share (first, last) of each step, as offsets into the step's batch.
        round_size: images per accumulation round: of each list.
        visits: add `count` to an index for each earlier pass over the dataset.
    """

    def __init__(
        self,
        count: int,
        seed: int,
        start: int,
        batch: int,
        part: tuple[int, int],
        round_size: int,
        visits: bool = False,
    ):
        self.count = count
        self.seed = seed
        self.start = start
        self.batch = batch
        self.part = part
        self.round_size = round_size
        self.visits = visits

    def items(self, run_indices: np.ndarray) -> np.ndarray:
        """Which item of the dataset, or which visit to one, each image of the run shows, int64 [n]; see above."""
        indices = dataset_indices(run_indices, self.count, self.seed)
        return indices + run_indices // self.count * self.count if self.visits else indices

    def __iter__(self) -> Iterator[list[int]]:
        nimg = self.start
        while True:
            indices = self.items(np.arange(nimg + self.part[0], nimg + self.part[1]))
            for part in indices.reshape(-1, self.round_size):
                yield part.tolist()
            nimg += self.batch


def collate(items: list[tuple[np.ndarray, np.ndarray]]) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch: images [N, C, H, W] (uint8 or float32) and labels float32 [N, label_dim]."""
    images, labels = zip(*items, strict=True)
    shape = (len(images), *images[0].shape)
    dtype = torch.uint8 if images[0].dtype == np.uint8 else torch.float32
    if torch.utils.data.get_worker_info() is None:
        batch = torch.empty(shape, dtype=dtype)
    else:  # in shared memory, so that the training process need not copy it
        storage = torch.UntypedStorage._new_shared(math.prod(shape) * dtype.itemsize)
        batch = torch.empty(0, dtype=dtype).set_(storage, 0, shape)  # type: ignore[call-overload]
    for row, image in zip(batch.numpy(), images, strict=True):  # np.stack takes longer to look at small images
        row[...] = image
    return batch, torch.from_numpy(np.stack(labels))


def start_loading(loader: torch.utils.data.DataLoader) -> Iterator[Any]:
    """The batches of a loader, whose processes do not see Ctrl-C, not even while they start."""
    if loader.num_workers == 0 or not hasattr(signal, "pthread_sigmask"):  # Windows has none
        return iter(loader)
    multiprocessing.resource_tracker.ensure_running()  # its start would let signals through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # which they inherit
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def begin_loader_process(_worker: int) -> None:
    """Prepares a loader process: signals to the group (Ctrl-C, torchrun's SIGTERM) are left to the main process."""
    os.setsid()
    # When Python shuts down, the thread that sends batches may be about to free a tensor, for which it needs Python's
    # lock: now and then that aborts the process. So leave before.
    multiprocessing.util.Finalize(None, os._exit, args=(0,), exitpriority=-100)
