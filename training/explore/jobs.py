"""Images that are being made, and denoisers that are watched meanwhile."""

import math
import threading
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch

from training.denoiser import Denoiser

FRAMES = 10  # of the way to an image
REMEMBERED = 16 * FRAMES  # evaluations at most, of which these are chosen


class SupersededError(Exception):
    """Nobody waits for these images any more."""


class Job:
    """Images that are being made: `progress` from 0 to 1, and `future`, which gives what the page gets."""

    def __init__(self):
        self.progress = 0.0
        self.future: Future[dict[str, Any]] = Future()
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Have it stop when the network is to be evaluated next."""
        self._cancelled.set()

    def check(self) -> None:
        """Go on, unless it was cancelled.

        Raises:
            SupersededError: it was.
        """
        if self._cancelled.is_set():
            raise SupersededError


class Watched:
    """A denoiser that keeps what it makes of one image along the noise levels, and ends with its job.

    Args:
        denoiser: D(x; sigma, cond).
        job: whose images these are.
        index: of the image in its batch; None = nothing is kept.
        levels: the highest and the lowest noise level, for the job's progress.

    `calls` is how often it was evaluated.
    """

    def __init__(self, denoiser: Denoiser, job: Job, index: int | None, levels: tuple[float, float]):
        self.denoiser, self.job, self.index, self.levels = denoiser, job, index, levels
        self.calls = 0
        self._seen: dict[float, torch.Tensor] = {}  # D [1, C, H, W] by noise level, of every so many evaluations
        self._last: dict[float, torch.Tensor] = {}
        self._every = 1

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, cond: torch.Tensor | None = None, /) -> torch.Tensor:
        self.job.check()
        D = self.denoiser(x, sigma, cond)
        index = self.index or 0
        level = float(sigma.reshape(-1)[index if sigma.numel() > 1 else 0])
        highest, lowest = self.levels
        if highest > lowest and level > 0:
            done = math.log(highest / level) / math.log(highest / lowest)
            self.job.progress = min(max(done, self.job.progress), 1.0)
        if self.index is not None:
            self._last = {level: D[index : index + 1].clone()}
            if self.calls % self._every == 0:
                self._seen |= self._last
            if len(self._seen) > REMEMBERED:
                self._seen = dict(list(self._seen.items())[::2])
                self._every *= 2
        self.calls += 1
        return D

    def frames(self) -> list[tuple[float, torch.Tensor]]:
        """Up to FRAMES of the noise levels, from the first to the last evaluated, with D [1, C, H, W] there."""
        seen = list((self._seen | self._last).items())
        if not seen:
            return []
        return [seen[i] for i in np.unique(np.linspace(0, len(seen) - 1, FRAMES).round().astype(int))]
