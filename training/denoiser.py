"""The one contract that networks, guidance and samplers share."""

from typing import Protocol

import torch


class Denoiser(Protocol):
    """Estimates the clean image from a noisy one: D(x; sigma, labels) -> x0.

    Args:
        x: noisy images y + sigma * n, float32 [N, C, H, W].
        sigma: noise level, a tensor with one element or of shape [N].
        labels: class vectors, float32 [N, label_dim], or None for unconditional.

    Returns:
        float32 [N, C, H, W], the expectation of y given x.
    """

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None = None, /) -> torch.Tensor: ...
