"""Sampling in the toy example."""

import dataclasses
from collections.abc import Callable
from typing import Protocol

import torch

from training.config.guidance import GuidanceConfig
from training.denoiser import Denoiser
from training.guidance import guided
from training.samplers.edm import ode_sampler
from training.samplers.grids import edm_sigmas

SIGMA_MAX = 5.0
STEPS = 32


class Scored(Protocol):
    """What has a score: a `ToyModel`, or the ground truth."""

    def score(self, x: torch.Tensor, sigma: torch.Tensor | float, /) -> torch.Tensor: ...


def denoiser(model: Scored) -> Denoiser:
    """D(x; sigma) = x + sigma^2 grad log p(x; sigma) for points x [N, 2]."""

    def D(x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None = None, /) -> torch.Tensor:
        sigma = sigma.to(x)
        return x + sigma**2 * model.score(x, sigma)

    return D


@torch.no_grad()
def sample_toy(
    net: Scored,
    noise: torch.Tensor,
    gnet: Scored | None = None,
    guidance: float = 1,
    num_steps: int = STEPS,
    sigma_max: float = SIGMA_MAX,
    on_step: Callable[[torch.Tensor], None] | None = None,
    how: GuidanceConfig = GuidanceConfig(),
) -> torch.Tensor:
    """Samples [N, 2]: the ends of the probability flow from `sigma_max` to 0, by Heun's method.

    Args:
        net: the main model.
        noise: unit-variance noise [N, 2].
        gnet: guiding model, used where guidance acts.
        guidance: weight w.
        num_steps: number of steps.
        sigma_max: noise level at the start.
        on_step: called with the points at every noise level, first to last.
        how: what else there is to guidance.
    """
    D, sigmas = denoiser(net), edm_sigmas(num_steps, sigma_max=sigma_max)
    config = dataclasses.replace(how, guidance=guidance)
    if gnet is not None and config.acts:
        D = guided(D, denoiser(gnet), config, sigmas)
    return ode_sampler(D, noise, sigmas, on_step=on_step)
