"""Data as NVAE's published code keeps it: Omniglot's `chardata.mat`, and splits.

Everything reads without executing anything in a file.
"""

import struct
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from dnnlib.errors import UserError
from training.conversion.mat import read_mat
from training.conversion.sources import Source, SourceImage

OMNIGLOT_SIDE = 28
OMNIGLOT = {"train": "data", "test": "testdata"}  # names of the arrays


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
    name = OMNIGLOT[split]
    if not path.is_file():
        raise UserError(f"--source={path}: no such file")
    try:
        arrays = {key: value for key, value in read_mat(path.read_bytes()) if key == name}
        columns = arrays[name].reshape(OMNIGLOT_SIDE, OMNIGLOT_SIDE, -1, order="F")
    except (KeyError, ValueError, struct.error, zlib.error) as err:
        raise UserError(f"--source={path}: not the chardata.mat of Omniglot ({err}): download it again") from None
    return (255 * columns.transpose(2, 0, 1)).astype(np.uint8)


def is_omniglot(path: Path) -> bool:
    """Whether a MATLAB file holds the arrays of Omniglot."""
    try:
        return any(name in OMNIGLOT.values() for name, _ in read_mat(path.read_bytes()))
    except (ValueError, struct.error, zlib.error):
        return False


def omniglot(path: Path, split: str) -> Source:
    """The characters of a `chardata.mat`.

    Raises:
        UserError: as `read_omniglot`, or a part that it does not have.
    """
    if split == "validation":
        raise UserError(f"--source={path}: Omniglot has the parts train and test, not validation: see --split")
    characters = np.concatenate([read_omniglot(path, part) for part in (OMNIGLOT if split == "all" else [split])])

    def images() -> Iterator[SourceImage]:
        return (SourceImage(f"{path}:{i}", image) for i, image in enumerate(characters))

    return Source("MATLAB file of Omniglot", path, len(characters), images)


# ---------------------------------------------------------------------------------------------------------
# Splits


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


def part_of_source(source: Source, num_validation: int, split: str) -> Source:
    """The images of a source that `fixed_split` gives to a part, 'train' or 'validation'.

    Raises:
        UserError: another part, or fewer images.
    """
    if split not in ("train", "validation"):
        raise UserError(f"--validation={num_validation} makes the parts train and validation, not {split}: see --split")
    count = source.count if source.count is not None else sum(1 for _ in source.images())
    indices = fixed_split(count, num_validation)[split == "validation"]
    chosen = frozenset(indices.tolist())

    def images() -> Iterator[SourceImage]:
        return (image for i, image in enumerate(source.images()) if i in chosen)

    notes = [*source.notes, f"{len(chosen)} of its {count} images: --split={split} of --validation={num_validation}"]
    return replace(source, count=len(chosen), images=images, notes=notes)
