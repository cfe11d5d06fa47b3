"""The variance-preserving schedules of U-ViT beside `schedules.VP`: the cosine one, and the steps of Stable Diffusion.

Of a variance-preserving schedule, s(t) says all: u = s x0 + sqrt(1 - s^2) n, so sigma = sqrt(1 / s^2 - 1), and the SDE
has the rate beta(t) = -2 d ln s / dt.
"""

import functools
import math
from abc import abstractmethod
from dataclasses import dataclass

import torch

from dnnlib.errors import UserError
from training.schedules import EPS, wide


class VariancePreserving:
    """What follows from ln s(t), its inverse and the rate beta(t)."""

    @abstractmethod
    def log_scale(self, t: torch.Tensor | float) -> torch.Tensor:
        """ln s(t), never above 0."""

    @abstractmethod
    def time_of_log_scale(self, log_scale: torch.Tensor) -> torch.Tensor:
        """The time t with ln s(t) = `log_scale`."""

    @abstractmethod
    def beta(self, t: torch.Tensor | float) -> torch.Tensor:
        """beta(t), the rate at which the data's variance fades."""

    @property
    def prior_std(self) -> float:
        return 1.0

    def sigma(self, t: torch.Tensor | float) -> torch.Tensor:
        return (-2 * self.log_scale(t)).expm1().sqrt()

    def scale(self, t: torch.Tensor | float) -> torch.Tensor:
        return self.log_scale(t).exp()

    def std(self, t: torch.Tensor | float) -> torch.Tensor:
        return (-(2 * self.log_scale(t)).expm1()).sqrt()

    def time(self, sigma: torch.Tensor | float) -> torch.Tensor:
        return self.time_of_log_scale(wide(sigma).square().log1p() / -2)

    def drift(self, t: torch.Tensor | float) -> torch.Tensor:
        return self.beta(t) / -2

    def diffusion(self, t: torch.Tensor | float) -> torch.Tensor:
        return self.beta(t).sqrt()


@dataclass(frozen=True)
class CosineVP(VariancePreserving):
    """The cosine schedule: s(t) = cos(theta(t)) / cos(theta(0)), theta(t) = (t + offset) / (1 + offset) pi / 2.

    Source: Nichol & Dhariwal 2021 (arXiv 2102.09672), Eq. 17. As s(1) = 0, sampling begins at `last_time`.

    Args:
        offset: keeps the first noise levels from being too small.
        last_time: the time of `sigma_max`.

    Raises:
        UserError: an offset that is not positive, or a last time that is not between 0 and 1.
    """

    offset: float = 0.008
    last_time: float = 0.9946

    def __post_init__(self):
        if not (0 < self.offset < math.inf and 0 < self.last_time < 1):
            raise UserError(
                f"a cosine schedule needs offset > 0 and 0 < last_time < 1, not {self.offset} and {self.last_time}"
            )

    @property
    def sigma_min(self) -> float:
        return float(self.sigma(EPS))

    @property
    def sigma_max(self) -> float:
        return float(self.sigma(self.last_time))

    def _theta(self, t: torch.Tensor | float) -> torch.Tensor:
        return (wide(t) + self.offset) / (1 + self.offset) * (math.pi / 2)

    def log_scale(self, t: torch.Tensor | float) -> torch.Tensor:
        # 1 - s^2 = sin(theta - theta_0) sin(theta + theta_0) / cos^2(theta_0), without a difference of equal numbers.
        theta, theta_0 = self._theta(t), self._theta(0.0)
        return (-(theta - theta_0).sin() * (theta + theta_0).sin() / theta_0.cos().square()).log1p() / 2

    def time_of_log_scale(self, log_scale: torch.Tensor) -> torch.Tensor:
        theta_0 = self._theta(0.0)
        sin_squared = theta_0.sin().square() - theta_0.cos().square() * (2 * log_scale).expm1()
        theta = torch.atan2(sin_squared.sqrt(), theta_0.cos() * log_scale.exp())
        return theta * ((1 + self.offset) / (math.pi / 2)) - self.offset

    def beta(self, t: torch.Tensor | float) -> torch.Tensor:
        return self._theta(t).tan() * (math.pi / (1 + self.offset))

    def label(self, t: torch.Tensor | float) -> torch.Tensor:
        return wide(t) * 999


@dataclass(frozen=True)
class InterpolatedVP(VariancePreserving):
    """The N steps of Stable Diffusion, with ln s(t) linear between them; labels are N t, so 1, ..., N at the steps.

    Step n is at t = n / N and has s^2 = (1 - beta_1) ... (1 - beta_n), where the roots of beta_n are evenly spaced
    (Rombach et al. 2022, arXiv 2112.10752); before the first step and after the last, the outer lines continue. Between
    the steps: Lu et al. 2022 (arXiv 2206.00927), Appendix D.

    Args:
        beta_min, beta_max: beta_1 and beta_N.
        num_scales: N.

    Raises:
        UserError: not 0 < beta_min <= beta_max < 1, or fewer than two steps.
    """

    beta_min: float = 0.00085
    beta_max: float = 0.012
    num_scales: int = 1000

    def __post_init__(self):
        if not 0 < self.beta_min <= self.beta_max < 1:
            raise UserError(
                f"InterpolatedVP needs 0 < beta_min <= beta_max < 1, not {self.beta_min} and {self.beta_max}"
            )
        if self.num_scales < 2:
            raise UserError(f"InterpolatedVP needs at least 2 steps (num_scales), not {self.num_scales}")

    @functools.cached_property
    def knots(self) -> torch.Tensor:
        """ln s of each step, float64 [N] on the CPU."""
        ends = self.beta_min**0.5, self.beta_max**0.5
        roots = torch.linspace(*ends, self.num_scales, dtype=torch.float64, device="cpu")
        return (-roots.square()).log1p().cumsum(0) / 2

    @property
    def sigma_min(self) -> float:
        return float(self.sigma(1 / self.num_scales))

    @property
    def sigma_max(self) -> float:
        return float(self.sigma(1.0))

    def training_times(self, uniform: torch.Tensor) -> torch.Tensor:
        """Times of steps, each as likely as the others, from draws in [0, 1)."""
        return ((wide(uniform) * self.num_scales).floor() + 1) / self.num_scales

    def _segment(self, t: torch.Tensor) -> torch.Tensor:
        """Number of the step, 1 to N - 1, at which the line begins that a time is on."""
        return (t * self.num_scales).floor().long().clamp(1, self.num_scales - 1)

    def log_scale(self, t: torch.Tensor | float) -> torch.Tensor:
        t = wide(t)
        knots, n = self.knots.to(t), self._segment(t)
        # The first line would pass 0 just after t = 0.
        return (knots[n - 1] + (knots[n] - knots[n - 1]) * (t * self.num_scales - n)).clamp(max=0)

    def time_of_log_scale(self, log_scale: torch.Tensor) -> torch.Tensor:
        knots = self.knots.to(log_scale)
        # Of steps that become smaller, the first that is not above.
        n = torch.bucketize(-log_scale, -knots).clamp(1, self.num_scales - 1)
        return (n + (log_scale - knots[n - 1]) / (knots[n] - knots[n - 1])) / self.num_scales

    def beta(self, t: torch.Tensor | float) -> torch.Tensor:
        t = wide(t)
        knots, n = self.knots.to(t), self._segment(t)
        return (knots[n - 1] - knots[n]) * (2 * self.num_scales)

    def label(self, t: torch.Tensor | float) -> torch.Tensor:
        return wide(t) * self.num_scales
