"""One call of the denoiser on the CPU: of the plainly written network, and of `FastDenoiser`.

EDM2's architecture for latents of 4 channels at 64x64, class-conditional, with random weights: 22.7 GFLOP per image
with 64 model channels, 89.9 with 128.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import textbook
from benchmarks.harness import Job
from torch_utils.device import set_up_device
from training.networks.edm2 import Precond
from training.networks.edm2_cpu import FastDenoiser

RESOLUTION, IMG_CHANNELS, LABEL_DIM = 64, 4, 10


def network(model_channels: int, precision: str) -> Precond:
    torch.manual_seed(0)
    net = Precond(RESOLUTION, IMG_CHANNELS, LABEL_DIM, precision, model_channels=model_channels)
    for name, parameter in net.named_parameters():
        if name.endswith("gain"):
            parameter.data.fill_(0.5)  # zero before training, which would hide most of the network
    return net.eval().requires_grad_(False)


def inputs(batch: int, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy images and class vectors."""
    torch.manual_seed(1)
    x = torch.randn(batch, IMG_CHANNELS, RESOLUTION, RESOLUTION)
    labels = torch.eye(LABEL_DIM)[torch.arange(batch) % LABEL_DIM]
    return x.to(device), labels.to(device)


def call(
    denoiser: Callable[..., torch.Tensor], batch: int, device: torch.device | str = "cpu"
) -> Callable[[], torch.Tensor]:
    x, labels = inputs(batch, device)
    return torch.inference_mode()(partial(denoiser, x, torch.tensor(1.0, device=device), labels))


def set_up_textbook(model_channels: int, batch: int) -> Callable[[], torch.Tensor]:
    net = textbook.Precond(RESOLUTION, IMG_CHANNELS, LABEL_DIM, model_channels=model_channels)
    net.load_state_dict(network(model_channels, "fp32").state_dict())
    return call(net.eval().requires_grad_(False), batch)


def set_up_ours(model_channels: int, batch: int, precision: str) -> Callable[[], torch.Tensor]:
    set_up_device(torch.device("cpu"))
    return call(FastDenoiser(network(model_channels, precision), batch), batch)


def job(model_channels: int, batch: int, precision: str) -> Job:
    bar = {"fp32": 1.9 if batch == 1 else 1.4, "bf16": 2.4}[precision]
    return Job(
        f"sampling forward, {precision}, {model_channels} channels, batch {batch}",
        partial(set_up_textbook, model_channels, batch),
        partial(set_up_ours, model_channels, batch, precision),
        bar=bar,
        tolerance={"fp32": 1e-4, "bf16": 2e-2}[precision],
        precision=precision,
    )


JOBS = [job(C, batch, precision) for precision in ("fp32", "bf16") for C in (64, 128) for batch in (1, 4, 8)]
