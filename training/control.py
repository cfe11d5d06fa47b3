"""Control of samplers: what is known of an image is put back after each update (Song et al. 2021, Appendix I).

A control is called as control(x, sigma, randn_like) -> x, with the solution x = x0 + sigma n [N, C, H, W] at a noise
level sigma (a number, or one per image, [N]). It puts noisy versions of the known parts there, and at sigma = 0 those
parts themselves. The unknown parts see them by way of the network only, so it works with every solver.
"""

from collections.abc import Callable
from typing import Protocol

import torch

from dnnlib.errors import UserError

RandnLike = Callable[[torch.Tensor], torch.Tensor]


class Control(Protocol):
    """What is put back after each update of a sampler."""

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor | float, randn_like: RandnLike) -> torch.Tensor: ...


def noise_of(x: torch.Tensor, sigma: torch.Tensor | float, randn_like: RandnLike) -> torch.Tensor:
    """Noise of standard deviation sigma, shaped like x; where sigma = 0 throughout, nothing is drawn."""
    level = torch.as_tensor(sigma)
    if not level.any():
        return torch.zeros_like(x)
    return level.to(x.dtype).to(x.device).reshape(-1, 1, 1, 1) * randn_like(x)


class KnownPixels:
    """Inpainting: the pixels of an image that a mask names.

    Args:
        images: what is known, in the units of the denoiser, [N, C, H, W] or [1, C, H, W].
        mask: 1 where a pixel is known and 0 elsewhere; broadcast to the images. The other pixels of `images` are
            never looked at.

    Raises:
        UserError: a mask of another size, or of other values.
    """

    def __init__(self, images: torch.Tensor, mask: torch.Tensor):
        try:
            known = mask.expand(images.shape)
        except RuntimeError:
            raise UserError(f"a mask of shape {list(mask.shape)} does not fit images {list(images.shape)}") from None
        if not ((mask == 0) | (mask == 1)).all():
            raise UserError("a mask must be 1 where pixels are known and 0 elsewhere")
        self.known = known.bool()
        self.images = images.where(self.known, torch.zeros_like(images))

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor | float, randn_like: RandnLike) -> torch.Tensor:
        return torch.where(self.known, self.images.to(x.dtype) + noise_of(x, sigma, randn_like), x)


class KnownGrey:
    """Colourisation: the mean of red, green and blue.

    Along e = (1, 1, 1) / sqrt(3) an image is known, at right angles to it (its colours) it is not.

    Args:
        images: grey, or of any colour, whose mean is known: in the units of the denoiser, [N, 1 or 3, H, W].

    Raises:
        UserError: images of another number of channels.
    """

    def __init__(self, images: torch.Tensor):
        if images.shape[1] not in (1, 3):
            raise UserError(f"colouring needs images of 1 or 3 channels, not {images.shape[1]}")
        self.known = images.mean(dim=1, keepdim=True) * 3**0.5

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor | float, randn_like: RandnLike) -> torch.Tensor:
        e = 3**-0.5
        along = (x * e).sum(dim=1, keepdim=True)
        return x + e * (self.known.to(x.dtype) + noise_of(x, sigma, randn_like)[:, :1] - along)
