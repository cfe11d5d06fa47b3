"""Metrics of images by the features that a detector finds in them: FID and its relatives."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from dnnlib.errors import UserError, one_line
from dnnlib.files import file_sha256
from dnnlib.util import EasyDict
from torch_utils import distributed
from training.config.metrics import DEFAULT_METRICS, METRICS, check_metrics, parse_metrics
from training.dataset.images import ImageFolderDataset
from training.dataset.order import collate, subset
from training.metrics.detectors import Detector, InceptionDetector, load_detector
from training.metrics.distances import (
    K_DENSITY,
    K_PRECISION,
    SPLITS,
    SUBSET_SIZE,
    frechet_distance,
    frechet_error,
    inception_score,
    kernel_distance,
    neighbour_scores,
)
from training.metrics.files import ENTRIES, load_stats, save_stats

__all__ = [
    "METRICS",
    "calculate_metrics_from_stats",
    "calculate_stats_for_files",
    "calculate_stats_for_iterable",
    "frechet_distance",
    "load_detectors",
    "load_stats",
    "parse_metrics",
    "save_stats",
    "small_sample_note",
]


def load_detectors(
    metrics: Iterable[str],
    device: torch.device | str = "cpu",
    weights: Mapping[str, str | Path] | None = None,
    resize: str = "torch",
) -> dict[str, Detector]:
    """The detectors that metrics need, by the entry of the statistics.

    Args:
        weights: files of weights by name of the detector; others are fetched.
        resize: how images are resized for DINOv2, 'torch' or 'pil'.

    Raises:
        UserError: weights or a resize mode that no metric uses; see `load_detector`, too.
        RunError: as `load_detector`.
    """
    weights = weights or {}
    names = {METRICS[metric].entry: ENTRIES[METRICS[metric].entry] for metric in metrics}
    for name in weights:
        if name not in names.values():
            raise UserError(f"--detector-weights={name}: no metric of --metrics uses it: leave it out")
    if resize != "torch" and "dinov2" not in names.values():
        raise UserError(f"--resize={resize}: no metric of --metrics uses DINOv2: leave it out")
    return {
        entry: load_detector(name, device, weights.get(name), resize if name == "dinov2" else "torch")
        for entry, name in names.items()
    }


# ---------------------------------------------------------------------------------------------------------
# Statistics


class _Collected:
    """What has been gathered of the features of one detector.

    Sums are float64, so that neither the size of the batches nor the number of processes matters. Image i goes to
    group i modulo `groups`.
    """

    def __init__(self, detector: Detector, sums: bool, features: bool, groups: int):
        self.detector, self.sums, self.groups = detector, sums, groups
        self.features: list[torch.Tensor] | None = [] if features else None
        device = torch.device("cpu") if detector.device.type == "mps" else detector.device  # MPS has no float64
        D = detector.feature_dim
        shapes = ([groups], [groups, D], [groups, D, D]) if sums else ([0],) * 3
        self.count, self.x, self.xx = (torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes)

    def add(self, images: torch.Tensor, indices: torch.Tensor) -> None:
        features = self.detector(images.to(self.detector.device))
        if self.features is not None:
            self.features.append(features.cpu())
        for group in range(self.groups if self.sums else 0):
            x = features[(indices % self.groups == group).to(features.device)].to(self.x.device, torch.float64)
            self.count[group] += len(x)
            self.x[group] += x.sum(dim=0)
            self.xx[group].addmm_(x.T, x)

    def entry(self, order: torch.Tensor | None) -> EasyDict:
        """The statistics over all processes; features on the first one only, in that order."""
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
            parts = distributed.gather_to_first(
                torch.cat([torch.zeros([0, self.detector.feature_dim]), *self.features])
            )
            if order is not None:
                entry.features = torch.cat(parts)[order].numpy()
                if isinstance(self.detector, InceptionDetector):
                    entry.logits = self.detector.logits(torch.from_numpy(entry.features).to(self.detector.device)).cpu()
        return entry


class StatsIterable:
    """The batches of images, with their statistics in the last one."""

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
        kinds = {
            entry: {METRICS[name].array for name in self.metrics if METRICS[name].entry == entry}
            for entry in self.detectors
        }
        collected = {
            entry: _Collected(detector, "mu" in kinds[entry], "features" in kinds[entry], self.groups)
            for entry, detector in self.detectors.items()
        }
        rank, world_size = distributed.get_rank(), distributed.get_world_size()
        total = getattr(self.image_iter, "num_images", None)
        seen: list[torch.Tensor] = []
        resolution = None
        held: EasyDict | None = None  # one batch is held back, as the last one gets the statistics
        count = 0
        with tqdm(
            total=total, unit="img", disable=None if self.verbose and rank == 0 else True, dynamic_ncols=True
        ) as progress:
            for batch in self.image_iter:
                r = batch if isinstance(batch, EasyDict) else EasyDict(images=torch.as_tensor(batch))
                if held is not None:
                    yield held
                held = r
                r.stats = None
                indices = torch.as_tensor(r.get("indices", np.arange(count, count + len(r.images)) * world_size + rank))
                for part in collected.values():
                    part.add(r.images, indices)
                seen.append(indices)
                resolution = r.images.shape[-1] if len(r.images) else resolution
                count += len(r.images)
                progress.update(min(len(r.images) * world_size, total - progress.n if total else len(r.images)))
        every = distributed.gather_to_first(torch.cat([torch.zeros(0, dtype=torch.int64), *seen]))
        order = torch.cat(every).argsort() if every else None
        num_images = distributed.from_first(len(order) if order is not None else 0)
        if num_images < 2:
            raise UserError(f"statistics need 2 or more images, not {num_images}")
        stats = EasyDict({name: part.entry(order) for name, part in collected.items()})
        stats.update(num_images=num_images, resolution=distributed.from_first(resolution), facts={})
        if self.dest_path is not None and rank == 0:
            save_stats(self.dest_path, stats)
        held = held if held is not None else EasyDict(images=None)
        held.stats = stats
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
        image_iter: batches: uint8 tensors [N, C, H, W], or records with such `images` and perhaps `indices` (what
            `generate_images` makes). Under torchrun, this process's share of them.
        metrics: names of METRICS.
        verbose: show a progress bar on terminals.
        dest_path: file in which to save the statistics.
        device: where to compute.
        detectors: as `load_detectors` makes them; default: with the published weights.
        groups: of images, for error bars; see `frechet_error`.

    Returns:
        An iterable of the records; `stats` of the last one are the statistics over all processes (see
        `feature_stats`), of the others None. Features of all images are on the first process only.

    Raises:
        UserError: no such metric; while it is iterated, images that no detector takes, or fewer than two.
    """
    check_metrics(metrics)
    detectors = load_detectors(metrics, device) if detectors is None else detectors
    return StatsIterable(image_iter, metrics, detectors, groups, verbose, dest_path)


class FileBatches:
    """This process's share of the images that `open_images` has opened, a batch at a time."""

    def __init__(self, images: Any, max_batch_size: int = 64, num_workers: int = 2, prefetch_factor: int = 2):
        if isinstance(images, ArrayImages):
            num_workers = 0  # they are in memory
        self.num_images = len(images)
        self.images = images
        rank, world_size = distributed.get_rank(), distributed.get_world_size()
        batches = [range(i, min(i + max_batch_size, len(images))) for i in range(0, len(images), max_batch_size)]
        self.batches = batches[rank::world_size]
        self.loader = torch.utils.data.DataLoader(
            images,
            batch_sampler=self.batches,  # type: ignore[arg-type]
            collate_fn=collate,
            num_workers=num_workers,
            prefetch_factor=prefetch_factor if num_workers > 0 else None,
            multiprocessing_context="spawn" if num_workers > 0 else None,
        )

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[EasyDict]:
        for batch_idx, (indices, (images, _labels)) in enumerate(zip(self.batches, self.loader, strict=True)):
            yield EasyDict(images=images, indices=np.array(indices), batch_idx=batch_idx, num_batches=len(self))


def open_images(path: str | Path, num_images: int | None = None, seed: int = 0) -> Any:
    """The images of a folder, a ZIP file, or an .npz file as ADM writes it (`arr_0`, uint8 [N, H, W, C]).

    Args:
        num_images: how many; there may be more, then `seed` selects a subset.

    Raises:
        UserError: there are fewer, they differ in size, or are none.
    """
    path = Path(path)
    images: Any
    if path.suffix == ".npz":
        images = ArrayImages(path, num_images, seed)
    else:
        images = ImageFolderDataset(path, use_labels=False, max_size=num_images, random_seed=seed)
        if images.dtype != np.uint8:
            raise UserError(f"{path}: holds latents, not images: decode them first (dataset_tool.py decode)")
        images.verify()
    if num_images is not None and len(images) < num_images:
        raise UserError(f"{path}: holds {len(images)} images, and --num={num_images} are wanted: generate more of them")
    return images


def content_hash(images: Any) -> str:
    """What identifies images that `open_images` has opened: of a folder or ZIP file as `DatasetInfo` says, of an .npz
    file its SHA-256."""
    return file_sha256(images.path) if isinstance(images, ArrayImages) else images.info().content_hash


class ArrayImages(torch.utils.data.Dataset):
    """Images of an .npz file as ADM writes them, `arr_0`: uint8 [N, H, W, C]."""

    def __init__(self, path: Path, max_size: int | None, seed: int):
        self.path = path
        try:
            with open(path, "rb") as f, np.load(f, allow_pickle=False) as archive:
                self.array = archive["arr_0"]
        except Exception as err:  # zipfile, its decompressors and NumPy have many ways to say that a file is damaged
            reason = "it has no arr_0" if isinstance(err, KeyError) else one_line(err)
            raise UserError(f"{path}: holds no images ({reason})") from None
        if self.array.dtype != np.uint8 or self.array.ndim != 4:
            raise UserError(f"{path}: arr_0 is {self.array.dtype} {list(self.array.shape)}, not uint8 [N, H, W, C]")
        if self.array.shape[1] != self.array.shape[2]:
            raise UserError(f"{path}: images of {self.array.shape[1]}x{self.array.shape[2]}, which are not square")
        self.resolution = self.array.shape[1]
        self.indices = subset(len(self.array), max_size, seed)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, idx: int) -> tuple[np.ndarray, np.ndarray]:
        return self.array[self.indices[idx]].transpose(2, 0, 1), np.zeros([0], dtype=np.float32)


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
    """Statistics of stored images: as `calculate_stats_for_iterable`, on what `open_images` opens.

    Args:
        max_batch_size: images at a time.
        num_workers, prefetch_factor: processes that load images, and batches that each has ready.

    Raises:
        UserError: also what `open_images` raises.
    """
    images = open_images(image_path, num_images, seed)
    batches = FileBatches(images, max_batch_size, num_workers, prefetch_factor)
    return calculate_stats_for_iterable(batches, metrics, **stats_kwargs)


# ---------------------------------------------------------------------------------------------------------
# Metrics


def calculate_metrics_from_stats(
    stats: Mapping[str, Any],
    ref: Mapping[str, Any],
    metrics: Sequence[str] = DEFAULT_METRICS,
    verbose: bool = False,
    force: bool = False,
) -> dict[str, float]:
    """Metrics of images whose statistics are `stats`, against the reference `ref`. On the first process.

    Warns if there are too few images for a Frechet distance, or too few in the reference.

    Args:
        verbose: print each value.
        force: compare even with references that were made otherwise.

    Returns:
        Values by name: each metric under its own, its error as `{metric}_std` where there is one; 'prdc' gives
        'precision', 'recall', 'density' and 'coverage'.

    Raises:
        UserError: statistics lack what a metric needs, or were made with another detector or at another resolution.
    """
    results = metric_values(stats, ref, metrics, force)
    if verbose:
        for name, value in results.items():
            print(f"{name + ':':24s}{value:g}")
    for note in filter(None, (small_sample_note(metric, stats, ref) for metric in metrics)):
        warnings.warn(note, stacklevel=2)
    return results


def metric_values(
    stats: Mapping[str, Any], ref: Mapping[str, Any], metrics: Sequence[str], force: bool = False
) -> dict[str, float]:
    """`calculate_metrics_from_stats` without its warnings, for those who tell them in another way."""
    check_metrics(metrics)
    for metric in metrics:
        check_reference(metric, ref)
        entry = stats.get(METRICS[metric].entry, {})
        if METRICS[metric].array not in entry:
            raise UserError(f"the statistics of the images were made without {metric}")
        if not force:
            refuse(mismatches(metric, entry.get("detector"), stats.get("resolution"), ref))
    results: dict[str, float] = {}
    for metric in metrics:
        results.update(KINDS[METRICS[metric].kind].calculate(metric, stats[METRICS[metric].entry], ref))
    return results


def small_sample_note(metric: str, stats: Mapping[str, Any] | None = None, ref: Mapping[str, Any] | None = None) -> str:
    """What to know about a Frechet distance where the images, or those of the reference, are fewer than features; ''
    where they are not, or their number is not known."""
    if METRICS[metric].kind != "frechet":
        return ""
    D, few = 0, []
    for given, what in [(stats, "of"), (ref, "against a reference of")]:
        if given is not None and given.get("num_images") is not None:
            D = len(given[METRICS[metric].entry]["mu"])
            if given["num_images"] <= D:
                few.append(f" {what} {given['num_images']} images")
    return f"{metric}{''.join(few)} in {D} dimensions mostly tells how few they are: take far more" if few else ""


def check_reference(metric: str, ref: Mapping[str, Any], feature_dim: int | None = None) -> None:
    """
    Raises:
        UserError: the reference lacks what the metric needs, or is of other features than `feature_dim` of them.
    """
    if not METRICS[metric].compares:
        return
    entry, array = METRICS[metric].entry, METRICS[metric].array
    if array not in ref.get(entry, {}):
        what = "statistics" if array == "mu" else "features"
        raise UserError(
            f"the reference has no {what} for {metric}: make one that has (calculate_metrics.py ref --metrics={metric})"
        )
    dim = ref[entry][array].shape[-1]
    if feature_dim is not None and dim != feature_dim:
        raise UserError(f"the reference for {metric} is of {dim} features, these are {feature_dim}")


def check_numbers(metric: str, num_images: int, ref: Mapping[str, Any], groups: int = 1) -> None:
    """
    Raises:
        UserError: too few images, or too few in the reference, for the metric or the error bar over `groups`.
    """
    kind = KINDS[METRICS[metric].kind]
    fewest = max(kind.fewest, 2 * groups if METRICS[metric].array == "mu" and groups > 1 else 0)
    if num_images < fewest:
        what = metric if fewest == kind.fewest else f"an error bar of {metric}"
        raise UserError(f"{what} needs {fewest} or more images, not {num_images}")
    if kind.fewest_ref > 0 and len(ref[METRICS[metric].entry]["features"]) < kind.fewest_ref:
        there = len(ref[METRICS[metric].entry]["features"])
        raise UserError(f"{metric} needs a reference of {kind.fewest_ref} or more images, not {there}")


def mismatches(
    metric: str, detector: Mapping[str, Any] | None, resolution: int | None, ref: Mapping[str, Any]
) -> list[str]:
    """In what images whose features `detector` describes differ from the reference, as far as both are known."""
    if not METRICS[metric].compares:
        return []
    found = []
    theirs = ref[METRICS[metric].entry].get("detector")
    if detector and theirs:
        found = [
            f"the reference for {metric} was made with {key} {theirs.get(key)!r}, these are with {ours!r}"
            for key, ours in detector.items()
            if ours != theirs.get(key)
        ]
    size = ref.get("resolution")
    if None not in (resolution, size) and resolution != size:
        found.append(f"the images are {resolution}x{resolution}, those of the reference {size}x{size}")
    return found


def refuse(found: Sequence[str]) -> None:
    """
    Raises:
        UserError: there are mismatches.
    """
    if found:
        raise UserError(f"{found[0]}: they do not compare (calculate_metrics.py --force does it all the same)")


def _frechet(metric: str, stats: Mapping[str, Any], ref: Mapping[str, Any]) -> dict[str, float]:
    theirs = ref[METRICS[metric].entry]
    values = {metric: frechet_distance(stats["mu"], stats["sigma"], theirs["mu"], theirs["sigma"])}
    groups = stats.get("groups", [])
    if len(groups) > 1:
        values[f"{metric}_std"] = frechet_error(groups, theirs["mu"], theirs["sigma"])
    return values


def _kernel(metric: str, stats: Mapping[str, Any], ref: Mapping[str, Any]) -> dict[str, float]:
    value, error = kernel_distance(stats["features"], ref[METRICS[metric].entry]["features"])
    return {metric: value, f"{metric}_std": error}


def _inception_score(metric: str, stats: Mapping[str, Any], _ref: Mapping[str, Any]) -> dict[str, float]:
    value, deviation = inception_score(stats["logits"])
    return {metric: value, f"{metric}_std": deviation}


def _neighbours(metric: str, stats: Mapping[str, Any], ref: Mapping[str, Any]) -> dict[str, float]:
    suffix = metric.removeprefix("prdc")
    scores = neighbour_scores(ref[METRICS[metric].entry]["features"], stats["features"])
    return {f"{name}{suffix}": value for name, value in scores.items()}


@dataclass(frozen=True)
class Kind:
    """How metrics are calculated.

    Args:
        calculate: values by name, of a metric, the entry of the images, and the reference.
        fewest, fewest_ref: number of images, and of images of the reference, below which that is impossible.
    """

    calculate: Callable[[str, Mapping[str, Any], Mapping[str, Any]], dict[str, float]]
    fewest: int
    fewest_ref: int = 0


KINDS = {
    "frechet": Kind(_frechet, 2),
    "kernel": Kind(_kernel, SUBSET_SIZE + 1, SUBSET_SIZE + 1),
    "inception score": Kind(_inception_score, SPLITS),
    "neighbours": Kind(_neighbours, K_PRECISION + 1, K_DENSITY + 1),
}
