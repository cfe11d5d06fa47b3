"""Masks of images: 1 = known, float32 [N or 1, 1, H, W]."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import torch

from dnnlib.errors import UserError, one_line
from training.config.restoration import MaskConfig


def known_pixels(masks: MaskConfig, indices: Sequence[int], seed: int, resolution: int) -> torch.Tensor:
    """The mask that the options name; raises as the functions below."""
    if masks.path is not None:
        return mask_of_file(masks.path, resolution)
    if masks.box is not None:
        return mask_of_box(masks.box, resolution)
    return mask_of_ratio(masks.ratio or 0.0, indices, seed, resolution)


def mask_of_file(path: Path, resolution: int) -> torch.Tensor:
    """White pixels of a picture are known, black ones are to be filled in.

    Raises:
        UserError: it cannot be read, or is of another size.
    """
    try:
        with PIL.Image.open(path) as picture:
            mask = np.asarray(picture.convert("L")) >= 128
    except Exception as err:  # a damaged file can fail in any way
        raise UserError(f"--mask={path}: cannot be read as a picture ({one_line(err)})") from None
    if mask.shape != (resolution, resolution):
        height, width = mask.shape
        raise UserError(f"--mask={path}: is {width}x{height}, and the images are {resolution}x{resolution}")
    return torch.from_numpy(mask).float()[None, None]


def mask_of_box(box: Sequence[int], resolution: int) -> torch.Tensor:
    """All is known but a box of pixels (left, top, right, bottom), without the last two.

    Raises:
        UserError: it is empty, or reaches beyond the images.
    """
    left, top, right, bottom = box
    if not (0 <= left < right <= resolution and 0 <= top < bottom <= resolution):
        raise UserError(
            f"--box={left},{top},{right},{bottom}: must lie within 0,0,{resolution},{resolution} and not be empty"
        )
    mask = torch.ones(1, 1, resolution, resolution)
    mask[..., top:bottom, left:right] = 0
    return mask


def mask_of_ratio(ratio: float, indices: Sequence[int], seed: int, resolution: int) -> torch.Tensor:
    """That share of all pixels is unknown, at places that depend on seed and image."""
    masks = []
    for index in indices:
        order = np.random.default_rng([seed, index]).permutation(resolution**2)
        masks.append(torch.from_numpy(order >= round(ratio * resolution**2)).float())
    return torch.stack(masks).reshape(-1, 1, resolution, resolution)
