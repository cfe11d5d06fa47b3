"""The schedules of U-ViT: inverses, the SDE behind them, accuracy near t = 0, and the steps of the discrete one."""

import math

import pytest
import torch

from dnnlib.errors import UserError
from training.schedules_uvit import CosineVP, InterpolatedVP

SCHEDULES = [CosineVP(), CosineVP(0.02, 0.98), InterpolatedVP(), InterpolatedVP(0.01, 0.0102, 20)]
TIMES = torch.cat([torch.logspace(-4, -1, 7, dtype=torch.float64), torch.linspace(0.2, 0.99, 9, dtype=torch.float64)])


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_time_inverts_sigma(schedule):
    t = schedule.time(schedule.sigma(TIMES))
    assert t.dtype == torch.float64
    torch.testing.assert_close(t, TIMES, rtol=1e-9, atol=1e-12)
    sigma = torch.logspace(math.log10(schedule.sigma_min), math.log10(schedule.sigma_max), 30, dtype=torch.float64)
    torch.testing.assert_close(schedule.sigma(schedule.time(sigma)), sigma, rtol=1e-9, atol=0)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_std_is_scale_times_sigma(schedule):
    product = schedule.scale(TIMES) * schedule.sigma(TIMES)
    torch.testing.assert_close(schedule.std(TIMES), product, rtol=1e-12, atol=0)
    assert float(schedule.scale(0.0)) == 1


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_marginals_solve_the_sde(schedule):
    """ds/dt = f s and d(std^2)/dt = 2 f std^2 + g^2 (Song et al. 2021, Appendix D); between steps."""
    t = torch.linspace(0.0526, 0.9526, 10, dtype=torch.float64)
    h = 1e-5
    f, g = schedule.drift(t), schedule.diffusion(t)
    ds = (schedule.scale(t + h) - schedule.scale(t - h)) / (2 * h)
    torch.testing.assert_close(ds, f * schedule.scale(t), rtol=1e-6, atol=1e-9)
    dvar = (schedule.std(t + h) ** 2 - schedule.std(t - h) ** 2) / (2 * h)
    torch.testing.assert_close(dvar, 2 * f * schedule.std(t) ** 2 + g**2, rtol=1e-6, atol=1e-7)


def test_cosine_near_zero():
    """Its leading term: 1 - s^2 = (theta - theta_0) 2 tan(theta_0)."""
    schedule, t = CosineVP(), 1e-9
    rate = math.pi / 1.008 * math.tan(0.008 / 1.008 * math.pi / 2)
    assert float(schedule.std(t)) == pytest.approx(math.sqrt(rate * t), rel=1e-6)
    assert float(schedule.time(schedule.sigma(t))) == pytest.approx(t, rel=1e-6)


def test_steps_of_stable_diffusion():
    schedule = InterpolatedVP()
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    n = torch.arange(1, 1001)
    torch.testing.assert_close(schedule.scale(n / 1000.0), (1 - betas).cumprod(0).sqrt(), rtol=1e-6, atol=0)
    torch.testing.assert_close(schedule.label(schedule.time(schedule.sigma(n.double() / 1000))), n.double())
    assert schedule.sigma_min == pytest.approx(0.02917, abs=1e-5)
    assert schedule.sigma_max == pytest.approx(14.61, abs=1e-2)
    assert float(schedule.sigma(0.0)) == 0  # where the first line would be above ln s = 0


def test_training_times_are_those_of_steps():
    schedule = InterpolatedVP(num_scales=10)
    draws = torch.tensor([0.0, 0.05, 0.0999, 0.1001, 0.55, 0.9999])
    torch.testing.assert_close(schedule.training_times(draws) * 10, torch.tensor([1, 1, 1, 2, 6, 10]).double())


@pytest.mark.parametrize(
    ("make", "fragment"),
    [
        (lambda: CosineVP(offset=0), "offset > 0"),
        (lambda: CosineVP(last_time=1), "last_time < 1"),
        (lambda: InterpolatedVP(beta_min=0), "0 < beta_min"),
        (lambda: InterpolatedVP(0.1, 1.5), "beta_max < 1"),
        (lambda: InterpolatedVP(num_scales=1), "2 steps"),
    ],
)
def test_impossible_schedules(make, fragment):
    with pytest.raises(UserError, match=fragment):
        make()
