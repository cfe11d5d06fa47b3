"""TFRecord files of StyleGAN's data sets (FFHQ, CelebA-HQ), read without TensorFlow, every checksum compared.

A record is a serialised `Example` with the features `shape`, [C, H, W], and `data`, the bytes of its pixels.
"""

import functools
import os
import re
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from dnnlib.errors import UserError
from training.conversion.sources import Source, SourceImage

HEADER = struct.Struct("<QI")  # length of a record, and its checksum
FOOTER = struct.Struct("<I")  # checksum of the record
POLYNOMIAL, ONES = 0x82F63B78, 0xFFFFFFFF  # of CRC-32C
LANE = 512  # bytes that are taken one after the other; lanes are taken side by side
RESOLUTION = re.compile(r"-r(\d\d)(?=[-.])")  # in names of files: log2
VARINT, BYTES = 0, 2  # wire types of protocol buffers
FIXED = {1: 8, 5: 4}  # and those of fixed size


def is_tfrecord(path: Path) -> bool:
    """Whether a file begins with the header of a record."""
    with open(path, "rb") as f:
        start = f.read(HEADER.size)
    return len(start) == HEADER.size and _length(start) is not None


def tfrecord_files(path: Path, files: Sequence[Path], note: str = "") -> Source:
    """The images of TFRecord files: of those with the largest images, where their names say several sizes."""
    sizes = {file: int(match[1]) for file in files if (match := RESOLUTION.search(file.name))}
    notes = []
    if len(set(sizes.values())) > 1:
        largest = max(sizes.values())
        files = [file for file in files if sizes.get(file) == largest]
        others = sorted({2**size for size in sizes.values()} - {2**largest})
        notes = [f"images of {2**largest} pixels; for {' or '.join(map(str, others))}, give that file as --source"]
    count = sum(_count(file) for file in files)

    def images() -> Iterator[SourceImage]:
        for file in files:
            with open(file, "rb") as f:
                for i in range(_count(file)):
                    yield _image(f"{file.name}[{i}]", f)

    return Source(f"TFRecord files{note}", path, count, images, notes=notes)


def _count(path: Path) -> int:
    """Number of records.

    Raises:
        UserError: the file is truncated, or its records do not follow each other.
    """
    count, size = 0, path.stat().st_size
    with open(path, "rb") as f:
        while f.tell() < size:
            length = _length(f.read(HEADER.size))
            if length is None or length + FOOTER.size > size - f.tell():
                raise UserError(f"--source={path}: damaged or truncated at record {count}: copy it again")
            f.seek(length + FOOTER.size, os.SEEK_CUR)
            count += 1
    return count


def _length(header: bytes) -> int | None:
    """What a header says of its record; None = its checksum is wrong."""
    if len(header) < HEADER.size:
        return None
    length, checksum = HEADER.unpack(header)
    return length if _masked(crc32c(header[:8])) == checksum else None


def _image(name: str, f: IO[bytes]) -> SourceImage:
    """The next record."""
    length = _length(f.read(HEADER.size))
    assert length is not None  # `_count` has looked
    record, (checksum,) = f.read(length), FOOTER.unpack(f.read(FOOTER.size))
    if _masked(crc32c(record)) != checksum:
        return SourceImage(name, b"", error="checksum mismatch")
    try:
        features = dict(_feature(entry) for _, entry in _fields(next(_fields(record))[1]))
        channels, height, width = features["shape"]
        (pixels,) = features["data"]
        image = np.frombuffer(pixels, np.uint8).reshape(channels, height, width).transpose(1, 2, 0)
    except (KeyError, ValueError, TypeError, IndexError, StopIteration, struct.error) as err:
        return SourceImage(name, b"", error=f"not an image of [C, H, W] bytes ({err!r})")
    return SourceImage(name, np.ascontiguousarray(image[:, :, 0] if channels == 1 else image))


def _feature(entry: bytes) -> tuple[str, list]:
    """Name and values of a feature: integers or bytes; of floats, nothing."""
    parts = dict(_fields(entry))
    ((kind, values),) = _fields(parts[2])
    found: list = []
    for _, value in _fields(values) if kind in (1, 3) else ():
        found += [value] if kind == 1 or isinstance(value, int) else _varints(value)  # which are packed
    return parts[1].decode(), found


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Numbers and values of the fields of a protocol buffer.

    Raises:
        ValueError: it is none.
    """
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        if tag & 7 == VARINT:
            value, position = _varint(message, position)
            yield tag >> 3, value
            continue
        size, position = _varint(message, position) if tag & 7 == BYTES else (FIXED[tag & 7], position)
        if size > len(message) - position:
            raise ValueError("truncated")
        yield tag >> 3, message[position : position + size]
        position += size


def _varint(message: bytes, position: int) -> tuple[int, int]:
    """A number of 7 bits per byte, and the position behind it."""
    value = 0
    for shift in range(0, 64, 7):
        byte = message[position + shift // 7]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position + shift // 7 + 1
    raise ValueError("a number of more than 64 bits")


def _varints(packed: bytes) -> list[int]:
    position, values = 0, []
    while position < len(packed):
        value, position = _varint(packed, position)
        values.append(value)
    return values


# ---------------------------------------------------------------------------------------------------------
# CRC-32C


def crc32c(data: bytes) -> int:
    """The checksum of iSCSI (RFC 3720)."""
    if len(data) < LANE:
        table, state = _table(8).tolist(), ONES
        for byte in data:
            state = state >> 8 ^ table[(state ^ byte) & 0xFF]
        return state ^ ONES
    # The checksum is linear: ones at the start are the same as inverted first bytes, after which zeros in front change
    # nothing. So the data is cut into lanes that are read side by side, and then put together.
    lanes = np.zeros(-(-len(data) // LANE) * LANE, np.uint8)
    lanes[-len(data) :] = np.frombuffer(data, np.uint8)
    lanes[-len(data) :][:4] ^= 0xFF
    states = _read(np.zeros(len(lanes) // LANE, np.uint32), lanes.view("<u2").reshape(-1, LANE // 2).T)
    beyond, state = _beyond_a_lane(), 0
    for of_lane in states.tolist():
        first, second, third, fourth = (beyond[i][state >> 8 * i & 0xFF] for i in range(4))
        state = first ^ second ^ third ^ fourth ^ of_lane
    return state ^ ONES


def _masked(checksum: int) -> int:
    """As TFRecord files store it."""
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & ONES


@functools.cache
def _table(bits: int) -> np.ndarray:
    """What the lowest bits of a state become, uint32 [2^bits]."""
    state = np.arange(1 << bits, dtype=np.uint32)
    for _ in range(bits):
        state = state >> np.uint32(1) ^ np.where(state & np.uint32(1), np.uint32(POLYNOMIAL), np.uint32(0))
    return state


def _read(states: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """States after two bytes at a time of each lane, uint32 [N], from rows of uint16 [N]."""
    table = _table(16)
    for row in rows:
        states = states >> np.uint32(16) ^ table[(states ^ row) & np.uint32(0xFFFF)]
    return states


@functools.cache
def _beyond_a_lane() -> list[list[int]]:
    """What a state becomes by a lane of zeros, by each of its four bytes."""
    states = np.arange(256, dtype=np.uint32) << (np.uint32(8) * np.arange(4, dtype=np.uint32)[:, None])
    zeros = np.zeros([LANE // 2, 1], np.uint16)
    return _read(states.reshape(-1), zeros).reshape(4, 256).tolist()
