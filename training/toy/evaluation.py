"""How samples of the toy example compare with the ground truth."""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from training.config.guidance import GuidanceConfig
from training.toy.data import GAUSSIANS_PER_BRANCH, GaussianMixture, gt
from training.toy.models import Models
from training.toy.sampling import sample_toy

SUPPORT_MASS = 0.99  # share of the distribution inside its support
SUPPORT_SAMPLES = 1 << 15
BLOCK = 4096  # samples assigned to branches at a time


class Estimate(NamedTuple):
    """A mean over samples and its standard error."""

    value: float
    error: float


class Quality(NamedTuple):
    """How samples compare with the ground truth.

    Args:
        nll: mean negative log-density of the samples under the ground truth, in nats.
        outliers: share of samples outside the support, the smallest region with 99 % of the mass.
        branch_kl: KL divergence, in nats, of the distribution of samples over the branches of the tree from that of the
            ground truth; 0 = all branches are covered. (With N samples its bias is about 127 / 2N.)
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
    # without samples contributes 0.
    log_ratio = (share.clamp(min=1e-30) / _by_branch(distribution.phi)).log()
    return Quality(_mean(-logp), _mean(outside), _mean(on_branch @ log_ratio))


def _by_branch(weights: torch.Tensor) -> torch.Tensor:
    """Weights of components [..., K], summed over each branch."""
    return weights.unflatten(-1, (-1, GAUSSIANS_PER_BRANCH)).sum(dim=-1)


def _mean(values: torch.Tensor) -> Estimate:
    values = values.double()
    return Estimate(values.mean().item(), values.std().item() / math.sqrt(len(values)))


# ---------------------------------------------------------------------------------------------------------
# Comparison


HEADING = f"{'':26s}{'w':>4s}{'-log p':>18s}{'outliers':>18s}{'branch KL':>18s}"


class Row(NamedTuple):
    """A line of the table.

    Args:
        sampling: kind of sampling.
        weight: of guidance; None for the ground truth.
        quality: of the samples.
    """

    sampling: str
    weight: float | None
    quality: Quality

    def __str__(self) -> str:
        """The line below `HEADING`."""
        nll, outliers, kl = self.quality
        return (
            f"{self.sampling:26s}{'' if self.weight is None else f'{self.weight:g}':>4s}"
            f"{nll.value:11.3f} ±{nll.error:5.3f}"
            f"{outliers.value:11.2%} ±{outliers.error:5.2%}"
            f"{kl.value:11.4f} ±{kl.error:6.4f}"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; None where a number is not finite."""
        quality = {
            name: {key: value if math.isfinite(value) else None for key, value in estimate._asdict().items()}
            for name, estimate in self.quality._asdict().items()
        }
        return {"sampling": self.sampling, "weight": self.weight, **quality}


def compare(
    models: Models,
    weights: Sequence[float],
    samples: int,
    seed: int,
    device: torch.device,
    how: GuidanceConfig = GuidanceConfig(),
) -> Iterator[Row]:
    """Rows for the ground truth, no guidance, classifier-free guidance and autoguidance, one after the other.

    Args:
        models: the models, on `device`.
        weights: of guidance, each of which is tried.
        samples: how many of each kind, all from the same noise.
        seed: of that noise.
        how: what else there is to guidance.
    """
    distribution = gt(models.cls, device)
    true = distribution.sample(samples, generator=torch.Generator(device).manual_seed(seed))
    yield Row("ground truth", None, measure(distribution, true))
    noise = torch.randn(samples, 2, generator=torch.Generator(device).manual_seed(seed), device=device)
    yield Row("no guidance", 1.0, measure(distribution, sample_toy(models.net, noise)))
    for name, guide in [("classifier-free guidance", models.cfg_net), ("autoguidance", models.gnet)]:
        for weight in weights if guide is not None else ():
            yield Row(name, weight, measure(distribution, sample_toy(models.net, noise, guide, weight, how=how)))
