"""Preconditioning: what turns a raw network F into the denoiser D(x; sigma) = c_skip x + c_out F(c_in x, c_noise)."""

from typing import NamedTuple

import torch


class Coefficients(NamedTuple):
    """Factors of D(x; sigma) = c_skip * x + c_out * F(c_in * x, c_noise), each shaped like sigma."""

    c_skip: torch.Tensor
    c_out: torch.Tensor
    c_in: torch.Tensor
    c_noise: torch.Tensor


def edm_coefficients(sigma: torch.Tensor, sigma_data: float) -> Coefficients:
    """Preconditioning of EDM (Karras et al. 2022, Table 1): unit variance at the network's input and target."""
    total = sigma.square() + sigma_data**2
    return Coefficients(
        c_skip=sigma_data**2 / total,
        c_out=sigma * sigma_data / total.sqrt(),
        c_in=1 / total.sqrt(),
        c_noise=sigma.log() / 4,
    )
