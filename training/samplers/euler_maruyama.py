"""Euler-Maruyama: the reverse-time SDE, and its probability flow, in the time of a schedule."""

import torch

from training.samplers.grids import Grid
from training.samplers.ode import AfterUpdate, RandnLike, Solution, Solver
from training.schedules import Schedule


def euler_maruyama(schedule: Schedule, stochastic: bool = True) -> Solver:
    """The solver that takes a schedule's SDE back in time with Euler's steps, one evaluation each.

    With u = s(t) x and the score (D - x) / (s sigma^2), a step of length dt < 0 is (Song et al. 2021, arXiv 2011.13456,
    Eqs. 6 and 13)

        u <- u + (f u - g^2 score) dt + g sqrt(-dt) z,    for the probability flow    u <- u + (f u - g^2 score / 2) dt.

    All is taken at the beginning of the step. The last step adds no noise.

    Args:
        schedule: whose times the grid has.
        stochastic: the SDE; otherwise the probability flow.
    """

    def solve(
        D: Solution, x: torch.Tensor, grid: Grid, options: None, *, randn_like: RandnLike, after_update: AfterUpdate
    ) -> torch.Tensor:
        assert grid.times is not None, "Euler-Maruyama needs a grid with times"
        for i, (sigma, sigma_next) in enumerate(grid.steps()):
            t, dt = grid.times[i], grid.times[i + 1] - grid.times[i]
            scale, f, g = schedule.scale(t), schedule.drift(t), schedule.diffusion(t)
            weight = g**2 * dt / (scale * sigma**2) / (1 if stochastic else 2)
            u = scale * (1 + f * dt) * x - weight * (D(x, sigma) - x)
            if stochastic and i < len(grid) - 1:
                u = u + g * (-dt).sqrt() * randn_like(x)
            x = after_update(u / schedule.scale(grid.times[i + 1]), sigma_next, randn_like)
        return x

    return solve
