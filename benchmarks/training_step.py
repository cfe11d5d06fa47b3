"""One optimiser step: gradients of a batch of 16 images of 32x32 (64 channels, 30 million parameters), and the rest."""

import functools
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import textbook
from benchmarks.harness import Job
from benchmarks.step import some
from torch_utils.device import set_up_device
from torch_utils.gradients import (
    channels_last_views,
    count_nonfinite,
    flat_gradients,
    replace_nonfinite_,
    use_channels_last,
)
from training.losses import EDM2Loss
from training.networks.edm2 import Precond
from training.networks.edm2_layers import MPConv, effective_weights, normalize_weights_
from training.phema import PowerFunctionEMA

BATCH = 16
LEARNING_RATE = 1e-4
STDS = (0.05, 0.10)


def network(precision: str = "fp32") -> Precond:
    torch.manual_seed(0)
    net = Precond(32, 3, 10, precision=precision, model_channels=64)
    with torch.no_grad():
        for p in net.parameters():
            if p.ndim == 0:  # gains, which are 0 at first
                p.fill_(0.5)
    normalize_weights_(net)
    use_channels_last(net)
    return net.train()


def compute_gradients(net: torch.nn.Module, rounds: int) -> None:
    rnd = torch.Generator().manual_seed(1)
    images = torch.randn(BATCH, 3, 32, 32, generator=rnd) * 0.5
    noise = torch.randn(BATCH, 3, 32, 32, generator=rnd)
    loss_fn = EDM2Loss()
    sigma = loss_fn.noise_levels(torch.randn(BATCH, generator=rnd))
    labels = torch.eye(10)[torch.arange(BATCH) % 10]
    parts = (t.chunk(rounds) for t in (images, labels, sigma, noise))
    for y, c, s, n in zip(*parts, strict=True):
        (loss_fn(net, y, c, sigma=s, noise=n).sum() / BATCH).backward()


def in_order(net: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Parameters in an order that both variants share."""
    return [p for _, p in sorted(net.named_parameters())]


def plain_network() -> textbook.Precond:
    net = textbook.Precond(32, 3, 10, model_channels=64)
    net.load_state_dict(network().state_dict())
    return net.train()


def plain_gradients(rounds: int) -> Callable[[], np.ndarray]:
    net = plain_network()

    def run() -> np.ndarray:
        net.zero_grad(set_to_none=True)
        compute_gradients(net, rounds)
        return some([p.grad for p in in_order(net) if p.grad is not None])

    return run


def our_gradients(rounds: int, precision: str) -> Callable[[], np.ndarray]:
    set_up_device(torch.device("cpu"), huge_pages=True)
    net = network(precision)
    gradients = flat_gradients(net.parameters())

    def run() -> np.ndarray:
        gradients.zero_()
        with effective_weights(net, normalize_first=True):
            compute_gradients(net, rounds)
        return some([p.grad for p in in_order(net) if p.grad is not None])

    return run


def plain_parameters() -> Callable[[], np.ndarray]:
    net = plain_network()
    convs = [m for m in net.modules() if isinstance(m, textbook.MPConv)]
    rest = textbook.PlainOptimization(net, LEARNING_RATE, STDS)
    for p in in_order(net):
        p.grad = torch.full_like(p, 1e-3)
    found = [torch.full_like(conv.weight, 1e-3) for conv in convs]

    def run() -> np.ndarray:
        for conv, grad in zip(convs, found, strict=True):
            w = textbook.normalize(conv.weight)
            with torch.no_grad():
                conv.weight.copy_(w)
            w = textbook.normalize(conv.weight) / np.sqrt(conv.weight[0].numel())
            w.backward(grad)
        rest.step(BATCH, BATCH)
        return some(in_order(net))

    return run


def our_parameters() -> Callable[[], np.ndarray]:
    set_up_device(torch.device("cpu"), huge_pages=True)
    net = network()
    gradients = flat_gradients(net.parameters())
    gradients.fill_(1e-3)
    optimizer = torch.optim.Adam(channels_last_views(net.parameters()), lr=LEARNING_RATE, betas=(0.9, 0.99), fused=True)
    ema = PowerFunctionEMA(net, STDS)
    convs = [m for m in net.modules() if isinstance(m, MPConv)]
    found = [torch.full_like(conv.weight, 1e-3) for conv in convs]
    nonfinite = torch.zeros([], dtype=torch.int64)

    def run() -> np.ndarray:
        with effective_weights(net, normalize_first=True):
            for conv, grad in zip(convs, found, strict=True):
                assert conv.shared_weight is not None
                conv.shared_weight.grad = grad
        count = count_nonfinite(gradients)
        nonfinite.add_(count)
        if count > 0:
            replace_nonfinite_(gradients)
        optimizer.step()
        ema.update(BATCH, BATCH)
        return some(in_order(net))

    return run


JOBS = [
    Job(
        f"gradients, {precision}, batch {BATCH}" + (f" in {rounds} rounds" if rounds > 1 else ""),
        functools.partial(plain_gradients, rounds),
        functools.partial(our_gradients, rounds, precision),
        bar,
        tolerance,
        precision,
    )
    for precision, rounds, bar, tolerance in [
        ("fp32", 1, 1.25, 1e-5),
        ("fp32", 4, 1.35, 1e-5),
        ("bf16", 1, 1.8, 0.02),
        ("bf16", 4, 1.8, 0.02),
    ]
] + [Job("parameter side of the step", plain_parameters, our_parameters, 2, 1e-6)]
