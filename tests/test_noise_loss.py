"""The objective of U-ViT: what it draws, and what it is worth where the answer is known."""

import pytest
import torch
from torch import nn

from dnnlib.errors import UserError
from training.conditioning import Conditioning, DataSpec
from training.denoiser import Preconditioned
from training.losses import NoiseLoss, WithoutSomeConditions
from training.preconditioning import DataPrediction, EDMOfSchedule, Epsilon
from training.samplers.noise import StackedRandomGenerator
from training.schedules import VP
from training.schedules_uvit import CosineVP, InterpolatedVP

SCHEDULES = [VP(), CosineVP(), InterpolatedVP()]


class Recorder(nn.Module):
    """Estimates nothing, and keeps what it was given."""

    def forward(self, x, label, cond=None):
        self.x, self.label, self.cond = x, label, cond
        return torch.zeros_like(x)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_loss_of_an_empty_estimate(schedule):
    """0 instead of the noise costs 1, 0 instead of the image its mean square, whatever the time."""
    rnd = StackedRandomGenerator("cpu", range(64))
    images = 0.5 * rnd.randn([64, 1, 16, 16])
    noise = NoiseLoss(schedule)(Preconditioned(Recorder(), Epsilon(schedule), None), images, rnd=rnd)
    assert noise.shape == (64,) and noise.dtype == torch.float32
    assert noise.mean().item() == pytest.approx(1, abs=0.03)
    data = NoiseLoss(schedule, "data")(Preconditioned(Recorder(), DataPrediction(schedule), None), images, rnd=rnd)
    torch.testing.assert_close(data, images.square().mean([1, 2, 3]))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_network_sees_the_state_and_its_label(schedule):
    net = Preconditioned(Recorder(), Epsilon(schedule), None)
    images, noise, cond = torch.randn(3, 5, 2, 4, 4).unbind()[0], torch.randn(5, 2, 4, 4), torch.arange(5)
    t = NoiseLoss(schedule).times(torch.linspace(0.01, 0.97, 5))
    NoiseLoss(schedule)(net, images, cond, t=t, noise=noise)
    state = schedule.scale(t).reshape(-1, 1, 1, 1) * images + schedule.std(t).reshape(-1, 1, 1, 1) * noise
    torch.testing.assert_close(net.net.x, state.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(net.net.label, schedule.label(t).float(), rtol=1e-5, atol=1e-5)
    assert net.net.cond is cond


def test_labels_of_steps_are_whole():
    schedule = InterpolatedVP()
    net = Preconditioned(Recorder(), Epsilon(schedule), None)
    NoiseLoss(schedule)(net, torch.zeros(1000, 1, 1, 1))
    torch.testing.assert_close(net.net.label, net.net.label.round(), rtol=0, atol=1e-3)
    assert net.net.label.min() >= 1 and net.net.label.max() <= 1000.001


def test_draws_of_an_image_are_its_own():
    schedule = VP()
    loss = NoiseLoss(schedule)
    images = torch.randn(4, 1, 3, 3)
    net = Preconditioned(Recorder(), Epsilon(schedule), None)
    together = loss(net, images, rnd=StackedRandomGenerator("cpu", range(4)))
    for i in range(4):
        alone = loss(net, images[i : i + 1], rnd=StackedRandomGenerator("cpu", [i]))
        torch.testing.assert_close(alone[0], together[i])


def test_unknown_prediction():
    with pytest.raises(UserError, match="noise or data"):
        NoiseLoss(VP(), "score")


def test_log_normal_noise_levels():
    loss = NoiseLoss(VP(), lognormal=(-0.4, 1.2))
    ln_sigma = VP().sigma(loss.times(torch.linspace(0, 1, 100_001)[:-1])).log()
    assert ln_sigma.isfinite().all()
    assert ln_sigma.mean().item() == pytest.approx(-0.4, abs=1e-3)
    assert ln_sigma.std().item() == pytest.approx(1.2, rel=1e-2)


def test_error_of_what_edm_predicts():
    """An estimate of 0 is the mean: its error is that of D, c_skip x, over c_out^2."""
    preconditioning = EDMOfSchedule(VP(), 0.5)
    net = Preconditioned(Recorder(), preconditioning, None)
    images, noise = torch.randn(2, 6, 1, 4, 4).unbind()
    t = torch.linspace(0.1, 0.9, 6)
    loss = NoiseLoss(VP())(net, images, t=t, noise=noise)
    sigma = VP().sigma(t).reshape(-1, 1, 1, 1)
    D = net(images + sigma * noise, sigma)
    wanted = ((D - images) / preconditioning(sigma).c_out).square().flatten(1).mean(1)
    torch.testing.assert_close(loss, wanted.float(), rtol=1e-3, atol=1e-4)


def test_dropped_conditions():
    conditioning = Conditioning(kind="classes", size=5)
    net = Preconditioned(Recorder(), Epsilon(VP()), DataSpec(channels=1, resolution=2, conditioning=conditioning))
    images, labels, n = torch.zeros(400, 1, 2, 2), torch.eye(5).repeat(80, 1), 400
    loss = WithoutSomeConditions(NoiseLoss(VP()), 0.3)
    loss(net, images, labels, rnd=StackedRandomGenerator("cpu", range(n)), nimg=0)
    dropped = (net.net.cond == 0).all(1)
    assert dropped.float().mean().item() == pytest.approx(0.3, abs=0.07)
    assert torch.equal(net.net.cond[~dropped], labels[~dropped])
    assert loss.regularizer(net, 0) is None and loss.state_dict() == {}
    net.spec = DataSpec(channels=1, resolution=2)
    loss(net, images, torch.zeros(n, 0), rnd=StackedRandomGenerator("cpu", range(n)), nimg=0)
    assert net.net.cond is None
