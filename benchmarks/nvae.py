"""NVAE of 32 channels and 10 groups at 32x32: a training step, importance-weighted bounds, and samples."""

import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import textbook_nvae
from benchmarks.harness import Job
from benchmarks.step import gradients_of, our_step, random_numbers
from torch_utils.device import set_up_device
from torch_utils.gradients import use_channels_last
from training.conditioning import DataSpec
from training.config.nvae import TRAINING_PRESETS
from training.families import trained_by
from training.likelihood_vae import importance_bounds
from training.losses_vae import PixelObjective, balanced_kl, image_values, to_bytes
from training.lr import warmup_cosine
from training.networks.nvae import NVAE
from training.networks.nvae_layers import effective_weights

BATCH, SAMPLES = 16, 10
CIFAR = TRAINING_PRESETS["nvae-cifar10"]
NETWORK = dataclasses.replace(
    CIFAR.config.network, num_channels_enc=32, num_channels_dec=32, num_groups_per_scale=10, num_nf=0
)
CONFIG = dataclasses.replace(CIFAR.config, network=NETWORK)
DATA = DataSpec(channels=CIFAR.channels, resolution=CIFAR.resolution)


def network() -> NVAE:
    torch.manual_seed(0)
    return trained_by(CONFIG).build(NETWORK, DATA)


def batch() -> torch.Tensor:
    """Images of whole levels, in [-1, 1]."""
    levels = torch.randint(256, [BATCH, 3, 32, 32], generator=torch.Generator().manual_seed(0))
    return levels / 127.5 - 1


def plain_step() -> Callable[[], np.ndarray]:
    net = network().train()
    objective = PixelObjective(net, CONFIG.run.duration)  # whose schedule, and first vectors, the textbook shares
    norms = objective.spectral_norms
    vectors = {
        shape: tuple(norms.get_buffer(f"{v}_{shape[0]}x{shape[1]}").clone() for v in "uv")
        for shape in net.weight_stacks()
    }
    textbook_nvae.plain(net)
    step = textbook_nvae.Step(net, vectors, CONFIG.optimizer, CONFIG.objective.weight_decay_norm)
    images, nimg = batch(), 0
    o, duration = CONFIG.optimizer, CONFIG.run.duration

    def run() -> np.ndarray:
        nonlocal nimg
        x = image_values(net.decoder, to_bytes(images))
        noise = net.split_noise(random_numbers(images).randn([BATCH, net.noise_size]))
        out = net(x, noise)
        recon = -net.decoder.log_prob(out.logits, x).sum(dim=(1, 2, 3))
        kl, _ = balanced_kl(out.kl_all, objective.alpha, objective.beta(nimg))
        step((recon + kl).mean(), warmup_cosine(nimg, duration, o.lr, o.learning_rate_min, o.warmup_portion * duration))
        nimg += BATCH
        return gradients_of(net)

    return run


def our_nvae_step(precision: str) -> Callable[[], np.ndarray]:
    config = dataclasses.replace(CONFIG, run=dataclasses.replace(CONFIG.run, precision=precision))
    return our_step(config, DATA, batch(), None)


def evaluated() -> tuple[torch.Tensor, list[list[torch.Tensor]]]:
    """Images in [0, 1], and the draws of each sample and group."""
    net, rnd = network(), torch.Generator().manual_seed(1)
    draws = [[torch.randn(BATCH, *shape, generator=rnd) for shape in net.latent_shapes] for _ in range(SAMPLES)]
    return (batch() + 1) / 2, draws


def plain_bound() -> Callable[[], np.ndarray]:
    net = textbook_nvae.plain(network()).eval()
    x, draws = evaluated()

    @torch.no_grad()
    def run() -> np.ndarray:
        return textbook_nvae.importance_bound(net, x, draws).numpy()

    return run


def our_bound() -> Callable[[], np.ndarray]:
    set_up_device(torch.device("cpu"), huge_pages=False)
    net = network().eval()
    use_channels_last(net)
    x, draws = evaluated()

    def run() -> np.ndarray:
        numbers = iter([group for sample in draws for group in sample])
        return importance_bounds(net, x, SAMPLES, lambda _: next(numbers)).neg_log_p.numpy()

    return run


def plain_samples() -> Callable[[], np.ndarray]:
    net = textbook_nvae.plain(network()).eval()
    noise = evaluated()[1][0]

    @torch.no_grad()
    def run() -> np.ndarray:
        return net.decoder.mean(net.sample(BATCH, noise=noise)).numpy()

    return run


def our_samples() -> Callable[[], np.ndarray]:
    set_up_device(torch.device("cpu"), huge_pages=False)
    net = network().eval()
    use_channels_last(net)
    noise = evaluated()[1][0]

    @torch.no_grad()
    def run() -> np.ndarray:
        with effective_weights(net):
            return net.decoder.mean(net.sample(BATCH, noise=noise)).numpy()

    return run


JOBS = [
    *(
        Job(
            f"NVAE training step, {precision}, batch {BATCH}",
            plain_step,
            partial(our_nvae_step, precision),
            bar,
            tolerance,
            precision,
        )
        for precision, bar, tolerance in [("fp32", 1.3, 1e-4), ("bf16", None, 5e-2)]
    ),
    Job(f"NVAE bound of {SAMPLES} importance samples, batch {BATCH}", plain_bound, our_bound, 2.0, 1e-5),
    Job(f"NVAE samples, batch {BATCH}", plain_samples, our_samples, 1.3, 1e-4),
]
