"""Euler-Maruyama: the reverse-time SDE, and its probability flow, in the time of a schedule."""

import torch

from training.config.samplers import EulerMaruyama
from training.samplers.grids import Grid
from training.samplers.ode import AfterUpdate, RandnLike, Solution


def euler_maruyama(
    D: Solution,
    x: torch.Tensor,
    grid: Grid,
    options: EulerMaruyama,
    *,
    randn_like: RandnLike,
    after_update: AfterUpdate,
) -> torch.Tensor:
    """Euler's steps back in a schedule's time, one evaluation each; the grid has times (`grids.sde_grid`).

    With u = s(t) x and the score (D - x) / (s sigma^2), a step of length dt < 0 is (Song et al. 2021, arXiv 2011.13456,
    Eqs. 6 and 13)

        u <- u + (f u - g^2 score) dt + g sqrt(-dt) z,    for the probability flow    u <- u + (f u - g^2 score / 2) dt.

    All is taken at the beginning of the step. The last step adds no noise. Steps are those between the grid's times;
    those of `predictor_corrector`'s predictor are all of length 1 / N.
    """
    schedule = grid.schedule
    assert grid.times is not None and schedule is not None, "Euler-Maruyama needs a grid with times"
    for i, (sigma, sigma_next) in enumerate(grid.steps()):
        t, dt = grid.times[i], grid.times[i + 1] - grid.times[i]
        scale, f, g = schedule.scale(t), schedule.drift(t), schedule.diffusion(t)
        weight = g**2 * dt / (scale * sigma**2) / (1 if options.stochastic else 2)
        u = scale * (1 + f * dt) * x - weight * (D(x, sigma) - x)
        if options.stochastic and i < len(grid) - 1:
            u = u + g * (-dt).sqrt() * randn_like(x)
        x = after_update(u / schedule.scale(grid.times[i + 1]), sigma_next, randn_like)
    return x
