"""Weights of guidance as functions of the noise level.

A constant weight is that of Ho & Salimans 2022 (arXiv 2207.12598), an interval that of Kynkäänniemi et al. 2024
(arXiv 2404.07724). Weights that change along the way, by a line or a cosine among others, are compared by Wang et al.
2024 (arXiv 2404.13040) as functions of time; here they are functions of ln sigma, which all schedules share.
"""

import math
from collections.abc import Callable, Sequence

import torch

from training.config.guidance import GuidanceConfig

Weight = Callable[[torch.Tensor], torch.Tensor]  # sigma [N] -> w [N], float64
EVERYWHERE = (0.0, math.inf)  # all noise levels


def as_weight(weight: "float | Weight") -> Weight:
    """A number as the function that has that value everywhere; a function as it is."""
    if callable(weight):
        return weight
    value = float(weight)
    return lambda sigma: torch.full_like(sigma, value)


def ramp(shape: str, low: float, high: float, at_low: float, at_high: float) -> Weight:
    """From one weight at the level `low` to another at `high`, and constant beyond.

    With u = ln(sigma / low) / ln(high / low), cut to [0, 1], the share of the second weight is u ('linear') or
    (1 - cos(pi u)) / 2 ('cosine').
    """

    def weight(sigma: torch.Tensor) -> torch.Tensor:
        u = ((sigma / low).log() / math.log(high / low)).clamp(0, 1)
        share = u if shape == "linear" else (1 - (math.pi * u).cos()) / 2
        return at_low + (at_high - at_low) * share

    return weight


def table(levels: Sequence[float], weights: Sequence[float]) -> Weight:
    """Linear in ln sigma between levels, which increase, and constant beyond the first and the last."""

    def weight(sigma: torch.Tensor) -> torch.Tensor:
        knots, values = sigma.new_tensor(levels).log(), sigma.new_tensor(weights)
        if len(knots) == 1:
            return values.expand_as(sigma)
        place = sigma.log()
        right = torch.searchsorted(knots, place).clamp(1, len(knots) - 1)
        share = ((place - knots[right - 1]) / (knots[right] - knots[right - 1])).clamp(0, 1)
        return torch.lerp(values[right - 1], values[right], share)

    return weight


def inside(weight: Weight, interval: tuple[float, float], none: float = 1.0) -> Weight:
    """The weight where lo < sigma <= hi, and elsewhere that of no guidance."""
    lo, hi = interval
    if interval == EVERYWHERE:
        return weight
    return lambda sigma: torch.where((sigma > lo) & (sigma <= hi), weight(sigma), none)


def renoised_by_guide(weight: Weight, levels: torch.Tensor) -> Weight:
    """The weight w with which a step of Euler's method by CFG is one by CFG++ with lambda.

    CFG++ (Chung et al. 2024, arXiv 2406.08070) takes the noise of the guide to go from sigma_i to sigma_(i+1): with
    D_lambda = D_0 + lambda (D_1 - D_0),

        x_(i+1) = D_lambda + sigma_(i+1) / sigma_i (x_i - D_0),

    which is CFG with w = lambda / (1 - sigma_(i+1) / sigma_i).

    Args:
        weight: lambda, usually between 0 and 1.
        levels: all noise levels of the sampler, decreasing, float64 on the CPU. Any other sigma belongs to the nearest.
    """
    steps = 1 - levels[1:] / levels[:-1]

    def of_step(sigma: torch.Tensor) -> torch.Tensor:
        nearest = (sigma.cpu()[:, None] - levels[:-1]).abs().argmin(dim=1)
        return weight(sigma) / steps[nearest].to(sigma)

    return of_step


def weight_of(config: GuidanceConfig, levels: torch.Tensor | None = None, none: float = 1.0) -> Weight:
    """The weight that a configuration describes.

    Args:
        levels: noise levels of the sampler, for CFG++.
        none: the weight that is no guidance.
    """
    if config.guidance_table is not None:
        weight = table(config.guidance_table[0::2], config.guidance_table[1::2])
    elif config.guidance_schedule != "constant":
        assert config.guidance_ramp is not None
        end = none if config.guidance_end is None else config.guidance_end
        weight = ramp(config.guidance_schedule, *config.guidance_ramp, config.guidance, end)
    else:
        weight = as_weight(config.guidance)
    if config.guidance_method == "cfg++":
        assert levels is not None
        weight = renoised_by_guide(weight, levels)
    return inside(weight, config.interval, none)
