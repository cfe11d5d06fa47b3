"""Preconditioning: what turns a raw network F into the denoiser D(x; sigma) = c_skip x + c_out F(c_in x, c_noise)."""

from typing import NamedTuple, Protocol

import torch

from training.schedules import VE, Schedule

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Coefficients(NamedTuple):
    """Factors of D(x; sigma) = c_skip * x + c_out * F(c_in * x, c_noise), each shaped like sigma."""

    c_skip: torch.Tensor
    c_out: torch.Tensor
    c_in: torch.Tensor
    c_noise: torch.Tensor


class Preconditioning(Protocol):
    """Coefficients as a function of sigma, and the range of sigma that networks are trained for."""

    @property
    def sigma_min(self) -> float: ...
    @property
    def sigma_max(self) -> float: ...

    def __call__(self, sigma: torch.Tensor) -> Coefficients: ...


def edm_coefficients(sigma: torch.Tensor, sigma_data: float) -> Coefficients:
    """Preconditioning of EDM (Karras et al. 2022, Table 1): unit variance at the network's input and target."""
    total = sigma.square() + sigma_data**2
    return Coefficients(
        c_skip=sigma_data**2 / total,
        c_out=sigma * sigma_data / total.sqrt(),
        c_in=1 / total.sqrt(),
        c_noise=sigma.log() / 4,
    )


class Epsilon:
    """Preconditioning of networks that estimate the noise, or the score (Song et al. 2021; Karras et al. 2022).

    The network sees the state u = s(t) x of the schedule and the label of the time t at which the noise level is sigma:
    c_skip = 1, c_in = s(t(sigma)), c_noise = label(t(sigma)). Where it estimates the noise n (VP, sub-VP), c_out is
    -sigma; where it gives the score (D - x) / sigma^2 itself (VE), c_out is sigma^2.

    Args:
        schedule: of the noise that the network is trained on.
    """

    def __init__(self, schedule: Schedule):
        self.schedule = schedule
        self.sigma_min = schedule.sigma_min
        self.sigma_max = schedule.sigma_max

    def __call__(self, sigma: torch.Tensor) -> Coefficients:
        """Coefficients, shaped like `sigma` and in the type of the schedule (float64)."""
        t = self.schedule.time(sigma)
        sigma = sigma.to(t)
        return Coefficients(
            c_skip=torch.ones_like(t),
            c_out=sigma.square() if isinstance(self.schedule, VE) else -sigma,
            c_in=self.schedule.scale(t),
            c_noise=self.schedule.label(t),
        )


class DataPrediction:
    """Preconditioning of networks that estimate the clean image: D = F(s(t(sigma)) x, label(t(sigma))).

    Args:
        schedule: of the noise that the network is trained on.
    """

    def __init__(self, schedule: Schedule):
        self.schedule = schedule
        self.sigma_min = schedule.sigma_min
        self.sigma_max = schedule.sigma_max

    def __call__(self, sigma: torch.Tensor) -> Coefficients:
        """Coefficients, shaped like `sigma` and in the type of the schedule (float64)."""
        t = self.schedule.time(sigma)
        return Coefficients(
            c_skip=torch.zeros_like(t),
            c_out=torch.ones_like(t),
            c_in=self.schedule.scale(t),
            c_noise=self.schedule.label(t),
        )


class EDMOfSchedule:
    """Preconditioning of EDM, with the label of a schedule's time in place of ln(sigma) / 4.

    Args:
        schedule: of the noise; it says the labels and the range of sigma.
        sigma_data: standard deviation of the data.
    """

    def __init__(self, schedule: Schedule, sigma_data: float):
        self.schedule = schedule
        self.sigma_data = sigma_data
        self.sigma_min = schedule.sigma_min
        self.sigma_max = schedule.sigma_max

    def __call__(self, sigma: torch.Tensor) -> Coefficients:
        """Coefficients, shaped like `sigma` and in the type of the schedule (float64)."""
        t = self.schedule.time(sigma)
        return edm_coefficients(sigma.to(t), self.sigma_data)._replace(c_noise=self.schedule.label(t))

    def target(self, images: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """What F has to be for D to be the clean images: (y - c_skip x) / c_out of x = y + sigma n, in closed form."""
        return (sigma / self.sigma_data * images - self.sigma_data * noise) / (
            sigma.square() + self.sigma_data**2
        ).sqrt()


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """What a network of a precision ('fp32', 'bf16' or 'fp16') computes in on a device.

    Processors have no fast float16 arithmetic, so on a CPU 'fp16' computes in float32.
    """
    return torch.float32 if device.type == "cpu" and precision == "fp16" else PRECISIONS[precision]
