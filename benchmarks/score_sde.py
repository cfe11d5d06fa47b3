"""Score-SDE models: resampling with FIR filters, and likelihoods at equal tolerance and equal steps."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import textbook_score_sde
from benchmarks.harness import Job
from torch_utils.device import set_up_device
from training.config.likelihood import FlowLikelihoodConfig
from training.config.score_sde_presets import SCORE_PRESETS
from training.families import preset_network
from training.likelihood import log_likelihood
from training.networks import fir

TAPS = (1.0, 3.0, 3.0, 1.0)
TOLERANCE, FIRST_TIME, IMAGES = 1e-3, 1e-3, 32


def network() -> Any:
    """DDPM++ of the digits, whose output is not zero."""
    torch.manual_seed(0)
    net = preset_network(SCORE_PRESETS["digits-vp"])
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return net.eval().requires_grad_(False)


def activations() -> torch.Tensor:
    return torch.randn(16, 64, 32, 32, generator=torch.Generator().manual_seed(0))


def plain_resampling(halve: bool) -> Callable[[], np.ndarray]:
    x = activations()
    arguments = (TAPS, 1, 2, (1, 1)) if halve else (TAPS, 2, 1, (2, 1))
    return lambda: textbook_score_sde.resample(x, *arguments).numpy()


def our_resampling(halve: bool) -> Callable[[], np.ndarray]:
    set_up_device(torch.device("cpu"), huge_pages=True)
    x = activations().contiguous(memory_format=torch.channels_last)
    function = fir.downsample if halve else fir.upsample
    return lambda: function(x, TAPS).numpy()


def likelihood_inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """Images, and random signs."""
    rnd = torch.Generator().manual_seed(1)
    images = torch.rand(IMAGES, 1, 8, 8, generator=rnd) * 2 - 1
    return images, torch.randint(2, images.shape, generator=rnd).float() * 2 - 1


def plain_likelihood() -> Callable[[], np.ndarray]:
    net = network()
    schedule = net.preconditioning.schedule
    images, epsilon = likelihood_inputs()

    def score(u: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        std = schedule.std(t.double()).float().reshape(-1, 1, 1, 1)
        return -net.net(u, schedule.label(t.double()).float(), None) / std

    rates = schedule.beta_min, schedule.beta_max
    return lambda: textbook_score_sde.log_likelihood(score, images, epsilon, rates, TOLERANCE, FIRST_TIME).numpy()


def our_likelihood() -> Callable[[], np.ndarray]:
    set_up_device(torch.device("cpu"), huge_pages=True)
    net = network()
    images, epsilon = likelihood_inputs()
    options = FlowLikelihoodConfig(rtol=TOLERANCE, atol=TOLERANCE, common_norm=True, first_time=FIRST_TIME)
    return lambda: log_likelihood(net, images, epsilon=epsilon, options=options).log_p.numpy()


JOBS = [
    *(
        Job(
            f"FIR {name}, 64 channels, 32x32, batch 16",
            partial(plain_resampling, half),
            partial(our_resampling, half),
            3.0,
            1e-5,
        )
        for name, half in [("downsampling", True), ("upsampling", False)]
    ),
    Job(f"likelihood of {IMAGES} digits, tolerance {TOLERANCE:g}", plain_likelihood, our_likelihood, None, 1e-3),
]
