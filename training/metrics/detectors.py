"""The detectors of all metrics, loaded by name: Inception-v3, DINOv2, CLIP and plain pixels."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from dnnlib.errors import UserError
from training.config.metrics import DETECTORS, METRICS, RESIZABLE, RESIZE_MODES
from training.metrics.base import Detector
from training.metrics.clip import CLIPDetector
from training.metrics.dinov2 import DINOv2Detector
from training.metrics.files import ENTRIES
from training.metrics.inception import InceptionDetector


class PixelDetector(Detector):
    """Pixels in [0, 1], averaged over the cells of an 8x8 grid: a stand-in that needs no weights.

    D = 192 for images of every size; those smaller than 8x8 are enlarged.
    """

    name, size, feature_dim = "pixels", 8, 192

    def describe(self) -> dict[str, Any]:
        return {"detector": self.name, "resize": "average, 8x8", "weights": None}

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        rows, columns = (self._averages(n, images.device) for n in images.shape[2:])
        return (rows @ (images.float() / 255 @ columns.T)).flatten(1)

    def _averages(self, n: int, device: torch.device) -> torch.Tensor:
        """float32 [8, n]: share of each of n pixels in the means over 8 equal parts of a line."""
        edges = torch.arange(self.size + 1, device=device) * (n / self.size)
        start = torch.arange(n, device=device)
        overlap = torch.minimum(edges[1:, None], start + 1) - torch.maximum(edges[:-1, None], start)
        return overlap.clamp(min=0) * (self.size / n)


def load_detector(
    name: str, device: torch.device | str, weights: str | Path | None = None, resize: str = "torch"
) -> Detector:
    """The detector called 'inception', 'dinov2', 'clip' or 'pixels', ready for use.

    Args:
        device: where it computes.
        weights: file (inception) or folder (dinov2, clip) of the weights; None = those of the published metrics, which
            are downloaded once.
        resize: how dinov2 and clip resize their images, 'torch' or 'pil'; the others have one way only.

    Raises:
        UserError: an unknown detector or resize mode, or weights that are missing, damaged or of another network.
        RunError: a download failed.
    """
    if name not in DETECTORS:
        raise UserError(f"unknown detector {name!r} (known: {', '.join(DETECTORS)})")
    if resize not in RESIZE_MODES:
        raise UserError(f"unknown resize mode {resize!r} (known: {', '.join(RESIZE_MODES)})")
    if resize != "torch" and name not in RESIZABLE:
        raise UserError(f"resize mode {resize!r} is for the detectors {' and '.join(RESIZABLE)}, not for {name}")
    device = torch.device(device)
    if name == "inception":
        return InceptionDetector(device, weights)
    if name == "dinov2":
        return DINOv2Detector(device, weights, resize)
    if name == "clip":
        return CLIPDetector(device, weights, resize)
    if weights is not None:
        raise UserError(f"{weights}: the detector pixels has no weights")
    return PixelDetector(device)


def load_detectors(
    metrics: Iterable[str],
    device: torch.device | str = "cpu",
    weights: Mapping[str, str | Path] | None = None,
    resize: str = "torch",
) -> dict[str, Detector]:
    """The detectors that metrics need, by the entry of the statistics ('fid', 'fd_dinov2', ...).

    Args:
        metrics: names of METRICS.
        device: where the detectors compute.
        weights: files of weights, by name of the detector; those not given are downloaded once.
        resize: how images are resized for DINOv2 and CLIP, 'torch' or 'pil'.

    Raises:
        UserError: weights or a resize mode that no metric uses; also as `load_detector`.
        RunError: a download failed.
    """
    weights = weights or {}
    names = {METRICS[metric].entry: ENTRIES[METRICS[metric].entry] for metric in metrics}
    for name in weights:
        if name not in names.values():
            raise UserError(f"--detector-weights={name}: no metric of --metrics uses it: leave it out")
    if resize != "torch" and not set(RESIZABLE) & set(names.values()):
        raise UserError(f"--resize={resize}: no metric of --metrics uses DINOv2 or CLIP: leave it out")
    return {
        entry: load_detector(name, device, weights.get(name), resize if name in RESIZABLE else "torch")
        for entry, name in names.items()
    }
