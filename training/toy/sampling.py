"""Sampling in the toy example, and what the samples are measured by."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

from training.denoiser import Denoiser
from training.guidance import GuidedDenoiser
from training.samplers.edm import ode_sampler
from training.samplers.grids import edm_sigmas
from training.toy.data import GAUSSIANS_PER_BRANCH, GaussianMixture

SIGMA_MAX = 5.0
STEPS = 32
SUPPORT_MASS = 0.99  # of the distribution, inside what counts as its support
SUPPORT_SAMPLES = 1 << 15
BLOCK = 4096  # samples whose branches are found at a time


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
) -> torch.Tensor:
    """Follow the probability flow from `sigma_max` to 0 with Heun's method.

    Args:
        noise: unit-variance noise [N, 2].
        gnet: guiding model, if `guidance` is not 1.
        on_step: called with the points at every noise level, first to last.

    Returns:
        Samples [N, 2].
    """
    D = denoiser(net)
    if gnet is not None and guidance != 1:
        D = GuidedDenoiser(D, denoiser(gnet), guidance)
    return ode_sampler(D, noise, edm_sigmas(num_steps, sigma_max=sigma_max), on_step=on_step)


class Estimate(NamedTuple):
    """A mean over samples and its standard error."""

    value: float
    error: float


class Quality(NamedTuple):
    """How samples compare with the ground truth.

    Args:
        nll: mean negative log-density of the samples under the ground truth, in nats.
        outliers: share of samples outside the support, the smallest region with 99 % of the mass.
        branch_kl: KL divergence, in nats, of the share of samples on each branch of the tree from what it should be;
            0 = all branches are covered. (Few samples raise it: by about 127 / 2N for N of them.)
    """

    nll: Estimate
    outliers: Estimate
    branch_kl: Estimate


@functools.lru_cache(maxsize=8)
def support_level(distribution: GaussianMixture) -> float:
    """The log-density above which `SUPPORT_MASS` of the distribution lies."""
    generator = torch.Generator(distribution.mu.device).manual_seed(0)
    logp = distribution.logp(distribution.sample(SUPPORT_SAMPLES, generator=generator))
    return logp.quantile(1 - SUPPORT_MASS).item()


def measure(distribution: GaussianMixture, x: torch.Tensor) -> Quality:
    """Quality of samples x [N, 2]."""
    logp = distribution.logp(x)
    outside = (~(logp >= support_level(distribution))).float()  # NaN is outside, too
    on_branch = torch.cat([_by_branch(distribution.posterior(part)) for part in x.split(BLOCK)])
    share = on_branch.mean(dim=0)
    # The derivative of KL = sum_b share_b log(share_b / expected_b) with respect to share_b, up to a constant. A branch
    # that no sample is near contributes 0.
    log_ratio = (share.clamp(min=1e-30) / _by_branch(distribution.phi)).log()
    return Quality(_mean(-logp), _mean(outside), _mean(on_branch @ log_ratio))


def _by_branch(weights: torch.Tensor) -> torch.Tensor:
    """Sum weights of components [..., K] over each branch."""
    return weights.unflatten(-1, (-1, GAUSSIANS_PER_BRANCH)).sum(dim=-1)


def _mean(values: torch.Tensor) -> Estimate:
    values = values.double()
    return Estimate(values.mean().item(), values.std().item() / math.sqrt(len(values)))
