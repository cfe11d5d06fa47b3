"""Statistics of image features, accumulated over batches and processes in one pass for all metrics."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dnnlib.errors import UserError
from dnnlib.progress import Progress
from dnnlib.util import EasyDict
from torch_utils import distributed
from training.config.metrics import DEFAULT_METRICS, METRICS, check_metrics
from training.metrics.base import Detector
from training.metrics.detectors import load_detectors
from training.metrics.files import save_stats
from training.metrics.images import FileBatches, open_images
from training.metrics.inception import InceptionDetector


class FeatureSums:
    """What is accumulated of the features of one detector.

    Sums are float64, so that the batch size and the number of processes do not matter.

    Args:
        detector: gives the features.
        sums: accumulate means and covariances.
        features: keep the features of all images.
        groups: number of groups of images with sums of their own; image i belongs to group i modulo `groups`.
    """

    def __init__(self, detector: Detector, sums: bool, features: bool, groups: int):
        self.detector, self.sums, self.groups = detector, sums, groups
        self.features: list[torch.Tensor] | None = [] if features else None
        device = torch.device("cpu") if detector.device.type == "mps" else detector.device  # MPS has no float64
        D = detector.feature_dim
        shapes = ([groups], [groups, D], [groups, D, D]) if sums else ([0],) * 3
        self.count, self.x, self.xx = (torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes)

    def add(self, images: torch.Tensor, indices: torch.Tensor) -> None:
        """Add a batch: uint8 [N, C, H, W], and the indices [N] of its images."""
        features = self.detector(images.to(self.detector.device))
        if self.features is not None:
            self.features.append(features.cpu())
        for group in range(self.groups if self.sums else 0):
            x = features[(indices % self.groups == group).to(features.device)].to(self.x.device, torch.float64)
            self.count[group] += len(x)
            self.x[group] += x.sum(dim=0)
            self.xx[group].addmm_(x.T, x)

    def entry(self, order: torch.Tensor | None) -> EasyDict:
        """The statistics over all processes, as `training.metrics.files` describes them.

        Args:
            order: on the first process, the permutation that sorts the features of all processes by index; None on the
                others, where the result has no features.
        """
        entry = EasyDict(detector=self.detector.describe())
        if self.sums:
            for tensor in (self.count, self.x, self.xx):
                distributed.all_reduce_sum_(tensor)
            n, x = int(self.count.sum()), self.x.sum(dim=0)
            mu = x / n
            entry.mu = mu.cpu().numpy()
            entry.sigma = ((self.xx.sum(dim=0) - n * torch.outer(mu, mu)) / (n - 1)).cpu().numpy()
            groups = zip(self.count.tolist(), self.x.cpu().numpy(), self.xx.cpu().numpy(), strict=True)
            entry.groups = [(int(count), x, xx) for count, x, xx in groups]
        if self.features is not None:
            own = torch.cat([torch.zeros([0, self.detector.feature_dim]), *self.features])
            parts = distributed.gather_to_first(own)
            if order is not None:
                entry.features = torch.cat(parts)[order].numpy()
                if isinstance(self.detector, InceptionDetector):
                    entry.logits = self.detector.logits(torch.from_numpy(entry.features).to(self.detector.device)).cpu()
        return entry


class Accumulator:
    """Statistics of all detectors over the batches so far.

    Args:
        metrics: names of METRICS, which say what is accumulated.
        detectors, groups: as for `calculate_stats_for_iterable`.
    """

    def __init__(self, metrics: Sequence[str], detectors: Mapping[str, Detector], groups: int):
        self.parts = {}
        for entry, detector in detectors.items():
            arrays = {METRICS[name].array for name in metrics if METRICS[name].entry == entry}
            self.parts[entry] = FeatureSums(detector, "mu" in arrays, "features" in arrays, groups)
        self.indices = torch.zeros(0, dtype=torch.int64)
        self.classes = torch.zeros(0, dtype=torch.int64)  # of all images, or of none
        self.resolution: int | None = None

    def add(self, images: torch.Tensor, indices: torch.Tensor | None, classes: torch.Tensor | None = None) -> None:
        """Add a batch of this process; without indices, process r of R has the images r, R + r, 2R + r, ...

        Args:
            classes: of the images, int64 [N]; None = not known.
        """
        if indices is None:
            first, end = len(self.indices), len(self.indices) + len(images)
            indices = torch.arange(first, end) * distributed.get_world_size() + distributed.get_rank()
        for part in self.parts.values():
            part.add(images, indices)
        self.indices = torch.cat([self.indices, indices])
        self.classes = self.classes if classes is None else torch.cat([self.classes, classes])
        self.resolution = images.shape[-1] if len(images) else self.resolution

    def statistics(self) -> EasyDict:
        """The statistics over all processes; features of all images are on the first one only.

        Raises:
            UserError: fewer than two images.
        """
        every, classes = distributed.gather_to_first(self.indices), distributed.gather_to_first(self.classes)
        order = torch.cat(every).argsort() if every else None
        num_images = distributed.from_first(len(order) if order is not None else 0)
        if num_images < 2:
            raise UserError(f"statistics need 2 or more images, not {num_images}")
        stats = EasyDict({name: part.entry(order) for name, part in self.parts.items()})
        stats.update(num_images=num_images, resolution=distributed.from_first(self.resolution), facts={})
        if order is not None and sum(map(len, classes)) == num_images:
            stats.classes = torch.cat(classes)[order].numpy()
        return stats


class StatsIterable:
    """The batches of images, with their statistics in the last one; see `calculate_stats_for_iterable`."""

    def __init__(
        self,
        image_iter: Iterable[Any],
        metrics: Sequence[str],
        detectors: Mapping[str, Detector],
        groups: int,
        verbose: bool,
        dest_path: str | Path | None,
    ):
        self.image_iter, self.metrics, self.detectors = image_iter, metrics, detectors
        self.groups, self.verbose, self.dest_path = groups, verbose, dest_path

    def __iter__(self) -> Iterator[EasyDict]:
        accumulator = Accumulator(self.metrics, self.detectors, self.groups)
        rank, world_size = distributed.get_rank(), distributed.get_world_size()
        total = getattr(self.image_iter, "num_images", None)
        held: EasyDict | None = None  # one batch is held back, because the last one gets the statistics
        done, hidden = 0, not self.verbose or rank != 0
        with Progress(total=total, unit="img", hidden=hidden) as progress:
            for batch in self.image_iter:
                r = batch if isinstance(batch, EasyDict) else EasyDict(images=torch.as_tensor(batch))
                if held is not None:
                    yield held
                held = r
                r.stats = None
                indices = r.get("indices")
                accumulator.add(r.images, None if indices is None else torch.as_tensor(indices), r.get("classes"))
                count = min(len(r.images) * world_size, total - done if total else len(r.images))
                done += count
                progress.update(count)
        held = held if held is not None else EasyDict(images=None)
        held.stats = accumulator.statistics()
        if self.dest_path is not None and rank == 0:
            save_stats(self.dest_path, held.stats)
        yield held


def calculate_stats_for_iterable(
    image_iter: Iterable[Any],
    metrics: Sequence[str] = DEFAULT_METRICS,
    verbose: bool = True,
    dest_path: str | Path | None = None,
    device: torch.device | str = "cpu",
    detectors: Mapping[str, Detector] | None = None,
    groups: int = 1,
) -> StatsIterable:
    """Statistics of images, in one pass for all metrics.

    Args:
        image_iter: batches: uint8 tensors [N, C, H, W], or records with `images` and optionally `indices` (what
            `generate_images` returns). Under torchrun, this process's share of them.
        metrics: names of METRICS.
        verbose: show a progress bar on terminals.
        dest_path: file in which to save the statistics; None = do not save them.
        device: where to compute.
        detectors: of `load_detectors`; None = with the published weights.
        groups: number of groups of images for error bars; see `frechet_error`.

    Returns:
        An iterable of the records. The `stats` of the last one are the statistics over all processes, as
        `training.metrics.files` describes them; of the others None. Features of all images are on the first process
        only.

    Raises:
        UserError: an unknown metric; during iteration, images that detectors do not take, or fewer than two.
        RunError: a download of weights failed.
    """
    check_metrics(metrics)
    detectors = load_detectors(metrics, device) if detectors is None else detectors
    return StatsIterable(image_iter, metrics, detectors, groups, verbose, dest_path)


def calculate_stats_for_files(
    image_path: str | Path,
    num_images: int | None = None,
    seed: int = 0,
    metrics: Sequence[str] = DEFAULT_METRICS,
    max_batch_size: int = 64,
    num_workers: int = 2,
    prefetch_factor: int = 2,
    **stats_kwargs: Any,
) -> StatsIterable:
    """Statistics of stored images: `calculate_stats_for_iterable` on the images of a file or folder.

    Args:
        image_path, num_images, seed: as for `open_images`.
        metrics: names of METRICS.
        max_batch_size, num_workers, prefetch_factor: as for `FileBatches`.
        stats_kwargs: further arguments of `calculate_stats_for_iterable`.

    Returns:
        As `calculate_stats_for_iterable`.

    Raises:
        UserError: as `open_images` and `calculate_stats_for_iterable`.
        RunError: a download of weights failed.
    """
    images = open_images(image_path, num_images, seed)
    batches = FileBatches(images, max_batch_size, num_workers, prefetch_factor)
    return calculate_stats_for_iterable(batches, metrics, **stats_kwargs)


def last_stats(batches: Iterable[Any]) -> EasyDict:
    """The statistics in the last of the batches; iterates over all of them."""
    stats = None
    for r in batches:
        stats = r.stats
    assert stats is not None
    return stats
