"""Runge-Kutta with adaptive steps: accuracy, independence of samples, and the probability flow of normal data."""

import math

import numpy as np
import pytest
import scipy.integrate
import torch
from ideal import STD

from dnnlib.errors import RunError, UserError
from training.config.samplers import RungeKutta
from training.samplers.adaptive import integrate, rk45
from training.samplers.grids import ode_grid
from training.samplers.sampler import unchanged
from training.schedules import VE, VP, SubVP

SCHEDULES = [VE(), VP(), SubVP()]
START = torch.linspace(-1, 2, 2 * 3 * 4 * 4, dtype=torch.float64).reshape(2, 3, 4, 4)


def gaussian(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The ideal denoiser of N(0, STD^2)."""
    return STD**2 / (STD**2 + sigma.to(x.dtype).reshape(-1, 1, 1, 1) ** 2) * x


def oscillator(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Van der Pol's, whose speed changes a lot: [N, 2]."""
    return torch.stack([y[:, 1], 5 * (1 - y[:, 0] ** 2) * y[:, 1] - y[:, 0]], dim=1)


OSCILLATORS = torch.tensor([[2.0, 0.0], [0.1, 3.0], [-1.0, 0.5]], dtype=torch.float64)


@pytest.mark.parametrize(("t0", "t1"), [(0.0, 10.0), (2.0, 0.5)])
@pytest.mark.parametrize("tolerance", [1e-3, 1e-6, 1e-9])
def test_steps_are_those_of_scipy(t0, t1, tolerance):
    """With a common norm for the whole batch, and for one sample without."""

    def vector(t: float, y: np.ndarray) -> np.ndarray:
        state = torch.from_numpy(y).reshape(-1, 2)
        return oscillator(torch.full([len(state)], t), state).flatten().numpy()

    for start, common in [(OSCILLATORS, True), (OSCILLATORS[:1], False)]:
        expected = scipy.integrate.solve_ivp(
            vector, (t0, t1), start.flatten().numpy(), method="RK45", rtol=tolerance, atol=tolerance
        )
        result = integrate(oscillator, start, t0, t1, tolerance, tolerance, common_norm=common)
        assert result.nfe == expected.nfev
        torch.testing.assert_close(result.y.flatten(), torch.from_numpy(expected.y[:, -1]), rtol=1e-9, atol=1e-9)


def test_polynomials_up_to_order_5_are_exact():
    """However large the steps are; those of a higher order are not."""
    start = torch.zeros(1, 1, dtype=torch.float64)
    for order in range(1, 8):
        result = integrate(lambda t, y, order=order: (order * t ** (order - 1))[:, None], start, 0.0, 2.0, 0.1, 0.1)
        error = abs(float(result.y) / 2.0**order - 1)
        assert error < 1e-13 if order <= 5 else error > 1e-8, order


def test_smaller_tolerances_cost_evaluations_and_buy_accuracy():
    exact = math.exp(-3.0)
    results = [
        integrate(lambda t, y: -y, torch.ones(1, 1, dtype=torch.float64), 0, 3, r, r) for r in (1e-4, 1e-7, 1e-10)
    ]
    errors = [abs(float(result.y) - exact) for result in results]
    assert errors[0] > 100 * errors[1] > 10000 * errors[2]
    assert errors[2] < 1e-9
    assert results[0].nfe < results[1].nfe < results[2].nfe


def test_there_and_back():
    there = integrate(oscillator, OSCILLATORS, 0.0, 0.3, 1e-11, 1e-11)
    back = integrate(oscillator, there.y, 0.3, 0.0, 1e-11, 1e-11)
    torch.testing.assert_close(back.y, OSCILLATORS, rtol=1e-6, atol=1e-6)


def test_a_sample_does_not_depend_on_its_batch():
    together = integrate(oscillator, OSCILLATORS, 0.0, 10.0)
    for i in range(len(OSCILLATORS)):
        alone = integrate(oscillator, OSCILLATORS[i : i + 1], 0.0, 10.0)
        assert torch.equal(alone.y, together.y[i : i + 1])
        assert alone.nfe <= together.nfe
    common = integrate(oscillator, OSCILLATORS, 0.0, 10.0, common_norm=True)
    assert not torch.equal(common.y, together.y)


def test_every_evaluation_is_counted():
    calls = []

    def f(t, y):
        calls.append(t)
        return oscillator(t, y)

    assert integrate(f, OSCILLATORS, 0.0, 3.0).nfe == len(calls)
    calls.clear()
    assert integrate(f, OSCILLATORS, 0.0, 3.0, after_step=lambda t, y: y.clamp(-9, 9)).nfe == len(calls)


def test_what_is_changed_after_a_step_is_where_the_next_begins():
    """y' = (y_1, 0): as y_1 is kept at 2, y_0 grows as if it had always been."""
    times = []

    def kept(t, y):
        times.append(t)
        return torch.stack([y[:, 0], torch.full_like(y[:, 1], 2.0)], dim=1)

    start = torch.tensor([[0.0, 2.0]], dtype=torch.float64)
    result = integrate(
        lambda t, y: torch.stack([y[:, 1], -y[:, 0]], dim=1), start, 0.0, 1.0, 1e-8, 1e-8, after_step=kept
    )
    assert float(result.y[0, 1]) == 2.0
    free = integrate(lambda t, y: torch.stack([y[:, 1], -y[:, 0]], dim=1), start, 0.0, 1.0, 1e-8, 1e-8)
    assert float(free.y[0, 0]) == pytest.approx(2 * math.sin(1), rel=1e-6)
    assert float(free.y[0, 0]) < float(result.y[0, 0]) < 2.0
    assert times[-1].item() == 1.0


def test_bad_problems():
    start = torch.ones(1, 1, dtype=torch.float64)
    for rtol, atol in [(0, 1e-5), (1e-5, 0)]:
        with pytest.raises(UserError, match="tolerances must be positive"):
            integrate(lambda t, y: y, start, 0, 1, rtol, atol)
    with pytest.raises(RunError, match="no step of the ODE solver is small enough"):
        integrate(lambda t, y: y**2, start, 0, 2)  # infinite at t = 1


# ---------------------------------------------------------------------------------------------------------
# The probability flow


def follow(schedule, x=START, D=gaussian, after_update=unchanged, randn_like=torch.randn_like, **options):
    """The state u at the end of the flow, from unit-variance noise."""
    grid = ode_grid(schedule)
    assert grid.start is not None
    options = RungeKutta(**options)
    return rk45(D, x * grid.start, grid, options, randn_like=randn_like, after_update=after_update) * grid.end


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_flow_of_normal_data(schedule):
    """Its state stays as many standard deviations from the mean as it was."""
    grid = ode_grid(schedule)
    assert grid.times is not None
    first, last = torch.hypot(STD * schedule.scale(grid.times), schedule.std(grid.times)).tolist()
    errors = []
    for tolerance in (1e-4, 1e-7):
        u = follow(schedule, rtol=tolerance, atol=tolerance)
        errors.append(float((u - START * (schedule.prior_std / first * last)).abs().max()))
    # Each of some tens of steps is as exact as the tolerance.
    assert errors[0] < 20 * 1e-4 and errors[1] < 20 * 1e-7, errors


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_flow_of_a_sample_does_not_depend_on_its_batch(schedule):
    together, alone = follow(schedule), follow(schedule, START[:1])
    assert torch.equal(alone, together[:1])
    assert not torch.equal(follow(schedule, common_norm=True), together)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_evaluations_of_the_denoiser(schedule):
    """One more for the denoising, whose step is as large as the noise that is left (VE)."""
    calls = []

    def D(x, sigma):
        calls.append(sigma)
        return gaussian(x, sigma)

    plain = follow(schedule, D=D)
    counted = len(calls)
    calls.clear()
    denoised = follow(schedule, D=D, denoise=1000)
    assert len(calls) == counted + 1
    assert not torch.equal(denoised, plain)
    if isinstance(schedule, VE):
        end = ode_grid(schedule).sigmas[-1]
        torch.testing.assert_close(denoised, gaussian(plain, end), rtol=1e-6, atol=1e-9)


def test_updates_are_announced_and_draw_once():
    """With the noise level of each sample, from the first step to the end."""
    levels, draws = [], []

    def after_update(x, sigma, randn_like):
        levels.append(sigma)
        draws.append(randn_like(x))
        return x

    calls = []

    def randn_like(x):
        calls.append(x)
        return torch.randn_like(x)

    schedule = VP()
    assert torch.equal(follow(schedule, after_update=after_update, randn_like=randn_like), follow(schedule))
    assert len(calls) == 1 and all(draw is draws[0] for draw in draws)
    levels = torch.stack(levels)
    assert levels.shape[1] == len(START) and bool((levels.diff(dim=0) <= 0).all())
    torch.testing.assert_close(levels[-1], ode_grid(schedule).sigmas[-1].expand(len(START)))
