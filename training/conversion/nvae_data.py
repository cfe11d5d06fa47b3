"""Data as NVAE's published code keeps it: Omniglot's `chardata.mat`, and splits.

Everything reads without executing anything in a file.
"""

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dnnlib.errors import UserError
from training.conversion.sources import Source, SourceImage

OMNIGLOT_SIDE = 28
OMNIGLOT = {"train": "data", "test": "testdata"}  # names of the arrays
# Data types of MATLAB 5 files that hold numbers, and the types of elements that hold others.
MAT_TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
MAT_MATRIX, MAT_COMPRESSED = 14, 15
MAX_MAT_SIZE = 1 << 30  # bytes of a decompressed element; against hostile files


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


def read_mat(data: bytes) -> Iterator[tuple[str, np.ndarray]]:
    """Names and values of the numeric arrays in a MATLAB 5 file; other variables are left out.

    Raises:
        ValueError, struct.error, zlib.error: it is none, or damaged.
    """
    order = {b"IM": "<", b"MI": ">"}.get(data[126:128])
    if not data.startswith(b"MATLAB 5.0") or order is None:
        raise ValueError("no MATLAB 5 file")
    for kind, content in _elements(data[128:], order):
        if kind == MAT_COMPRESSED:
            decompressor = zlib.decompressobj()
            inner = decompressor.decompress(content, MAX_MAT_SIZE)
            ((kind, content),) = _elements(inner, order)
        if kind == MAT_MATRIX:
            parts = list(_elements(content, order))
            if len(parts) == 4 and parts[3][0] in MAT_TYPES:
                dims, name = np.frombuffer(parts[1][1], f"{order}i4"), parts[2][1].decode("ascii")
                values = np.frombuffer(parts[3][1], order + MAT_TYPES[parts[3][0]])
                yield name, values.reshape(dims, order="F")


def _elements(data: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """Types and contents of the elements in a row."""
    position = 0
    while position < len(data):
        kind, size = struct.unpack_from(f"{order}II", data, position)
        if kind >> 16:  # up to four bytes stand within the tag
            kind, size, start, step = kind & 0xFFFF, kind >> 16, position + 4, 8
        else:
            start, step = position + 8, 8 + size + (0 if kind == MAT_COMPRESSED else -size % 8)
        if start + size > len(data):
            raise ValueError("truncated")
        yield kind, data[start : start + size]
        position += step


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
