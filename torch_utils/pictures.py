"""Images as PNG files and grids."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.PngImagePlugin
import torch

from dnnlib.errors import UserError
from dnnlib.files import atomic_write, check_not_input

MIN_TILE = 64  # smaller images are enlarged to at least this many pixels in grids, to be visible
CAPTION_HEIGHT = 14  # of the default font
GRID_GAP, GRID_GRAY = 8, 96  # width and brightness of the lines between enlarged images


def check_picture(option: str, path: Path, inputs: Mapping[str, str | os.PathLike | None]) -> None:
    """Refuse a name for a PNG file that says another type, or is that of an input, see `check_not_input`.

    Raises:
        UserError: it does.
    """
    check_not_input(option, path, inputs)
    if path.suffix.lower() != ".png":
        raise UserError(f"{option}={path}: is saved as PNG: choose a name that ends in .png")


def write_png(f: IO[bytes], image: np.ndarray, text: Mapping[str, str] | None = None) -> None:
    """Write uint8 [C, H, W] (1, 2, 3 or 4 channels) as PNG to an open file, with text by keyword."""
    pixels = image[0] if image.shape[0] == 1 else image.transpose(1, 2, 0)
    chunks = PIL.PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        chunks.add_text(key, value)
    PIL.Image.fromarray(np.ascontiguousarray(pixels)).save(f, format="png", pnginfo=chunks)


def save_image(path: str | Path, image: np.ndarray, text: Mapping[str, str] | None = None) -> None:
    """As `write_png`, as a file."""
    with atomic_write(path, sync=False) as f:
        write_png(f, image, text)


def image_grid(images: np.ndarray, columns: int, captions: Sequence[str] | None = None) -> np.ndarray:
    """One picture, uint8 [C, height, width], of images, uint8 [N, C, H, W], in rows.

    Small ones are enlarged, with lines between them. Captions stand below the images, cut where the room ends.
    """
    N, C, H, W = images.shape
    rows = math.ceil(N / columns)
    scale = max(math.ceil(MIN_TILE / H), 1)
    gap = GRID_GAP if scale > 1 else 0
    tiles = np.zeros([rows * columns, C, H, W], dtype=np.uint8)
    tiles[:N] = images
    tiles = tiles.repeat(scale, axis=2).repeat(scale, axis=3)
    if captions is not None:
        lines = [_caption(text, tiles.shape[3], C) for text in [*captions, *[""] * (len(tiles) - N)]]
        tiles = np.concatenate([tiles, np.stack(lines)], axis=2)
    tiles = np.pad(tiles, [(0, 0), (0, 0), (0, gap), (0, gap)], constant_values=GRID_GRAY)
    height, width = tiles.shape[2:]
    grid = tiles.reshape(rows, columns, C, height, width).transpose(2, 0, 3, 1, 4)
    grid = grid.reshape(C, rows * height, columns * width)
    return grid[:, : grid.shape[1] - gap, : grid.shape[2] - gap]


def _caption(text: str, width: int, channels: int) -> np.ndarray:
    """A line of text, white on black, uint8 [channels, CAPTION_HEIGHT, width]."""
    line = PIL.Image.new("L", (width, CAPTION_HEIGHT))
    PIL.ImageDraw.Draw(line).text((2, 1), text[:width], fill=255)
    pixels = np.repeat(np.asarray(line)[None], channels, axis=0)
    if channels in (2, 4):
        pixels[-1] = 255  # opaque
    return pixels


def drawable(images: torch.Tensor) -> np.ndarray:
    """Pixels, uint8 [N, 1, 3 or 4, H, W]: those given, or latents scaled to 0..255, without extra channels."""
    if images.dtype != torch.uint8:
        low, high = images.amin(), images.amax()
        images = ((images - low) / (high - low).clamp(min=1e-8) * 255).to(torch.uint8)
    channels = images.shape[1]
    return images[:, : {1: 1, 2: 1, 4: 4}.get(channels, 3)].cpu().numpy()
