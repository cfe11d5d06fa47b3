"""DPM-Solver, DPM-Solver++ and Euler-Maruyama: orders of accuracy, evaluations, and ends of grids."""

import math
from dataclasses import replace

import pytest
import torch
from gaussian import FIRST, LAST, MEAN, STD, Gaussian, even_grid, exact, run, start, unchanged

from dnnlib.errors import RunError, UserError
from training.config.dpm_solver import AdaptiveDPMSolver, DPMSolver
from training.config.samplers import EulerMaruyama
from training.samplers.dpm_solver import adaptive, multistep, singlestep, singlestep_orders
from training.samplers.euler_maruyama import euler_maruyama
from training.samplers.grids import (
    Grid,
    edm_sigmas,
    sde_grid,
    spaced_times,
    time_grid,
    with_inner_levels,
)
from training.samplers.thresholding import ThresholdedDenoiser
from training.schedules import VE, VP
from training.schedules_uvit import CosineVP, InterpolatedVP

ALL = [
    DPMSolver(order=order, prediction=prediction, solver_type=solver_type)
    for order in (1, 2, 3)
    for prediction in ("data", "noise")
    for solver_type in ("dpmsolver", "taylor")
]


def slope(solve, options, grids) -> float:
    """Measured order of accuracy: how the error falls from a grid to one of twice as many steps."""
    x = start()
    errors = [(run(solve, x, grid, options) - exact(x, FIRST, LAST)).abs().mean().item() for grid in grids]
    return math.log2(errors[-2] / errors[-1])


@pytest.mark.parametrize("options", ALL, ids=repr)
def test_order_of_singlestep(options):
    options = replace(options, fixed_order=True)
    assert slope(singlestep, options, [even_grid(n) for n in (192, 384)]) == pytest.approx(options.order, abs=0.15)


@pytest.mark.parametrize("solver_type", ["dpmsolver", "taylor"])
def test_order_3_takes_an_inner_level_at_two_thirds(solver_type):

    def grid(n):
        knots = even_grid(n // 3).sigmas
        inner = [knots[:-1] ** (1 - r) * knots[1:] ** r for r in (0.0, 0.25, 0.5)]
        return Grid(torch.cat([torch.stack(inner, dim=1).flatten(), knots[-1:]]))

    options = DPMSolver(solver_type=solver_type, fixed_order=True)
    assert slope(singlestep, options, [grid(n) for n in (192, 384)]) == pytest.approx(2, abs=0.15)


@pytest.mark.parametrize("options", ALL, ids=repr)
def test_order_of_multistep(options):
    order = min(options.order, 2)  # order 3 is as published
    assert slope(multistep, options, [even_grid(n) for n in (256, 512)]) == pytest.approx(order, abs=0.15)


def test_published_order_3_has_smaller_errors_than_order_2():
    x, errors = start(), []
    for order in (1, 2, 3):
        out = run(multistep, x, even_grid(64), DPMSolver(order=order))
        errors.append((out - exact(x, FIRST, LAST)).abs().mean().item())
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("prediction", ["data", "noise"])
@pytest.mark.parametrize("solve", [singlestep, multistep])
def test_of_order_1_they_are_euler_or_its_exponential_form(solve, prediction):
    x, grid = start(), even_grid(5)
    expected = x
    for sigma, sigma_next in grid.steps():
        D = Gaussian()(expected, sigma)
        if prediction == "noise":
            expected = expected + (sigma_next - sigma) * (expected - D) / sigma
        else:
            expected = sigma_next / sigma * expected + (1 - sigma_next / sigma) * D
    out = run(solve, x, grid, DPMSolver(order=1, prediction=prediction))
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("options", ALL, ids=repr)
@pytest.mark.parametrize("steps", range(1, 9))
def test_evaluations(options, steps):
    for grid in (even_grid(steps), Grid(edm_sigmas(steps))):
        for solve in (singlestep, multistep):
            D = Gaussian()
            levels = []
            out = run(solve, start(), grid, options, D, lambda x, sigma, _, seen=levels: seen.append(sigma) or x)
            assert len(D.sigmas) == steps
            assert out.isfinite().all() and levels[-1] == grid.sigmas[-1]


@pytest.mark.parametrize(
    ("evaluations", "order", "fixed", "expected"),
    [
        (9, 3, False, [3, 3, 2, 1]),
        (10, 3, False, [3, 3, 3, 1]),
        (11, 3, False, [3, 3, 3, 2]),
        (3, 3, False, [2, 1]),
        (12, 3, True, [3, 3, 3, 3]),
        (5, 2, False, [2, 2, 1]),
        (4, 1, False, [1, 1, 1, 1]),
        (1, 3, False, [1]),
        (2, 3, False, [2]),
        (0, 3, False, []),
        (0, 2, True, []),
    ],
)
def test_orders(evaluations, order, fixed, expected):
    assert singlestep_orders(evaluations, order, fixed) == expected


def test_fixed_orders_need_a_multiple():
    with pytest.raises(UserError, match="10 steps are not a multiple of the fixed order 3"):
        singlestep_orders(10, 3, fixed=True)


@pytest.mark.parametrize("options", ALL, ids=repr)
@pytest.mark.parametrize("solve", [singlestep, multistep])
def test_a_clean_end_is_the_denoised_image(solve, options):
    fixed = start(seed=1)
    out = run(solve, start(), Grid(edm_sigmas(7)), options, lambda x, sigma: fixed)
    torch.testing.assert_close(out, fixed, rtol=1e-12, atol=1e-12)


def test_equal_levels_are_one():
    grid = even_grid(6)
    doubled = Grid(torch.cat([grid.sigmas[:3], grid.sigmas[2:]]))
    for solve in (singlestep, multistep):
        torch.testing.assert_close(run(solve, start(), doubled, ALL[-1]), run(solve, start(), grid, ALL[-1]))


# ---------------------------------------------------------------------------------------------------------
# Adaptive


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("prediction", ["data", "noise"])
def test_adaptive_steps_meet_their_tolerance(order, prediction):
    errors, counts = [], []
    for tolerance in (1e-1, 1e-3, 1e-5):
        options = AdaptiveDPMSolver(order=order, prediction=prediction, rtol=tolerance, atol=tolerance)
        D = Gaussian()
        out = run(adaptive, start(), even_grid(1), options, D)
        errors.append((out - exact(start(), FIRST, LAST)).abs().max().item())
        counts.append(len(D.sigmas))
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-4
    assert counts[0] < counts[1] < counts[2] and all(count % order == 0 for count in counts)


def test_adaptive_steps_of_a_sample_are_its_own():
    x, options = start(), AdaptiveDPMSolver()
    together = run(adaptive, x, even_grid(1), options)
    for i in (0, 7):
        assert torch.equal(run(adaptive, x[i : i + 1], even_grid(1), options)[0], together[i])
    common = run(adaptive, x, even_grid(1), replace(options, common_step=True))
    assert not torch.equal(common, together)
    torch.testing.assert_close(common, together, rtol=0, atol=0.1)


def test_adaptive_updates_reach_the_end_once():
    """What is put back after each update is put back at every sample's own levels."""
    seen = []

    def keep(x, sigma, _):
        seen.append(sigma)
        return x

    x = run(adaptive, start(4), even_grid(1), AdaptiveDPMSolver(), after_update=keep)
    assert x.isfinite().all()
    levels = torch.stack(seen)
    assert levels.shape[1] == 4 and ((levels / LAST - 1).abs() < 1e-9).any(0).all()


def test_adaptive_steps_end_above_zero():
    with pytest.raises(UserError, match="lowest noise level"):
        run(adaptive, start(), Grid(edm_sigmas(2)), AdaptiveDPMSolver())


def test_adaptive_steps_stop_at_nan():
    with pytest.raises(RunError, match="NaN"):
        run(adaptive, start(), even_grid(1), AdaptiveDPMSolver(), lambda x, sigma: x * math.nan)


# ---------------------------------------------------------------------------------------------------------
# Euler-Maruyama


@pytest.mark.parametrize("schedule", [VP(), CosineVP(), VE(0.01, 10), InterpolatedVP()], ids=repr)
def test_euler_maruyama_flow_is_of_order_1(schedule):
    errors = []
    for steps in (400, 800):
        grid = time_grid(schedule, torch.linspace(0.9, 0.01, steps + 1, dtype=torch.float64))
        x = start() / FIRST * grid.sigmas[0]
        out = run(euler_maruyama, x, grid, EulerMaruyama(stochastic=False))
        errors.append((out - exact(x, grid.sigmas[0], grid.sigmas[-1])).abs().mean().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("schedule", [VP(), VE(0.01, 10), InterpolatedVP()], ids=repr)
def test_euler_maruyama_samples_the_distribution(schedule):
    torch.manual_seed(0)
    grid = sde_grid(schedule, 200)
    assert grid.sigmas[-1] == 0 and len(grid) == 200 and grid.start is not None
    D = Gaussian()
    x = grid.start * torch.randn(20000, 1, dtype=torch.float64)
    x = run(euler_maruyama, x, grid, EulerMaruyama(), D)
    assert len(D.sigmas) == 200
    assert x.mean().item() == pytest.approx(MEAN, abs=0.015)
    assert x.std().item() == pytest.approx(STD, rel=0.03)


def test_euler_maruyama_adds_no_noise_last():
    draws = []

    def randn_like(x):
        draws.append(x)
        return torch.randn_like(x)

    options = EulerMaruyama()
    euler_maruyama(Gaussian(), start(), sde_grid(VP(), 5), options, randn_like=randn_like, after_update=unchanged)
    assert len(draws) == 4


# ---------------------------------------------------------------------------------------------------------
# Grids and thresholding


@pytest.mark.parametrize("schedule", [VP(), CosineVP(), InterpolatedVP()], ids=repr)
def test_spacings(schedule):
    first, last = 0.9, 1e-3
    times = {spacing: spaced_times(schedule, spacing, 8, first, last) for spacing in ("time", "quadratic", "log-snr")}
    for t in times.values():
        assert t.dtype == torch.float64 and len(t) == 9 and (t.diff() < 0).all()
        torch.testing.assert_close(t[[0, -1]], torch.tensor([first, last], dtype=torch.float64), rtol=1e-9, atol=0)
    for values in (times["time"], times["quadratic"].sqrt(), schedule.sigma(times["log-snr"]).log()):
        torch.testing.assert_close(values.diff(), values.diff().mean().expand(8), rtol=1e-6, atol=0)


def test_samples_are_those_of_the_schedule():
    schedule = VP()
    grid = time_grid(schedule, spaced_times(schedule, "time", 3, 1.0, 1e-3))
    assert grid.start == pytest.approx(1 / float(schedule.scale(1.0)))
    assert grid.end == pytest.approx(float(schedule.scale(1e-3)))
    torch.testing.assert_close(schedule.time(grid.sigmas), grid.times)


@pytest.mark.parametrize(
    "arguments", [("cubic", 3, 1, 0.1), ("time", 0, 1, 0.1), ("time", 3, 0.1, 1), ("time", 3, 1, 0)]
)
def test_impossible_spacings(arguments):
    with pytest.raises(UserError):
        spaced_times(VP(), *arguments)


def test_inner_levels():
    grid = with_inner_levels(Grid(torch.tensor([8.0, 1.0, 0.25], dtype=torch.float64)), [3, 2])
    torch.testing.assert_close(grid.sigmas, torch.tensor([8, 4, 2, 1, 0.5, 0.25], dtype=torch.float64))


def test_thresholding():
    x = torch.linspace(-4, 4, 801).reshape(1, 1, 1, -1)
    out = ThresholdedDenoiser(lambda x, sigma, labels: x, quantile=0.5)(x, torch.tensor(1.0))
    torch.testing.assert_close(out, x.clamp(-2, 2) / 2)
    inside = 0.2 * x
    both = torch.cat([inside, x])
    out_both = ThresholdedDenoiser(lambda x, sigma, labels: x, quantile=0.5)(both, torch.tensor(1.0))
    assert torch.equal(out_both[:1], inside) and torch.equal(out_both[1:], out)
