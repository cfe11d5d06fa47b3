"""A training step of any family, as the training loop takes it, for comparison with one written plainly."""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from torch_utils.device import set_up_device
from torch_utils.gradients import use_channels_last
from training.conditioning import DataSpec
from training.config.training import TrainConfig
from training.families import trained_by
from training.phema import RampedEMA
from training.samplers.noise import StackedRandomGenerator

COMPARED = 40_000  # elements of each tensor that both variants are compared by


def some(tensors: Iterable[torch.Tensor]) -> np.ndarray:
    """The first rows of each tensor."""
    rows = [t.detach().reshape(1, -1) if t.ndim == 0 else t.detach() for t in tensors]
    return torch.cat([t[: max(COMPARED // t[0].numel(), 1)].flatten() for t in rows]).numpy()


def gradients_of(net: torch.nn.Module) -> np.ndarray:
    """Some of them, in the order of the parameters' names."""
    return some(p.grad for _, p in sorted(net.named_parameters()) if p.grad is not None)


def random_numbers(images: torch.Tensor) -> StackedRandomGenerator:
    """Those of each image in a step; both variants draw the same."""
    return StackedRandomGenerator(images.device, range(len(images)))


def our_step(
    config: TrainConfig, data: DataSpec, images: torch.Tensor, ema_rate: float | None
) -> Callable[[], np.ndarray]:
    """Gradients, optimiser and average of the weights; returns the gradients of the step.

    Args:
        config: of the run.
        data: what the images look like.
        images: [N, C, H, W] in the units of the network.
        ema_rate: decay per step of the average; None = there is none.
    """
    set_up_device(torch.device("cpu"), huge_pages=True)
    entry = trained_by(config)
    assert entry.objective is not None and entry.optimizer is not None
    torch.manual_seed(0)
    net = entry.build(config.network, data).train()
    net.precision = config.run.precision
    use_channels_last(net)
    objective, optimizer = entry.objective(net, config), entry.optimizer(net, config)
    ema = None if ema_rate is None else RampedEMA(net, ema_rate)
    nimg = 0

    def run() -> np.ndarray:
        nonlocal nimg
        optimizer.zero_gradients()
        with entry.step(net):
            loss = objective(net, images, None, rnd=random_numbers(images), nimg=nimg)
            (loss.sum() * (optimizer.loss_scaling / len(images))).backward()
            regularizer = objective.regularizer(net, nimg)
            if regularizer is not None:
                (regularizer * optimizer.loss_scaling).backward()
        optimizer.step(nimg)
        nimg += len(images)
        if ema is not None:
            ema.update(nimg, len(images))
        return gradients_of(net)

    return run
