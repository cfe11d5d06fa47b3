"""Data as NVAE's published code keeps it: LMDB archives, Omniglot's `chardata.mat`, and its ways to resize images.

Everything reads without executing anything in a file.
"""

import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image

from dnnlib.errors import UserError
from training.conversion.mat import read_mat
from training.conversion.opening import open_source
from training.conversion.sources import Source, SourceImage
from training.conversion.transforms import resize

BILINEAR = PIL.Image.Resampling.BILINEAR
CELEBA_BOX = (15, 40, 163, 188)  # left, upper, right, lower edge of the part of a CelebA image that is kept
LMDB_KIND = "LMDB database"  # what `open_source` calls one
OMNIGLOT_SIDE = 28


# ---------------------------------------------------------------------------------------------------------
# LMDB archives


def open_lmdb(path: Path) -> Source:
    """Images of an archive whose keys are 0, 1, ... in decimal, in that order: raw pixels or encoded files.

    Raw pixels are RGB, row by row, of square images. Only what is there counts, not the split that a name promises.

    Raises:
        UserError: no such archive, a damaged one, one that is keyed in another way, or no package that reads it.
    """
    source = open_source(path)
    if source.kind != LMDB_KIND:
        raise UserError(f"--source={path}: no LMDB database")

    def images() -> Iterator[SourceImage]:
        import lmdb

        with lmdb.open(str(path), readonly=True, lock=False) as env, env.begin() as transaction:
            for i in range(source.count or 0):
                data = transaction.get(str(i).encode())
                if data is None:
                    raise UserError(f"--source={path}: entry {i} of {source.count} is missing: keys must be 0, 1, ...")
                yield SourceImage(f"{path}:{i}", _raw_pixels(bytes(data)))

    return replace(source, images=images)


def _raw_pixels(data: bytes) -> bytes | np.ndarray:
    """Pixels [R, R, 3] where there are just as many bytes, an encoded file otherwise."""
    side = math.isqrt(len(data) // 3)
    encoded = data.startswith((b"\x89PNG", b"\xff\xd8\xff", b"RIFF"))
    if encoded or 3 * side * side != len(data):
        return data
    return np.frombuffer(data, np.uint8).reshape(side, side, 3)


# ---------------------------------------------------------------------------------------------------------
# Omniglot


def read_omniglot(path: Path, split: str = "train") -> np.ndarray:
    """Characters of the `chardata.mat` of importance-weighted autoencoders (Burda et al. 2016): uint8 [N, 28, 28].

    Values are 255 times the probability of white.

    Args:
        split: "train" (24,345 characters) or "test" (8,070).

    Raises:
        UserError: no such file, no MATLAB 5 file, or one without these arrays.
    """
    name = {"train": "data", "test": "testdata"}[split]
    if not path.is_file():
        raise UserError(f"--source={path}: no such file")
    try:
        arrays = {key: value for key, value in read_mat(path.read_bytes()) if key == name}
        columns = arrays[name].reshape(OMNIGLOT_SIDE, OMNIGLOT_SIDE, -1, order="F")
    except (KeyError, ValueError, struct.error, zlib.error) as err:
        raise UserError(f"--source={path}: not the chardata.mat of Omniglot ({err}): download it again") from None
    return (255 * columns.transpose(2, 0, 1)).astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------
# Sizes


def crop_celeba(image: np.ndarray) -> np.ndarray:
    """The face of a CelebA image: [218, 178, C] -> [148, 148, C].

    Raises:
        UserError: it is of another size.
    """
    left, upper, right, lower = CELEBA_BOX
    if image.shape[0] < lower or image.shape[1] < right:
        raise UserError(f"CelebA images are 178x218, this one is {image.shape[1]}x{image.shape[0]}")
    return image[upper:lower, left:right]


def resize_shorter(image: np.ndarray, size: int) -> np.ndarray:
    """[H, W, C] with the shorter side resized to `size`, bilinearly, and the other one in proportion."""
    height, width = image.shape[:2]
    shorter = min(height, width)
    return resize(image, size * width // shorter, size * height // shorter, BILINEAR)


def resize_and_crop(image: np.ndarray, size: int) -> np.ndarray:
    """The middle [size, size, C] of `resize_shorter`, as LSUN's images are evaluated."""
    image = resize_shorter(image, size)
    y, x = (round((n - size) / 2) for n in image.shape[:2])
    return image[y : y + size, x : x + size]


def fixed_split(count: int, num_validation: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Indices of training and validation images, both increasing, drawn once for ever by `seed`.

    The published code keeps 7,000 of FFHQ's 70,000 images for validation. Which ones, only its own files say.

    Raises:
        UserError: more validation images than images.
    """
    if not 0 <= num_validation <= count:
        raise UserError(f"{num_validation} validation images cannot be taken from {count}")
    order = np.random.Generator(np.random.PCG64(seed)).permutation(count)
    return np.sort(order[num_validation:]), np.sort(order[:num_validation])
