"""Dropout masks by image."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_network

from training.networks.dropout import ImageMasks, LayerWithDropout, keep, mask_keys

SHAPE = (8, 16, 16)
P = 0.3


def masks(layers: int = 1, seeds: range = range(64), p: float = P) -> torch.Tensor:
    """What stays, bool [layers, N, C, H, W]."""
    keys = torch.from_numpy(mask_keys(layers, np.array(seeds)))
    return torch.stack([keep(own, SHAPE, p) for own in keys])


def layer(p: float = P) -> LayerWithDropout:
    made = LayerWithDropout()
    made.dropout = p
    return made


def test_masks_are_of_the_image_whatever_its_batch():
    whole = masks(2)
    for seeds in (range(0, 3), range(3, 64)):
        assert torch.equal(masks(2, seeds), whole[:, seeds.start : seeds.stop])
    flat = whole.flatten(0, 1).flatten(1)
    assert len(torch.unique(flat, dim=0)) == len(flat)  # another one in each layer, and for each image


@pytest.mark.parametrize("p", [0.0005, 0.1, 0.5, 0.9])
def test_shares_are_those_of_independent_draws(p):
    """Means over all, per image, per channel, per column and per position, whose variance is that of the binomial."""
    dropped = (~masks(4, range(500), p)).double().flatten(0, 1)  # [2000, C, H, W]
    assert abs(dropped.mean() - p) < 5 * (p * (1 - p) / dropped.numel()) ** 0.5
    for dims in [(1, 2, 3), (0, 2, 3), (0, 1, 2), (0,)]:
        count = dropped.numel() / dropped.mean(dim=dims).numel()
        scores = (dropped.mean(dim=dims) - p) / (p * (1 - p) / count) ** 0.5
        chi_square = scores.square().mean()  # of n degrees of freedom over n: 1 on average, with a variance of 2 / n
        assert abs(chi_square - 1) < 4 * (2 / scores.numel()) ** 0.5, dims


def test_neighbours_are_independent():
    """Neighbours along each dimension, images with neighbouring seeds, and neighbouring layers."""
    centered = masks(4, range(200)).double() - (1 - P)
    variance = P * (1 - P)
    for dim in range(5):
        a, b = centered.narrow(dim, 0, centered.shape[dim] - 1), centered.narrow(dim, 1, centered.shape[dim] - 1)
        assert abs((a * b).mean() / variance) < 5 / a.numel() ** 0.5, dim


def test_a_layer_drops_and_scales():
    x, drops = torch.randn(2, *SHAPE), layer()
    drops.mask_keys = torch.from_numpy(mask_keys(1, np.arange(2)))[0]
    kept = masks(1, range(2))[0]
    torch.testing.assert_close(drops.drop(x), x * kept / (1 - P))
    assert torch.equal(drops.drop(x.contiguous(memory_format=torch.channels_last)), drops.drop(x))
    assert drops.eval().drop(x) is x
    assert layer(0.0).drop(x) is x


def test_without_keys_torch_decides():
    x = torch.ones(2, *SHAPE)
    torch.manual_seed(5)
    ours = layer().drop(x)
    torch.manual_seed(5)
    assert torch.equal(ours, F.dropout(x, P))


def test_a_second_pass_meets_the_same_masks():
    """As activation checkpointing and the two passes of consistency tuning make it, with nothing in between."""
    net = tiny_network(dropout=0.5).train()
    set_masks = ImageMasks(net)
    assert len(set_masks.layers) == len([m for m in net.modules() if isinstance(m, LayerWithDropout)]) > 3
    x, sigma, labels = torch.randn(4, 1, 8, 8), torch.ones(4), torch.eye(10)[:4]

    def output(seeds: list[int]) -> torch.Tensor:
        set_masks(np.array(seeds), x.device)
        return net(x, sigma, labels)

    first = output([1, 2, 3, 4])
    assert torch.equal(net(x, sigma, labels), first)
    torch.manual_seed(9)
    assert torch.equal(output([1, 2, 3, 4]), first)
    assert not torch.equal(output([1, 2, 3, 5])[3], first[3])


def test_gradients_are_the_same_with_checkpointing():
    gradients = []
    for checkpointed in (False, True):
        net = tiny_network(dropout=0.5).train().requires_grad_(True)
        net.unet.checkpoint_activations = checkpointed
        ImageMasks(net)(np.arange(4), torch.device("cpu"))
        net(torch.ones(4, 1, 8, 8), torch.ones(4), torch.eye(10)[:4]).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]))
    assert torch.equal(*gradients)


@pytest.mark.slow
def test_compiled_masks_are_the_same():
    """In one graph, which is not compiled again for other seeds."""
    drops = layer()
    x = torch.randn(4, *SHAPE).contiguous(memory_format=torch.channels_last)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(drops.drop, fullgraph=True, dynamic=False, backend=counter)
    for seeds in (range(4), range(100, 104)):
        drops.mask_keys = torch.from_numpy(mask_keys(3, np.array(seeds)))[1]
        assert torch.equal(compiled(x) == 0, drops.drop(x) == 0)
        torch.testing.assert_close(compiled(x), drops.drop(x))
    assert counter.frame_count == 1
