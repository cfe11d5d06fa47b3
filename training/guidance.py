"""Guidance: two denoisers combined into one."""

import math

import torch

from dnnlib.errors import UserError
from training.denoiser import Denoiser


class Unconditional:
    """A denoiser that forgets what it is asked for: the guide of classifier-free guidance by one network.

    Args:
        net: a denoiser that knows images without a condition, too.
    """

    def __init__(self, net: Denoiser):
        self.net = net

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        return self.net(x, sigma, None)


class GuidedDenoiser:
    """D = lerp(D_guide, D_main, w): classifier-free guidance and autoguidance alike.

    With an unconditional guide this is classifier-free guidance (Ho & Salimans 2022); with a smaller or less
    trained version of the main network it is autoguidance (Karras et al. 2024, arXiv 2406.02507, Eq. 4).

    Args:
        net: main denoiser.
        gnet: guiding denoiser, given the same labels (an unconditional one ignores them).
        guidance: weight w; 1 = no guidance.
        interval: noise levels lo < sigma <= hi at which guidance acts (Kynkäänniemi et al. 2024,
            arXiv 2404.07724); elsewhere the main denoiser is used alone.

    Raises:
        UserError: the interval is empty.
    """

    def __init__(self, net: Denoiser, gnet: Denoiser, guidance: float, interval: tuple[float, float] = (0.0, math.inf)):
        lo, hi = interval
        if not lo < hi:
            raise UserError(f"guidance interval must satisfy lo < hi, not {lo},{hi}")
        self.net = net
        self.gnet = gnet
        self.guidance = guidance
        self.interval = interval

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        lo, hi = self.interval
        active = (sigma > lo) & (sigma <= hi)
        D_main = self.net(x, sigma, labels)
        if not active.any():
            return D_main
        D_guide = self.gnet(x, sigma, labels)
        D = D_guide.lerp(D_main, self.guidance)
        return torch.where(active.reshape(-1, *[1] * (x.ndim - 1)).to(x.device), D, D_main)
