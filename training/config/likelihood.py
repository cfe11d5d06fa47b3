"""How likelihoods are computed. One home of the defaults."""

from dataclasses import dataclass

from training.config.fields import Config, option
from training.config.metrics import PRECISIONS


@dataclass(frozen=True, kw_only=True)
class VAEBounds(Config):
    """Bounds of an NVAE."""

    samples: int = option(
        1,
        "Importance samples per image of an NVAE; 1 = the evidence lower bound alone, published: 1000",
        low=1,
        high=10_000_000,
    )
    max_batch: int = option(
        128, "Images times samples that go through an NVAE's decoder together, which bounds the memory", low=1
    )


@dataclass(frozen=True, kw_only=True)
class LikelihoodConfig(Config):
    """What a network's likelihood is computed with; a section for each kind of networks."""

    vae: VAEBounds = VAEBounds()
    precision: str = option(
        "fp32", "What the network computes in; bounds are worth little in less than fp32", choices=PRECISIONS
    )
    device: str = option(
        "auto",
        "Where to compute; auto = the first of cuda, mps, cpu that is there",
        choices=("auto", "cpu", "cuda", "mps"),
    )
