"""The objective of consistency tuning: pairs of noise levels, and what is compared at them."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_network, tiny_uvit

from training.losses_consistency import ConsistencyLoss
from training.samplers.noise import StackedRandomGenerator

IMAGES = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def loss_of(**changes) -> ConsistencyLoss:
    options = dict(P_mean=-0.8, P_std=1.6, q=4.0, k=8.0, stage=1000, stages=4, huber=0.03)
    return ConsistencyLoss(**{**options, **changes})


@pytest.mark.parametrize("net", [tiny_network(), tiny_uvit(prediction="edm")], ids=["EDM2", "U-ViT"])
def test_an_image_without_noise_stays(net):
    """f(x, 0) = x: the difference falls as the noise level does."""
    x, labels = torch.randn(4, 1, 8, 8), torch.eye(10)[:4]
    errors = [(net(x, torch.tensor(sigma), labels) - x).norm().item() for sigma in (1e-2, 1e-3, 1e-4)]
    assert errors[1] < errors[0] / 5 and errors[2] < min(errors[1] / 5, 1e-3 * x.norm().item())


def test_stages():
    loss = loss_of()
    assert [loss.stage(nimg) for nimg in (0, 999, 1000, 2999, 3000, 10**9)] == [1, 1, 2, 3, 4, 4]
    loss(tiny_network(), IMAGES, nimg=1000)
    assert loss.report() == {"stage": 2}


def test_limits_of_the_gap():
    loss, t = loss_of(), torch.logspace(-4, 3, 200, dtype=torch.float64)
    gaps = [loss.gap(t, nimg) for nimg in (0, 1000, 2000, 3000)]
    for a, gap in enumerate(gaps, 1):
        assert (gap > 0).all() and (gap <= t).all()
        assert gap[-1].item() == pytest.approx(t[-1].item() / 4**a)  # sigmoid(-t) vanishes
        assert gap[0].item() / t[0].item() == pytest.approx(min(1, 5 / 4**a), rel=1e-3)  # and is 1/2
    assert (gaps[0][t < 0.5] == t[t < 0.5]).all()  # r = 0
    for wider, closer in zip(gaps[1:], gaps[2:], strict=False):
        torch.testing.assert_close(closer, wider / 4)
    # Pairs of nearly equal levels keep their distance: it is not a difference of both.
    assert (loss_of(q=1e6, stages=2).gap(t, 1000) > 0).all()


class Line:
    """f(x, t) = w t for all pixels."""

    def __init__(self):
        self.w = torch.tensor(0.7, requires_grad=True)

    def __call__(self, x, sigma, labels=None):
        return (self.w * sigma.reshape(-1, 1, 1, 1).to(x)).expand_as(x)


def test_gradients_pass_through_the_noisier_side_alone():
    net, loss, t = Line(), loss_of(), torch.full([6], 3.0, dtype=torch.float64)
    gap = loss.gap(t, 3000)[0].item()
    values = loss(net, IMAGES, t=t, noise=torch.randn_like(IMAGES), nimg=3000)
    difference = 0.7 * gap * 8  # norm of 64 pixels
    wanted = (math.hypot(difference, 0.03) - 0.03) / gap
    torch.testing.assert_close(values, torch.full([6], wanted), rtol=1e-4, atol=0)
    (gradient,) = torch.autograd.grad(values.sum(), net.w)
    # d/dw of |w t - target|, not of |w t - w r|.
    assert gradient.item() == pytest.approx(6 * difference / math.hypot(difference, 0.03) * 8 * 3 / gap, rel=1e-4)


def test_the_target_of_low_levels_is_the_clean_image():
    t = torch.full([6], 0.1, dtype=torch.float64)
    values = loss_of()(Line(), IMAGES, t=t, noise=torch.randn_like(IMAGES))
    distance = (0.07 - IMAGES).flatten(1).norm(dim=1)
    torch.testing.assert_close(values, ((distance.square() + 0.03**2).sqrt() - 0.03) / 0.1, rtol=1e-4, atol=1e-5)


class Levels:
    """Keeps the images and levels that it is asked about; says that it is made for levels from 0.1 to 2."""

    sigma_min, sigma_max = 0.1, 2.0

    def __init__(self):
        self.seen = []

    def __call__(self, x, sigma, labels=None):
        self.seen.append((x, sigma, labels))
        return x


def test_both_sides_share_image_noise_and_condition():
    net, labels = Levels(), torch.eye(6)
    rnd = StackedRandomGenerator("cpu", range(6))
    loss_of()(net, IMAGES, labels, rnd=rnd, nimg=2000)
    (x_r, r, first), (x_t, t, second) = net.seen
    assert first is labels and second is labels
    assert (r < t).all() and (t >= 0.1).all() and (t <= 2).all()
    noises = [(x - IMAGES) / sigma.reshape(-1, 1, 1, 1).float() for x, sigma in ((x_r, r), (x_t, t))]
    torch.testing.assert_close(*noises, rtol=1e-3, atol=1e-4)


def test_dropout_masks_are_the_same_on_both_sides_and_others_in_the_next_step():
    masks = []

    def net(x, sigma, labels=None):
        masks.append(F.dropout(torch.ones_like(x), 0.5))
        return masks[-1]

    torch.manual_seed(0)
    for _ in range(2):
        values = loss_of()(net, IMAGES, t=torch.full([6], 5.0, dtype=torch.float64), nimg=3000)
        assert torch.equal(values, torch.zeros(6))
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[2], masks[3])
    assert not torch.equal(masks[0], masks[2])


def test_draws_of_an_image_are_its_own():
    loss, net = loss_of(), tiny_network()
    together = loss(net, IMAGES, rnd=StackedRandomGenerator("cpu", range(6)), nimg=1500)
    assert together.shape == (6,) and together.dtype == torch.float32
    for i in range(6):
        alone = loss(net, IMAGES[i : i + 1], rnd=StackedRandomGenerator("cpu", [i]), nimg=1500)
        torch.testing.assert_close(alone[0], together[i], rtol=1e-3, atol=1e-4)


def test_noise_levels_are_log_normal():
    class Unlimited(Levels):
        sigma_min, sigma_max = 0.0, math.inf

    net = Unlimited()
    torch.manual_seed(0)
    loss_of()(net, torch.zeros(50_000, 1, 1, 1))
    ln_t = net.seen[1][1].log()
    assert ln_t.mean().item() == pytest.approx(-0.8, abs=0.03)
    assert ln_t.std().item() == pytest.approx(1.6, abs=0.03)
