"""The one contract that networks, guidance and samplers share, and its preconditioning."""

from typing import NamedTuple, Protocol

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


class EDMCoefficients(NamedTuple):
    """Factors of D(x; sigma) = c_skip * x + c_out * F(c_in * x, c_noise), each shaped like sigma."""

    c_skip: torch.Tensor
    c_out: torch.Tensor
    c_in: torch.Tensor
    c_noise: torch.Tensor


def edm_coefficients(sigma: torch.Tensor, sigma_data: float) -> EDMCoefficients:
    """Preconditioning of EDM (Karras et al. 2022, Table 1): unit variance at the network's input and target."""
    total = sigma.square() + sigma_data**2
    return EDMCoefficients(
        c_skip=sigma_data**2 / total,
        c_out=sigma * sigma_data / total.sqrt(),
        c_in=1 / total.sqrt(),
        c_noise=sigma.log() / 4,
    )
