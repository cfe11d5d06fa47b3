"""A denoiser whose probability flow is known in closed form, and solvers run on it in float64."""

import math

import torch

from training.samplers.grids import Grid

MEAN, STD = 0.3, 0.5
FIRST, LAST = 80.0, 0.002


class Gaussian:
    """The exact denoiser of data distributed as N(MEAN, STD^2), which keeps the levels that it was asked for."""

    def __init__(self):
        self.sigmas = []

    def __call__(self, x, sigma):
        self.sigmas.append(sigma)
        sigma = sigma if sigma.ndim == 0 else sigma.to(x).reshape(-1, *[1] * (x.ndim - 1))
        return (STD**2 * x + sigma**2 * MEAN) / (STD**2 + sigma**2)


def start(n=16, seed=0):
    return FIRST * torch.randn(n, 1, 1, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact(x, first, last):
    """Where the probability flow takes x from one level to another."""
    return MEAN + (x - MEAN) * math.sqrt((STD**2 + last**2) / (STD**2 + first**2))


def even_grid(steps: int) -> Grid:
    """Evenly spaced in ln sigma."""
    return Grid(torch.linspace(math.log(FIRST), math.log(LAST), steps + 1, dtype=torch.float64).exp())


def unchanged(x, _sigma, _randn_like):
    return x


def run(solve, x, grid, options, D=None, after_update=unchanged):
    return solve(D or Gaussian(), x, grid, options, randn_like=torch.randn_like, after_update=after_update)
