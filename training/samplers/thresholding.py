"""Dynamic thresholding: a denoiser whose images stay in their range under strong guidance."""

import torch

from training.denoiser import Denoiser


class ThresholdedDenoiser:
    """A denoiser's images, brought into [-limit, limit] (Saharia et al. 2022, arXiv 2205.11487, Section 2.3).

    Where the given quantile of an image's absolute values is beyond the limit, the image is cut there and scaled back.

    Args:
        net: the denoiser, of pixels.
        quantile: share of an image's values that are not cut.
        limit: largest absolute value of clean images.
    """

    def __init__(self, net: Denoiser, quantile: float = 0.995, limit: float = 1.0):
        self.net = net
        self.quantile = quantile
        self.limit = limit

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """As the denoiser."""
        D = self.net(x, sigma, labels)
        # One by one: quantiles of all at once have a limit of their size.
        edges = torch.stack([values.abs().quantile(self.quantile) for values in D.flatten(1).float()])
        edges = edges.clamp(min=self.limit).to(D).reshape(-1, *[1] * (D.ndim - 1))
        return D.clamp(-edges, edges) * (self.limit / edges)
