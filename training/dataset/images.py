"""The dataset that everything reads: square images or latents with labels, from a folder or a ZIP file."""

import hashlib
import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch

from dnnlib.errors import UserError, one_line
from training.config.data import DatasetInfo
from training.dataset.advice import how_to_convert
from training.dataset.captions import load_captions
from training.dataset.decoding import (
    HEADER_BYTES,
    WITH_ALPHA,
    Transform,
    are_moderate,
    decode,
    fitted,
    plain_npy_header,
    read_header,
)
from training.dataset.labels import describe_classes, load_labels
from training.dataset.listing import NAMES_FILE, counted, is_array, many, printable
from training.dataset.order import evenly_spaced, subset
from training.dataset.part import Part
from training.dataset.storage import files_of_dataset, open_storage

FINGERPRINT_SAMPLES = 1024
COMPRESSED = "slow to read; store it without compression (zip -0)"  # of a dataset, in notes


class ImageFolderDataset(torch.utils.data.Dataset):
    """Square images or latents of one size, with optional labels, from a folder or a ZIP file.

    Images are any format that Pillow decodes (uint8, 1 channel = grayscale, 3 = RGB, 4 = RGBA), read as
    `open_picture` says; `.npy` files are arrays [C, H, W], float latents or uint8 pixels. Hidden files and folders, and
    those that systems keep for themselves, are left out. Labels come from `dataset.json` ({"labels": [[name, label],
    ...]} or null): integers become one-hot vectors, lists of numbers stay as they are. Without that file, the sorted
    names of the top-level directories, if there are several, are the classes.

    Args:
        path: folder or ZIP file.
        resolution: height and width that the images must have; None = any.
        use_labels: False = ignore labels.
        max_size: use a random subset of this many images; None = all.
        xflip: add a mirrored copy of every image behind the originals.
        random_seed: selects the subset.
        cache: keep decoded images in memory.
        opaque: put images with an alpha channel on white, as conversions do; False = alpha is a channel.
        checksums: compare the CRC-32 of each ZIP entry when it is first read.
        use_captions: give contexts of captions (`training.dataset.captions`) in place of labels.
        part: use those images only that it has; None = all.
        fit: makes images of one size of them, as RGB: uint8 [H, W, 3] -> the same, or None where one is too small.

    Items are (image, label): an array [C, H, W], uint8 or float32, and float32 [label_dim] or, of captions, [tokens,
    width].

    Raises:
        UserError: the path is missing or damaged, holds no images, labels are incomplete, or, when an image is
            read, it is damaged or differs from the first in size or channels. The message names the file.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        resolution: int | None = None,
        use_labels: bool = True,
        max_size: int | None = None,
        xflip: bool = False,
        random_seed: int = 0,
        cache: bool = False,
        opaque: bool = False,
        checksums: bool = True,
        use_captions: bool = False,
        fit: Transform | None = None,
        part: Part | None = None,
    ):
        self.path = Path(path)
        self.use_labels = use_labels and not use_captions
        self._opaque, self._checksums, self._fit = opaque, checksums, fit
        self._storage = open_storage(self.path)
        listing = files_of_dataset(self._storage)
        for position in listing.odd:  # dataset.json under a damaged name would be missed
            self._check_name(position)
        if not listing.images:
            raise UserError("; ".join([f"{self.path}: no images found (PNG, JPEG, ... or .npy)", *listing.left_out()]))
        labels = load_labels(self.path, self._storage, listing, self.use_labels)
        self._kinds, self._label_source, self._class_names = listing.kinds, labels.source, labels.class_names
        self._notes = labels.notes + listing.left_out()
        self._encoder_record = labels.encoder

        indices = subset(len(listing.images), max_size, random_seed)
        if part is not None:
            chosen = part.has(listing.images)[indices]
            if chosen.all() or not chosen.any():
                held_out = "all" if chosen.all() == part.held_out else "none"
                count = many(len(indices), "image")
                raise UserError(
                    f"--val-fraction={part.fraction} holds out {held_out} of {count} of {self.path}: give another share"
                )
            indices = indices[chosen]
        self._files = np.array(listing.positions, np.int64)[indices]  # positions in the storage
        # Of all images, also those outside a subset.
        values = labels.values
        self._label_dim = 0 if values is None else int(values.max()) + 1 if values.ndim == 1 else values.shape[1]
        self._labels = None if values is None else values[indices]
        self._xflip = xflip
        chosen = [self._storage.names[int(file)] for file in self._files]
        self.captions = load_captions(self.path, self._storage, chosen) if use_captions else None
        self._cache: dict[int, np.ndarray] | None = {} if cache else None

        self._npy_header = b""
        self._checked = np.zeros(len(self._files), dtype=bool)  # files that were found to be undamaged
        first = self._decode(0)
        self._shape, self._dtype, self._item_bytes = first.shape, first.dtype, first.nbytes
        if is_array(self._name(0)):
            self._npy_header = plain_npy_header(self._read(0), self._shape, self._dtype)
        elif self.num_channels in WITH_ALPHA:
            self._notes.append("alpha is a channel like the others: dataset_tool.py convert puts images on white")
        if self._shape[1] != self._shape[2]:
            advice = "" if is_array(self._name(0)) else how_to_convert(self.path, self._shape)
            raise UserError(f"{self.path}: {self._name(0)} is {_size(self._shape)}, not square{advice}")
        if resolution is not None and resolution != self.resolution:
            raise UserError(f"{self.path}: the images are {_size(self._shape)}, not {resolution}x{resolution}")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of each image."""
        return self._shape

    @property
    def dtype(self) -> np.dtype:
        """uint8 for pixels, float32 for latents."""
        return self._dtype

    @property
    def num_channels(self) -> int:
        """Channels of the stored images."""
        return self._shape[0]

    @property
    def resolution(self) -> int:
        """Height and width of each image."""
        return self._shape[1]

    @property
    def label_dim(self) -> int:
        """Length of the label vectors, 0 without labels."""
        return self._label_dim

    @property
    def has_labels(self) -> bool:
        """Whether items have labels."""
        return self._labels is not None

    @property
    def label_source(self) -> str:
        """Where labels come from: 'dataset.json' or 'class folders'; '' without labels."""
        return self._label_source

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes 0, 1, ..., where dataset.json or class folders give them."""
        return self._class_names

    @property
    def encoder_record(self) -> dict[str, Any] | None:
        """What dataset.json says of the encoder of latents; None = nothing."""
        return self._encoder_record

    @property
    def notes(self) -> list[str]:
        """What users should know about how the files were understood: one line each."""
        return self._notes

    @property
    def compressed(self) -> bool:
        """Whether images are compressed within the ZIP file, so that each read unpacks them."""
        return self._storage.compressed(self._files)

    def __len__(self) -> int:
        return len(self._files) * (2 if self._xflip else 1)

    def __getitem__(self, idx: int) -> tuple[np.ndarray, np.ndarray]:
        image, label = self._view(idx)
        return image.copy(), label

    def __getitems__(self, indices: list[int]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Items for a DataLoader's batch: views into the file where it holds the numbers as they are, not copies.

        Indices beyond the last are later visits to the same images, which may have other captions then.
        """
        return [self._view(idx % len(self), idx // len(self)) for idx in indices]

    def _view(self, idx: int, visit: int = 0) -> tuple[np.ndarray, np.ndarray]:
        flipped, base = divmod(range(len(self))[idx], len(self._files))
        image = self._image(base)
        return image[:, :, ::-1] if flipped else image, self.get_label(idx, visit)

    def get_label(self, idx: int, visit: int = 0) -> np.ndarray:
        """Label vector of item `idx`, float32 [label_dim], or the context of the caption that a visit shows."""
        if self.captions is not None:
            return self.captions.context(idx % len(self._files), visit)
        if self._labels is None:
            return np.zeros([0], dtype=np.float32)
        label = self._labels[idx % len(self._files)]
        if label.ndim == 0:
            one_hot = np.zeros([self.label_dim], dtype=np.float32)
            one_hot[label] = 1
            return one_hot
        return label.copy()

    def get_stored_label(self, idx: int) -> int | list[float]:
        """Label of item `idx` as dataset.json holds it."""
        assert self._labels is not None
        return self._labels[idx % len(self._files)].tolist()

    def name(self, idx: int) -> str:
        """File name of item `idx`, as text that can be printed."""
        return self._name(idx % len(self._files))

    def stored_bytes(self, idx: int) -> bytes:
        """The file of item `idx` as it is.

        Raises:
            UserError: it cannot be read.
        """
        return bytes(self._read(idx % len(self._files)))

    def names_before(self) -> list[str]:
        """What the images were called before `dataset_tool.py convert --keep-names`; else what they are called.

        Raises:
            UserError: names.json is damaged.
        """
        names = [self.name(idx) for idx in range(len(self._files))]
        if NAMES_FILE not in self._storage.names:
            return names
        try:
            before = json.loads(bytes(self._storage.read(self._storage.names.index(NAMES_FILE))))
            return [str(before[name]) for name in names]
        except (OSError, ValueError, KeyError, TypeError, RecursionError, struct.error, zlib.error) as err:
            raise UserError(f"{self.path}: {NAMES_FILE}: cannot be used ({one_line(repr(err))[:100]})") from None

    def text_beside(self, idx: int) -> str:
        """The text file of the name of item `idx`.

        Raises:
            UserError: there is none, or it cannot be read.
        """
        name = os.path.splitext(self._storage.names[int(self._files[idx % len(self._files)])])[0] + ".txt"
        try:
            return bytes(self._storage.read(self._storage.names.index(name))).decode("utf-8")
        except ValueError:
            raise UserError(f"{self.path}: {printable(name)}: no such text file, or not UTF-8") from None
        except (OSError, struct.error, zlib.error) as err:
            raise UserError(f"{self.path}: cannot read {printable(name)}: {one_line(err)}") from None

    def summary(self) -> list[str]:
        """What the dataset contains and how it was understood, in lines for users; the last ones are `notes`."""
        shape = "latents" if self._dtype != np.uint8 else "pixels"
        chosen, total = len(self._files), self._kinds.total()
        count = many(chosen, "image") if chosen == total else f"{chosen} of {total} images"
        mirrored = ", each also mirrored" if self._xflip else ""
        lines = [f"{self.path}: {count} ({counted(self._kinds)}), {shape} of {_size(self._shape)}{mirrored}"]
        if self.captions is not None:
            tokens, width = self.captions.shape
            count = sum(map(len, self.captions.texts))
            lines.append(f"labels: {many(count, 'caption')}, contexts of {tokens} tokens of width {width}")
        elif self._labels is None:
            lines.append("labels: none" if self.use_labels else "labels: not used")
        elif self._labels.ndim == 2:
            lines.append(f"labels: {self._label_source}, vectors of length {self.label_dim}")
        else:
            classes, counts = np.unique(self._labels, return_counts=True)
            counts_by_class = dict(zip(classes.tolist(), counts.tolist(), strict=True))
            lines.append(f"labels: {self._label_source}, {describe_classes(counts_by_class, self._class_names)}")
        return lines + self._notes

    def size_text(self) -> str:
        """Number and size of the images in a few words, such as '450 images of 64x64x3, each also mirrored'."""
        mirrored = ", each also mirrored" if self._xflip else ""
        size = "x".join(map(str, (self.resolution, self.resolution, self.num_channels)))
        return f"{many(len(self._files), 'image')} of {size}{mirrored}"

    def decoded_bytes(self) -> int:
        """Size of all decoded images."""
        return len(self._files) * self._item_bytes

    def keep_in_memory(self) -> None:
        """Keep decoded images from now on."""
        if self._cache is None:
            self._cache = {}

    def verify(self) -> None:
        """Check the dtype and size of every image by its header.

        Raises:
            UserError: one differs from the first; names both.
        """
        if self._fit is not None:  # headers say nothing of what it makes; each image is looked at when it is read
            return
        for base in range(len(self._files)):
            start = self._read(base, HEADER_BYTES)
            try:
                shape, dtype = read_header(self._name(base), start, self._opaque)
            except ValueError:  # another format, or damaged
                self._image(base)
                continue
            self._check(base, shape, dtype)

    def info(self) -> DatasetInfo:
        """What identifies the dataset: its size, shape and content.

        Raises:
            UserError: a file cannot be read.
        """
        digest = hashlib.sha256()
        for base, file in enumerate(self._files):
            try:
                size = self._storage.size(int(file))
            except OSError as err:
                raise UserError(f"{self.path}: cannot read {self._name(base)}: {err}") from None
            digest.update(os.fsencode(self._storage.names[int(file)]) + f"\0{size}\0".encode())
        for base in evenly_spaced(len(self._files), FINGERPRINT_SAMPLES):
            digest.update(struct.pack("<I", self._storage.crc(int(self._files[base]))))
        if self._labels is not None:
            digest.update(np.ascontiguousarray(self._labels).tobytes())
        if self._encoder_record is not None:
            digest.update(_encoder_digest(self._encoder_record))
        if self.captions is not None:
            digest.update(self.captions.digest())
        return DatasetInfo(
            count=len(self),
            resolution=self.resolution,
            channels=self.num_channels,
            label_dim=self.label_dim,
            content_hash=digest.hexdigest(),
        )

    def _name(self, base: int) -> str:
        return printable(self._storage.names[int(self._files[base])])

    def _image(self, base: int) -> np.ndarray:
        """Image `base`, not mirrored; not to be written to."""
        if self._cache is not None and base in self._cache:
            return self._cache[base]
        image = self._decode(base)
        self._check(base, image.shape, image.dtype)
        if self._cache is not None:
            image = self._cache[base] = np.array(image, order="C")  # not a view of the file, which may change
        return image

    def _check(self, base: int, shape: tuple[int, ...], dtype: np.dtype) -> None:
        if dtype == self._dtype and shape == self._shape:
            return
        name, first = self._name(base), self._name(0)
        if dtype != self._dtype:
            raise UserError(
                f"{self.path}: {name} holds {dtype}, but {first} {self._dtype}: do not mix pixels and latents"
            )
        advice = "" if is_array(name) else how_to_convert(self.path, shape, self._shape)
        raise UserError(
            f"{self.path}: {name} is {_size(shape)}, but {first} is {_size(self._shape)}: all images must be alike"
            f"{advice}"
        )

    def _read(self, base: int, size: int | None = None) -> bytes | memoryview:
        idx = int(self._files[base])
        try:
            return self._storage.read(idx) if size is None else self._storage.read_start(idx, size)
        except (OSError, ValueError, struct.error, zlib.error) as err:
            raise UserError(f"{self.path}: cannot read {self._name(base)}: {err}") from None

    def _check_name(self, position: int) -> None:
        try:
            self._storage.check_name(position)
        except (OSError, ValueError, struct.error) as err:
            name = printable(self._storage.names[position])
            raise UserError(f"{self.path}: cannot read {name}: {err}") from None

    def _decode(self, base: int) -> np.ndarray:
        data, checked = self._read(base), self._checked[base]
        try:
            # Looking at the data costs as much as copying it: once is enough.
            if self._checksums and not checked:
                self._storage.check(int(self._files[base]), data)
            image = self._as_stored(data)
            if image is None or not (checked or are_moderate(image)):
                image = decode(self._name(base), data, self._opaque)
            if self._fit is not None and image.dtype == np.uint8:
                image = fitted(image, self._fit)
        except PIL.UnidentifiedImageError:
            raise UserError(f"{self.path}: cannot read {self._name(base)}: damaged, or not an image") from None
        except Exception as err:  # a damaged file can fail in any way
            raise UserError(f"{self.path}: cannot read {self._name(base)}: {err or type(err).__name__}") from None
        self._checked[base] = True
        return image

    def _as_stored(self, data: bytes | memoryview) -> np.ndarray | None:
        """The numbers of an array file as they lie in it; None where they have to be decoded."""
        start = len(self._npy_header)
        if start == 0 or len(data) != start + self._item_bytes or data[:start] != self._npy_header:
            return None
        return np.frombuffer(data, self._dtype, offset=start).reshape(self._shape)


def _encoder_digest(record: dict[str, Any]) -> bytes:
    """What the record of an encoder says of the latents; not where a VAE is that has a checksum."""
    kwargs = record.get("kwargs")
    if isinstance(kwargs, dict) and "vae_sha256" in kwargs:
        record = {**record, "kwargs": {key: value for key, value in kwargs.items() if key != "vae_name"}}
    return json.dumps(record, sort_keys=True).encode()


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[2]}x{shape[1]} with {shape[0]} channel{'s' if shape[0] != 1 else ''}"
