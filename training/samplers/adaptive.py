"""Runge-Kutta's method of order 5 with adaptive steps, on the device, and the probability flow solved by it.

Source: Dormand & Prince 1980, "A family of embedded Runge-Kutta formulae", and Hairer, Norsett & Wanner, "Solving
Ordinary Differential Equations I", Section II.4, for the choice of steps. Every sample has steps of its own, so that it
does not depend on its batch; the common error norm of Song et al. 2021 (arXiv 2011.13456, Appendix D.4), whose batch
is one vector for SciPy's RK45, is an option.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from dnnlib.errors import RunError, UserError
from training.config.samplers import RungeKutta
from training.samplers.grids import Grid, last_time, latest_time
from training.samplers.ode import AfterUpdate, RandnLike, Solution
from training.samplers.predictor_corrector import Times, reverse_diffusion, score
from training.schedules import Schedule, wide

# Dormand & Prince's pair: stage i is at t + C_i h and takes the stages before it with weights A_i. The last row of A is
# the solution of order 5, whose derivative is the first stage of the next step; E are its differences from order 4.
C = (0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1)
A = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
E = (71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
EXPONENT = -1 / 5  # of the error, in the choice of steps
SAFETY, MIN_FACTOR, MAX_FACTOR = 0.9, 0.2, 10.0

Derivative = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class ODEResult(NamedTuple):
    """The solution [N, D], and how often the derivative was evaluated: in all, and as far as each sample needed it."""

    y: torch.Tensor
    nfe: int
    evaluations: torch.Tensor  # int64 [N]


def integrate(
    f: Derivative,
    y: torch.Tensor,
    t0: float,
    t1: float,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    common_norm: bool = False,
    after_step: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> ODEResult:
    """The solution at t1 of dy/dt = f(t, y), known at t0.

    Args:
        f: (t [N], y [N, D]) -> [N, D].
        y: the solution at t0, [N, D]; its type is that of the arithmetic.
        t0, t1: the interval, in either direction.
        rtol, atol: a step is accepted when the mean square of error / (atol + rtol |y|) is at most 1.
        common_norm: take that mean over the batch, so that all have the same steps.
        after_step: (t, y) -> y, called after accepted steps; what it changes is where the next step begins.

    Raises:
        UserError: tolerances that are not positive.
        RunError: no step is small enough, as where f is not finite.
    """
    if not (rtol > 0 and atol > 0):
        raise UserError(f"tolerances must be positive, not {rtol} and {atol}")
    direction = 1.0 if t1 > t0 else -1.0
    t = torch.full([len(y)], t0, dtype=y.dtype, device=y.device)
    shortest = 10 * torch.finfo(y.dtype).eps * max(abs(t0), abs(t1))
    norm = _Norm(rtol, atol, common_norm)
    k_first = f(t, y)
    step = _first_step(f, t, y, k_first, direction, abs(t1 - t0), norm)
    nfe, rejected = 2, torch.zeros_like(t, dtype=torch.bool)
    evaluations = torch.full_like(t, nfe, dtype=torch.int64)
    while True:
        remaining = (t1 - t).abs()
        if not (remaining > 0).any():
            return ODEResult(y, nfe, evaluations)
        if ((step < shortest) & (step < remaining)).any():
            raise RunError(f"no step of the ODE solver is small enough near t = {float(t[step.argmin()]):.6g}")
        ends = step >= remaining
        h = torch.where(ends, t1 - t, direction * step)  # 0 where the end is reached
        t_next = torch.where(ends, t1, t + h)
        stages = [k_first]
        for c, weights in zip(C[1:-1], A[1:-1], strict=True):
            stages.append(f(t + c * h, y + _weighted(stages, weights, h)))
        y_next = y + _weighted(stages, A[-1], h)
        stages.append(f(t_next, y_next))
        nfe += 6
        evaluations += 6 * (remaining > 0)
        error = norm(_weighted(stages, E, h), torch.maximum(y.abs(), y_next.abs()))
        accepted = error < 1
        y = torch.where(accepted[:, None], y_next, y)
        k_first = torch.where(accepted[:, None], stages[-1], k_first)
        t = torch.where(accepted, t_next, t)
        if after_step is not None:
            changed = after_step(t, y)
            if changed is not y:
                y = torch.where(accepted[:, None], changed, y)
                k_first = f(t, y)
                nfe += 1
                evaluations += 1
        # Where a step has just been rejected, the next one must not grow.
        factor = (SAFETY * error**EXPONENT).nan_to_num(MIN_FACTOR).clamp(MIN_FACTOR, MAX_FACTOR)
        factor = torch.where(accepted & rejected, factor.clamp(max=1), factor)
        step = torch.where(ends & accepted, step, h.abs() * factor)
        rejected = ~accepted


class _Norm:
    """Root mean square of a vector relative to its tolerance, [N, D] -> [N]."""

    def __init__(self, rtol: float, atol: float, common: bool):
        self.rtol, self.atol, self.common = rtol, atol, common

    def __call__(self, vector: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
        square = (vector / (self.atol + self.rtol * size)).square().mean(dim=1)
        return (square.mean().expand_as(square) if self.common else square).sqrt()


def _weighted(stages: list[torch.Tensor], weights: tuple[float, ...], h: torch.Tensor) -> torch.Tensor:
    """h times the weighted sum of derivatives."""
    total = torch.zeros_like(stages[0])
    for k, weight in zip(stages, weights, strict=True):
        if weight != 0:
            total.add_(k, alpha=weight)
    return total.mul_(h[:, None])


def _first_step(
    f: Derivative,
    t: torch.Tensor,
    y: torch.Tensor,
    k: torch.Tensor,
    direction: float,
    length: float,
    norm: _Norm,
) -> torch.Tensor:
    """Length of the first step of each sample, from the sizes of y and of its first two derivatives, [N]."""
    size = y.abs()
    d0, d1 = norm(y, size), norm(k, size)
    h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), torch.full_like(d0, 1e-6), 0.01 * d0 / d1).clamp(max=length)
    k_next = f(t + direction * h0, y + (direction * h0)[:, None] * k)
    d2 = norm(k_next - k, size) / h0
    largest = torch.maximum(d1, d2)
    h1 = torch.where(largest <= 1e-15, (h0 * 1e-3).clamp(min=1e-6), (0.01 / largest) ** -EXPONENT)
    return torch.minimum(100 * h0, h1).clamp(max=length)


# ---------------------------------------------------------------------------------------------------------
# The probability flow


class Flow(NamedTuple):
    """The probability flow du/dt = f u - (D(x; sigma) - x) rate at times t, where x = u / s: columns [N, 1]."""

    f: torch.Tensor
    rate: torch.Tensor  # g^2 / (2 s sigma^2)
    s: torch.Tensor
    sigma: torch.Tensor

    @staticmethod
    def of(schedule: Schedule, t: torch.Tensor) -> "Flow":
        """Of a schedule, at times [N], in their type."""
        s, sigma = schedule.scale(t), schedule.sigma(t)
        rate = schedule.diffusion(t).square() / (2 * s * sigma.square())
        return Flow(*(value.to(t)[:, None] for value in (schedule.drift(t), rate, s, sigma)))


def encode_by_flow(D: Solution, x: torch.Tensor, schedule: Schedule, options: RungeKutta) -> torch.Tensor:
    """The noise of unit variance that the probability flow carries clean images [N, ...] to, float32.

    `rk45` on `grids.ode_grid` carries it back. The image stands at the grid's last time, where u = s x is nearly x.
    """
    first, last = latest_time(schedule), last_time(schedule)
    derivative = _derivative(D, schedule, x.shape)
    result = integrate(derivative, wide(x).flatten(1), last, first, options.rtol, options.atol, options.common_norm)
    return (result.y / schedule.prior_std).reshape(x.shape).float()


def _derivative(D: Solution, schedule: Schedule, shape: torch.Size) -> Derivative:
    """du/dt of the probability flow, for flat states u of images of a shape."""

    def derivative(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        flow = Flow.of(schedule, t)
        clean = D((u / flow.s).reshape(shape), flow.sigma.flatten()).to(u).flatten(1)
        return flow.f * u - (clean - u / flow.s) * flow.rate

    return derivative


def rk45(
    D: Solution,
    x: torch.Tensor,
    grid: Grid,
    options: RungeKutta,
    *,
    randn_like: RandnLike,
    after_update: AfterUpdate,
) -> torch.Tensor:
    """The solution at the last time of a grid with two times (`grids.ode_grid`), [N, ...] like `x`.

    The arithmetic is that of the schedule, float64 but on MPS. `after_update` is called after accepted steps with the
    noise levels of the samples, [N]; what it draws is drawn once, since a flow has no noise along its path.

    Raises:
        UserError, RunError: as `integrate`.
    """
    assert grid.times is not None and grid.schedule is not None
    schedule, shape = grid.schedule, x.shape
    first, last = grid.times[0].item(), grid.times[-1].item()

    derivative = _derivative(D, schedule, shape)
    drawn: list[torch.Tensor] = []

    def drawn_once(like: torch.Tensor) -> torch.Tensor:
        if not drawn:
            drawn.append(randn_like(like))
        return drawn[0]

    def after_step(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        flow = Flow.of(schedule, t)
        solution = (u / flow.s).reshape(shape)
        changed = after_update(solution, flow.sigma.flatten(), drawn_once)
        return u if changed is solution else changed.to(u).flatten(1) * flow.s

    u = wide(x).flatten(1) * float(schedule.scale(first))
    result = integrate(
        derivative, u, first, last, options.rtol, options.atol, options.common_norm, after_step=after_step
    )
    u = result.y.reshape(shape)
    s = float(schedule.scale(last))
    if options.denoise is not None:
        end = torch.tensor([last], dtype=torch.float64)
        a, b, _ = reverse_diffusion(schedule, Times(end, torch.zeros_like(end)), options.denoise, flow=False)
        u = a.item() * u + b.item() * score(D, u, s, grid.sigmas[-1])
    return (u / s).to(x.dtype)
