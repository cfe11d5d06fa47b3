"""Noise schedules: how much of an image is left, and how much noise is in it, at each time t of a diffusion.

Source: Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", ICLR 2021
(arXiv 2011.13456), Section 3.4 and Appendix B and C; the split into s(t) and sigma(t) is that of Karras et al. 2022
(arXiv 2206.00364), Table 1.

The SDE is du = f(t) u dt + g(t) dw with t from 0 (data) to 1 (noise), and its state is u = s(t) (x0 + sigma(t) n) with
unit-variance noise n. Denoisers work on x = u / s(t), whose noise level is sigma(t). All functions are elementwise,
take tensors or numbers, and compute in float64 (float32 on Apple's MPS, which has nothing wider); where a small number
is the difference of large ones they use expm1 and log1p.
"""

import functools
import math
from dataclasses import dataclass
from typing import Protocol

import torch

from dnnlib.errors import UserError

EPS = 1e-5  # the smallest time seen in training (Song et al., Appendix C): the score of clean data may be infinite


class Schedule(Protocol):
    """s(t), sigma(t) and the inverse of the latter, the label that a network gets, and the SDE.

    `sigma_min` and `sigma_max` bound the noise levels that networks are trained for; `prior_std` is the standard
    deviation of the normal distribution that stands for u at t = 1.
    """

    @property
    def sigma_min(self) -> float: ...
    @property
    def sigma_max(self) -> float: ...
    @property
    def prior_std(self) -> float: ...

    def sigma(self, t: torch.Tensor | float) -> torch.Tensor:
        """Noise level of x = u / s(t)."""
        ...

    def scale(self, t: torch.Tensor | float) -> torch.Tensor:
        """s(t), the factor of the data in u."""
        ...

    def std(self, t: torch.Tensor | float) -> torch.Tensor:
        """Standard deviation of the noise in u, s(t) sigma(t)."""
        ...

    def time(self, sigma: torch.Tensor | float) -> torch.Tensor:
        """The time t at which the noise level is `sigma`."""
        ...

    def label(self, t: torch.Tensor | float) -> torch.Tensor:
        """What a network is given to know the time."""
        ...

    def drift(self, t: torch.Tensor | float) -> torch.Tensor:
        """f(t) of the SDE."""
        ...

    def diffusion(self, t: torch.Tensor | float) -> torch.Tensor:
        """g(t) of the SDE."""
        ...


def wide(value: torch.Tensor | float) -> torch.Tensor:
    """The value as a tensor of the widest floating-point type of its device."""
    if not isinstance(value, torch.Tensor):
        return torch.tensor(value, dtype=torch.float64, device="cpu")
    return value.to(torch.float32 if value.device.type == "mps" else torch.float64)


@dataclass(frozen=True)
class VE:
    """Variance exploding: noise is added to data that stays as it is (Song et al., Eqs. 30-31).

    Networks get the noise level itself as their label.

    Args:
        sigma_min, sigma_max: noise levels at t = 0 and t = 1, between which ln sigma is linear in t.

    Raises:
        UserError: not 0 < sigma_min < sigma_max.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def __post_init__(self):
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise UserError(f"VE needs 0 < sigma_min < sigma_max, not {self.sigma_min} and {self.sigma_max}")

    @property
    def prior_std(self) -> float:
        return self.sigma_max

    @property
    def continuous(self) -> "VE":
        """The same SDE without levels."""
        return VE(self.sigma_min, self.sigma_max)

    def sigma(self, t: torch.Tensor | float) -> torch.Tensor:
        return self.sigma_min * (wide(t) * self._log_ratio).exp()

    def scale(self, t: torch.Tensor | float) -> torch.Tensor:
        return torch.ones_like(wide(t))

    def std(self, t: torch.Tensor | float) -> torch.Tensor:
        return self.sigma(t)

    def time(self, sigma: torch.Tensor | float) -> torch.Tensor:
        return (wide(sigma) / self.sigma_min).log() / self._log_ratio

    def label(self, t: torch.Tensor | float) -> torch.Tensor:
        return self.sigma(t)

    def drift(self, t: torch.Tensor | float) -> torch.Tensor:
        return torch.zeros_like(wide(t))

    def diffusion(self, t: torch.Tensor | float) -> torch.Tensor:
        return self.sigma(t) * math.sqrt(2 * self._log_ratio)

    @property
    def _log_ratio(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)


@dataclass(frozen=True)
class VP:
    """Variance preserving: the data fades as noise is added (Song et al., Eqs. 32-33); DDPM in continuous time.

    With beta(t) = beta_min + t (beta_max - beta_min) and its integral B(t): s = e^(-B/2), sigma = sqrt(e^B - 1).

    Args:
        beta_min, beta_max: rates at t = 0 and t = 1.

    Raises:
        UserError: not 0 <= beta_min <= beta_max, or beta_max = 0.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self):
        if not (0 <= self.beta_min <= self.beta_max < math.inf and self.beta_max > 0):
            raise UserError(
                f"a VP schedule needs 0 <= beta_min <= beta_max > 0, not {self.beta_min} and {self.beta_max}"
            )

    @property
    def sigma_min(self) -> float:
        return float(self.sigma(EPS))

    @property
    def sigma_max(self) -> float:
        return float(self.sigma(1.0))

    @property
    def prior_std(self) -> float:
        return 1.0

    @property
    def continuous(self) -> "VP":
        """The same SDE without steps."""
        return VP(self.beta_min, self.beta_max)

    def beta(self, t: torch.Tensor | float) -> torch.Tensor:
        """beta(t), the rate at which the data's variance fades."""
        return self.beta_min + wide(t) * (self.beta_max - self.beta_min)

    def integral(self, t: torch.Tensor | float) -> torch.Tensor:
        """B(t), the integral of beta from 0 to t."""
        t = wide(t)
        return t * (self.beta_min + t * ((self.beta_max - self.beta_min) / 2))

    def sigma(self, t: torch.Tensor | float) -> torch.Tensor:
        return self.integral(t).expm1().sqrt()

    def scale(self, t: torch.Tensor | float) -> torch.Tensor:
        return (-self.integral(t) / 2).exp()

    def std(self, t: torch.Tensor | float) -> torch.Tensor:
        return (-(-self.integral(t)).expm1()).sqrt()

    def time(self, sigma: torch.Tensor | float) -> torch.Tensor:
        return self.time_of_integral(wide(sigma).square().log1p())

    def time_of_integral(self, B: torch.Tensor) -> torch.Tensor:
        """The time t with B(t) = `B`: the root of a quadratic, without a difference of nearly equal numbers."""
        root = (self.beta_min**2 + 2 * (self.beta_max - self.beta_min) * B).sqrt()
        return torch.where(B > 0, 2 * B / (self.beta_min + root), torch.zeros_like(B))

    def label(self, t: torch.Tensor | float) -> torch.Tensor:
        return wide(t) * 999

    def drift(self, t: torch.Tensor | float) -> torch.Tensor:
        return self.beta(t) / -2

    def diffusion(self, t: torch.Tensor | float) -> torch.Tensor:
        return self.beta(t).sqrt()


@dataclass(frozen=True)
class SubVP(VP):
    """Sub-VP: the drift of VP with less noise, sigma = 2 sinh(B/2) (Song et al., Eq. 14 and Eq. 34).

    Args:
        beta_min, beta_max: as of VP.
    """

    @property
    def continuous(self) -> "SubVP":
        return self

    def sigma(self, t: torch.Tensor | float) -> torch.Tensor:
        return 2 * (self.integral(t) / 2).sinh()

    def std(self, t: torch.Tensor | float) -> torch.Tensor:
        return -(-self.integral(t)).expm1()

    def time(self, sigma: torch.Tensor | float) -> torch.Tensor:
        return self.time_of_integral(2 * (wide(sigma) / 2).asinh())

    def diffusion(self, t: torch.Tensor | float) -> torch.Tensor:
        return (self.beta(t) * -(-2 * self.integral(t)).expm1()).sqrt()


def _check_levels(name: str, num_scales: int) -> None:
    if num_scales < 2:
        raise UserError(f"{name} needs at least 2 noise levels (num_scales), not {num_scales}")


@dataclass(frozen=True)
class DiscreteVE(VE):
    """VE for networks trained at N noise levels (SMLD); its labels number them, 0 being the largest.

    Levels are evenly spaced in ln sigma, so level i (counted from the smallest) is at t = i / (N - 1), and rounding the
    time takes the nearest. The SDE is that of VE.

    Args:
        sigma_min, sigma_max: the smallest and the largest level.
        num_scales: N.

    Raises:
        UserError: as VE, or fewer than two levels.
    """

    num_scales: int = 1000

    def __post_init__(self):
        super().__post_init__()
        _check_levels("DiscreteVE", self.num_scales)

    def label(self, t: torch.Tensor | float) -> torch.Tensor:
        return ((1 - wide(t)) * (self.num_scales - 1)).round()


@dataclass(frozen=True)
class DiscreteVP(VP):
    """VP for networks trained at the N steps of DDPM (Ho et al. 2020, arXiv 2006.11239); labels are times t (N - 1).

    Step j has beta_j / N between beta_min / N and beta_max / N and alpha-bar_j, the product of 1 - beta up to there:
    s = sqrt(alpha-bar), sigma = sqrt((1 - alpha-bar) / alpha-bar). A time belongs to the step below it, so s(t) and
    sigma(t) are staircases; their SDE, and `std`, are those of VP.

    Args:
        beta_min, beta_max: as of VP.
        num_scales: N.
        first_time: the time that stands for step 0, where `time` puts the steps evenly from it to 1. The published
            samplers end at t = 1e-3 and let labels be fractions there; 0 gives whole labels, as in training.

    Raises:
        UserError: as VP, fewer than two steps, or beta_max / N of 1 or more.
    """

    num_scales: int = 1000
    first_time: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        _check_levels("DiscreteVP", self.num_scales)
        if self.beta_max >= self.num_scales:
            raise UserError(
                f"DiscreteVP: beta_max / num_scales = {self.beta_max:g} / {self.num_scales} must be less than 1: "
                f"use more steps"
            )

    @functools.cached_property
    def log_alpha_bar(self) -> torch.Tensor:
        """ln alpha-bar of each step, float64 [N] on the CPU."""
        betas = torch.linspace(self.beta_min, self.beta_max, self.num_scales, dtype=torch.float64, device="cpu")
        betas = betas / self.num_scales
        return (-betas).log1p().cumsum(0)

    @property
    def sigma_min(self) -> float:
        return float(self.sigma(0.0))

    def _of_step(self, t: torch.Tensor | float) -> torch.Tensor:
        """ln alpha-bar of the step that a time belongs to."""
        t = wide(t)
        # A time that stands for a step may have been rounded down to just below it.
        step = (t * (self.num_scales - 1) + 1e-4).floor().long().clamp(0, self.num_scales - 1)
        return self.log_alpha_bar.to(t)[step]

    def sigma(self, t: torch.Tensor | float) -> torch.Tensor:
        return (-self._of_step(t)).expm1().sqrt()

    def scale(self, t: torch.Tensor | float) -> torch.Tensor:
        return (self._of_step(t) / 2).exp()

    def time(self, sigma: torch.Tensor | float) -> torch.Tensor:
        """The time of the step whose noise level is nearest in ln sigma."""
        sigma = wide(sigma)
        levels = (-self.log_alpha_bar.to(sigma)).expm1().log() / 2
        step = torch.bucketize(sigma.log(), (levels[1:] + levels[:-1]) / 2)
        return self.first_time + (1 - self.first_time) * step.to(sigma.dtype) / (self.num_scales - 1)

    def label(self, t: torch.Tensor | float) -> torch.Tensor:
        return wide(t) * (self.num_scales - 1)
