"""Score-SDE models: NCSN++ of 64 channels at 32x32, FIR filters, likelihoods at equal tolerance and equal steps."""

import dataclasses
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
from benchmarks.step import gradients_of, our_step, random_numbers
from torch_utils.device import set_up_device
from torch_utils.gradients import use_channels_last
from training.conditioning import Conditioning, DataSpec
from training.config.likelihood import FlowLikelihoodConfig
from training.config.samplers import GridConfig, SamplerConfig
from training.config.score_sde_presets import SCORE_PRESETS
from training.config.training import Preset
from training.families import preset_network
from training.likelihood import log_likelihood
from training.networks import fir
from training.preconditioning import PRECISIONS
from training.samplers.grids import grid_for
from training.samplers.sampler import Sampler

TAPS = textbook_score_sde.TAPS
EMA_RATE = 0.999
FIRST_TRAINED = 1e-5  # time
PC_STEPS = 5
TOLERANCE, FIRST_TIME, IMAGES = 1e-3, 1e-3, 32


def without_dropout(name: str, **network: Any) -> Preset:
    """A preset whose network has no dropout, and whose layers all matter from the start."""
    preset = SCORE_PRESETS[name]
    changed = dataclasses.replace(preset.config.network, dropout=0.0, init_scale=1.0, **network)
    return dataclasses.replace(preset, config=dataclasses.replace(preset.config, network=changed))


NCSNPP = without_dropout("ve/cifar10_ncsnpp_continuous", nf=64)
DIGITS = without_dropout("digits-vp")


def network(preset: Preset) -> Any:
    torch.manual_seed(0)
    return preset_network(preset).eval().requires_grad_(False)


def plain_network(preset: Preset) -> textbook_score_sde.NCSNpp:
    chosen = preset.config.network
    net = textbook_score_sde.NCSNpp(
        preset.resolution,
        preset.channels,
        chosen.nf,
        chosen.ch_mult,
        chosen.num_res_blocks,
        chosen.attn_resolutions,
        ve=chosen.sde == "ve",
    )
    state = network(preset).net.state_dict()
    net.load_state_dict({name: value.contiguous() for name, value in state.items() if name != "sigmas"})
    return net


def batch_of(size: int) -> torch.Tensor:
    return torch.rand(size, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def noisy(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images, and their noise levels."""
    return batch_of(size), torch.linspace(0.1, 1, size)


def plain_forward(size: int) -> Callable[[], np.ndarray]:
    net = plain_network(NCSNPP).eval()
    x, sigma = noisy(size)

    @torch.no_grad()
    def run() -> np.ndarray:
        return net(x, sigma).numpy()

    return run


def our_forward(size: int, precision: str) -> Callable[[], np.ndarray]:
    set_up_device(torch.device("cpu"), huge_pages=False)
    net = network(NCSNPP)
    use_channels_last(net)
    x, sigma = noisy(size)
    x = x.to(PRECISIONS[precision])

    @torch.inference_mode()
    def run() -> np.ndarray:
        return net.net(x, sigma).numpy()

    return run


def plain_step(size: int) -> Callable[[], np.ndarray]:
    net = plain_network(NCSNPP).train()
    chosen = NCSNPP.config
    rest = textbook_score_sde.Optimization(net, chosen.optimizer, EMA_RATE)
    levels = chosen.network.sigma_min, chosen.network.sigma_max
    images = batch_of(size)

    def run() -> np.ndarray:
        rnd = random_numbers(images)
        t = rnd.rand([size]).double() * (1 - FIRST_TRAINED) + FIRST_TRAINED
        sigma = (levels[0] * (levels[1] / levels[0]) ** t).float()
        noise = rnd.randn(images.shape)
        score = net(images + noise * sigma[:, None, None, None], sigma)
        loss = (score * sigma[:, None, None, None] + noise).square().sum(dim=(1, 2, 3)) / 2
        rest.step(loss.mean(), size)
        return gradients_of(net)

    return run


def our_ncsnpp_step(size: int, precision: str) -> Callable[[], np.ndarray]:
    config = NCSNPP.config
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, precision=precision))
    data = DataSpec(channels=NCSNPP.channels, resolution=NCSNPP.resolution, conditioning=Conditioning.of_labels(0))
    return our_step(config, data, batch_of(size), EMA_RATE)


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
    net = plain_network(DIGITS)
    schedule = network(DIGITS).preconditioning.schedule
    images, epsilon = likelihood_inputs()

    def score(u: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        std = schedule.std(t.double()).float().reshape(-1, 1, 1, 1)
        return -net(u, 999 * t) / std

    rates = schedule.beta_min, schedule.beta_max
    return lambda: textbook_score_sde.log_likelihood(score, images, epsilon, rates, TOLERANCE, FIRST_TIME).numpy()


def our_likelihood() -> Callable[[], np.ndarray]:
    set_up_device(torch.device("cpu"), huge_pages=True)
    net = network(DIGITS)
    images, epsilon = likelihood_inputs()
    options = FlowLikelihoodConfig(rtol=TOLERANCE, atol=TOLERANCE, common_norm=True, first_time=FIRST_TIME)
    return lambda: log_likelihood(net, images, epsilon=epsilon, options=options).log_p.numpy()


def recorded_calls() -> tuple[Any, Sampler, torch.Tensor, list[tuple[torch.Tensor, ...]]]:
    """A denoiser, predictor-corrector sampling, the noise that it starts with, and the calls that it makes."""
    set_up_device(torch.device("cpu"), huge_pages=False)
    net = network(NCSNPP)
    use_channels_last(net)
    config = SamplerConfig(solver="pc", grid=GridConfig(num_steps=PC_STEPS))
    sampler = Sampler(config, grid_for(config, net))
    noise = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    calls = []

    def recorded(*args: Any) -> torch.Tensor:
        calls.append(args)
        return net(*args)

    sampler(recorded, noise, None, randn_like=torch.randn_like)
    return net, sampler, noise, calls


def network_calls() -> Callable[[], int]:
    net, _, _, calls = recorded_calls()

    @torch.inference_mode()
    def run() -> int:
        for args in calls:
            net(*args)
        return len(calls)

    return run


def whole_sampling() -> Callable[[], int]:
    net, sampler, noise, calls = recorded_calls()

    @torch.inference_mode()
    def run() -> int:
        sampler(net, noise, None, randn_like=torch.randn_like)
        return len(calls)

    return run


JOBS = [
    *(
        Job(
            f"NCSN++ {name}, {precision}, batch {size}",
            partial(plain, size),
            partial(ours, size, precision),
            bar,
            tolerance,
            precision,
        )
        for name, plain, ours in [
            ("forward", plain_forward, our_forward),
            ("training step", plain_step, our_ncsnpp_step),
        ]
        for precision, bar, tolerance in [("fp32", 1.3, 1e-4), ("bf16", 2.0, 5e-2)]
        for size in (16, 1)
    ),
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
    # Against the network alone: 0.97 are 3 % of overhead.
    Job(f"predictor-corrector, {PC_STEPS} steps, of NCSN++, batch 4", network_calls, whole_sampling, 0.97, 0),
    Job(f"likelihood of {IMAGES} digits, tolerance {TOLERANCE:g}", plain_likelihood, our_likelihood, 2.0, 1e-3),
]
