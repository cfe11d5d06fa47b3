"""Samplers: a solver, the grid that it visits, and its options."""

from collections.abc import Callable
from typing import Any

import torch

from training.config.samplers import SamplerConfig
from training.denoiser import Denoiser
from training.samplers import dpm_solver
from training.samplers.adaptive import rk45
from training.samplers.coefficients import MULTISTEP
from training.samplers.consistency import consistency
from training.samplers.euler_maruyama import euler_maruyama
from training.samplers.grids import Grid, grid_for
from training.samplers.ode import AfterUpdate, RandnLike, Solver, euler, heun, multistep
from training.samplers.predictor_corrector import predictor_corrector
from training.samplers.unipc import unipc

SOLVERS: dict[str, Solver] = {
    "heun": heun,
    "euler": euler,
    **{name: multistep(method) for name, method in MULTISTEP.items()},
    "dpm-single": dpm_solver.singlestep,
    "dpm-multi": dpm_solver.multistep,
    "dpm-adaptive": dpm_solver.adaptive,
    "unipc": unipc,
    "euler-maruyama": euler_maruyama,
    "pc": predictor_corrector,
    "rk45": rk45,
    "consistency": consistency,
}


def unchanged(x: torch.Tensor, _sigma: torch.Tensor, _randn_like: RandnLike) -> torch.Tensor:
    """The solution as it is: an `after_update` that does nothing."""
    return x


class Sampler:
    """Noise -> images, by following a denoiser.

    Args:
        config: the solver and its options.
        grid: the noise levels; None = those of `config` for a denoiser that is made for any.

    `nfe` is how often the last call evaluated the denoiser.
    """

    def __init__(self, config: SamplerConfig, grid: Grid | None = None):
        self.config = config
        self.grid = grid_for(config) if grid is None else grid
        self.nfe = 0

    def describe(self) -> dict[str, Any]:
        """What it does, as plain JSON values."""
        levels = self.grid.sigmas[self.grid.sigmas > 0].tolist()
        facts = self.config.describe()
        if self.config.kind.grid == "listed":
            facts["sigmas"] = levels
        facts |= {"sigma_min": float(f"{levels[-1]:.6g}"), "sigma_max": float(f"{levels[0]:.6g}")}
        return facts if self.grid.schedule is None else facts | {"schedule": repr(self.grid.schedule)}

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
            self.nfe += 1
            return denoiser(x.float(), sigma, cond).to(dtype)

        def watched(x: torch.Tensor, sigma: torch.Tensor, randn_like: RandnLike) -> torch.Tensor:
            x = after_update(x, sigma, randn_like)
            if on_step is not None:
                on_step(x)
            return x

        self.nfe = 0
        start = self.grid.sigmas[0].item() if self.grid.start is None else self.grid.start
        x = noise.to(dtype) * start
        if on_step is not None:
            on_step(x)
        solve = SOLVERS[self.config.solver]
        x = solve(D, x, self.grid, self.config.options, randn_like=randn_like, after_update=watched)
        return x if self.grid.end == 1 else x * self.grid.end
