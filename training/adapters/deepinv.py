"""Denoisers as deepinv calls them: denoiser(x, sigma) -> the clean image, of pixels from 0 to 1.

deepinv is not needed here: its algorithms (plug-and-play priors, diffusion samplers) take any module of this form.
"""

import torch
from torch import nn

from training.denoiser import Denoiser


class ForDeepInverse(nn.Module):
    """Our denoiser for deepinv.

    Its images have pixels from 0 to 1 and noise in the same units, ours have the network's. With x = low + (high - low)
    x', noise of standard deviation sigma' is noise of (high - low) sigma', and D' = (D - low) / (high - low).

    Args:
        denoiser: D(x, sigma, cond).
        pixel_range: what black and white are to it, (low, high); None = as its `spec` says, or (-1, 1).
        cond: the condition of all images, [1, ...] or [N, ...]; None = none.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        pixel_range: tuple[float, float] | None = None,
        cond: torch.Tensor | None = None,
    ):
        super().__init__()
        self.denoiser, self.cond = denoiser, cond
        spec = getattr(denoiser, "spec", None)
        self.low, self.high = pixel_range or getattr(spec, "pixel_range", (-1.0, 1.0))

    def forward(self, x: torch.Tensor, sigma: torch.Tensor | float, **_unused: object) -> torch.Tensor:
        """The clean image, [N, C, H, W] like `x`.

        Args:
            x: images of pixels from 0 to 1, with noise.
            sigma: its standard deviation in the same units: a number, or one per image, [N] or [N, 1, 1, 1].
        """
        scale = self.high - self.low
        level = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).reshape(-1) * scale
        cond = None if self.cond is None else self.cond.to(x.device).expand(len(x), *self.cond.shape[1:])
        D = self.denoiser(self.low + scale * x, level, cond)
        return ((D - self.low) / scale).to(x.dtype)
