"""Rules of guidance: how a weight combines what two denoisers see in the same noisy images.

With the main denoiser's D_1, the guide's D_0 and the weight w, each gives D_1 where w = 1.
"""

import math
from typing import Protocol

import torch

from training.denoiser import per_image

Weighting = float | torch.Tensor  # one weight for all images, or shaped so that it multiplies them


class Rule(Protocol):
    """(D_1, D_0, w, x, sigma) -> D.

    Args:
        main, guide: D_1 and D_0 [N, ...].
        weight: w.
        x: noisy images that both saw, [N, ...].
        sigma: their noise level, one element or [N].
    """

    def __call__(
        self,
        main: torch.Tensor,
        guide: torch.Tensor,
        weight: Weighting,
        x: torch.Tensor,
        sigma: torch.Tensor,
    ) -> torch.Tensor: ...


def dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The inner product of each image of `a` with that of `b`, in the form that multiplies images."""
    return per_image((a * b).flatten(1).sum(dim=1), a)


def extrapolated(
    main: torch.Tensor, guide: torch.Tensor, weight: Weighting, x: torch.Tensor, sigma: torch.Tensor
) -> torch.Tensor:
    """D_0 + w (D_1 - D_0): classifier-free guidance and autoguidance alike.

    With an unconditional guide this is classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598); with a smaller
    or less trained version of the main network it is autoguidance (Karras et al. 2024, arXiv 2406.02507, Eq. 4).
    """
    return guide.lerp(main, weight)


class Momentum:
    """value_i + beta sum_(i-1): a running sum over noise levels, of which each counts once.

    A solver may evaluate a level several times: Heun's method ends a step where the next one begins. Then the last
    value counts, and the sum of the levels above stays as it is.
    """

    def __init__(self, beta: float):
        self.beta = beta
        self.level = math.inf  # the lowest so far
        self.above: torch.Tensor | None = None  # the sum before that level
        self.sum: torch.Tensor | None = None

    def __call__(self, value: torch.Tensor, level: float) -> torch.Tensor:
        if level < self.level:
            self.level, self.above = level, self.sum
        self.sum = value if self.above is None else value + self.beta * self.above
        return self.sum


class Projected:
    """Adaptive projected guidance (APG; Sadat et al. 2024, arXiv 2410.02416).

    D = D_1 + (w - 1) (d_orthogonal + eta d_parallel) where d is D_1 - D_0 with momentum and no longer than a norm, and
    d_parallel = (d . D_1) / (D_1 . D_1) D_1 is its part along the image. With eta = 1, no limit and no momentum, it is
    `extrapolated`.

    One object serves one batch, since it keeps the momentum.

    Args:
        eta: share of the parallel part.
        norm: largest Euclidean norm of d, over all dimensions of an image; None = no limit.
        momentum: beta of `Momentum`; negative in the paper.
    """

    def __init__(self, eta: float = 0.0, norm: float | None = None, momentum: float = 0.0):
        self.eta, self.norm = eta, norm
        self.momentum = Momentum(momentum) if momentum != 0 else None

    def __call__(
        self,
        main: torch.Tensor,
        guide: torch.Tensor,
        weight: Weighting,
        x: torch.Tensor,
        sigma: torch.Tensor,
    ) -> torch.Tensor:
        d = main - guide
        if self.momentum is not None:
            d = self.momentum(d, float(sigma.max()))
        if self.norm is not None:
            d = d * (self.norm / dot(d, d).sqrt()).clamp(max=1)
        parallel = dot(d, main) / dot(main, main) * main
        return main + (weight - 1) * (d - parallel + self.eta * parallel)


def scaled_guide(
    main: torch.Tensor, guide: torch.Tensor, weight: Weighting, x: torch.Tensor, sigma: torch.Tensor
) -> torch.Tensor:
    """CFG-Zero*: the guide's velocity is scaled to fit that of the main denoiser (Fan et al. 2025, arXiv 2503.18886).

    The paper's flow is u = (1 - t) x0 + t n = (1 - t) x with t / (1 - t) = sigma, whose velocity is n - x0: of a
    denoiser, v = (x - D) / sigma - D. Then v = (1 - w) s v_0 + w v_1 with s = (v_1 . v_0) / (v_0 . v_0), and D is
    (x - sigma v) / (1 + sigma).
    """
    level = per_image(sigma, x)
    v1, v0 = ((x - D) / level - D for D in (main, guide))
    v = (dot(v1, v0) / dot(v0, v0) * v0).lerp(v1, weight)
    return (x - level * v) / (1 + level)
