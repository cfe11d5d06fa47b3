"""Guidance: two denoisers combined into one, or a denoiser and a classifier."""

import math
from typing import Any

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


class ClassifierGuided:
    """D + w sigma^2 grad log p(class | x, sigma): images of a class by a denoiser that knows none (Song et al. 2021).

    The class is what the denoiser is asked for, as a class vector, which only the classifier is given.

    Args:
        net: denoiser.
        classifier: called as classifier(x, sigma) for logits; says the `sigma_min` and `sigma_max` that it has learned.
            Beyond them, and outside of the interval, the denoiser is used alone.
        guidance: weight w; 0 = none, 1 = images as the classifier believes them to be distributed.
        interval: noise levels lo < sigma <= hi at which guidance acts.
    """

    def __init__(self, net: Denoiser, classifier: Any, guidance: float, interval: tuple[float, float]):
        self.net, self.classifier, self.guidance = net, classifier, guidance
        self.lo, self.hi = interval

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        D = self.net(x, sigma, None)
        if labels is None:
            return D
        active = (sigma > self.lo) & (sigma <= self.hi)
        # Solvers reach the ends of a schedule only nearly.
        active &= (sigma >= 0.999 * self.classifier.sigma_min) & (sigma <= 1.001 * self.classifier.sigma_max)
        if self.guidance == 0 or not active.any():
            return D
        weight = torch.where(active, self.guidance * sigma.double().square(), 0.0)
        return D + weight.reshape(-1, *[1] * (x.ndim - 1)).to(D) * self.gradient(x, sigma, labels).to(D)

    def gradient(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Gradient of log p(class | x, sigma) by x, float32, in whatever mode it is asked for."""
        # Copies made outside of inference mode can be differentiated, those of inference mode cannot.
        with torch.inference_mode(False), torch.enable_grad():
            image, level, labels = x.detach().float().clone().requires_grad_(), sigma.detach().clone(), labels.clone()
            log_p = (self.classifier(image, level).log_softmax(dim=1) * labels).sum()
            return torch.autograd.grad(log_p, image)[0]
