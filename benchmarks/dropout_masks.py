"""What dropout masks by image cost: a layer, and gradients of a batch of 16 images of 32x32 (30 million parameters).

Interleaved with masks by torch's generator (`--dropout-masks=round`).
"""

import functools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.harness import Job, measure
from benchmarks.training_step import BATCH, compute_gradients, network
from torch_utils.device import set_up_device
from torch_utils.gradients import flat_gradients
from training.networks.dropout import ImageMasks, LayerWithDropout, masks_of_round
from training.networks.edm2_layers import effective_weights

P = 0.1
SHAPE = (BATCH, 64, 32, 32)


def layer(by_image: bool) -> Callable[[], float]:
    """Dropout of the activations of a block, and its gradient."""
    drops = LayerWithDropout()
    drops.dropout = P
    set_masks = ImageMasks(drops) if by_image else masks_of_round
    x = torch.randn(SHAPE).contiguous(memory_format=torch.channels_last).requires_grad_()
    gradient = torch.ones_like(x)

    def run() -> float:
        x.grad = None
        set_masks(np.arange(BATCH), x.device)
        drops.drop(x).backward(gradient)
        return 1.0  # the masks differ

    return run


def gradients(by_image: bool) -> Callable[[], float]:
    set_up_device(torch.device("cpu"), huge_pages=True)
    net = network()
    for block in net.modules():
        if isinstance(block, LayerWithDropout):
            block.dropout = P
    set_masks = ImageMasks(net) if by_image else masks_of_round
    flat = flat_gradients(net.parameters())

    def run() -> float:
        flat.zero_()
        set_masks(np.arange(BATCH), flat.device)
        with effective_weights(net, normalize_first=True):
            compute_gradients(net, rounds=1)
        return 1.0

    return run


@click.command()
@click.option("--repeats", type=click.IntRange(min=1), default=15, show_default=True)
def main(repeats: int) -> None:
    for name, made in {"a layer": layer, "gradients": gradients}.items():
        job = Job(name, functools.partial(made, False), functools.partial(made, True), None, 0)
        timing = measure(job, repeats)
        by_round, by_image = (1000 * statistics.median(seconds) for seconds in (timing.textbook, timing.ours))
        print(f"{name}: {by_round:.1f} ms by round, {by_image:.1f} ms by image, {timing.ratio:.2f} times as fast")


if __name__ == "__main__":
    main()
