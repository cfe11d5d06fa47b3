"""Checksums of tensors, which those of their parts add up to, so that parts can be read in any order by any threads.

A checksum is the sum, modulo 2^64, of the little-endian 64-bit words of a tensor's bytes, filled up with zeros. It
finds every flipped bit and costs next to nothing beside reading, which a CRC of gigabytes does not.
"""

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dnnlib.errors import DamagedFileError

WORD = 8  # bytes
MODULUS = 1 << 64


def word_sum(data: memoryview | bytes, start: int = 0) -> int:
    """What bytes add to the checksum of a tensor in which they begin at the byte `start`."""
    values = np.frombuffer(data, np.uint8)
    head = min(-start % WORD, len(values))
    middle = head + (len(values) - head) // WORD * WORD
    total = int.from_bytes(values[:head].tobytes(), "little") << 8 * (start % WORD)
    total += int(values[head:middle].view("<u8").sum())
    total += int.from_bytes(values[middle:].tobytes(), "little")
    return total % MODULUS


def mismatch(path: Path, what: str) -> DamagedFileError:
    """The error for a part of a file that is not what was written."""
    return DamagedFileError(
        f"{path}: {what} is damaged (checksum mismatch): copy the file again, or use another snapshot"
    )


def stored_text(layout: Mapping[str, Any], sums: Sequence[int]) -> str:
    """The entry of a file's metadata for checksums of its tensors, in the order of their places in the file.

    Args:
        layout: the file's header: type, shape and place of each tensor by name.
    """
    return f"{_layout_crc(layout):08x}" + "".join(f"{total % MODULUS:016x}" for total in sums)


def stored_sums(text: str | None, layout: Mapping[str, Any]) -> dict[str, int]:
    """The checksums by name that `stored_text` wrote; {} where there are none, or another program moved the tensors.

    Raises:
        ValueError: the text is damaged.
    """
    if not text or int(text[:8], 16) != _layout_crc(layout):
        return {}
    names = sorted(layout, key=lambda name: layout[name]["data_offsets"])
    numbers = [int(text[i : i + 16], 16) for i in range(8, len(text), 16)]
    return dict(zip(names, numbers, strict=True))


def _layout_crc(layout: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(layout, sort_keys=True).encode())
