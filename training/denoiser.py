"""The one contract that networks, guidance and samplers share, and how a raw network comes to meet it."""

import math
from typing import Any, Protocol

import torch
from torch import nn

from dnnlib.errors import UserError
from training.config.samplers import SIGMA_MAX, SIGMA_MIN
from training.preconditioning import PRECISIONS, Coefficients, Preconditioning, compute_dtype
from training.schedules import VE, Schedule, wide


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


def per_image(value: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Numbers [N] in the form that multiplies images, [N, 1, ...], and in their type."""
    return value.to(x).reshape(-1, *[1] * (x.ndim - 1))


def noise_range(denoiser: Any) -> tuple[float, float]:
    """Noise levels that a denoiser is made for: 0 and infinity where it does not say so."""
    return getattr(denoiser, "sigma_min", 0.0), getattr(denoiser, "sigma_max", math.inf)


def schedule_of(denoiser: Any) -> Schedule:
    """The schedule that a denoiser's network was trained on, or VE with EDM's noise levels, as far as it knows them."""
    schedule = getattr(getattr(denoiser, "preconditioning", None), "schedule", None)
    if schedule is not None:
        return schedule
    low, high = noise_range(denoiser)
    return VE(max(low, SIGMA_MIN), min(high, SIGMA_MAX))


def without_steps(schedule: Schedule) -> Schedule:
    """The same SDE in continuous time."""
    return getattr(schedule, "continuous", schedule)


class Preconditioned(nn.Module):
    """The denoiser D(x; sigma, cond) = c_skip x + c_out F(c_in x, c_noise, cond) around a raw network F.

    Args:
        net: F, called as net(images, labels, cond): images [N, C, H, W] in the type to compute in, labels c_noise
            float32 [N] or [1]. A module, whose state dict has the published names.
        preconditioning: the coefficients as functions of sigma.
        spec: what the images and conditions look like; kept for those who ask the denoiser.
        precision: 'fp32', 'bf16' or 'fp16': what F computes in (see `preconditioning.compute_dtype`). Weights and
            all that is outside of F stay float32.

    `sigma_min` and `sigma_max` are those of the preconditioning.

    Raises:
        UserError: no such precision.
    """

    def __init__(self, net: nn.Module, preconditioning: Preconditioning, spec: Any, precision: str = "fp32"):
        super().__init__()
        if precision not in PRECISIONS:
            raise UserError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
        self.net = net
        self.preconditioning = preconditioning
        self.spec = spec
        self.precision = precision
        self.sigma_min = preconditioning.sigma_min
        self.sigma_max = preconditioning.sigma_max

    def forward(
        self, x: torch.Tensor, sigma: torch.Tensor | float, cond: torch.Tensor | None = None, /
    ) -> torch.Tensor:
        """
        Args:
            x: noisy images y + sigma * n, [N, C, H, W].
            sigma: noise level, one element or [N].
            cond: conditions, as F takes them.

        Returns:
            D(x; sigma, cond), shaped like `x`: float32, or float64 where x is. Its difference from x, which is small
            where sigma is, then keeps the digits of F.
        """
        F_x, c = self.raw(x, sigma, cond)
        return c.c_skip * x.to(torch.promote_types(x.dtype, torch.float32)) + c.c_out * F_x

    def raw(
        self, x: torch.Tensor, sigma: torch.Tensor | float, cond: torch.Tensor | None = None, /
    ) -> tuple[torch.Tensor, Coefficients]:
        """F(c_in x, c_noise, cond) as float32, and the coefficients as float32 [N, 1, 1, 1] or [1, 1, 1, 1].

        Arguments are those of `forward`. For objectives, which would lose digits by way of D.
        """
        # Worked out where sigma is, in float64, and moved in one piece.
        exact = self.preconditioning(wide(sigma).flatten())
        c = Coefficients(*torch.stack(exact).float().to(x.device).reshape(4, -1, 1, 1, 1))
        x_in = (c.c_in * x).to(compute_dtype(self.precision, x.device))
        return self.net(x_in, c.c_noise.flatten(), cond).float(), c
