"""U-ViT S/2 at 32x32, batch 16: forward pass and training step, of the plainly written network and of ours."""

import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import textbook_uvit
from benchmarks.harness import Job
from benchmarks.step import gradients_of, our_step, random_numbers
from torch_utils.device import set_up_device
from training.conditioning import DataSpec
from training.config.uvit_presets import UVIT_PRESETS
from training.families import trained_by
from training.networks import uvit_cpu
from training.networks.uvit import UViT
from training.networks.uvit_denoiser import uvit_schedule
from training.preconditioning import PRECISIONS

BATCH = 16
PRESET = UVIT_PRESETS["cifar10_uvit_small"]
CONFIG: Any = PRESET.config
DATA = DataSpec(channels=PRESET.channels, resolution=PRESET.resolution)
EMA_RATE = CONFIG.ema.ema_rate


def network() -> UViT:
    torch.manual_seed(0)
    return trained_by(CONFIG).build(CONFIG.network, DATA).net


def plain_network() -> textbook_uvit.UViT:
    chosen = CONFIG.network
    net = textbook_uvit.UViT(
        DATA.resolution, chosen.patch_size, DATA.channels, chosen.embed_dim, chosen.depth, chosen.num_heads
    )
    net.load_state_dict(network().state_dict())
    return net


def batch() -> torch.Tensor:
    return torch.randn(BATCH, *DATA.shape, generator=torch.Generator().manual_seed(0)) / 2


def plain_forward() -> Callable[[], np.ndarray]:
    net = plain_network().eval()
    x, label = batch(), torch.linspace(0, 999, BATCH)

    @torch.no_grad()
    def run() -> np.ndarray:
        return net(x, label).numpy()

    return run


def our_forward(precision: str) -> Callable[[], np.ndarray]:
    set_up_device(torch.device("cpu"), huge_pages=False)
    denoiser = trained_by(CONFIG).build(CONFIG.network, DATA)
    denoiser.net.load_state_dict(network().state_dict())
    denoiser.precision = precision
    packed: Any = uvit_cpu.for_sampling(denoiser, BATCH)
    x, label = batch().to(PRECISIONS[precision]), torch.linspace(0, 999, BATCH)

    @torch.inference_mode()
    def run() -> np.ndarray:
        return packed.net(x, label).float().numpy()

    return run


def plain_step() -> Callable[[], np.ndarray]:
    net = plain_network().train()
    rest = textbook_uvit.Optimization(net, CONFIG.optimizer, EMA_RATE)
    schedule, images = uvit_schedule(CONFIG.network), batch()

    def run() -> np.ndarray:
        rnd = random_numbers(images)
        t, noise = rnd.rand([BATCH]), rnd.randn(images.shape)
        alpha = schedule.scale(t).float()[:, None, None, None]
        std = schedule.std(t).float()[:, None, None, None]
        estimate = net(alpha * images + std * noise, 999 * t)
        rest.step((estimate - noise).square().flatten(1).mean(dim=1).mean(), BATCH)
        return gradients_of(net)

    return run


def our_uvit_step(precision: str) -> Callable[[], np.ndarray]:
    config = dataclasses.replace(CONFIG, run=dataclasses.replace(CONFIG.run, precision=precision))
    return our_step(config, DATA, batch(), EMA_RATE)


def attention(plain: bool) -> Callable[[], np.ndarray]:
    """Of one block of S/2."""
    q, k, v = torch.randn(3, BATCH, 8, 257, 64, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def run() -> np.ndarray:
        return (textbook_uvit.attention if plain else F.scaled_dot_product_attention)(q, k, v).numpy()

    return run


JOBS = [
    Job(f"U-ViT S/2 {name}, {precision}, batch {BATCH}", plain, partial(ours, precision), bar, tolerance, precision)
    for name, plain, ours in [("forward", plain_forward, our_forward), ("training step", plain_step, our_uvit_step)]
    for precision, bar, tolerance in [("fp32", 1.3, 1e-4), ("bf16", 2.0, 5e-2)]
] + [Job(f"U-ViT S/2 attention, batch {BATCH}", partial(attention, True), partial(attention, False), None, 1e-5)]
