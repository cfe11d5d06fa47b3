"""DPM-Solver and DPM-Solver++: solvers that know the linear part of the probability flow exactly.

Sources: Lu et al. 2022, "DPM-Solver" (arXiv 2206.00927), and "DPM-Solver++" (arXiv 2211.01095). With
lambda = -ln sigma, the flow of x is dx/dlambda = D - x = -sigma n, where n = (x - D) / sigma is the estimated noise.
A solver expands M, either D or n, around the start of a step of length h:

    x(lambda + h) = decay x(lambda) + w1 M + w2 h M' + w3 h^2 M'' + ...

The papers' formulas are for u = alpha x; in them, all alphas cancel. A grid may end in sigma = 0, where every solver
gives D.
"""

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch

from dnnlib.errors import RunError, UserError
from training.config.dpm_solver import AdaptiveDPMSolver, DPMSolver
from training.samplers.dpm_orders import singlestep_orders
from training.samplers.grids import Grid
from training.samplers.ode import AfterUpdate, RandnLike, Solution

Model = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (x, sigma) -> M


def model(D: Solution, prediction: str) -> Model:
    """M as a function of x and sigma: D ('data') or the estimated noise ('noise')."""

    def noise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return (x - D(x, sigma)) / per_sample(sigma, x)

    return D if prediction == "data" else noise


class Weights(NamedTuple):
    """Factors of the expansion, in the form that multiplies x."""

    decay: torch.Tensor
    w1: torch.Tensor
    w2: torch.Tensor
    w3: torch.Tensor


def step_weights(sigma: torch.Tensor, sigma_next: torch.Tensor, prediction: str, x: torch.Tensor) -> Weights:
    """The factors of a step of x from `sigma` to `sigma_next` > 0, one level for all samples or one for each.

    The integrals of e^((1 - theta) z) theta^(j - 1) / (j - 1)! over theta from 0 to 1 are phi_j(z), where z = -h for D
    and h for the noise.
    """
    h = (sigma / sigma_next).log()
    z = -h if prediction == "data" else h
    phi1 = z.expm1() / z
    phi2 = (phi1 - 1) / z
    phi3 = (phi2 - 1 / 2) / z
    decay, factor = (sigma_next / sigma, h) if prediction == "data" else (torch.ones_like(h), -sigma_next * h)
    return Weights(*(per_sample(w, x) for w in (decay, factor * phi1, factor * phi2, factor * phi3)))


def per_sample(value: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A number for each sample, [N], in the form that multiplies x; one for all samples as it is."""
    return value if value.ndim == 0 else value.to(x).reshape(-1, *[1] * (x.ndim - 1))


# ---------------------------------------------------------------------------------------------------------
# Singlestep


def singlestep(
    D: Solution, x: torch.Tensor, grid: Grid, options: DPMSolver, *, randn_like: RandnLike, after_update: AfterUpdate
) -> torch.Tensor:
    """Steps of orders 1 to 3 that forget what was before them: one evaluation per interval of the grid.

    A step of order k covers k intervals, whose inner levels are its intermediate ones (DPM-Solver, Algorithms 1 and 2;
    DPM-Solver++, Algorithm 1). `grids.with_inner_levels` puts them where DPM-Solver has them: of order 3 are only steps
    whose last inner level is at 2/3 of the way in lambda.

    Raises:
        UserError: as `singlestep_orders`.
    """
    M = model(D, options.prediction)
    sigmas = grid.without_repeats().sigmas
    to_zero = int(sigmas[-1] == 0)
    orders = singlestep_orders(len(sigmas) - 1 - to_zero, options.order, options.fixed_order)
    position = 0
    for order in orders:
        levels = sigmas[position : position + order + 1]
        x, _ = STEPS[order](M, x, levels, options)
        x = after_update(x, levels[-1], randn_like)
        position += order
    return after_update(D(x, sigmas[-2]), sigmas[-1], randn_like) if to_zero else x


def first_order(
    M: Model, x: torch.Tensor, levels: torch.Tensor, options: DPMSolver
) -> tuple[torch.Tensor, torch.Tensor]:
    """A step of order 1 between two levels (DDIM, with either kind of M), and x itself for one of order 0."""
    w = step_weights(levels[0], levels[1], options.prediction, x)
    return w.decay * x + w.w1 * M(x, levels[0]), x


def second_order(
    M: Model, x: torch.Tensor, levels: torch.Tensor, options: DPMSolver
) -> tuple[torch.Tensor, torch.Tensor]:
    """Steps of orders 2 and 1 from the first of three levels to the last."""
    (r1,) = fractions(levels, x)
    inner, w = (step_weights(levels[0], levels[i], options.prediction, x) for i in (1, 2))
    M0 = M(x, levels[0])
    M1 = M(inner.decay * x + inner.w1 * M0, levels[1])
    order1 = w.decay * x + w.w1 * M0
    return order1 + first_derivative_weight(w, options) / r1 * (M1 - M0), order1


def third_order(
    M: Model, x: torch.Tensor, levels: torch.Tensor, options: DPMSolver
) -> tuple[torch.Tensor, torch.Tensor]:
    """Steps of orders 3 and 2 from the first of four levels to the last."""
    r1, r2 = fractions(levels, x)
    inner1, inner2, w = (step_weights(levels[0], levels[i], options.prediction, x) for i in (1, 2, 3))
    M0 = M(x, levels[0])
    M1 = M(inner1.decay * x + inner1.w1 * M0, levels[1])
    slope1 = (M1 - M0) / r1
    M2 = M(inner2.decay * x + inner2.w1 * M0 + inner2.w2 * r2 * slope1, levels[2])
    slope2 = (M2 - M0) / r2
    order1 = w.decay * x + w.w1 * M0
    order2 = order1 + first_derivative_weight(w, options) * slope1
    if options.solver_type == "dpmsolver":
        return order1 + w.w2 * slope2, order2
    derivative = (r2 * slope1 - r1 * slope2) / (r2 - r1)
    return order1 + w.w2 * derivative + w.w3 * (2 / (r2 - r1)) * (slope2 - slope1), order2


STEPS = {1: first_order, 2: second_order, 3: third_order}


def first_derivative_weight(w: Weights, options: DPMSolver) -> torch.Tensor:
    """What multiplies h M' in steps of order 2: Taylor's weight, or the one of DPM-Solver, equal to it up to h^3."""
    return w.w1 / 2 if options.solver_type == "dpmsolver" else w.w2


def fractions(levels: torch.Tensor, x: torch.Tensor) -> list[torch.Tensor]:
    """Where the inner levels are between the first and the last in lambda, in the form that multiplies x."""
    lambdas = -levels.log()
    return [per_sample((inner - lambdas[0]) / (lambdas[-1] - lambdas[0]), x) for inner in lambdas[1:-1]]


# ---------------------------------------------------------------------------------------------------------
# Multistep


def multistep(
    D: Solution, x: torch.Tensor, grid: Grid, options: DPMSolver, *, randn_like: RandnLike, after_update: AfterUpdate
) -> torch.Tensor:
    """Steps that continue the last 1 to 3 values of M: one evaluation per step (DPM-Solver++, Algorithm 2).

    The first steps are of lower order. Order 3 is as published, where the term of the second derivative has half of its
    weight: in the limit it is of order 2, with a smaller error than order 2 itself. `coefficients.dpmpp_3m` is of
    order 3.
    """
    M = model(D, options.prediction)
    known: deque[tuple[torch.Tensor, torch.Tensor]] = deque(maxlen=options.order)
    for sigma, sigma_next in grid.without_repeats().steps():
        if sigma_next > 0:
            known.appendleft((sigma.log(), M(x, sigma)))
            x = _continued(x, known, step_weights(sigma, sigma_next, options.prediction, x), sigma_next, options)
        else:
            x = D(x, sigma)
        x = after_update(x, sigma_next, randn_like)
    return x


def _continued(
    x: torch.Tensor,
    known: deque[tuple[torch.Tensor, torch.Tensor]],
    w: Weights,
    sigma_next: torch.Tensor,
    options: DPMSolver,
) -> torch.Tensor:
    """The solution after a step, from ln sigma and M of the last levels, the newest first."""
    (log0, M0), *earlier = known
    h = log0 - sigma_next.log()
    x = w.decay * x + w.w1 * M0
    if not earlier:
        return x
    log1, M1 = earlier[0]
    r0 = (log1 - log0) / h
    d0 = (M0 - M1) / r0
    if len(earlier) == 1:
        return x + first_derivative_weight(w, options) * d0
    log2, M2 = earlier[1]
    r1 = (log2 - log1) / h
    d1 = (M1 - M2) / r1
    return x + w.w2 * (d0 + r0 / (r0 + r1) * (d0 - d1)) + w.w3 / (r0 + r1) * (d0 - d1)


# ---------------------------------------------------------------------------------------------------------
# Adaptive


def adaptive(
    D: Solution,
    x: torch.Tensor,
    grid: Grid,
    options: AdaptiveDPMSolver,
    *,
    randn_like: RandnLike,
    after_update: AfterUpdate,
) -> torch.Tensor:
    """Singlestep steps whose length follows from the difference of two orders (arXiv 2206.00927, Appendix C).

    Of the grid, only the ends matter. An attempt evaluates the denoiser `options.order` times. Each sample has steps of
    its own; with `common_step`, all have those of the largest error. Errors are those of u = x / sqrt(1 + sigma^2).

    Raises:
        UserError: the grid ends in sigma = 0.
        RunError: the denoiser gives NaN or infinity.
    """
    if grid.sigmas[-1] == 0:
        raise UserError("adaptive steps cannot end in sigma = 0: give a lowest noise level above it")
    M = model(D, options.prediction)
    steps = DPMSolver(order=options.order, prediction=options.prediction)
    inner = torch.arange(options.order + 1, dtype=torch.float64)[:, None] / options.order
    lambdas = (-grid.sigmas[0].log()).expand(len(x))
    end = -grid.sigmas[-1].log()
    h = torch.full_like(lambdas, options.first_step)
    previous = x * unit_scale(lambdas, x)
    while (moving := lambdas < end).any():
        # A sample that has arrived computes along, and its result is left out.
        last = moving & (h >= end - lambdas)
        h = torch.where(last, end - lambdas, torch.where(moving, h, options.first_step))
        arrival = torch.where(last, end, lambdas + h)
        higher, lower = STEPS[options.order](M, x, (-(lambdas + inner * h)).exp(), steps)
        lower, difference = (y * unit_scale(arrival, x) for y in (lower, higher - lower))
        tolerance = (options.rtol * torch.maximum(lower.abs(), previous.abs())).clamp(min=options.atol)
        error = (difference / tolerance).square().flatten(1).mean(1).sqrt().to(h)
        if not error[moving].isfinite().all():
            raise RunError("adaptive steps: the denoiser gives NaN or infinity")
        if options.common_step:
            error = error[moving].max().expand(len(error))
        accepted = moving & (error <= 1)
        chosen = per_sample(accepted, x) != 0
        x = torch.where(chosen, after_update(higher, (-arrival).exp(), randn_like), x)
        previous = torch.where(chosen, lower, previous)
        lambdas = torch.where(accepted, arrival, lambdas)
        h = options.safety * h * error.clamp(min=1e-12) ** (-1 / options.order)
    return x


def unit_scale(lambdas: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """1 / sqrt(1 + sigma^2), which brings x to the magnitude of noise or data."""
    return per_sample((1 + (-2 * lambdas).exp()).rsqrt(), x)
