"""Losses on images that a run does not learn from: whether it learns by heart."""

import math
from pathlib import Path
from typing import Any

import torch

from dnnlib.errors import UserError
from dnnlib.util import code_version
from torch_utils import distributed
from torch_utils.training_stats import Collector
from training.config.training import TrainConfig
from training.dataset.images import ImageFolderDataset
from training.dataset.listing import many
from training.dataset.order import collate, evenly_spaced
from training.dataset.part import Part
from training.denoiser import noise_range
from training.encoders import Encoder
from training.families import trained_by
from training.metrics.evaluation import save_records
from training.samplers.noise import StackedRandomGenerator

BATCH = 64
LEVELS = 8  # noise levels from LOWEST to HIGHEST, as far as a network knows them
LOWEST, HIGHEST = 0.02, 20.0


class Validation:
    """The objective of a run on images of its own, always the same with the same noise; of denoisers, their error at
    several noise levels, too: the mean square of D(x; sigma) - x0 over sigma^2 v / (sigma^2 + v), which is that of the
    best denoiser of white noise with the variance v of the images.

    Args:
        config: of the run, whose `val_data` or `val_fraction`, and `val_images`, say which images.
        encoder: of the run.
        net: of the run.
        device: where to compute.

    Raises:
        UserError: no images, or of another size, or with other classes, than those trained on.
    """

    def __init__(self, config: TrainConfig, encoder: Encoder, net: Any, device: torch.device):
        data = config.data
        self.fraction = data.val_fraction
        self.dataset = ImageFolderDataset(
            config.run.val_data or data.data,
            use_labels=data.cond,
            checksums=data.verify,
            use_captions=data.captions,
            part=Part(data.val_fraction, config.run.seed, held_out=True) if data.val_fraction else None,
        )
        ours, theirs = self.dataset.info(), config.dataset
        assert theirs is not None
        for name, what in {
            "resolution": "resolution",
            "channels": "channels",
            "label_dim": "number of classes",
        }.items():
            if getattr(ours, name) != getattr(theirs, name):
                raise UserError(
                    f"--val-data={config.run.val_data}: its {what} is {getattr(ours, name)}, and that of the training "
                    f"images {getattr(theirs, name)}"
                )
        self.architecture = trained_by(config)
        assert self.architecture.objective is not None
        self.levels = self._levels(net)
        self.objective = self.architecture.objective(net, config)
        self.encoder, self.device = encoder, device
        self.indices = evenly_spaced(len(self.dataset), min(config.run.val_images, len(self.dataset)))
        pixels = self._batch(self.indices[:BATCH].tolist())[0]
        self.variance = pixels.var().item() if pixels.numel() > 1 else 1.0

    def describe(self) -> str:
        used, total = len(self.indices), len(self.dataset)
        if not self.fraction:
            return f"Validating on {many(used, 'image')} of {self.dataset.path}"
        return (
            f"Validating on {used} of {many(total, 'image')} of {self.dataset.path} that --val-fraction="
            f"{self.fraction:g} holds out, chosen by their names"
        )

    def __call__(self, net: Any, path: Path, nimg: int) -> dict[str, float]:
        """Losses by name, the same on all processes, which share the work; recorded beside the snapshot at `path`.

        Args:
            net: an averaged network of the run.
            nimg: training progress in images.
        """
        stats = Collector(self.device)
        training = net.training
        net.eval()
        with torch.no_grad():
            for start in range(0, len(self.indices), BATCH * distributed.get_world_size()):
                first = start + BATCH * distributed.get_rank()
                if chosen := self.indices[first : first + BATCH].tolist():
                    self._measure(net, chosen, stats, nimg)
        net.train(training)
        names = {"val_loss", *(f"val_error_{sigma:.2g}" for sigma in self.levels)}
        for name in names - stats.moments.keys():  # a process without images
            stats.report(name, torch.zeros(0, device=self.device))
        results = {name: value for name, value in stats.collect().items() if name in names}
        if distributed.get_rank() == 0:
            record = {"metric": "val_loss", "nimg": nimg, "net": path.name, "num_images": len(self.indices)}
            share = {"val_fraction": self.fraction} if self.fraction else {}
            made_by = {"val_data": str(self.dataset.path), **share, "code_version": code_version()}
            finite = {name: value for name, value in results.items() if math.isfinite(value)}
            save_records(path.parent, [{**record, **made_by, "results": finite}])
        return results

    def _batch(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor, StackedRandomGenerator]:
        """Latents and conditions of some images, and what else is drawn for them."""
        images, cond = collate([self.dataset[i] for i in indices])
        rnd = StackedRandomGenerator(self.device, indices)
        return self.encoder.encode_latents(images.to(self.device), rnd.randn_like), cond.to(self.device), rnd

    def _measure(self, net: Any, indices: list[int], stats: Collector, nimg: int) -> None:
        images, cond, rnd = self._batch(indices)
        loss = self.objective(net, images, cond, rnd=rnd, nimg=nimg)
        stats.report("val_loss", loss.flatten(1).mean(dim=1) if loss.ndim > 1 else loss)
        for sigma in self.levels:
            D = net(images + sigma * rnd.randn_like(images), torch.full([len(images)], sigma, device=self.device), cond)
            linear = sigma**2 * self.variance / (sigma**2 + self.variance)
            stats.report(f"val_error_{sigma:.2g}", (D - images).square().flatten(1).mean(dim=1) / linear)

    def _levels(self, net: Any) -> list[float]:
        """Noise levels at which errors are measured; of denoisers."""
        if not (self.architecture.is_denoiser and self.architecture.makes_images):
            return []
        lowest, highest = noise_range(net)
        low, high = math.log10(max(LOWEST, lowest)), math.log10(min(HIGHEST, highest))
        return torch.logspace(low, high, LEVELS, dtype=torch.float64).tolist()
