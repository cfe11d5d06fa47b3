"""Noise schedules: the grid of noise levels that a sampler visits."""

import torch

from dnnlib.errors import UserError


def edm_sigmas(
    num_steps: int = 32, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> torch.Tensor:
    """Noise levels of EDM (Karras et al. 2022, Eq. 5), where sigma(t) = t and s(t) = 1.

    Returns:
        float64 tensor [num_steps + 1] on the CPU, decreasing from `sigma_max` to `sigma_min`, then 0.

    Raises:
        UserError: fewer than one step, or not 0 < sigma_min <= sigma_max, or rho <= 0.
    """
    if num_steps < 1:
        raise UserError(f"num_steps must be at least 1, not {num_steps}")
    if not 0 < sigma_min <= sigma_max:
        raise UserError(f"sigma_min and sigma_max must satisfy 0 < {sigma_min} <= {sigma_max}")
    if rho <= 0:
        raise UserError(f"rho must be positive, not {rho}")
    i = torch.arange(num_steps, dtype=torch.float64)
    fraction = i / max(num_steps - 1, 1)
    start, end = i.new_tensor([sigma_max, sigma_min]) ** (1 / rho)
    sigmas = (start + fraction * (end - start)) ** rho
    if not sigmas.isfinite().all():
        raise UserError(f"rho={rho} and sigma_max={sigma_max} give no finite noise levels")
    return torch.cat([sigmas, sigmas.new_zeros(1)])
