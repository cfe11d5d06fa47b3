"""Parts of a dataset: images that are held out, and the rest."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Part:
    """Either part of a dataset of which a share of the images is held out.

    An image is held out where the first 8 bytes of SHA-256(seed, a zero byte, its name in the dataset), read as a
    number below 2^64, are less than `fraction` of that: whatever other images there are, and in whatever order.

    Args:
        fraction: share of the images that is held out, about.
        seed: of the choice.
        held_out: which of the parts.
    """

    fraction: float
    seed: int
    held_out: bool

    def has(self, names: Sequence[str]) -> np.ndarray:
        """Which of the images of these names are in this part, bool [n]."""
        digests = (hashlib.sha256(f"{self.seed}\0{name}".encode("utf-8", "surrogateescape")) for name in names)
        drawn = np.array([int.from_bytes(digest.digest()[:8], "big") / 2**64 for digest in digests])
        return (drawn < self.fraction) == self.held_out
