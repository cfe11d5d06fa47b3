"""Denoisers as k-diffusion calls them: model(x, sigma, **extra) -> the clean image, with sigma of shape [N].

Its samplers pass `extra_args` on to the model with every call. Its denoisers and ours agree in all else: x = x0 +
sigma n in the units of the network, and D(x; sigma) for E[x0 | x].
"""

from typing import Any

import torch
from torch import nn

from training.denoiser import Denoiser, noise_range

COND = "cond"  # the keyword of conditions, unless another is named


class ForKDiffusion(nn.Module):
    """Our denoiser for k-diffusion's samplers, and code like them.

    Args:
        denoiser: D(x, sigma, cond).
        cond_key: the keyword among `extra_args` that holds the condition; others are refused, since nothing would
            come of them.

    `sigma_min` and `sigma_max` are those of the denoiser, as samplers of k-diffusion's noise levels want them.
    """

    def __init__(self, denoiser: Denoiser, cond_key: str = COND):
        super().__init__()
        self.inner_model, self.cond_key = denoiser, cond_key
        self.sigma_min, self.sigma_max = noise_range(denoiser)

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, **extra: Any) -> torch.Tensor:
        """The clean image, [N, C, H, W] like `x`.

        Args:
            sigma: noise levels, [N].
            extra: the condition, as the denoiser takes it.

        Raises:
            TypeError: another argument than the condition.
        """
        cond = extra.pop(self.cond_key, None)
        if extra:
            raise TypeError(f"unknown argument {next(iter(extra))!r}: this denoiser takes {self.cond_key!r} alone")
        return self.inner_model(x, sigma, cond)


class OfKDiffusion:
    """A model of k-diffusion's form as one of our denoisers, for our samplers, guidance and restoration.

    Args:
        model: called as model(x, sigma [N], **{cond_key: cond}); without a condition, as model(x, sigma).
        cond_key: the keyword that it takes its condition by.
        sigma_min, sigma_max: noise levels that it is made for; None = as it says, or any.
    """

    def __init__(
        self, model: Any, cond_key: str = COND, sigma_min: float | None = None, sigma_max: float | None = None
    ):
        self.model, self.cond_key = model, cond_key
        low, high = (float(level) for level in noise_range(model))
        self.sigma_min = low if sigma_min is None else sigma_min
        self.sigma_max = high if sigma_max is None else sigma_max

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, cond: torch.Tensor | None = None, /) -> torch.Tensor:
        levels = sigma.to(x.dtype).to(x.device).reshape(-1).expand(len(x))
        return self.model(x, levels, **({} if cond is None else {self.cond_key: cond}))
