"""Grids: the noise levels that a sampler visits."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from dnnlib.errors import UserError
from training.config.dpm_solver import SPACINGS
from training.config.samplers import CONSISTENCY_LEVELS, SIGMA_MAX, SIGMA_MIN, GridConfig, SamplerConfig
from training.denoiser import noise_range, schedule_of, without_steps
from training.samplers.dpm_orders import singlestep_orders
from training.schedules import VE, VP, Schedule, SubVP

CLOSE = 1 + 1e-6  # noise levels that differ by less are the same


@dataclass(frozen=True)
class Grid:
    """The noise levels that a solver visits.

    Args:
        sigmas: float64 [steps + 1] on the CPU, decreasing.
        times: the schedule's times of these levels, float64 [steps + 1]; None = the levels are times.
        schedule: what the times mean, where there are any.
        start: where a solution begins: x = start * noise; None = the first level.
        end: what the result is multiplied by, for networks whose samples are of another scale.
    """

    sigmas: torch.Tensor
    times: torch.Tensor | None = None
    schedule: Schedule | None = None
    start: float | None = None
    end: float = 1.0

    def __len__(self) -> int:
        """Number of steps."""
        return len(self.sigmas) - 1

    def steps(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The levels that each step begins and ends at."""
        return zip(self.sigmas[:-1], self.sigmas[1:], strict=True)

    def without_repeats(self) -> "Grid":
        """The same levels, each one once: for solvers that divide by their distances."""
        kept = torch.cat([self.sigmas.new_ones(1, dtype=torch.bool), self.sigmas.diff() != 0])
        times = None if self.times is None else self.times[kept]
        return replace(self, sigmas=self.sigmas[kept], times=times)


def grid_for(config: SamplerConfig, denoiser: Any = None) -> Grid:
    """The noise levels that a sampler visits with a denoiser.

    Raises:
        UserError: the levels are not in order, or beyond those that the denoiser is made for.
    """
    if config.listed:
        return _listed_grid(config.grid.sigmas, denoiser)
    return _time_grid_for(config, denoiser) if config.in_time else _edm_grid_for(config, denoiser)


def _listed_grid(levels: Sequence[float] | None, denoiser: Any) -> Grid:
    """These levels, and 0 at the end; None = those of consistency sampling, as far as the denoiser is made for them."""
    if levels is None:
        levels = [min(sigma, noise_range(denoiser)[1]) for sigma in CONSISTENCY_LEVELS]
    for sigma in levels:
        _check_level("sigmas", sigma, denoiser)
    return Grid(torch.tensor([*levels, 0.0], dtype=torch.float64))


def _edm_grid_for(config: SamplerConfig, denoiser: Any) -> Grid:
    """Levels of EDM. Of solvers with inner levels, the steps are evaluations, the last of which is
    D at the end."""
    grid, (low, high) = config.grid, _levels_for(config.grid, denoiser)
    sigma_min, sigma_max = max(low, SIGMA_MIN) if grid.sigma_min is None else low, high
    if grid.sigma_max is None:
        sigma_max = min(high, SIGMA_MAX)
    if sigma_min > sigma_max:
        raise UserError(f"--sigma_min={sigma_min:g} is above --sigma_max={sigma_max:g}")
    if config.kind.grid != "inner":
        return Grid(edm_sigmas(grid.num_steps, sigma_min, sigma_max, grid.rho))
    orders = singlestep_orders(grid.num_steps - 1, config.dpm.order, config.dpm.fixed_order)
    sigmas = edm_sigmas(len(orders) + 1, sigma_min, sigma_max, grid.rho)
    inner = with_inner_levels(Grid(sigmas[:-1]), orders)
    return Grid(torch.cat([inner.sigmas, sigmas[-1:]]))


def _time_grid_for(config: SamplerConfig, denoiser: Any) -> Grid:
    """Levels of times of a schedule, from its first time to its last as far as the denoiser is made for them."""
    grid, kind = config.grid, config.kind.grid
    low, high = _levels_for(grid, denoiser)
    schedule = schedule_for(grid.schedule, denoiser, grid.sigma_min, grid.sigma_max)
    if kind != "times":
        schedule = without_steps(schedule)
    first = latest_time(schedule, high)
    last = float(schedule.time(low)) if low > 0 else 0.0
    if grid.sigma_min is None:
        last = max(last, last_time(schedule))
    if not 0 < last < first:
        raise UserError(f"noise levels from {high:g} to {low:g} leave no time of the schedule {grid.schedule}")
    if kind == "times":
        return sde_grid(schedule, grid.num_steps, last, first)
    if kind == "ends":
        return ode_grid(schedule, last, first)
    spacing = "time" if grid.spacing == "edm" else grid.spacing
    if kind != "inner" or spacing != "log-snr":
        # The inner levels of a step are among those that are evenly spaced, as in the published computation.
        return time_grid(schedule, spaced_times(schedule, spacing, grid.num_steps, first, last))
    orders = singlestep_orders(grid.num_steps, config.dpm.order, config.dpm.fixed_order)
    return with_inner_levels(time_grid(schedule, spaced_times(schedule, spacing, len(orders), first, last)), orders)


def _levels_for(config: GridConfig, denoiser: Any) -> tuple[float, float]:
    """The lowest and highest noise level that are asked for; where none is, those that the denoiser is made for."""
    low, high = noise_range(denoiser)
    asked = {"sigma_min": config.sigma_min, "sigma_max": config.sigma_max}
    for name, sigma in asked.items():
        if sigma is not None:
            _check_level(name, sigma, denoiser)
    return (low if config.sigma_min is None else config.sigma_min), (
        high if config.sigma_max is None else config.sigma_max
    )


def _check_level(name: str, sigma: float, denoiser: Any) -> None:
    low, high = noise_range(denoiser)
    if not low / CLOSE <= sigma <= high * CLOSE:
        raise UserError(f"--{name}={sigma:g} is beyond the noise levels of the network, {low:.4g} to {high:.4g}")


def latest_time(schedule: Schedule, sigma_max: float = math.inf) -> float:
    """Where the noise is strongest: 1, or the time of the highest noise level that the schedule or its user allows."""
    highest = min(sigma_max, schedule.sigma_max)
    return float(schedule.time(highest)) if float(schedule.sigma(1.0)) > highest * CLOSE else 1.0


def schedule_for(name: str, denoiser: Any, sigma_min: float | None = None, sigma_max: float | None = None) -> Schedule:
    """The schedule of a name in `config.samplers.SCHEDULES`, for a denoiser.

    Args:
        sigma_min, sigma_max: of VE; None = those of EDM, as far as the denoiser is made for them.
    """
    if name == "network":
        return schedule_of(denoiser)
    if name == "ve":
        low, high = noise_range(denoiser)
        return VE(sigma_min or max(low, SIGMA_MIN), sigma_max or min(high, SIGMA_MAX))
    return {"vp": VP, "subvp": SubVP}[name]()


def time_grid(schedule: Schedule, times: torch.Tensor) -> Grid:
    """The grid of a schedule's times, for samples u = s(t) x that begin as its prior and stay as they are at the end.

    Args:
        times: decreasing, float64 [steps + 1].
    """
    start = schedule.prior_std / float(schedule.scale(times[0]))
    return Grid(schedule.sigma(times), times, schedule, start, float(schedule.scale(times[-1])))


def spaced_times(schedule: Schedule, spacing: str, steps: int, first: float, last: float) -> torch.Tensor:
    """Decreasing times [steps + 1] from `first` to `last`, float64, as samplers of the DPM-Solver family space them.

    Args:
        spacing: 'time' = evenly in t, 'quadratic' = in the root of t, 'log-snr' = in ln(1 / sigma).

    Raises:
        UserError: another spacing, fewer than one step, or not 0 < last < first.
    """
    if spacing not in SPACINGS:
        raise UserError(f"unknown spacing {spacing!r} (known: {', '.join(SPACINGS)})")
    if steps < 1 or not 0 < last < first:
        raise UserError(
            f"{steps} steps from time {first} to {last}: it takes one or more, from a later time to an earlier"
        )
    if spacing == "log-snr":
        log_sigma = schedule.sigma(torch.tensor([first, last], dtype=torch.float64)).log()
        sigmas = torch.linspace(log_sigma[0], log_sigma[1], steps + 1, dtype=torch.float64).exp()
        return schedule.time(sigmas)
    power = 2 if spacing == "quadratic" else 1
    return torch.linspace(first ** (1 / power), last ** (1 / power), steps + 1, dtype=torch.float64) ** power


def with_inner_levels(grid: Grid, orders: Sequence[int]) -> Grid:
    """The grid with k - 1 levels inside each step of order k, evenly spaced in ln sigma.

    Args:
        orders: of each step.
    """
    assert len(orders) == len(grid), f"{len(orders)} orders for {len(grid)} steps"
    parts = [
        sigma * (sigma_next / sigma) ** (torch.arange(order, dtype=torch.float64) / order)
        for (sigma, sigma_next), order in zip(grid.steps(), orders, strict=True)
    ]
    return replace(grid, sigmas=torch.cat([*parts, grid.sigmas[-1:]]), times=None)


def edm_sigmas(
    num_steps: int = GridConfig.num_steps,
    sigma_min: float = SIGMA_MIN,
    sigma_max: float = SIGMA_MAX,
    rho: float = GridConfig.rho,
) -> torch.Tensor:
    """Noise levels of EDM (Karras et al. 2022, Eq. 5), where sigma(t) = t and s(t) = 1.

    Returns:
        float64 tensor [num_steps + 1] on the CPU, decreasing from `sigma_max` to `sigma_min`, then 0.

    Raises:
        UserError: fewer than one step, or not 0 < sigma_min <= sigma_max, or rho <= 0.
    """
    if num_steps < 1:
        raise UserError(f"num_steps must be at least 1, not {num_steps}")
    if not 0 < sigma_min <= sigma_max:
        raise UserError(f"sigma_min and sigma_max must satisfy 0 < {sigma_min} <= {sigma_max}")
    if rho <= 0:
        raise UserError(f"rho must be positive, not {rho}")
    i = torch.arange(num_steps, dtype=torch.float64)
    fraction = i / max(num_steps - 1, 1)
    start, end = i.new_tensor([sigma_max, sigma_min]) ** (1 / rho)
    sigmas = (start + fraction * (end - start)) ** rho
    if not sigmas.isfinite().all():
        raise UserError(f"rho={rho} and sigma_max={sigma_max} give no finite noise levels")
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def sde_grid(schedule: Schedule, num_steps: int, end_time: float | None = None, first_time: float = 1.0) -> Grid:
    """N evenly spaced times from `first_time` to `end_time`, and 0 at the end (Song et al. 2021, Appendix G).

    Args:
        schedule: what times mean.
        num_steps: N.
        end_time: of the last evaluation; None = `last_time(schedule)`.
        first_time: of the first evaluation.

    Raises:
        UserError: fewer than one step, or not 0 < end_time < 1.
    """
    if num_steps < 1:
        raise UserError(f"num_steps must be at least 1, not {num_steps}")
    end = _checked_time(last_time(schedule) if end_time is None else end_time)
    times = torch.linspace(first_time, end, num_steps, dtype=torch.float64)
    sigmas = torch.cat([schedule.sigma(times), times.new_zeros(1)])
    start = schedule.prior_std / float(schedule.scale(first_time))
    return Grid(sigmas, torch.cat([times, times.new_zeros(1)]), schedule, start)


def ode_grid(schedule: Schedule, end_time: float | None = None, first_time: float = 1.0) -> Grid:
    """The interval of times to `end_time`; the result is the state u = s(t) x there, as Song et al. return it.

    Args and errors are those of `sde_grid`.
    """
    end = _checked_time(last_time(schedule) if end_time is None else end_time)
    return time_grid(schedule, torch.tensor([first_time, end], dtype=torch.float64))


def last_time(schedule: Schedule) -> float:
    """Where sampling ends (Song et al. 2021, Appendix C): 1e-5 for VE; 1e-3 else, where scores are rough."""
    return 1e-5 if isinstance(schedule, VE) else 1e-3


def _checked_time(end_time: float) -> float:
    if not 0 < end_time < 1:
        raise UserError(f"the last time must lie between 0 and 1, not {end_time}")
    return end_time
