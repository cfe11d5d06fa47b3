"""Images as PNG files and grids."""

import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import PIL.Image
import torch

from dnnlib.errors import UserError
from dnnlib.files import atomic_write, check_not_input

MIN_TILE = 64  # smaller images are enlarged to at least this many pixels in grids, to be visible
GRID_GAP, GRID_GRAY = 8, 96  # width and brightness of the lines between enlarged images


def check_picture(option: str, path: Path, inputs: Mapping[str, str | os.PathLike | None]) -> None:
    """Refuse a name for a PNG file that says another type, or is that of an input, see `check_not_input`.

    Raises:
        UserError: it does.
    """
    check_not_input(option, path, inputs)
    if path.suffix.lower() != ".png":
        raise UserError(f"{option}={path}: is saved as PNG: choose a name that ends in .png")


def save_image(path: str | Path, image: np.ndarray) -> None:
    """Write uint8 [C, H, W] (1, 2, 3 or 4 channels) as PNG."""
    pixels = image[0] if image.shape[0] == 1 else image.transpose(1, 2, 0)
    with atomic_write(path, sync=False) as f:
        PIL.Image.fromarray(np.ascontiguousarray(pixels)).save(f, format="png")


def image_grid(images: np.ndarray, columns: int) -> np.ndarray:
    """One picture, uint8 [C, height, width], of images, uint8 [N, C, H, W], in rows.

    Small ones are enlarged, with lines between them.
    """
    N, C, H, W = images.shape
    rows = math.ceil(N / columns)
    scale = max(math.ceil(MIN_TILE / H), 1)
    gap = GRID_GAP if scale > 1 else 0
    tiles = np.zeros([rows * columns, C, H, W], dtype=np.uint8)
    tiles[:N] = images
    tiles = tiles.repeat(scale, axis=2).repeat(scale, axis=3)
    tiles = np.pad(tiles, [(0, 0), (0, 0), (0, gap), (0, gap)], constant_values=GRID_GRAY)
    tiles = tiles.reshape(rows, columns, C, *tiles.shape[2:]).transpose(2, 0, 3, 1, 4)
    grid = tiles.reshape(C, rows * (H * scale + gap), columns * (W * scale + gap))
    return grid[:, : grid.shape[1] - gap, : grid.shape[2] - gap]


def drawable(images: torch.Tensor) -> np.ndarray:
    """Pixels, uint8 [N, 1, 3 or 4, H, W]: those given, or latents scaled to 0..255, without extra channels."""
    if images.dtype != torch.uint8:
        low, high = images.amin(), images.amax()
        images = ((images - low) / (high - low).clamp(min=1e-8) * 255).to(torch.uint8)
    channels = images.shape[1]
    return images[:, : {1: 1, 2: 1, 4: 4}.get(channels, 3)].cpu().numpy()
