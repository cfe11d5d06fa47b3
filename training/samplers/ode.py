"""Solvers of the probability flow dx/dsigma = (x - D(x; sigma)) / sigma: one function per algorithm.

All have the signature of `Solver`. The last step, to sigma = 0, gives D itself with every solver.
"""

import math
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import torch

from training.config.samplers import Churn
from training.samplers.coefficients import Multistep
from training.samplers.grids import Grid

Solution = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
RandnLike = Callable[[torch.Tensor], torch.Tensor]
AfterUpdate = Callable[[torch.Tensor, torch.Tensor, RandnLike], torch.Tensor]


class Solver(Protocol):
    """Follows a denoiser from the first noise level of a grid to the last.

    Args:
        D: (x, sigma) -> the clean image, in the dtype of x; sigma is a float64 scalar on the CPU.
        x: the solution at the first level, [N, ...].
        grid: the levels.
        options: the solver's own section of `SamplerConfig`; None where it has none.
        randn_like: source of the noise that is added.
        after_update: (x, sigma, randn_like) -> x, called with the solution at each further level.

    Returns:
        The solution at the last level, shaped like `x`.
    """

    def __call__(
        self,
        D: Solution,
        x: torch.Tensor,
        grid: Grid,
        options: Any,
        *,
        randn_like: RandnLike,
        after_update: AfterUpdate,
    ) -> torch.Tensor: ...


def euler(
    D: Solution, x: torch.Tensor, grid: Grid, options: Churn, *, randn_like: RandnLike, after_update: AfterUpdate
) -> torch.Tensor:
    """Euler's method, with churn: one evaluation per step."""
    for sigma, sigma_next in grid.steps():
        x, sigma_hat = churned(x, sigma, len(grid), options, randn_like)
        d = (x - D(x, sigma_hat)) / sigma_hat.item()
        x = x + (sigma_next - sigma_hat).item() * d
        x = after_update(x, sigma_next, randn_like)
    return x


def heun(
    D: Solution, x: torch.Tensor, grid: Grid, options: Churn, *, randn_like: RandnLike, after_update: AfterUpdate
) -> torch.Tensor:
    """Heun's method, with churn (EDM, Algorithms 1 and 2): two evaluations per step, one in the last."""
    for sigma, sigma_next in grid.steps():
        x_hat, sigma_hat = churned(x, sigma, len(grid), options, randn_like)
        h = (sigma_next - sigma_hat).item()
        d = (x_hat - D(x_hat, sigma_hat)) / sigma_hat.item()
        x = x_hat + h * d
        if sigma_next > 0:
            d_next = (x - D(x, sigma_next)) / sigma_next.item()
            x = x_hat + h * (d + d_next) / 2
        x = after_update(x, sigma_next, randn_like)
    return x


def churned(
    x: torch.Tensor, sigma: torch.Tensor, steps: int, options: Churn, randn_like: RandnLike
) -> tuple[torch.Tensor, torch.Tensor]:
    """The solution and its noise level after noise was added (EDM, Algorithm 2, lines 4 to 6)."""
    if options.S_churn == 0 or not options.S_min <= sigma <= options.S_max:
        return x, sigma
    gamma = min(options.S_churn / steps, math.sqrt(2) - 1)
    sigma_hat = sigma * (1 + gamma)
    return x + (sigma_hat**2 - sigma**2).sqrt().item() * options.S_noise * randn_like(x), sigma_hat


def multistep(method: Multistep) -> Solver:
    """The solver that continues earlier values of D as `method` says (DPM-Solver++ and its relatives)."""

    def solve(
        D: Solution, x: torch.Tensor, grid: Grid, options: None, *, randn_like: RandnLike, after_update: AfterUpdate
    ) -> torch.Tensor:
        known: deque[tuple[float, torch.Tensor]] = deque(maxlen=method.order)
        for sigma, sigma_next in grid.without_repeats().steps():
            D_x = D(x, sigma)
            if sigma_next > 0:
                known.appendleft((sigma.item(), D_x))
                coefficients = method.coefficients([level for level, _ in known], sigma_next.item())
                x = (sigma_next / sigma).item() * x
                for coefficient, (_, value) in zip(coefficients, known, strict=True):
                    x = x + coefficient * value
            else:
                x = x + (sigma_next - sigma).item() * ((x - D_x) / sigma.item())
            x = after_update(x, sigma_next, randn_like)
        return x

    return solve
