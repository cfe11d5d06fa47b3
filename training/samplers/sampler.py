"""Samplers: a solver, the grid that it visits, and its options."""

from collections.abc import Callable

import torch

from training.config.generation import SamplerConfig
from training.denoiser import Denoiser
from training.samplers.coefficients import MULTISTEP
from training.samplers.grids import Grid, edm_grid
from training.samplers.ode import AfterUpdate, RandnLike, Solver, euler, heun, multistep

SOLVERS: dict[str, Solver] = {
    "heun": heun,
    "euler": euler,
    **{name: multistep(method) for name, method in MULTISTEP.items()},
}


def unchanged(x: torch.Tensor, _sigma: torch.Tensor, _randn_like: RandnLike) -> torch.Tensor:
    """The solution as it is: an `after_update` that does nothing."""
    return x


class Sampler:
    """Noise -> images, by following a denoiser.

    Args:
        config: the solver and its options.
        grid: the noise levels; None = those of `config`.
    """

    def __init__(self, config: SamplerConfig, grid: Grid | None = None):
        self.config = config
        self.grid = edm_grid(config.grid) if grid is None else grid

    def __call__(
        self,
        denoiser: Denoiser,
        noise: torch.Tensor,
        cond: torch.Tensor | None = None,
        *,
        randn_like: RandnLike = torch.randn_like,
        after_update: AfterUpdate = unchanged,
        on_step: Callable[[torch.Tensor], None] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor:
        """Samples [N, ...] in `dtype`.

        Args:
            denoiser: D(x; sigma, cond), given float32.
            noise: unit-variance noise [N, ...].
            cond: the condition of each sample, or None.
            randn_like: source of the noise that solvers add.
            after_update: (x, sigma, randn_like) -> x, called with the solution at every level after the first.
            on_step: called with the solution at every level, first to last.
            dtype: of the solution.
        """

        def D(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            return denoiser(x.float(), sigma, cond).to(dtype)

        def watched(x: torch.Tensor, sigma: torch.Tensor, randn_like: RandnLike) -> torch.Tensor:
            x = after_update(x, sigma, randn_like)
            if on_step is not None:
                on_step(x)
            return x

        start = self.grid.sigmas[0].item() if self.grid.start is None else self.grid.start
        x = noise.to(dtype) * start
        if on_step is not None:
            on_step(x)
        solve = SOLVERS[self.config.solver]
        x = solve(D, x, self.grid, self.config.options, randn_like=randn_like, after_update=watched)
        return x if self.grid.end == 1 else x * self.grid.end
