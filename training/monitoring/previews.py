"""Pictures of a training run: what it learns from and what it makes so far."""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dnnlib.errors import RunError, UserError
from torch_utils.pictures import drawable, image_grid, save_image
from training.config.generation import SamplingConfig
from training.config.samplers import SamplerConfig
from training.dataset.images import ImageFolderDataset
from training.denoiser import Denoiser
from training.encoders import Encoder
from training.families import architecture_of
from training.generators import DiffusionGenerator, Generator
from training.samplers.noise import StackedRandomGenerator

SMALL_RESOLUTION = 64  # below it 10 x 10 images, else 8 x 4
CANDIDATES = 5000  # items to choose from when the grid is arranged by class
BATCH = 50


class Previews:
    """Grids of samples with the same noise and labels throughout a run.

    Creating it writes `reals.png`: the images whose labels the samples get, a class per column where there are
    no more classes than columns.

    Args:
        dataset, encoder: the images, and what makes the network's latents of them.
        device: where to sample.
        outdir: where pictures are written.
        log: shows a line.
        sampler: what makes them.
        images: per picture; None = 100 below 64x64 pixels, else 32.
    """

    def __init__(
        self,
        dataset: ImageFolderDataset,
        encoder: Encoder,
        device: torch.device,
        outdir: Path,
        log: Callable[[str], None],
        sampler: SamplerConfig,
        images: int | None = None,
    ):
        self.encoder = encoder
        self.device = device
        self.log = log
        self.sampling = SamplingConfig(sampler=sampler)
        self.columns, rows = (10, 10) if dataset.resolution < SMALL_RESOLUTION else (8, 4)
        if images is not None:
            self.columns = min(self.columns, images)
            rows = -(-images // self.columns)
        chosen = _choose(dataset, self.columns, rows)
        chosen = chosen[:images]
        reals, labels = zip(*(dataset[i] for i in chosen), strict=True)
        self.labels = torch.from_numpy(np.stack(labels)).to(device)
        self.seeds = list(range(len(chosen)))
        rnd = StackedRandomGenerator(device, self.seeds)
        self.latents = encoder.encode_latents(torch.from_numpy(np.stack(reals)).to(device), rnd.randn_like)
        self._save(self.latents, outdir / "reals.png")

    def draw(self, net: Any, path: Path, stop: Callable[[], bool] = lambda: False) -> None:
        """Sample the grid with `net` and write it; nothing where `stop` says so between evaluations of a denoiser."""
        generator = architecture_of(net).generator(net, self.sampling, min(len(self.seeds), BATCH))
        parts = []
        for first, labels in enumerate(self.labels.split(BATCH)):
            seeds = self.seeds[first * BATCH : (first + 1) * BATCH]
            rnd = StackedRandomGenerator(self.device, seeds)
            noise = generator.noise(rnd)
            with torch.inference_mode():
                try:
                    parts.append(_sampled(generator, noise, labels, rnd, stop))
                except _AskedToStopError:
                    return
        self._save(torch.cat(parts), path)
        for name, pictures in architecture_of(net).pictures(net, self.latents).items():
            self._save(pictures, path.with_name(f"{path.stem}-{name}.png"))

    def _save(self, latents: torch.Tensor, path: Path) -> None:
        try:
            images = self.encoder.decode(latents)
        except (UserError, RunError) as err:
            self.log(f"Note: {path.name} shows latents, not pixels: {err}")
            images = latents
        save_image(path, image_grid(drawable(images), self.columns))


class _AskedToStopError(Exception):
    """Whoever waits for a picture does not any more."""


def _sampled(
    generator: Generator,
    noise: torch.Tensor,
    labels: torch.Tensor,
    rnd: StackedRandomGenerator,
    stop: Callable[[], bool],
) -> torch.Tensor:
    """What a generator makes of noise.

    Raises:
        _AskedToStopError: `stop` says so before it is done.
    """

    def stoppable(denoiser: Denoiser) -> Denoiser:
        def D(x: torch.Tensor, sigma: torch.Tensor, cond: torch.Tensor | None = None) -> torch.Tensor:
            if stop():
                raise _AskedToStopError
            return denoiser(x, sigma, cond)

        return D

    if isinstance(generator, DiffusionGenerator):
        return generator(noise, labels, rnd, wrap=stoppable)
    return generator(noise, labels, rnd)  # in one pass


def _choose(dataset: ImageFolderDataset, columns: int, rows: int) -> list[int]:
    order = np.random.default_rng(0).permutation(len(dataset))[:CANDIDATES].tolist()
    if not 0 < dataset.label_dim <= columns:
        return order[: rows * columns]
    by_class = defaultdict(list)
    for idx in reversed(order):
        by_class[int(dataset.get_label(idx).argmax())].append(idx)
    chosen = []
    for _row in range(rows):
        for column in range(columns):
            of_class = by_class[column % dataset.label_dim] or next(
                (items for items in by_class.values() if items), None
            )
            if of_class:
                chosen.append(of_class.pop())
    return chosen
