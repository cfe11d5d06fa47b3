"""How likelihoods are computed. One home of the defaults."""

from dataclasses import dataclass

from training.config.fields import Config, option
from training.config.metrics import PRECISIONS
from training.config.samplers import SCHEDULES


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


TRACES = ("rademacher", "gaussian", "exact")
DEQUANTIZATIONS = ("uniform", "none")
FIRST_TIME = 1e-5  # where the image stands (Song et al. 2021, Appendix C): at 0 the score may be infinite


@dataclass(frozen=True, kw_only=True)
class FlowLikelihoodConfig(Config):
    """The density of a denoiser, by the probability flow of a schedule (Song et al. 2021, Appendix D.2)."""

    trace: str = option(
        "rademacher",
        "Trace of the Jacobian of a denoiser: estimated by a random vector of +-1 or of normal elements, or exact (a "
        "product per dimension)",
        choices=TRACES,
    )
    rtol: float = option(1e-5, "Relative tolerance of the solver", above=0)
    atol: float = option(1e-5, "Absolute tolerance of the solver", above=0)
    common_norm: bool = option(False, "Give all images of a batch the same steps, as published")
    first_time: float = option(FIRST_TIME, flag=None, above=0, below=1)
    repeats: int = option(1, "Average over so many draws for each image; published: 5 on test images", low=1)
    levels: int = option(256, "Values that a pixel has; the digits have 17", low=2, high=256)
    dequantization: str = option(
        "uniform", "Spread pixels over the width of their level, or leave them", choices=DEQUANTIZATIONS
    )
    schedule: str = option(
        "network", "Schedule whose flow is followed; network = the one that it was trained on", choices=SCHEDULES
    )


@dataclass(frozen=True, kw_only=True)
class LikelihoodConfig(Config):
    """What a network's likelihood is computed with; a section for each kind of networks."""

    vae: VAEBounds = VAEBounds()
    flow: FlowLikelihoodConfig = FlowLikelihoodConfig()
    precision: str = option(
        "fp32", "What the network computes in; bounds are worth little in less than fp32", choices=PRECISIONS
    )
    device: str = option(
        "auto",
        "Where to compute; auto = the first of cuda, mps, cpu that is there",
        choices=("auto", "cpu", "cuda", "mps"),
    )
