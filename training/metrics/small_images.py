"""Figures of images so small that pixels compare them, such as 8x8 digits: by the nearest real image of each.

No detector is needed. None of these figures suffices alone: class means agree with their class, and copies are near.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from training.dataset.images import ImageFolderDataset
from training.dataset.order import collate
from training.metrics.statistics import calculate_stats_for_iterable, last_stats
from training.metrics.values import calculate_metrics_from_stats

AT_A_TIME = 500


def everything(path: str | Path) -> tuple[torch.Tensor, torch.Tensor]:
    """All images or latents of a dataset [N, C, H, W], and their classes, int64 [N]."""
    dataset = ImageFolderDataset(path)
    images, labels = collate([dataset[i] for i in range(len(dataset))])
    return images, labels.argmax(dim=1)


class RealImages:
    """All images of a dataset with classes, which others are compared with.

    Args:
        path: the dataset.
        metrics: of `calculate_metrics.py` to add, by pixels.

    `images` is uint8 [N, C, H, W], `classes` int64 [N]. `agreement` is the share of real images whose nearest other one
    is of their class, `diversity` the mean distance between images of a class.
    """

    def __init__(self, path: str | Path, metrics: Sequence[str] = ("fd_pixels",)):
        self.images, self.classes = everything(path)
        self.metrics = list(metrics)
        self._pixels = self.images.flatten(1).float()
        self._stats = self._stats_of(self.images)
        distances, nearest = torch.cdist(self._pixels, self._pixels).fill_diagonal_(torch.inf).min(dim=1)
        self.between = distances.mean().item()
        self.agreement = (self.classes[nearest] == self.classes).float().mean().item()
        self.diversity = within_class_distance(self.images, self.classes)

    def compare(self, images: torch.Tensor, classes: torch.Tensor | None = None) -> dict[str, float]:
        """
        Args:
            images: uint8 [n, C, H, W].
            classes: which were asked for, int64 [n]; None = images have none.

        Returns:
            The metrics, and distance_ratio: mean distance to the nearest real image over that between real images;
            noise: share of images twice as far from it as that; smallest_class, largest_class: shares, by the classes
            of the nearest real images. With `classes`, also agreement and diversity.
        """
        distances, nearest = torch.cdist(images.flatten(1).float(), self._pixels).min(dim=1)
        found = self.classes[nearest]
        shares = torch.bincount(found, minlength=int(self.classes.max()) + 1) / len(images)
        figures = {
            **calculate_metrics_from_stats(self._stats_of(images), self._stats, self.metrics),
            "distance_ratio": distances.mean().item() / self.between,
            "noise": (distances > 2 * self.between).float().mean().item(),
            "smallest_class": shares.min().item(),
            "largest_class": shares.max().item(),
        }
        if classes is not None:
            figures["agreement"] = (found == classes).float().mean().item()
            figures["diversity"] = within_class_distance(images, classes)
        return {name: float(value) for name, value in figures.items()}

    def _stats_of(self, images: torch.Tensor) -> dict:
        return last_stats(calculate_stats_for_iterable(images.split(AT_A_TIME), self.metrics, verbose=False))


def within_class_distance(images: torch.Tensor, classes: torch.Tensor) -> float:
    """Mean Euclidean distance, in gray levels, between images of a class, averaged over the classes that have two."""
    parts = [images[classes == c].flatten(1).float() for c in classes.unique()]
    return float(np.mean([torch.pdist(part).mean().item() for part in parts if len(part) > 1]))
