"""Levels that dynamic programming finds: the least of all sums of measured errors, and nearer to the exact solution."""

import itertools

import pytest
import torch

from dnnlib.errors import UserError
from training.config.samplers import GridConfig, SamplerConfig
from training.samplers import Sampler
from training.samplers.coefficients import MULTISTEP
from training.samplers.grids import Grid, edm_sigmas
from training.samplers.ode import multistep
from training.samplers.schedule_search import ScheduleSearch, rms

LOW, HIGH = 0.002, 80.0


def mixture(x, sigma, _cond=None):
    """The exact denoiser of numbers that are -0.7 or 0.7, with standard deviation 0.1."""
    variance = 0.01 + sigma.double() ** 2
    side = torch.tanh(0.7 * x.double() / variance)
    return 0.7 * side + 0.01 / variance * (x.double() - 0.7 * side)


def noise(n, seed=0):
    return torch.randn(n, 1, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cost(search: ScheduleSearch, way: tuple[int, ...]) -> float:
    """The sum that the search makes small, of one way, with steps of the solver from exact values."""
    order = MULTISTEP[search.solver].order if search.solver in MULTISTEP else 1
    total = rms(search.denoised[way[-1]] - search.end) ** 2
    for i in range(1, len(way)):
        known = list(way[max(i - order, 0) : i])
        total += (step_error(search, known, way[i]) * search.growth[way[i]]) ** 2
    return total**0.5


def step_error(search: ScheduleSearch, known: list[int], end: int) -> float:
    """The error of one step of the sampler itself, whose earlier evaluations are exact."""
    if search.solver == "heun":
        levels = search.sigmas[[known[-1], end]]
        sampler = Sampler(SamplerConfig(solver="heun"), Grid(levels, start=1.0))
        return rms(sampler(mixture, search.x[known[-1]], dtype=torch.float64) - search.x[end])
    stored = {search.sigmas[k].item(): k for k in known}
    states = iter(known[1:])
    out = multistep(MULTISTEP[search.solver])(
        lambda _x, sigma: search.denoised[stored[sigma.item()]],
        search.x[known[0]],
        Grid(search.sigmas[[*known, end]]),
        None,
        randn_like=torch.randn_like,
        after_update=lambda x, sigma, _: search.x[next(states)] if sigma.item() in stored else x,
    )
    return rms(out - search.x[end])


@pytest.mark.parametrize("solver", ["sqrt-3m", "dpmpp-2m", "heun"])
def test_it_finds_the_least_of_all_sums(solver):
    search = ScheduleSearch(mixture, noise(8), solver, LOW, HIGH, candidates=9)
    found, expected = search.levels(5)
    ways = [(0, *rest) for rest in itertools.combinations(range(1, 9), 4)]
    best = min(ways, key=lambda way: cost(search, way))
    assert found == search.sigmas[list(best)].tolist()
    assert expected == pytest.approx(cost(search, best), rel=1e-3)


@pytest.mark.parametrize(("solver", "steps", "share"), [("sqrt-3m", 10, 0.7), ("heun", 6, 0.7), ("euler", 10, 0.9)])
def test_levels_are_better_than_those_of_edm(solver, steps, share):
    """On noise that the search has not seen."""
    levels, _ = ScheduleSearch(mixture, noise(24), solver, LOW, HIGH, candidates=20).levels(steps)
    assert len(levels) == steps and levels[0] == HIGH and levels == sorted(levels, reverse=True)
    config, unseen = SamplerConfig(solver=solver), noise(200, seed=1)
    exact = Sampler(SamplerConfig(solver="sqrt-3m", grid=GridConfig(num_steps=400)))(
        mixture, unseen, dtype=torch.float64
    )
    found, edm = (
        rms(Sampler(config, Grid(torch.cat([sigmas, torch.zeros(1)])))(mixture, unseen, dtype=torch.float64) - exact)
        for sigmas in (torch.tensor(levels, dtype=torch.float64), edm_sigmas(steps)[:-1])
    )
    assert found < share * edm


def test_growth_is_that_of_the_flow():
    """The flow of normal data takes an error at sigma to one of STD / sqrt(STD^2 + sigma^2) times its size."""
    std = 0.5
    search = ScheduleSearch(
        lambda x, sigma: std**2 / (std**2 + sigma**2) * x, noise(4), "sqrt-3m", LOW, HIGH, candidates=30
    )
    exact = std / (std**2 + search.sigmas**2).sqrt()
    assert search.growth[1:] == pytest.approx(exact[1:].numpy(), rel=0.1)


def test_impossible_searches():
    with pytest.raises(UserError, match="--sampler=rk45: levels are found for heun, euler"):
        ScheduleSearch(mixture, noise(2), "rk45", LOW, HIGH)
    with pytest.raises(UserError, match="--steps=9: the levels are chosen from 8"):
        ScheduleSearch(mixture, noise(2), "euler", LOW, HIGH, candidates=8).levels(9)
