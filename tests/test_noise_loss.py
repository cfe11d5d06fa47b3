"""The objective of U-ViT: what it draws, and what it is worth where the answer is known."""

import pytest
import torch
from torch import nn

from dnnlib.errors import UserError
from training.denoiser import Preconditioned
from training.losses import NoiseLoss
from training.preconditioning import DataPrediction, Epsilon
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
