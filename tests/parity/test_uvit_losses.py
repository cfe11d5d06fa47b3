"""U-ViT's objective against the golden values (tolerances in the README of the golden files)."""

import pytest
import torch
from uvit_golden import GoldenFile, error, names, network

from training.denoiser import Preconditioned
from training.losses import NoiseLoss
from training.preconditioning import DataPrediction, Epsilon
from training.schedules import VP
from training.schedules_uvit import CosineVP, InterpolatedVP

RELATIVE, NEAR_ZERO = 2e-5, 1e-3
PREDICTIONS = {"noise_pred": "noise", "x0_pred": "data"}
PRECONDITIONINGS = {"noise": Epsilon, "data": DataPrediction}
FILES = names("losses*")


def denoiser(g: GoldenFile, schedule, prediction: str) -> Preconditioned:
    return Preconditioned(
        network(g.meta["kwargs"], state=g.below("state")), PRECONDITIONINGS[prediction](schedule), None
    )


def check_gradients(net: Preconditioned, loss: torch.Tensor, expected: dict[str, torch.Tensor]) -> None:
    """Of the mean over the batch."""
    net.zero_grad()
    loss.mean().backward()
    assert expected
    for key, value in expected.items():
        gradient = net.net.get_parameter(key).grad
        assert gradient is not None and error(gradient, value) <= RELATIVE, key


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(("prefix", "schedule"), [("vp", VP()), ("cosine", CosineVP())])
@pytest.mark.parametrize("of_model", PREDICTIONS)
def test_continuous(name, prefix, schedule, of_model):
    g = GoldenFile(name)
    x0, y, t, noise = g["x0"], g["y"], g[f"{prefix}/t"], g[f"{prefix}/eps"]
    model = f"{prefix}/model_{of_model}"
    net = denoiser(g, schedule, PREDICTIONS[of_model])
    scale, sigma = (f(t).reshape(-1, 1, 1, 1) for f in (schedule.scale, schedule.sigma))
    x = x0 + sigma * noise
    assert error(scale * x, g[f"{prefix}/xt"]) <= RELATIVE
    F_x, _ = net.raw(x, schedule.sigma(t), y)
    assert error(F_x, g[f"{model}/out"]) <= RELATIVE
    D = net(x, schedule.sigma(t), y)
    assert error(D, g[f"{model}/x0_pred"]) <= NEAR_ZERO
    estimate = (x - D) / sigma
    assert error(estimate, g[f"{model}/noise_pred"]) <= NEAR_ZERO
    assert error(-estimate / (scale * sigma), g[f"{model}/score"]) <= NEAR_ZERO
    for of_loss, prediction in PREDICTIONS.items():
        loss = NoiseLoss(schedule, prediction)(net, x0, y, t=t, noise=noise)
        # The published error of what the network does not estimate itself is a difference of equal numbers.
        tolerance = RELATIVE if of_loss == of_model else NEAR_ZERO
        torch.testing.assert_close(loss, g[f"{model}/loss_{of_loss}"], rtol=tolerance, atol=0)
    own = NoiseLoss(schedule, PREDICTIONS[of_model])
    check_gradients(net, own(net, x0, y, t=t, noise=noise), g.below(f"{model}/grad"))


@pytest.mark.parametrize("name", FILES)
def test_discrete(name):
    g = GoldenFile(name)
    schedule = InterpolatedVP()
    x0, y, noise = g["x0"], g["y"], g["discrete/eps"]
    t = g["discrete/n"].double() / schedule.num_scales
    net = denoiser(g, schedule, "noise")
    x = x0 + schedule.sigma(t).reshape(-1, 1, 1, 1) * noise
    assert error(schedule.scale(t).reshape(-1, 1, 1, 1) * x, g["discrete/xt"]) <= RELATIVE
    assert error(net.raw(x, schedule.sigma(t), y)[0], g["discrete/out"]) <= RELATIVE
    assert error(net(x, schedule.sigma(t), y), g["discrete/x0_from_noise_pred"]) <= NEAR_ZERO
    loss = NoiseLoss(schedule)(net, x0, y, t=t, noise=noise)
    torch.testing.assert_close(loss, g["discrete/loss_noise_pred"], rtol=RELATIVE, atol=0)
    check_gradients(net, loss, g.below("discrete/grad"))
    of_data = NoiseLoss(schedule, "data")(denoiser(g, schedule, "data"), x0, y, t=t, noise=noise)
    torch.testing.assert_close(of_data, g["discrete/extension_loss_x0_pred"], rtol=RELATIVE, atol=0)
