"""Datasets in their published formats: Python tarballs of CIFAR, IDX files of MNIST, LMDB databases of LSUN."""

import gzip
import math
import posixpath
import re
import struct
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np

from dnnlib.errors import UserError
from torch_utils import safe_pickle
from training.conversion.sources import Source, SourceImage
from training.conversion.tar import read_member

CIFAR_FOLDERS = ("cifar-10-batches-py", "cifar-100-python")
CIFAR_FILES = ("data_batch", "test_batch", "train", "test")
GZIP_MAGIC = b"\x1f\x8b"
IDX_MAGIC, IDX_MAX_DIMENSIONS = b"\0\0\x08", 4  # of arrays of bytes; then the number of dimensions, and each of them


def cifar(path: Path, names: Sequence[str], note: str) -> Source:
    """The batches `names` of a Python tarball of CIFAR-10 or CIFAR-100 (there the fine labels)."""

    def images() -> Iterator[SourceImage]:
        with tarfile.open(path) as archive:
            members = {posixpath.normpath(member.name): member for member in archive.getmembers()}
            for name in names:
                yield from _cifar_batch(path, name, read_member(archive, members[name]))

    return Source(f"CIFAR tarball{note}", path, None, images, "of the batches")


def _cifar_batch(path: Path, name: str, data: bytes) -> Iterator[SourceImage]:
    try:
        batch = safe_pickle.loads(data, name)
    except UserError as err:
        raise UserError(
            f"--source={path}: not as CIFAR is published ({err}): download it again from its home page"
        ) from None
    base = PurePosixPath(name).name
    try:
        pixels = batch["data"].load().reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        labels = batch["fine_labels"] if "fine_labels" in batch else batch["labels"]
        pairs = list(zip(pixels, labels, strict=True))
    except (KeyError, AttributeError, TypeError, ValueError) as err:
        raise UserError(f"--source={path}: {base} is not a batch of CIFAR images ({err!r})") from None
    for i, (image, label) in enumerate(pairs):
        yield SourceImage(f"{base}[{i}]", np.ascontiguousarray(image), int(label))


# ---------------------------------------------------------------------------------------------------------
# MNIST


def idx_shape(path: Path) -> tuple[int, ...] | None:
    """The shape of an IDX file of bytes (plain or gzip), None if it is something else."""
    try:
        with _open_idx(path) as f:
            start = f.read(4 + 4 * IDX_MAX_DIMENSIONS)
    except (OSError, EOFError):
        return None
    if len(start) < 8 or start[:3] != IDX_MAGIC or not 1 <= start[3] <= IDX_MAX_DIMENSIONS:
        return None
    dimensions = start[3]
    return struct.unpack_from(f">{dimensions}I", start, 4) if len(start) >= 4 + 4 * dimensions else None


def _open_idx(path: Path) -> IO[bytes]:
    with open(path, "rb") as f:
        compressed = f.read(2) == GZIP_MAGIC
    return gzip.open(path) if compressed else open(path, "rb")  # type: ignore[return-value]


def idx_files(path: Path, files: Sequence[Path], note: str = "") -> Source:
    """Images of IDX files as MNIST ships them, with the labels of the file that belongs to each."""
    count = 0
    for file in files:
        shape = idx_shape(file)
        if shape is None or len(shape) not in (3, 4):
            raise UserError(f"--source={file}: an IDX file of shape {list(shape or ())}, not of images")
        count += shape[0]

    def images() -> Iterator[SourceImage]:
        for file in files:
            pixels, labels_file = _read_idx(file), _labels_file(file)
            labels = _read_idx(labels_file) if labels_file is not None else None
            if labels is not None and labels.shape != pixels.shape[:1]:
                raise UserError(f"--source={file}: {len(pixels)} images, but labels of shape {list(labels.shape)}")
            for i, image in enumerate(pixels):
                gray = image[:, :, 0] if image.ndim == 3 and image.shape[2] == 1 else image
                yield SourceImage(f"{file.name}[{i}]", gray, int(labels[i]) if labels is not None else None)

    labelled = all(_labels_file(file) is not None for file in files)
    return Source(f"IDX files{note}", path, count, images, "labels files" if labelled else "")


def _labels_file(file: Path) -> Path | None:
    """The file of labels that lies beside a file of images, compressed or not."""
    name = re.sub(r"images([-.])idx[0-9]", r"labels\1idx1", file.name).removesuffix(".gz")
    found = next((path for path in (file.with_name(name), file.with_name(f"{name}.gz")) if path.is_file()), None)
    return found if name != file.name.removesuffix(".gz") else None


def _read_idx(path: Path) -> np.ndarray:
    shape = idx_shape(path)
    try:
        if shape is None:
            raise ValueError("not an IDX file of bytes")
        with _open_idx(path) as f:
            data = f.read()
        return np.frombuffer(data, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)
    except (ValueError, OSError, EOFError) as err:
        raise UserError(f"--source={path}: damaged IDX file ({err}): copy it again") from None


# ---------------------------------------------------------------------------------------------------------
# LSUN


def lmdb_database(path: Path) -> Source:
    """An LMDB environment whose values are encoded images, as LSUN ships them.

    Where keys are 0, 1, ... in decimal, as NVAE's published code keeps datasets, images come in that order, and values
    may be raw pixels: RGB, row by row, of square images.
    """
    try:
        import lmdb
    except ImportError:
        raise UserError(f"--source={path}: an LMDB database needs a package: pip install lmdb") from None

    def images() -> Iterator[SourceImage]:
        with lmdb.open(str(path), readonly=True, lock=False) as env, env.begin(buffers=False) as transaction:
            if transaction.get(b"0") is None:
                for key, value in transaction.cursor():
                    yield SourceImage(key.decode("latin-1"), value)
                return
            for i in range(count):
                value = transaction.get(str(i).encode())
                if value is None:
                    raise UserError(f"--source={path}: entry {i} of {count} is missing: keys must be 0, 1, ...")
                yield SourceImage(f"{path}:{i}", _raw_pixels(value))

    with lmdb.open(str(path), readonly=True, lock=False) as env:
        count = env.stat()["entries"]
        size = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
        if (path / "data.mdb").stat().st_size < size:  # reading it would kill the process
            raise UserError(f"--source={path}: data.mdb is truncated, it should have {size} bytes: copy it again")
    return Source("LMDB database", path, count, images)


def _raw_pixels(data: bytes) -> bytes | np.ndarray:
    """Pixels [R, R, 3] where there are just as many bytes, an encoded file otherwise."""
    side = math.isqrt(len(data) // 3)
    encoded = data.startswith((b"\x89PNG", b"\xff\xd8\xff", b"RIFF"))
    if encoded or 3 * side * side != len(data):
        return data
    return np.frombuffer(data, np.uint8).reshape(side, side, 3)
