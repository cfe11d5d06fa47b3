"""The published doors: samplers as functions of plain arguments."""

import math
from collections.abc import Callable

import torch

from dnnlib.errors import UserError
from training.config.samplers import Churn, GridConfig, SamplerConfig
from training.denoiser import Denoiser
from training.guidance import GuidedDenoiser
from training.samplers.grids import Grid, grid_for
from training.samplers.ode import RandnLike
from training.samplers.sampler import Sampler


def ode_sampler(
    denoiser: Denoiser,
    noise: torch.Tensor,
    sigmas: torch.Tensor,
    labels: torch.Tensor | None = None,
    solver: str = SamplerConfig.solver,
    S_churn: float = Churn.S_churn,
    S_min: float = Churn.S_min,
    S_max: float = Churn.S_max,
    S_noise: float = Churn.S_noise,
    dtype: torch.dtype = torch.float32,
    randn_like: RandnLike = torch.randn_like,
    on_step: Callable[[torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Samples [N, ...] in `dtype`, by a solver of dx/dsigma = (x - D(x; sigma)) / sigma.

    Args:
        denoiser: D(x; sigma, labels).
        noise: unit-variance noise [N, ...].
        sigmas: decreasing noise levels [steps + 1] on the CPU, ending in 0.
        labels: class vectors [N, label_dim] or None.
        solver: 'heun' evaluates D twice per step except the last, the others of `config.samplers.SOLVERS` once.
        S_churn, S_min, S_max, S_noise: amount, range and scale of the noise added at each step (EDM, Algorithm 2).
        dtype: of the solution.
        randn_like: source of that added noise.
        on_step: called with the solution at every noise level, first to last.

    Raises:
        UserError: no such solver, or one that cannot follow a solution to which noise is added.
    """
    churn = Churn(S_churn=S_churn, S_min=S_min, S_max=S_max, S_noise=S_noise)
    sampler = Sampler(SamplerConfig(solver=solver, churn=churn), Grid(sigmas))
    return sampler(denoiser, noise, labels, randn_like=randn_like, on_step=on_step, dtype=dtype)


def edm_sampler(
    net: Denoiser,
    noise: torch.Tensor,
    labels: torch.Tensor | None = None,
    gnet: Denoiser | None = None,
    num_steps: int = GridConfig.num_steps,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    rho: float = GridConfig.rho,
    guidance: float = 1,
    S_churn: float = Churn.S_churn,
    S_min: float = Churn.S_min,
    S_max: float = Churn.S_max,
    S_noise: float = Churn.S_noise,
    dtype: torch.dtype = torch.float32,
    randn_like: RandnLike = torch.randn_like,
    guidance_interval: tuple[float, float] = (0.0, math.inf),
    solver: str = SamplerConfig.solver,
) -> torch.Tensor:
    """Samples [N, ...] by Heun's method, or another, on EDM's grid of noise levels, with optional guidance and churn.

    `config.samplers.GridConfig` describes `num_steps` to `rho`, `guidance.GuidedDenoiser` the guidance, and
    `ode_sampler` the rest. Heun's method evaluates the network 2 * num_steps - 1 times.

    Raises:
        UserError: `guidance` differs from 1 and there is no `gnet`; or as `ode_sampler`.
    """
    denoiser = net
    if guidance != 1:
        if gnet is None:
            raise UserError(f"guidance {guidance} needs a guiding network (gnet)")
        denoiser = GuidedDenoiser(net, gnet, guidance, guidance_interval)
    levels = GridConfig(num_steps=num_steps, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)
    churn = Churn(S_churn=S_churn, S_min=S_min, S_max=S_max, S_noise=S_noise)
    config = SamplerConfig(solver=solver, grid=levels, churn=churn)
    return Sampler(config, grid_for(config, net))(denoiser, noise, labels, randn_like=randn_like, dtype=dtype)
