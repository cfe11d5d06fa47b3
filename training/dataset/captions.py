"""Captions of a dataset and their contexts, which lie beside the images.

dataset.json holds {"captions": {"encoder": {"name", "kwargs"}, "texts": {image: [text, ...], ...}}}; the contexts of
`a/b.png` are in `a/b.contexts`, and those of the empty text in `empty.contexts`: arrays as NumPy writes them, float32
[texts, tokens, width].
"""

import hashlib
import io
import json
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dnnlib.errors import UserError, one_line
from training.config.data import MAX_CHANNELS, MAX_TOKENS
from training.dataset.labels import read_description
from training.dataset.listing import CONTEXTS_SUFFIX
from training.dataset.storage import Storage

EMPTY = "empty" + CONTEXTS_SUFFIX


def contexts_name(image: str) -> str:
    """The file of the contexts of an image."""
    return os.path.splitext(image)[0] + CONTEXTS_SUFFIX


def encode_contexts(contexts: np.ndarray) -> bytes:
    """The contents of a file of contexts [texts, tokens, width]."""
    f = io.BytesIO()
    np.save(f, np.ascontiguousarray(contexts, np.float32))
    return f.getvalue()


def read_contexts(data: bytes | memoryview) -> np.ndarray:
    """The contexts in a file, float32 [texts, tokens, width]. Nothing in it is executed.

    Raises:
        ValueError: it holds something else.
    """
    array = np.load(io.BytesIO(data), allow_pickle=False)
    if not (isinstance(array, np.ndarray) and array.dtype == np.float32 and array.ndim == 3 and array.size > 0):
        raise ValueError("not an array of contexts, float32 [texts, tokens, width]")
    if array.shape[1] > MAX_TOKENS or array.shape[2] > MAX_CHANNELS or not np.isfinite(array).all():
        raise ValueError("contexts that are too large or not finite")
    return array


class Captions:
    """Captions of the images of a dataset.

    Args:
        where: names the dataset in errors.
        storage: its files.
        record: what dataset.json says.
        images: names of the images, in their order.

    Raises:
        UserError: an image has no captions, or the record or a file is damaged.
    """

    def __init__(self, where: str, storage: Storage, record: Any, images: Sequence[str]):
        self.where, self._storage = where, storage
        try:
            self.encoder: dict[str, Any] = record["encoder"]
            texts = record["texts"]
            self.texts = [tuple(texts[image]) for image in images]
            if not all(some and all(isinstance(text, str) for text in some) for some in self.texts):
                raise ValueError("captions must be lists of texts")
        except (KeyError, TypeError, ValueError) as err:
            raise UserError(
                f"{where}: dataset.json has no captions for all images ({one_line(repr(err))[:100]})"
            ) from None
        self._positions = {name: position for position, name in enumerate(storage.names)}
        self._files = [contexts_name(image) for image in images]
        self.empty = self._read(EMPTY)[0]
        self.shape: tuple[int, int] = (self.empty.shape[0], self.empty.shape[1])

    def context(self, base: int, visit: int) -> np.ndarray:
        """The context of image `base`, float32 [tokens, width]: of its captions in turn, one per visit. Errors as for
        `contexts`.
        """
        contexts = self.contexts(base)
        return contexts[(base + visit) % len(contexts)]

    def contexts(self, base: int) -> np.ndarray:
        """The contexts of all captions of image `base`, float32 [texts, tokens, width].

        Raises:
            UserError: the file cannot be read.
        """
        contexts = self._read(self._files[base])
        if contexts.shape != (len(self.texts[base]), *self.shape):
            wanted = [len(self.texts[base]), *self.shape]
            raise UserError(f"{self.where}: {self._files[base]} holds {list(contexts.shape)} numbers, not {wanted}")
        return contexts

    def digest(self) -> bytes:
        """What identifies them."""
        return hashlib.sha256(json.dumps([self.encoder, self.texts]).encode()).digest()

    def _read(self, name: str) -> np.ndarray:
        if name not in self._positions:
            raise UserError(f"{self.where}: {name} is missing: make the captions again (dataset_tool.py captions)")
        try:
            return read_contexts(self._storage.read(self._positions[name]))
        except (OSError, ValueError, struct.error, zlib.error) as err:
            raise UserError(f"{self.where}: cannot read {name}: {one_line(err)}") from None


def load_captions(path: Path, storage: Storage, images: Sequence[str]) -> Captions:
    """The captions of images of a dataset.

    Raises:
        UserError: there are none, or they are damaged.
    """
    described = read_description(path, storage)
    if described is None or described.captions is None:
        raise UserError(f"{path}: has no captions: add them by dataset_tool.py captions")
    return Captions(str(path), storage, described.captions, images)
