"""ScoreLoss: times, weights and what an ideal network leaves."""

import math

import pytest
import torch
from ideal import STD, Ideal

from dnnlib.errors import UserError
from training.denoiser import Preconditioned
from training.losses import ScoreLoss
from training.preconditioning import Epsilon
from training.schedules import EPS, VE, VP, DiscreteVE, DiscreteVP, SubVP


def ideal(schedule) -> Preconditioned:
    return Preconditioned(Ideal(schedule), Epsilon(schedule), spec=None)


@pytest.mark.parametrize("schedule", [VE(), VP(), SubVP()], ids=repr)
def test_times(schedule):
    u = torch.tensor([0.0, 0.25, 1.0])
    torch.testing.assert_close(ScoreLoss(schedule).times(u), EPS + (1 - EPS) * u.double())
    t = ScoreLoss(schedule, likelihood_weighting=True, importance_sampling=True).times(u)
    torch.testing.assert_close(t[[0, 2]], torch.tensor([EPS, 1.0], dtype=torch.float64), rtol=1e-6, atol=0)
    ln_sigma = schedule.sigma(t).log()
    assert float(ln_sigma[1]) == pytest.approx(float(0.75 * ln_sigma[0] + 0.25 * ln_sigma[2]), rel=1e-6)


@pytest.mark.parametrize("schedule", [DiscreteVE(num_scales=10), DiscreteVP(num_scales=100)], ids=repr)
def test_times_are_of_levels_and_all_equally_likely(schedule):
    N = schedule.num_scales
    u = (torch.arange(4 * N, dtype=torch.float64) + 0.5) / (4 * N)
    labels = schedule.label(ScoreLoss(schedule).times(u)).round()
    assert torch.equal(labels.long().bincount(minlength=N), torch.full([N], 4))


@pytest.mark.parametrize("schedule", [VE(), VP(), SubVP(), DiscreteVP()], ids=repr)
@pytest.mark.parametrize("reduce_mean", [True, False])
def test_an_ideal_network_leaves_what_cannot_be_known(schedule, reduce_mean):
    """E |n - E[n|x]|^2 of normal data is std^2 / (std^2 + sigma^2) per pixel."""
    torch.manual_seed(0)
    t = torch.tensor([0.1, 0.3, 0.6], dtype=torch.float64)
    n = 20000
    images = STD * torch.randn(n * 3, 1, 4, 4)
    loss = ScoreLoss(schedule, reduce_mean)(ideal(schedule), images, t=t.repeat(n))
    assert loss.shape == (3 * n,) and loss.dtype == torch.float32
    expected = STD**2 / (STD**2 + schedule.sigma(t) ** 2) * (1 if reduce_mean else 8)
    torch.testing.assert_close(loss.double().reshape(n, 3).mean(dim=0), expected, rtol=0.02, atol=0)


@pytest.mark.parametrize("schedule", [VE(0.1, 10), VP(), SubVP()], ids=repr)
def test_importance_sampling_has_the_same_mean_and_less_variance(schedule):
    """Both estimate the integral of g^2 / std^2 times the loss over t (here by an even grid of draws)."""
    torch.manual_seed(0)
    n = 40000
    images = STD * torch.randn(n, 1, 2, 2)
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    means, variances = [], []
    for sampled in (False, True):
        loss_fn = ScoreLoss(schedule, likelihood_weighting=True, importance_sampling=sampled)
        loss = loss_fn(ideal(schedule), images, t=loss_fn.times(u)).double()
        means.append(float(loss.mean()))
        variances.append(float(loss.var()))
    assert means[1] == pytest.approx(means[0], rel=0.05)
    if not isinstance(schedule, VE):  # where the weight is constant
        assert variances[1] < variances[0]


def test_draws_of_its_own():
    torch.manual_seed(0)
    loss_fn = ScoreLoss(VP())
    images = torch.zeros(3, 1, 2, 2)
    first = loss_fn(ideal(VP()), images)
    assert first.shape == (3,) and not torch.equal(first, loss_fn(ideal(VP()), images))


def test_no_digits_are_lost_at_the_smallest_times():
    """By way of D, float32 would leave one digit of sub-VP's noise of 1e-6."""
    schedule = SubVP()
    t = torch.full([1], EPS, dtype=torch.float64)
    noise = torch.ones(1, 1, 2, 2)
    loss = ScoreLoss(schedule)(ideal(schedule), torch.zeros(1, 1, 2, 2), t=t, noise=noise)
    sigma = float(schedule.sigma(EPS))
    expected = (STD**2 / (STD**2 + sigma**2)) ** 2
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert math.isfinite(float(loss))


@pytest.mark.parametrize(
    ("make", "fragment"),
    [
        (lambda: ScoreLoss(DiscreteVP(), likelihood_weighting=True), "continuous times"),
        (lambda: ScoreLoss(VP(), importance_sampling=True), "likelihood weighting"),
    ],
)
def test_bad_options(make, fragment):
    with pytest.raises(UserError, match=fragment):
        make()
