"""Training of U-ViT against the golden values: six steps of loss, AdamW, warm-up, clipping and averages."""

import numpy as np
import pytest
import torch
from uvit_golden import GoldenFile, error, names, network

from training.config.ema import EMAConfig
from training.config.training import RunConfig
from training.config.uvit import UViTOptimizer, UViTTraining
from training.denoiser import Preconditioned
from training.encoders import PUBLISHED_VAE, StabilityVAEEncoder
from training.families import trained_by
from training.losses import NoiseLoss
from training.preconditioning import DataPrediction, Epsilon
from training.schedules import VP
from training.schedules_uvit import InterpolatedVP

LOSS, NORM, STATE, NOISY_STATE, AVERAGE = 1e-5, 1e-4, 2e-6, 3e-4, 1e-6
# Without warm-up, Adam's first step is the sign of a gradient, so of one that is smaller than rounding errors it is noise.
ROUNDING, FEW = 1e-7, 1e-2
FILES = names("training_*")


def config_of(meta: dict) -> UViTTraining:
    """The configuration whose optimiser and averages a file describes; figures in steps become figures in images."""
    options, batch = meta["optimizer"], meta["batch"]
    return UViTTraining(
        optimizer=UViTOptimizer(
            lr=options["lr"],
            beta1=options["betas"][0],
            beta2=options["betas"][1],
            weight_decay=options["weight_decay"],
            warmup=max(meta["warmup_steps"], 0) * batch,
            grad_clip=meta["grad_clip"],
        ),
        ema=EMAConfig(ema_rate=meta["ema_rate"]),
        run=RunConfig(duration=meta["steps"] * batch, batch=batch, status=0, snapshot=0, checkpoint=0),
    )


def images_of(g: GoldenFile, part: slice, step: int) -> torch.Tensor:
    """Clean images of a step: of moments, a draw."""
    data = g["data"][part]
    noise = g.get("noise_z")
    if noise is None:
        return data
    mean, logvar = data.chunk(2, dim=1)
    encoder = StabilityVAEEncoder(PUBLISHED_VAE, scale=g.meta["scale_factor"])
    stored = torch.cat([mean, (logvar.clamp(-30, 20) / 2).exp()], dim=1)
    images = encoder.encode_latents(stored, lambda _like: noise[step])
    assert error(images, g["z"][step]) <= LOSS
    return images


def condition_of(g: GoldenFile, part: slice, step: int) -> torch.Tensor | None:
    """Conditions of a step, some of which are dropped."""
    cond = g.get("label", "context")
    if cond is None or g.meta["p_uncond"] in (None, 0):
        return None if cond is None else cond[part]
    dropped = torch.from_numpy(np.asarray(g["dropout_uniforms"][step])) < g.meta["p_uncond"]
    null = g.get("empty_context")
    null = torch.tensor(g.meta["null"]) if null is None else null
    found = torch.where(dropped.reshape(-1, *[1] * (cond.ndim - 1)), null, cond[part])
    assert torch.equal(found, g["cond_used"][step])
    return found


@pytest.mark.parametrize("name", FILES)
def test_six_steps(name):
    g = GoldenFile(name)
    meta, config = g.meta, config_of(g.meta)
    conditional = meta["nnet"].get("num_classes", -1) > 0 or "t2i" in meta["cls"]
    kwargs = {key: value for key, value in meta["nnet"].items() if key != "name"}
    raw = network(kwargs, meta["cls"], g.below("state_init")).train()
    schedule = InterpolatedVP() if "n" in g.arrays else VP()
    predicts_data = meta["pred"] == "x0_pred"
    net = Preconditioned(raw, (DataPrediction if predicts_data else Epsilon)(schedule), None)
    loss = NoiseLoss(schedule, "data" if predicts_data else "noise")
    family = trained_by(config)
    optimizer, ema = family.optimizer(net, config), family.ema(net, config)
    batch = meta["batch"]
    first_gradients: dict[str, torch.Tensor] = {}
    for step in range(meta["steps"]):
        part = slice(step * batch, (step + 1) * batch)
        t = g["n"][step].double() / schedule.num_scales if "n" in g.arrays else g["t"][step]
        cond = condition_of(g, part, step) if conditional else None
        losses = loss(net, images_of(g, part, step), cond, t=t, noise=g["eps"][step])
        torch.testing.assert_close(losses, g["loss"][step], rtol=LOSS, atol=0)
        optimizer.zero_gradients()
        (losses.sum() / batch).backward()
        first_gradients = first_gradients or {key: p.grad.clone() for key, p in raw.named_parameters()}
        assert optimizer.gradients.norm().item() == pytest.approx(g["gradnorm"][step].item(), rel=NORM)
        assert optimizer.learning_rate(part.start) == pytest.approx(g["lr_used"][step].item(), rel=1e-6)
        optimizer.step(part.start)
        ema.update(part.stop, batch)
    assert optimizer.learning_rate(part.stop) == pytest.approx(g["lr_after"][-1].item(), rel=1e-6)
    average = dict(ema.get()[-1][0].net.state_dict())
    for key, value in g.below("state_final").items():
        differences = (raw.state_dict()[key] - value).abs(), (average[key] - g[f"state_ema/{key}"]).abs()
        tolerance = STATE
        if meta["warmup_steps"] <= 0:
            gradient = first_gradients[key]
            clear = (gradient == 0) | (gradient.abs() > ROUNDING)
            tolerance = NOISY_STATE
            assert (~clear).float().mean() <= FEW
            differences = tuple(difference[clear] for difference in differences)
        for difference, most in zip(differences, (tolerance, AVERAGE), strict=True):
            assert difference.numel() == 0 or difference.max() <= most, key
