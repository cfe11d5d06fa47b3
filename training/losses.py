"""Training objectives and the distribution of noise levels seen in training."""

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch

from dnnlib.errors import UserError
from training.config.edm2 import EDM2Network, EDM2Objective
from training.preconditioning import DataPrediction, EDMOfSchedule
from training.schedules import EPS, DiscreteVE, DiscreteVP, Schedule, wide
from training.schedules_uvit import InterpolatedVP


class Objective(Protocol):
    """What a network is trained to make small."""

    def __call__(
        self, net: Any, images: torch.Tensor, labels: torch.Tensor | None, /, *, rnd: Any, nimg: int
    ) -> torch.Tensor:
        """Loss [N, ...], whose sum over the batch divided by N is the objective.

        Args:
            net: the network that is trained.
            images: clean images as the encoder gives them, float32 [N, C, H, W].
            labels: conditions [N, ...] or None.
            rnd: random numbers of each image (`StackedRandomGenerator`).
            nimg: images seen in training before this step.
        """
        ...

    def regularizer(self, net: Any, nimg: int) -> torch.Tensor | None:
        """What is added once per step, of the weights alone; None = nothing."""
        ...

    def report(self) -> dict[str, Any]:
        """What the latest call found beside the loss: numbers or tensors [] by name."""
        ...

    def of_each_image(self) -> dict[str, torch.Tensor]:
        """What the latest call knew of each image, tensors [N] by name.

        `sigma`, its noise level; `logvar`, the uncertainty u(sigma) of EDM2. Nothing where there are no noise levels.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to continue exactly."""
        ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


class Stateless:
    """The part of an objective that no resumed run depends on, that regularises nothing and reports nothing."""

    drawn: dict[str, torch.Tensor] | None = None  # in the latest call

    def regularizer(self, net: Any, nimg: int) -> torch.Tensor | None:
        return None

    def report(self) -> dict[str, Any]:
        return {}

    def of_each_image(self) -> dict[str, torch.Tensor]:
        return self.drawn or {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class EDM2Loss(Stateless):
    """Denoising loss weighted by the learned uncertainty (EDM2, Eqs. 14-16 and 21).

    Noise levels are log-normal: ln(sigma) ~ N(P_mean, P_std^2).
    """

    def __init__(
        self,
        P_mean: float = EDM2Objective.P_mean,
        P_std: float = EDM2Objective.P_std,
        sigma_data: float = EDM2Network.sigma_data,
    ):
        self.P_mean = P_mean
        self.P_std = P_std
        self.sigma_data = sigma_data

    def noise_levels(self, normal: torch.Tensor) -> torch.Tensor:
        """Map unit normal draws to sigma, elementwise."""
        return (self.P_mean + self.P_std * normal).exp()

    def __call__(
        self,
        net,
        images: torch.Tensor,
        labels: torch.Tensor | None = None,
        *,
        sigma: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        rnd: Any = None,
        nimg: int = 0,
    ) -> torch.Tensor:
        """Loss per element, float32 [N, C, H, W]. The training objective is its sum over the batch divided by N.

        Args:
            net: called as net(x, sigma, labels, return_logvar=True).
            images: clean images y, float32 [N, C, H, W].
            labels: class vectors [N, label_dim] or None.
            sigma: noise levels [N]; drawn if None.
            noise: unit-variance noise shaped like `images`; drawn if None.
            rnd: what they are drawn from (`StackedRandomGenerator`); None = torch's own generator.
            nimg: not used; this loss is the same throughout training.
        """
        randn: Callable[..., torch.Tensor] = torch.randn if rnd is None else rnd.randn
        if sigma is None:
            sigma = self.noise_levels(randn([images.shape[0]], device=images.device))
        if noise is None:
            noise = randn(images.shape, device=images.device)
        sigma = sigma.reshape(-1, 1, 1, 1)
        weight = (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2
        denoised, logvar = net(images + sigma * noise, sigma, labels, return_logvar=True)
        self.drawn = {"sigma": sigma.flatten(), "logvar": logvar.detach().flatten()}
        return weight / logvar.exp() * (denoised - images) ** 2 + logvar


class NoiseLoss(Stateless):
    """The objective of U-ViT (Bao et al. 2023, Section 2): squared error of the noise, or of the clean image.

    Times are uniform, in continuous time from 0 to 1, over the steps of an `InterpolatedVP`. Networks estimate one of
    the two by their preconditioning, `Epsilon` or `DataPrediction`; the error of the other follows from it. Of networks
    with EDM's preconditioning, the error of what they themselves give counts, which weighs that of the clean image by
    1 / c_out^2.

    Args:
        schedule: of the noise.
        prediction: 'noise' or 'data', whose error counts.
        lognormal: mean and standard deviation of a normal ln(sigma), as in EDM, in place of uniform times.

    Raises:
        UserError: another prediction.
    """

    def __init__(self, schedule: Schedule, prediction: str = "noise", lognormal: tuple[float, float] | None = None):
        if prediction not in ("noise", "data"):
            raise UserError(f"prediction must be noise or data, not {prediction!r}")
        self.schedule = schedule
        self.prediction = prediction
        self.lognormal = lognormal

    def times(self, uniform: torch.Tensor) -> torch.Tensor:
        """Times of training from draws in [0, 1), elementwise, float64."""
        if self.lognormal is not None:
            mean, std = self.lognormal
            # Draws are multiples of 2^-24; the offset keeps 0 from becoming infinity.
            return self.schedule.time((mean + std * torch.special.ndtri(wide(uniform) + 2**-26)).exp())
        return self.schedule.training_times(uniform) if isinstance(self.schedule, InterpolatedVP) else wide(uniform)

    def __call__(
        self,
        net: Any,
        images: torch.Tensor,
        labels: torch.Tensor | None = None,
        *,
        t: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        rnd: Any = None,
        nimg: int = 0,
    ) -> torch.Tensor:
        """Loss of each image, float32 [N]: the mean over its elements.

        Args:
            net: the denoiser (`Preconditioned`), whose preconditioning is that of the schedule.
            images: clean images x_0, float32 [N, C, H, W].
            labels: conditions [N, ...] or None.
            t: times [N]; drawn if None.
            noise: unit-variance noise shaped like `images`; drawn if None.
            rnd: what they are drawn from (`StackedRandomGenerator`); None = torch's own generator.
            nimg: not used; this loss is the same throughout training.
        """
        rand: Callable[..., torch.Tensor] = torch.rand if rnd is None else rnd.rand
        randn: Callable[..., torch.Tensor] = torch.randn if rnd is None else rnd.randn
        if t is None:
            t = self.times(rand([images.shape[0]], device=images.device))
        if noise is None:
            noise = randn(images.shape, device=images.device)
        sigma = self.schedule.sigma(t)
        self.drawn = {"sigma": sigma}
        column = sigma.reshape(-1, 1, 1, 1).to(images)
        F_x, _ = net.raw(images + column * noise, sigma, labels)
        if isinstance(net.preconditioning, EDMOfSchedule):
            return (F_x - net.preconditioning.target(images, noise, column)).square().flatten(1).mean(1)
        estimated = "data" if isinstance(net.preconditioning, DataPrediction) else "noise"
        error = (F_x - (images if estimated == "data" else noise)).square().flatten(1).mean(1)
        # x = x_0 + sigma n is known, so the errors of x_0 and n differ by the factor sigma.
        powers = {"noise": 0, "data": 2}
        return error * (sigma ** (powers[self.prediction] - powers[estimated])).to(error)


class WithoutSomeConditions:
    """An objective for which images lose their condition at random, so that one network learns to go without, too.

    Args:
        objective: what is made small.
        p: probability that an image loses its condition, see `Conditioning.drop`.
    """

    def __init__(self, objective: Objective, p: float):
        self.objective, self.p = objective, p
        self.regularizer, self.report = objective.regularizer, objective.report
        self.of_each_image = objective.of_each_image
        self.state_dict, self.load_state_dict = objective.state_dict, objective.load_state_dict

    def __call__(
        self, net: Any, images: torch.Tensor, labels: torch.Tensor | None, /, *, rnd: Any, nimg: int
    ) -> torch.Tensor:
        """As of the objective; whether a condition is dropped is drawn first."""
        conditioning = net.spec.conditioning
        labels = None if conditioning.kind == "none" else conditioning.drop(labels, self.p, rnd)
        return self.objective(net, images, labels, rnd=rnd, nimg=nimg)


class ClassifierLoss(Stateless):
    """Cross-entropy of a classifier of noisy images, whose noise levels are log-uniform over its range."""

    accuracy: torch.Tensor | None = None

    def __call__(
        self,
        net: Any,
        images: torch.Tensor,
        labels: torch.Tensor | None,
        *,
        rnd: Any,
        nimg: int = 0,
    ) -> torch.Tensor:
        """Loss of each image, float32 [N].

        Args:
            net: called as net(x, sigma); says its `sigma_min` and `sigma_max`.
            images: clean images, float32 [N, C, H, W].
            labels: class vectors [N, K].
            rnd: what noise and its levels are drawn from (`StackedRandomGenerator`).
            nimg: not used; this loss is the same throughout training.
        """
        assert labels is not None
        low, high = math.log(net.sigma_min), math.log(net.sigma_max)
        sigma = (low + (high - low) * rnd.rand([len(images)])).exp()
        self.drawn = {"sigma": sigma}
        noise = rnd.randn(images.shape)
        logits = net(images + sigma.reshape(-1, 1, 1, 1) * noise, sigma)
        self.accuracy = (logits.argmax(dim=1) == labels.argmax(dim=1)).float().mean().detach()
        return torch.nn.functional.cross_entropy(logits, labels, reduction="none")

    def report(self) -> dict[str, Any]:
        return {} if self.accuracy is None else {"accuracy": self.accuracy}


class ScoreLoss(Stateless):
    """Denoising score matching (Song et al. 2021, arXiv 2011.13456, Eq. 7), of SMLD and DDPM where levels are discrete.

    With x = y + sigma(t) n, all of them compare the noise in x with what the network takes it for,
    (x - D(x; sigma)) / sigma, which is -sigma times the score.

    Args:
        schedule: of the noise; of the network's preconditioning, too.
        reduce_mean: take the mean of the squares over an image, as VP presets do; otherwise half their sum (VE).
        likelihood_weighting: weight times by g(t)^2 / std(t)^2, which bounds the likelihood (Song et al. 2021,
            "Maximum Likelihood Training of Score-Based Diffusion Models", arXiv 2101.09258, Theorem 1).
        importance_sampling: draw times in proportion to that weight, in place of multiplying by it. The weight is
            d ln(sigma^2) / dt, so ln sigma is then uniform.
        dequantize: what black and white are, to spread 8-bit pixels evenly over the width of their level; None = not.

    Raises:
        UserError: a weighting of likelihoods with discrete levels.
    """

    def __init__(
        self,
        schedule: Schedule,
        reduce_mean: bool = True,
        likelihood_weighting: bool = False,
        importance_sampling: bool = False,
        dequantize: tuple[float, float] | None = None,
    ):
        self.dequantize = dequantize
        self.num_levels = schedule.num_scales if isinstance(schedule, (DiscreteVE, DiscreteVP)) else None
        if self.num_levels is not None and likelihood_weighting:
            raise UserError("likelihood weighting needs continuous times, not discrete levels")
        if importance_sampling and not likelihood_weighting:
            raise UserError("importance sampling of times needs likelihood weighting")
        self.schedule = schedule
        self.reduce_mean = reduce_mean
        self.likelihood_weighting = likelihood_weighting
        self.importance_sampling = importance_sampling
        self.ln_sigma_range = schedule.sigma(torch.tensor([EPS, 1.0], dtype=torch.float64)).log()

    def times(self, uniform: torch.Tensor) -> torch.Tensor:
        """Map draws from U[0, 1) to times, float64, elementwise: in [1e-5, 1), or one of the levels' times."""
        u = wide(uniform)
        if self.num_levels is not None:
            return (u * self.num_levels).floor() / (self.num_levels - 1)
        if self.importance_sampling:
            first, last = self.ln_sigma_range.tolist()
            return self.schedule.time((first + (last - first) * u).exp())
        return EPS + (1 - EPS) * u

    def __call__(
        self,
        net: Any,
        images: torch.Tensor,
        labels: torch.Tensor | None = None,
        *,
        t: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        rnd: Any = None,
        nimg: int = 0,
    ) -> torch.Tensor:
        """Loss per image, float32 [N]. The training objective is its sum over the batch divided by N.

        Args:
            net: the denoiser (`Preconditioned`), whose preconditioning is `Epsilon(schedule)`.
            images: clean images y, float32 [N, C, H, W].
            labels: conditions, as `net` takes them.
            t: times [N]; drawn if None.
            noise: unit-variance noise n shaped like `images`; drawn if None.
            rnd: what they are drawn from (`StackedRandomGenerator`); None = torch's own generator.
            nimg: not used; this loss is the same throughout training.
        """
        rand: Callable[..., torch.Tensor] = torch.rand if rnd is None else rnd.rand
        randn: Callable[..., torch.Tensor] = torch.randn if rnd is None else rnd.randn
        if t is None:
            t = self.times(rand([images.shape[0]], device=images.device))
        if noise is None:
            noise = randn(images.shape, device=images.device)
        if self.dequantize is not None:
            low, high = self.dequantize
            images = low + ((images - low) * 255 + (high - low) * rand(images.shape, device=images.device)) / 256
        sigma = self.schedule.sigma(t)
        self.drawn = {"sigma": sigma}
        column = sigma.float().reshape(-1, 1, 1, 1).to(images.device)
        F_x, c = net.raw(images + column * noise, sigma, labels)
        # (y - D) / sigma, without the difference of y and D: c_skip is 1.
        square = (noise + c.c_out / column * F_x).square().flatten(1)
        loss = square.mean(dim=1) if self.reduce_mean else square.sum(dim=1) / 2
        if self.importance_sampling:
            loss = loss * (2 * (self.ln_sigma_range[1] - self.ln_sigma_range[0])).item()
        elif self.likelihood_weighting:
            loss = loss * (self.schedule.diffusion(t) / self.schedule.std(t)).square().to(loss)
        return loss
