"""The interface of detectors, which find features in images."""

from typing import Any

import torch

from dnnlib.errors import UserError


class Detector:
    """Images -> features. The features of an image depend on that image alone.

    Args:
        device: where the detector computes.

    Attributes:
        name: as `load_detector` takes it.
        feature_dim: number of features, D.
    """

    name: str
    feature_dim: int

    def __init__(self, device: torch.device):
        self.device = device

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Features, float32 [N, D].

        Args:
            images: uint8 [N, C, H, W] on the detector's device, RGB (C = 3) or grayscale (C = 1).

        Raises:
            UserError: images of another dtype or shape.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            kind = f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)}"
            raise UserError(f"detectors take RGB or grayscale images, uint8 [N, 3 or 1, H, W], not {kind}")
        if len(images) == 0:  # under torchrun, a process may have none
            return torch.empty([0, self.feature_dim], device=self.device)
        with torch.no_grad():
            return self._features(images.expand(-1, 3, -1, -1))

    def describe(self) -> dict[str, Any]:
        """What determines the features, as plain JSON values: `detector`, `resize`, and `weights` (SHA-256)."""
        raise NotImplementedError

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        """float32 [N, D] of uint8 [N, 3, H, W]."""
        raise NotImplementedError
