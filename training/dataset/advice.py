"""Ready commands for images that are no dataset yet."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

import torch

SIZES = (32, 64)  # that are proposed for images of all kinds of sizes: without a GPU, and with one
BY = "make a dataset of them by "


def how_to_convert(path: Path, *shapes: Sequence[int]) -> str:
    """The end of an error about images that are not square or not alike: the command that makes a dataset of them.

    Args:
        path: folder or ZIP file.
        shapes: of some of the images, [C, H, W]; if all sides are the same, they stay.
    """
    sides = {side for shape in shapes for side in shape[1:]}
    size = next(iter(sides)) if len(sides) == 1 else SIZES[min(sides) >= SIZES[1] and torch.cuda.is_available()]
    dest = f"{path.with_suffix('') if path.suffix == '.zip' else os.path.normpath(path)}-{size}x{size}.zip"
    return (
        f"; {BY}python dataset_tool.py convert --source={shlex.quote(str(path))} "
        f"--dest={shlex.quote(dest)} --resolution={size}x{size} --transform=center-crop"
    )
