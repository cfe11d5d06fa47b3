"""Dropout (Srivastava et al. 2014) whose masks are functions of the image, the layer and the position.

So they do not depend on which images share a batch, and need no random generator: a forward pass that is computed a
second time, as activation checkpointing does, meets the same masks.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class LayerWithDropout(nn.Module):
    """A layer that drops some of its activations in training.

    Its `mask_keys`, int32 [2, N], say which: two numbers of each image, as `ImageMasks` sets them. None = torch's
    generator decides.
    """

    dropout: float  # probability
    mask_keys: torch.Tensor | None = None

    def drop(self, x: torch.Tensor) -> torch.Tensor:
        """Activations [N, C, H, W], some 0, and the others larger by 1 / (1 - p); as they are in eval mode."""
        if not self.training or self.dropout == 0:
            return x
        if self.mask_keys is None:
            return F.dropout(x, self.dropout)
        return x * keep(self.mask_keys, x.shape[1:], self.dropout).to(x.dtype).mul_(1 / (1 - self.dropout))


def keep(keys: torch.Tensor, shape: Sequence[int], p: float) -> torch.Tensor:
    """Which activations stay: all but a share `p`, bool [N, C, H, W].

    Multiply-add hashing modulo 2^32 (Dietzfelbinger 1996, "Universal hashing and k-wise independent random variables
    via integer arithmetic without primes"): an activation goes if a x + b < 2^32 p, where (a, b) are the image's keys
    in this layer and x is a number of its position, random to the eye. Where a and b are random, any two images are
    independent, and so are nearly all pairs of positions: all but those whose numbers differ by a multiple of 2^27,
    about one pair in 10^8.

    Args:
        keys: a, odd, and b of each image, int32 [2, N].
        shape: (C, H, W).
    """
    C, H, W = shape
    # Along the channels first, as activations are stored.
    x = position_numbers(C * H * W, keys.device).reshape(H, W, C).permute(2, 0, 1)
    a, b = keys.reshape(2, -1, 1, 1, 1).unbind()
    return (a * x).add_(b) >= round(p * 2**32) - 2**31  # int32: numbers modulo 2^32, less 2^31


def position_numbers(count: int, device: torch.device) -> torch.Tensor:
    """A one-to-one function of 0, 1, ..., int32 [count], in which these are no longer recognised.

    Bits are mixed by multiplications and shifts. In int64, where no product of 32 and 31 bits overflows.
    """
    x = torch.arange(count, device=device) + 1
    for _ in range(3):
        x = (x ^ (x >> 16)) * 0x45D9F3B & 0xFFFFFFFF
    return ((x ^ (x >> 16)) - 2**31).to(torch.int32)


class ImageMasks:
    """Has a network drop what is a function of the image alone.

    Args:
        net: whose layers with dropout are set.
    """

    def __init__(self, net: nn.Module):
        self.layers = [m for m in net.modules() if isinstance(m, LayerWithDropout) and m.dropout > 0]

    def __call__(self, seeds: np.ndarray, device: torch.device) -> None:
        """Set the masks of the forward passes that follow.

        Args:
            seeds: of the images of the batch, int64 [N] below 2^32.
            device: where the network is.
        """
        if self.layers:
            keys = torch.from_numpy(mask_keys(len(self.layers), seeds)).to(device, non_blocking=True)
            for layer, own in zip(self.layers, keys, strict=True):
                layer.mask_keys = own


def masks_of_round(seeds: np.ndarray, _device: torch.device) -> None:
    """Have torch's generator decide, beginning with the seed of the batch's first image."""
    torch.manual_seed(int(seeds[0]))


def mask_keys(layers: int, seeds: np.ndarray) -> np.ndarray:
    """`LayerWithDropout.mask_keys` of each layer, int32 [layers, 2, N].

    Both halves of a 64-bit hash of layer and seed, SplitMix64's (Steele et al. 2014, "Fast splittable pseudorandom
    number generators", Figure 16).
    """
    z = (np.arange(1, layers + 1, dtype=np.uint64)[:, None] << np.uint64(32)) | seeds.astype(np.uint64)
    z *= np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    a, b = (z >> np.uint64(32)).astype(np.uint32) | np.uint32(1), (z & np.uint64(0xFFFFFFFF)).astype(np.uint32)
    return np.stack([a, b], axis=1).view(np.int32)
