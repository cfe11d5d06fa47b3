"""Schedules: inverses, the SDE behind them, accuracy near t = 0, and levels of the discrete ones."""

import math

import numpy as np
import pytest
import torch

from dnnlib.errors import UserError
from training.schedules import VE, VP, DiscreteVE, DiscreteVP, SubVP

CONTINUOUS = [VE(), VE(0.002, 348), VP(), VP(0, 2), VP(3, 3), SubVP(), SubVP(0.2, 12)]
DISCRETE = [DiscreteVE(0.01, 50, 232), DiscreteVP(), DiscreteVP(num_scales=40), DiscreteVP(first_time=1e-3)]
TIMES = torch.cat([torch.logspace(-6, -1, 11, dtype=torch.float64), torch.linspace(0.2, 1, 9, dtype=torch.float64)])


@pytest.mark.parametrize("schedule", CONTINUOUS, ids=repr)
def test_time_inverts_sigma(schedule):
    t = schedule.time(schedule.sigma(TIMES))
    assert t.dtype == torch.float64
    torch.testing.assert_close(t, TIMES, rtol=1e-9, atol=1e-15)
    sigma = torch.logspace(math.log10(schedule.sigma_min), math.log10(schedule.sigma_max), 30, dtype=torch.float64)
    torch.testing.assert_close(schedule.sigma(schedule.time(sigma)), sigma, rtol=1e-9, atol=0)


@pytest.mark.parametrize("schedule", CONTINUOUS, ids=repr)
def test_std_is_scale_times_sigma(schedule):
    product = schedule.scale(TIMES) * schedule.sigma(TIMES)
    torch.testing.assert_close(schedule.std(TIMES), product, rtol=1e-12, atol=0)
    assert float(schedule.scale(0.0)) == 1


@pytest.mark.parametrize("schedule", [VE(), VP(), SubVP(), DiscreteVE(), DiscreteVP()], ids=repr)
def test_prior(schedule):
    assert float(schedule.std(1.0)) == pytest.approx(schedule.prior_std, rel=1e-4)


@pytest.mark.parametrize("schedule", CONTINUOUS, ids=repr)
def test_marginals_solve_the_sde(schedule):
    """ds/dt = f s and d(std^2)/dt = 2 f std^2 + g^2 (Song et al., Appendix D)."""
    t = torch.linspace(0.05, 0.95, 10, dtype=torch.float64)
    h = 1e-5
    f, g = schedule.drift(t), schedule.diffusion(t)
    ds = (schedule.scale(t + h) - schedule.scale(t - h)) / (2 * h)
    torch.testing.assert_close(ds, f * schedule.scale(t), rtol=1e-7, atol=1e-9)
    dvar = (schedule.std(t + h) ** 2 - schedule.std(t - h) ** 2) / (2 * h)
    torch.testing.assert_close(dvar, 2 * f * schedule.std(t) ** 2 + g**2, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("schedule", [VP(), SubVP()], ids=repr)
def test_no_cancellation_near_zero(schedule):
    """Against 1 - exp with arithmetic of 50 digits' worth: its series."""
    t = 1e-9
    B = 0.1 * t + 9.95 * t**2
    series = B - B**2 / 2
    expected = math.sqrt(series) if type(schedule) is VP else series
    assert float(schedule.std(t)) == pytest.approx(expected, rel=1e-12)
    assert float(schedule.time(schedule.sigma(t))) == pytest.approx(t, rel=1e-12)


def test_types_of_arguments():
    for value in (0.25, torch.tensor(0.25), np.float32(0.25)):
        assert VP().sigma(value).dtype == torch.float64
        assert float(VP().sigma(value)) == float(VP().sigma(0.25))
    assert VE().sigma(torch.rand(3, 2)).shape == (3, 2)


def test_labels():
    assert float(VE(0.01, 50).label(1.0)) == pytest.approx(50)
    assert float(VP().label(0.5)) == float(SubVP().label(0.5)) == 499.5
    assert float(DiscreteVP().label(0.5)) == 499.5


def test_discrete_ve_levels():
    """Every level gets its own label, as does each time near it; 0 is the largest."""
    schedule = DiscreteVE(0.01, 50, 232)
    levels = torch.from_numpy(np.geomspace(50, 0.01, 232))
    labels = torch.arange(232, dtype=torch.float64)
    for factor in (0.985, 1.0, 1.015):
        assert torch.equal(schedule.label(schedule.time(levels * factor)), labels)
    torch.testing.assert_close(schedule.sigma(1 - labels / 231), levels, rtol=1e-12, atol=0)


@pytest.mark.parametrize("first_time", [0.0, 1e-3])
def test_discrete_vp_levels(first_time):
    schedule = DiscreteVP(num_scales=50, first_time=first_time)
    alpha_bar = np.cumprod(1 - np.linspace(0.1, 20, 50) / 50)
    levels = torch.from_numpy(np.sqrt((1 - alpha_bar) / alpha_bar))
    step = torch.arange(50, dtype=torch.float64)
    for factor in (0.97, 1.0, 1.03):
        t = schedule.time(levels * factor)
        torch.testing.assert_close(schedule.label(t), step + (49 - step) * first_time, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(schedule.sigma(t), levels, rtol=1e-9, atol=0)
        torch.testing.assert_close(schedule.scale(t) ** 2, torch.from_numpy(alpha_bar), rtol=1e-12, atol=0)
    assert float(schedule.sigma(1.0)) == schedule.sigma_max
    assert float(schedule.sigma(0.0)) == schedule.sigma_min


def test_discrete_vp_approaches_the_continuous_one():
    errors = []
    for n in (100, 1000, 10000):
        schedule = DiscreteVP(num_scales=n)
        errors.append(abs(float(schedule.sigma(0.5)) / float(VP().sigma(0.5)) - 1))
    assert errors[0] > 5 * errors[1] > 25 * errors[2]


@pytest.mark.parametrize("schedule", DISCRETE, ids=repr)
def test_discrete_times_are_of_levels(schedule):
    sigma = torch.logspace(-3, 3, 100, dtype=torch.float64)
    t = schedule.time(sigma)
    assert bool((t.diff() >= 0).all())
    if isinstance(schedule, DiscreteVP):
        assert float(t.min()) == schedule.first_time and float(t.max()) == 1


@pytest.mark.parametrize(
    ("make", "fragment"),
    [
        (lambda: VE(0, 50), "sigma_min"),
        (lambda: VE(5, 1), "sigma_min"),
        (lambda: VP(-1, 20), "beta_min"),
        (lambda: VP(0, 0), "beta_max"),
        (lambda: SubVP(20, 0.1), "beta_min"),
        (lambda: DiscreteVP(num_scales=20), "use more steps"),
        (lambda: DiscreteVP(num_scales=1), "num_scales"),
        (lambda: DiscreteVE(num_scales=0), "num_scales"),
    ],
)
def test_bad_values(make, fragment):
    with pytest.raises(UserError, match=fragment):
        make()
