"""MATLAB 5 files, read without executing anything, and SVHN, which is published in them."""

import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from dnnlib.errors import UserError
from training.conversion.sources import Source, SourceImage

MAT_MAGIC = b"MATLAB 5"
# Data types of MATLAB 5 files that hold numbers, and the types of elements that hold others.
MAT_TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
MAT_MATRIX, MAT_COMPRESSED = 14, 15
MAX_MAT_SIZE = 1 << 31  # bytes of a decompressed element; against hostile files


def svhn_files(path: Path, files: Sequence[Path], note: str = "") -> Source:
    """SVHN's cropped digits (train_32x32.mat): `X` of shape [32, 32, 3, N], and `y`, where 10 stands for 0."""

    def images() -> Iterator[SourceImage]:
        for file in files:
            try:
                arrays = dict(read_mat(file.read_bytes()))
                pixels, labels = arrays["X"].transpose(3, 0, 1, 2), arrays["y"].flatten() % 10
                pairs = list(zip(pixels, labels.tolist(), strict=True))
            except (KeyError, ValueError, struct.error, zlib.error) as err:
                raise UserError(f"--source={file}: no file of SVHN with X and y, or damaged ({err})") from None
            for i, (image, label) in enumerate(pairs):
                yield SourceImage(f"{file.name}[{i}]", np.ascontiguousarray(image), int(label))

    return Source(f"SVHN files{note}", path, None, images, "y of the files")


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
