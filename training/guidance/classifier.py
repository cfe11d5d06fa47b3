"""A denoiser guided by a classifier of noisy images."""

from typing import Any

import torch

from training.denoiser import Denoiser, per_image
from training.guidance.weights import EVERYWHERE, Weight, as_weight, inside
from training.schedules import wide


class ClassifierGuided:
    """D + w sigma^2 grad log p(class | x, sigma): images of a class by a denoiser that knows none (Song et al. 2021).

    The class is what the denoiser is asked for, as a class vector, which only the classifier is given.

    Args:
        net: denoiser.
        classifier: called as classifier(x, sigma) for logits; says the `sigma_min` and `sigma_max` that it has learned.
            Beyond them, and outside of the interval, the denoiser is used alone.
        guidance: weight w, or a function of the noise level (`weights`); 0 = none, 1 = images as the classifier
            believes them to be distributed.
        interval: noise levels lo < sigma <= hi at which guidance acts.
    """

    def __init__(
        self, net: Denoiser, classifier: Any, guidance: float | Weight, interval: tuple[float, float] = EVERYWHERE
    ):
        self.net, self.classifier = net, classifier
        self.weight = inside(as_weight(guidance), interval, none=0.0)

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        D = self.net(x, sigma, None)
        if labels is None:
            return D
        level = wide(sigma).reshape(-1)
        # Solvers reach the ends of a schedule only nearly.
        known = (level >= 0.999 * self.classifier.sigma_min) & (level <= 1.001 * self.classifier.sigma_max)
        weight = torch.where(known, self.weight(level), 0.0)
        if not weight.any():
            return D
        return D + per_image(weight * level.square(), D) * self.gradient(x, sigma, labels).to(D)

    def gradient(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Gradient of log p(class | x, sigma) by x, float32, in whatever mode it is asked for."""
        # Copies made outside of inference mode can be differentiated, those of inference mode cannot.
        with torch.inference_mode(False), torch.enable_grad():
            image, level, labels = x.detach().float().clone().requires_grad_(), sigma.detach().clone(), labels.clone()
            log_p = (self.classifier(image, level).log_softmax(dim=1) * labels).sum()
            return torch.autograd.grad(log_p, image)[0]
