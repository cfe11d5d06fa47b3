"""Predictor-corrector samplers of the reverse SDE (Song et al. 2021, arXiv 2011.13456, Algorithms 1 to 5).

The solver has the signature of `ode.Solver`. Its state is u = s(t) x; its grid is `grids.sde_grid`. A denoiser gives
the score of u by (D(u / s; sigma) - u / s) / (s sigma^2), so any denoiser can be sampled on any schedule.

In step k at time t_k the corrector comes first, then the predictor. Step k belongs to level i = N - 1 - k of N, whose
time is tau = i / (N - 1). Both are linear in u, score and noise z, so a predictor is given by three numbers per step:

    u_mean = a u + b score,    u = u_mean + c z.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from dnnlib.errors import UserError
from training.config.samplers import PredictorCorrector
from training.samplers.grids import Grid
from training.samplers.ode import AfterUpdate, RandnLike, Solution
from training.schedules import VE, VP, Schedule, SubVP


class Update(NamedTuple):
    """u_mean = a u + b score and u = u_mean + c z: float64 [N], one number per step."""

    a: torch.Tensor
    b: torch.Tensor
    c: torch.Tensor


class Times(NamedTuple):
    """Times of the N steps, float64 [N]."""

    t: torch.Tensor
    tau: torch.Tensor  # of their levels

    @staticmethod
    def of(t: torch.Tensor) -> "Times":
        return Times(t, torch.linspace(1, 0, len(t), dtype=torch.float64) if len(t) > 1 else torch.zeros_like(t))


# ---------------------------------------------------------------------------------------------------------
# Predictors: (schedule, times, N, probability flow) -> Update


def euler_maruyama(schedule: Schedule, times: Times, N: int, flow: bool) -> Update:
    """A step of length 1 / N of the reverse SDE du = (f u - g^2 score) dt + g dw (Song et al., Eq. 6).

    The probability flow has half of the score and no noise (Eq. 13).
    """
    f, g = schedule.drift(times.t), schedule.diffusion(times.t)
    return _reverse(f / N, g / N**0.5, flow)


def reverse_diffusion(schedule: Schedule, times: Times, N: int, flow: bool) -> Update:
    """The step of SMLD or DDPM from level i - 1 to i, reversed (Song et al., Eq. 46 and Appendix E).

    Of other SDEs, it is that of Euler-Maruyama.
    """
    if isinstance(schedule, VE):
        sigma, below = _levels(schedule, times, N)
        return _reverse(torch.zeros_like(sigma), (sigma**2 - below**2).sqrt(), flow)
    if isinstance(schedule, VP) and not isinstance(schedule, SubVP):
        beta = _betas(schedule, times, N)
        return _reverse((1 - beta).sqrt() - 1, beta.sqrt(), flow)
    return euler_maruyama(schedule, times, N, flow)


def ancestral_sampling(schedule: Schedule, times: Times, N: int, flow: bool) -> Update:
    """Ancestral sampling of SMLD (Song et al., Eq. 47) and DDPM (Ho et al. 2020, Algorithm 2)."""
    if isinstance(schedule, VE):
        sigma, below = _levels(schedule, times, N)
        step = sigma**2 - below**2
        return Update(torch.ones_like(sigma), step, (below**2 * step / sigma**2).sqrt())
    beta = _betas(schedule, times, N)
    return Update((1 - beta).rsqrt(), beta * (1 - beta).rsqrt(), beta.sqrt())


def _reverse(F: torch.Tensor, G: torch.Tensor, flow: bool) -> Update:
    """The reverse of u + F u + G z."""
    return Update(1 - F, G**2 / (2 if flow else 1), G * (0 if flow else 1))


def _levels(schedule: VE, times: Times, N: int) -> tuple[torch.Tensor, torch.Tensor]:
    """sigma_i and sigma_(i - 1), which is 0 below the lowest level."""
    sigma = schedule.sigma(times.tau)
    below = schedule.sigma(times.tau - 1 / max(N - 1, 1))
    return sigma, below.where(times.tau > 0.5 / N, torch.zeros_like(below))


def _betas(schedule: Schedule, times: Times, N: int) -> torch.Tensor:
    """beta_i / N, which is -2 f / N: what the variance of the data loses in step i."""
    beta = -2 * schedule.drift(times.tau) / N
    if beta.max() >= 1:
        raise UserError(f"{N} steps are too few for this schedule (beta_max / N is {float(beta.max()):.3g}): use more")
    return beta


PREDICTORS: dict[str, Callable[[Schedule, Times, int, bool], Update] | None] = {
    "euler_maruyama": euler_maruyama,
    "reverse_diffusion": reverse_diffusion,
    "ancestral_sampling": ancestral_sampling,
    "none": None,
}

# ---------------------------------------------------------------------------------------------------------
# Correctors: (score, noise z, snr, alpha, std of the noise in u, norm) -> step size eta, a number or [N, 1, ...]


def langevin(
    score: torch.Tensor, z: torch.Tensor, snr: float, alpha: float, std: float, norm: str
) -> torch.Tensor | float:
    """Step size of Langevin dynamics: 2 alpha (snr |z| / |score|)^2 (Song et al., Algorithms 4 and 5).

    By 'batch', the norms are means over the batch. By 'sample', |score| is each sample's own and |z| is sqrt(D), so
    that a sample does not depend on the others; at D = 64, samples then lie about 1.5 % farther from the data.
    """
    norms = torch.linalg.vector_norm(score.flatten(1), dim=1)
    if norm == "batch":
        ratio = torch.linalg.vector_norm(z.flatten(1), dim=1).mean() / norms.mean()
    else:
        ratio = (score[0].numel() ** 0.5 / norms).reshape(-1, *[1] * (score.ndim - 1))
    return 2 * alpha * (snr * ratio) ** 2


def annealed_langevin(
    score: torch.Tensor, z: torch.Tensor, snr: float, alpha: float, std: float, norm: str
) -> torch.Tensor | float:
    """Step size of annealed Langevin dynamics: 2 alpha (snr std)^2 (Song & Ermon 2019, Algorithm 1)."""
    return 2 * alpha * (snr * std) ** 2


Corrector = Callable[[torch.Tensor, torch.Tensor, float, float, float, str], torch.Tensor | float]
CORRECTORS: dict[str, Corrector | None] = {"langevin": langevin, "ald": annealed_langevin, "none": None}

# ---------------------------------------------------------------------------------------------------------
# The solver


def score(D: Solution, u: torch.Tensor, s: float, sigma: torch.Tensor) -> torch.Tensor:
    """The score of the state u = s x at noise level sigma."""
    x = u / s
    return (D(x, sigma) - x) / (s * sigma.item() ** 2)


def predictor_corrector(
    D: Solution,
    x: torch.Tensor,
    grid: Grid,
    options: PredictorCorrector,
    *,
    randn_like: RandnLike,
    after_update: AfterUpdate,
) -> torch.Tensor:
    """The solution after all steps of a grid with times (`grids.sde_grid`), [N, ...] like `x`.

    `after_update` is called after each corrector and each predictor, with the noise level of their step, and once more
    at the end with level 0.

    Raises:
        UserError: more noise per step than a discrete schedule can have (too few steps), or ancestral sampling of
            sub-VP.
    """
    assert grid.times is not None and grid.schedule is not None
    schedule, N = grid.schedule, len(grid)
    if options.predictor == "ancestral_sampling" and isinstance(schedule, SubVP):
        raise UserError("there is no ancestral sampling for sub-VP: use reverse_diffusion or euler_maruyama")
    times = Times.of(grid.times[:-1])
    predict, correct = PREDICTORS[options.predictor], CORRECTORS[options.corrector]
    update = None if predict is None else predict(schedule, times, N, options.probability_flow)
    alphas = (1 - _betas(schedule, times, N)).tolist() if correct is not None else [1.0] * N
    scales, stds = schedule.scale(times.t).tolist(), schedule.std(times.t).tolist()

    u = u_mean = x * scales[0]
    for k, (sigma, _) in enumerate(grid.steps()):
        s = scales[k]
        if correct is not None:
            for _ in range(options.n_steps_each):
                gradient, z = score(D, u, s, sigma), randn_like(u)
                eta = correct(gradient, z, options.snr, alphas[k], stds[k], options.corrector_norm)
                u = u + eta * gradient + (2 * eta) ** 0.5 * z
        u = after_update(u / s, sigma, randn_like) * s
        u_mean = u
        if update is not None:
            a, b, c = (values[k].item() for values in update)
            u_mean = a * u + b * score(D, u, s, sigma)
            u = u_mean + c * randn_like(u)  # drawn even if c is 0: the probability flow consumes as many draws
        u = after_update(u / s, sigma, randn_like) * s
    if options.noise_removal and update is not None:
        u = u_mean
    return after_update(u, torch.zeros_like(grid.sigmas[-1]), randn_like)
