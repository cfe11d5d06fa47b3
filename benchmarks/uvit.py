"""U-ViT S/2 at 32x32, batch 16: forward pass and gradients, of the plainly written network and of ours."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import textbook_uvit
from benchmarks.harness import Job
from torch_utils.device import set_up_device
from training.networks.uvit import UViT

BATCH = 16
S_2 = dict(img_size=32, patch_size=2, in_chans=3, embed_dim=512, depth=12, num_heads=8)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
COMPARED = 40_000  # elements of each gradient that both variants are compared by


def network() -> UViT:
    torch.manual_seed(0)
    return UViT(**S_2)


def plain_network() -> nn.Module:
    net = textbook_uvit.UViT(**S_2)
    net.load_state_dict(network().state_dict())
    return net


def our_network() -> nn.Module:
    set_up_device(torch.device("cpu"), huge_pages=True)
    return network()


def inputs(precision: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noisy images, time labels and noise."""
    rnd = torch.Generator().manual_seed(1)
    x, noise = torch.randn(2, BATCH, 3, 32, 32, generator=rnd)
    return x.to(DTYPES[precision]), torch.rand(BATCH, generator=rnd) * 999, noise


def forward(make_net: Callable[[], nn.Module], precision: str) -> Callable[[], np.ndarray]:
    net = make_net().eval().requires_grad_(False)
    x, label, _ = inputs(precision)

    @torch.inference_mode()
    def run() -> np.ndarray:
        return net(x, label).float().numpy()

    return run


def gradients(make_net: Callable[[], nn.Module], precision: str) -> Callable[[], np.ndarray]:
    net = make_net().train()
    x, label, noise = inputs(precision)

    def run() -> np.ndarray:
        net.zero_grad(set_to_none=True)
        (net(x, label).float() - noise).square().mean().backward()
        found = [p.grad.flatten()[:COMPARED] for p in net.parameters() if p.grad is not None]
        return torch.cat(found).numpy()

    return run


JOBS = [
    Job(
        f"U-ViT {name}, {precision}, batch {BATCH}",
        partial(set_up, plain_network, "fp32"),
        partial(set_up, our_network, precision),
        bar,
        tolerance,
    )
    for name, set_up in [("forward", forward), ("gradients", gradients)]
    for precision, bar, tolerance in [("fp32", 1.3, 1e-4), ("bf16", None, 5e-2)]
]
