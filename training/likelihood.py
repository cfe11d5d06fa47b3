"""Likelihood of images by the probability flow: bits per dimension of every denoiser.

Source: Song et al. 2021 (arXiv 2011.13456, Section 4.3 and Appendix D.2), after Chen et al. 2018 (arXiv 1806.07366) and
Hutchinson 1990 (the estimate of the trace). The flow carries an image u(0) to noise u(1) whose density is known, and
its divergence is what the logarithm of the density changes by:

    log p(u(0)) = log N(u(1); 0, prior_std^2) + int_0^1 div(du/dt) dt.

Both come from one call of the denoiser and one product e^T dD/dx for each evaluation.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch

from dnnlib.errors import UserError
from training.config.likelihood import DEQUANTIZATIONS, FlowLikelihoodConfig
from training.denoiser import Denoiser, schedule_of, without_steps
from training.samplers.adaptive import Flow, integrate
from training.samplers.grids import latest_time, schedule_for
from training.schedules import Schedule, wide


class Likelihood(Protocol):
    """Likelihoods of images under a network, each from random numbers of its own.

    `section` is that of `LikelihoodConfig` that it looks at.
    """

    section: str

    def __call__(self, images: torch.Tensor, rnd: Any = None, cond: Any = None) -> torch.Tensor:
        """Bits per dimension of each image, float64 [N].

        Args:
            images: uint8 [N, C, H, W].
            rnd: random numbers of each image (`StackedRandomGenerator`); None = torch's own generator.
            cond: conditions [N, ...], or None.
        """
        ...

    def figures(self, images: torch.Tensor, rnd: Any = None, cond: Any = None) -> dict[str, torch.Tensor]:
        """All figures of each image [N] by name, float64; `bits_per_dim` is among them."""
        ...

    def describe(self) -> dict[str, Any]:
        """What computes them, as plain JSON values."""
        ...


class LikelihoodResult(NamedTuple):
    """What the flow says of each image."""

    log_p: torch.Tensor  # logarithm of the density in nats, float64 [N]
    z: torch.Tensor  # u(1), float32 [N, C, H, W]
    nfe: int  # evaluations of the denoiser
    evaluations: torch.Tensor  # of them, those that the image needed, int64 [N]


def bits_per_dim(
    denoiser: Denoiser,
    images: torch.Tensor,
    schedule: Schedule | None = None,
    *,
    cond: torch.Tensor | None = None,
    data_range: tuple[float, float] = (-1.0, 1.0),
    levels: int = FlowLikelihoodConfig.levels,
    dequantization: str = FlowLikelihoodConfig.dequantization,
    epsilon: torch.Tensor | None = None,
    rnd: Any = None,
    options: FlowLikelihoodConfig | None = None,
) -> torch.Tensor:
    """Bits per dimension of each image, float64 [N], as if pixels were one of so many levels.

    Args:
        denoiser: D(x; sigma, cond).
        images: uint8 [N, C, H, W], to be dequantised; or of floating point, in the units of the denoiser as they are.
        schedule, cond, epsilon, rnd, options: see `log_likelihood`.
        data_range: what black and white are for the denoiser: (0, 1) for published VE networks.
        levels: number of values that a pixel has, evenly spaced from 0 to 255. Where images have fewer than 256, the
            default mostly measures how sharply a network knows them.
        dequantization: see `dequantized`.

    Raises:
        UserError: as `log_likelihood` and `dequantized`.
    """
    if images.dtype == torch.uint8:
        images = dequantized(images, data_range, levels, dequantization, rnd)
    result = log_likelihood(denoiser, images, schedule, cond=cond, epsilon=epsilon, rnd=rnd, options=options)
    return to_bits_per_dim(result.log_p, images[0].numel(), data_range, levels)


def to_bits_per_dim(log_p: torch.Tensor, dims: int, data_range: tuple[float, float], levels: int) -> torch.Tensor:
    """Bits per dimension of images of density exp(log_p), for pixels that fill 1 / levels of the range of the data."""
    return -log_p / (dims * math.log(2)) + math.log2(levels / (data_range[1] - data_range[0]))


def dequantized(
    images: torch.Tensor,
    data_range: tuple[float, float] = (-1.0, 1.0),
    levels: int = FlowLikelihoodConfig.levels,
    dequantization: str = FlowLikelihoodConfig.dequantization,
    rnd: Any = None,
) -> torch.Tensor:
    """Images as densities see them, float32 [N, C, H, W] in the range of the data.

    Args:
        images: uint8 [N, C, H, W].
        data_range: of the result.
        levels: number of values that a pixel has, evenly spaced from 0 to 255.
        dequantization: 'uniform' spreads each level evenly over its share of the range (Theis et al. 2016, arXiv
            1511.01844); 'none' leaves pixels where the encoder of a network puts them; their density has no bound.
        rnd: what is drawn from (`StackedRandomGenerator`); None = torch's own generator.

    Raises:
        UserError: no such dequantisation, or fewer than two levels.
    """
    if dequantization not in DEQUANTIZATIONS:
        raise UserError(f"dequantization must be one of {', '.join(DEQUANTIZATIONS)}, not {dequantization!r}")
    if not 2 <= levels <= 256:
        raise UserError(f"levels must lie between 2 and 256, not {levels}")
    low, high = data_range
    if dequantization == "none":
        share = images.float() / 255
    else:
        rand = torch.rand if rnd is None else rnd.rand
        level = (images.float() * ((levels - 1) / 255)).round()
        share = (level + rand(images.shape, device=images.device)) / levels
    return low + (high - low) * share


def log_likelihood(
    denoiser: Denoiser,
    images: torch.Tensor,
    schedule: Schedule | None = None,
    *,
    cond: torch.Tensor | None = None,
    epsilon: torch.Tensor | None = None,
    rnd: Any = None,
    options: FlowLikelihoodConfig | None = None,
) -> LikelihoodResult:
    """Density of each image, the noise that the flow carries it to, and the number of evaluations.

    Args:
        denoiser: D(x; sigma, cond), differentiable in x.
        images: float [N, C, H, W], in the units of the denoiser.
        schedule: whose flow is followed; None = that of the denoiser's preconditioning, or VE with its noise levels.
        cond: conditions [N, ...] or None.
        epsilon: the random vectors e, shaped like `images`; drawn if None.
        rnd: what they are drawn from (`StackedRandomGenerator`); None = torch's own generator.
        options: how; None = the defaults of Song et al., with steps of its own for each image.

    Raises:
        UserError, RunError: as `adaptive.integrate`.
    """
    options = options or FlowLikelihoodConfig()
    schedule = without_steps(schedule_of(denoiser)) if schedule is None else schedule
    shape, dims = images.shape, images[0].numel()
    probes = _probes(images, options.trace, epsilon, rnd)

    def derivative(t: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """Of the image and, last, of the logarithm of its density."""
        u, flow = state[:, :-1], Flow.of(schedule, t)
        with torch.enable_grad():
            x = (u / flow.s).reshape(shape).requires_grad_()
            clean = denoiser(x, flow.sigma.flatten(), cond)
            # e^T (dD/dx - 1) e, summed over the probes
            traces = [
                _trace_part(torch.autograd.grad(clean, x, e.to(clean), retain_graph=i < len(probes) - 1)[0], e)
                for i, e in enumerate(probes)
            ]
        x, clean = x.detach().flatten(1), clean.detach().to(u).flatten(1)
        norm = torch.stack([e.flatten(1).square().sum(dim=1) for e in probes]).sum(dim=0)
        divergence = flow.f[:, 0] * norm - flow.rate[:, 0] / flow.s[:, 0] * torch.stack(traces).sum(dim=0)
        return torch.cat([flow.f * u - (clean - x) * flow.rate, divergence[:, None]], dim=1)

    start = wide(torch.cat([images.flatten(1), images.new_zeros(len(images), 1)], dim=1))
    interval = options.first_time, latest_time(schedule)
    y, nfe, evaluations = integrate(derivative, start, *interval, options.rtol, options.atol, options.common_norm)
    z, change = y[:, :-1], y[:, -1]
    variance = schedule.prior_std**2
    log_prior = -(z.square().sum(dim=1) / variance + dims * math.log(2 * math.pi * variance)) / 2
    return LikelihoodResult(log_prior + change, z.float().reshape(shape), nfe, evaluations)


def _probes(images: torch.Tensor, trace: str, epsilon: torch.Tensor | None, rnd: Any) -> list[torch.Tensor]:
    """Vectors e whose mean of e e^T is the identity, each like `images`; their sum, where they are all unit vectors."""
    like = wide(images)
    if epsilon is not None:
        return [epsilon.to(like)]
    if trace == "exact":
        unit = torch.eye(images[0].numel(), dtype=like.dtype, device=like.device)
        return [e.reshape(images.shape[1:]).expand_as(like) for e in unit]
    device = images.device
    if trace == "gaussian":
        draw = torch.randn if rnd is None else rnd.randn
        return [draw(images.shape, device=device).to(like)]
    signs = torch.randint(2, images.shape, device=device) if rnd is None else rnd.randint(2, images.shape)
    return [(2 * signs - 1).to(like)]


def _trace_part(product: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
    """e^T J e - e^T e for each image, from e^T J: float64 [N]. Subtracted before it is summed, to keep digits."""
    return ((product.to(e) - e) * e).flatten(1).sum(dim=1)


class FlowLikelihood:
    """The likelihood of images by the probability flow of a denoiser: a `Likelihood`.

    Args:
        net: the denoiser, a network in eval mode.
        config: how.
        context: entered around all evaluations, for what is constant in them.
    """

    section = "flow"

    def __init__(
        self,
        net: Any,
        config: FlowLikelihoodConfig,
        context: Callable[[Any], AbstractContextManager] = nullcontext,
    ):
        self.net, self.config, self.context = net, config, context
        self.schedule = without_steps(schedule_for(config.schedule, net))

    def __call__(self, images: torch.Tensor, rnd: Any = None, cond: torch.Tensor | None = None) -> torch.Tensor:
        """Bits per dimension of each image [N], float64. Arguments as for `figures`."""
        return self.figures(images, rnd, cond)["bits_per_dim"]

    def figures(
        self, images: torch.Tensor, rnd: Any = None, cond: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Bits per dimension of each image, and how often the denoiser was evaluated, float64 [N].

        Args:
            images: uint8 [N, C, H, W].
            rnd: random numbers of each image (`StackedRandomGenerator`); None = torch's own generator.
            cond: conditions [N, ...] or None.
        """
        return self.figures_and_latents(images, rnd, cond)[0]

    def figures_and_latents(
        self, images: torch.Tensor, rnd: Any = None, cond: torch.Tensor | None = None
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """As `figures`, and the noise of unit variance that the flow carries each image to, float32 [N, C, H, W].

        Of several draws for each image, it is that of the first.
        """
        config, span = self.config, self.net.spec.pixel_range
        bits, evaluations = [], []
        latents: torch.Tensor | None = None
        with self.context(self.net):
            for _ in range(config.repeats):
                x = dequantized(images, span, config.levels, config.dequantization, rnd)
                result = log_likelihood(self.net, x, self.schedule, cond=cond, rnd=rnd, options=config)
                bits.append(to_bits_per_dim(result.log_p, images[0].numel(), span, config.levels))
                evaluations.append(result.evaluations.double())
                latents = result.z / self.schedule.prior_std if latents is None else latents
        figures = {"bits_per_dim": torch.stack(bits).mean(dim=0), "nfe": torch.stack(evaluations).mean(dim=0)}
        assert latents is not None
        return figures, latents

    def describe(self) -> dict[str, Any]:
        """What computes them, as plain JSON values."""
        schedule = {"schedule": repr(self.schedule), "precision": self.net.precision}
        return {"likelihood": "probability flow", **self.config.to_json(), **schedule}
