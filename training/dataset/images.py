"""Images and latents from a folder or a ZIP file, and the order in which training sees them."""

import functools
import hashlib
import io
import json
import math
import mmap
import multiprocessing.util
import os
import posixpath
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

from dnnlib.errors import UserError, one_line
from training.config.data import DatasetInfo

try:
    import pyspng  # decodes PNG files three times as fast as Pillow
except ImportError:
    pyspng = None

# Signature, length of the first chunk (skipped), its type, width, height, bits per sample, color type.
PNG_HEADER = struct.Struct(">8s4x4sIIBB")
# The same without the type, then whether interlaced, checksum (skipped), length and type of the second chunk.
PNG_DATA = struct.Struct(">8s8xIIBB2xB4xI4s")
PNG_CHANNELS = {0: 1, 2: 3, 3: 3, 4: 2, 6: 4}  # by color type; palettes become RGB
HEADER_BYTES = 256  # enough for the headers of PNG and .npy
MAX_LABEL = 10**6
FINGERPRINT_SAMPLES = 1024
COMPRESSED = "slow to read; make it anew without compression (zip -0)"  # of a dataset, in notes


def files_below(folder: Path) -> Iterator[str]:
    """Relative names of the files below a folder, also through links: links that lead nowhere, too, but no pipes.

    Raises:
        UserError: a link leads back to a folder that it is in.
        OSError: a folder cannot be read.
    """

    def walk(path: str, prefix: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.is_dir():
                    facts = os.stat(entry.path)
                    key = (facts.st_dev, facts.st_ino)
                    if key in above:
                        raise UserError(f"{entry.path}: a link back to a folder that it is in: remove it")
                    yield from walk(entry.path, f"{prefix}{entry.name}/", (*above, key))
                elif entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path)):
                    yield prefix + entry.name

    facts = os.stat(folder)
    yield from walk(os.fspath(folder), "", ((facts.st_dev, facts.st_ino),))


class _Folder:
    """Files below a directory, sorted by relative name."""

    def __init__(self, path: Path):
        self.path = path
        self.names = sorted(name for name in files_below(path) if not name.rpartition("/")[2].startswith("."))

    def read(self, idx: int) -> bytes:
        return (self.path / self.names[idx]).read_bytes()

    def read_start(self, idx: int, size: int) -> bytes:
        with open(self.path / self.names[idx], "rb") as f:
            return f.read(size)

    def size(self, idx: int) -> int:
        return (self.path / self.names[idx]).stat().st_size

    def crc(self, idx: int) -> int:
        return zlib.crc32(self.read(idx))


class _Zip:
    """Entries of a ZIP file, sorted by name. The directory is read once, into arrays; entries then come from a memory
    map, so processes and threads can read at the same time."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                infos = [info for info in archive.infolist() if not info.is_dir()]
        except (OSError, MemoryError):
            raise
        except Exception as err:  # a damaged directory can fail in any way
            raise UserError(f"{path}: not a complete ZIP file ({one_line(err)}): copy or convert it again") from None
        infos = sorted((i for i in infos if not Path(i.filename).name.startswith(".")), key=lambda i: i.filename)
        self.names = [info.filename for info in infos]
        fields = [(i.header_offset, i.compress_size, i.file_size, i.CRC, i.compress_type) for i in infos]
        self.offsets, self.stored_sizes, self.sizes, self.crcs, self.methods = (
            np.array(fields, np.int64).reshape(-1, 5).T
        )
        self._map: mmap.mmap | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_map": None}

    def _stored(self, idx: int) -> memoryview:
        """The bytes of an entry as they lie in the file."""
        if self._map is None:
            with open(self.path, "rb") as f:
                self._map = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        offset = int(self.offsets[idx])
        # Local file header: 30 bytes, the lengths of name and extra field at 26 and 28.
        name_len, extra_len = struct.unpack_from("<HH", self._map, offset + 26)
        start = offset + 30 + name_len + extra_len
        return memoryview(self._map)[start : start + int(self.stored_sizes[idx])]

    def read(self, idx: int) -> bytes | memoryview:
        data, method = self._stored(idx), int(self.methods[idx])
        if method == zipfile.ZIP_STORED:
            return data
        if method == zipfile.ZIP_DEFLATED:
            return zlib.decompress(data, wbits=-15)
        raise ValueError(f"ZIP compression method {method} is not supported: store the file uncompressed")

    def read_start(self, idx: int, size: int) -> bytes:
        return bytes(self.read(idx)[:size])

    def size(self, idx: int) -> int:
        return int(self.sizes[idx])

    def crc(self, idx: int) -> int:
        return int(self.crcs[idx])


class ImageFolderDataset(torch.utils.data.Dataset):
    """Square images or latents of one size, with optional labels, from a folder or a ZIP file.

    Images are any format that Pillow opens (uint8, 1 channel = grayscale, 3 = RGB); `.npy` files are arrays
    [C, H, W], float latents or uint8 pixels. Labels come from `dataset.json` ({"labels": [[name, label], ...]}
    or null): integers become one-hot vectors, lists of numbers stay as they are. Without that file, the sorted
    names of the top-level directories, if there are several, are the classes.

    Args:
        path: folder or ZIP file.
        resolution: height and width that the images must have; None = any.
        use_labels: False = ignore labels.
        max_size: use a random subset of this many images; None = all.
        xflip: add a mirrored copy of every image behind the originals.
        random_seed: selects the subset.
        cache: keep decoded images in memory.

    Items are (image, label): an array [C, H, W], uint8 or float32, and float32 [label_dim].

    Raises:
        UserError: the path is missing or corrupt, holds no images, labels are incomplete, or, when an image is
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
    ):
        self.path = Path(path)
        self.use_labels = use_labels
        if self.path.is_dir():
            self._source = _Folder(self.path)
        elif self.path.is_file():
            self._source = _Zip(self.path)
        else:
            raise UserError(f"{self.path}: no such dataset: give a ZIP file or a folder of images")
        suffixes = image_suffixes() | {".npy"}
        names = self._source.names
        files = np.array([i for i, name in enumerate(names) if os.path.splitext(name)[1].lower() in suffixes], np.int64)
        if len(files) == 0:
            raise UserError(f"{self.path}: no images found (PNG, JPEG, ... or .npy)")
        labels = self._load_labels([names[i] for i in files])

        indices = subset(len(files), max_size, random_seed)
        self._files = files[indices]  # positions in the source
        # Of all images, also those outside a subset.
        self._label_dim = 0 if labels is None else int(labels.max()) + 1 if labels.ndim == 1 else labels.shape[1]
        self._labels = None if labels is None else labels[indices]
        self._xflip = xflip
        self._cache: dict[int, np.ndarray] | None = {} if cache else None

        self._npy_start = b""
        self._seen = np.zeros(len(self._files), dtype=bool)  # latents that were found to be finite
        first = self._decode(0)
        self._shape, self._dtype = first.shape, first.dtype
        if self._name(0).lower().endswith(".npy"):
            self._npy_start = _plain_npy_start(self._read(0), self._shape, self._dtype)
        if self._shape[1] != self._shape[2]:
            raise UserError(f"{self.path}: {self._name(0)} is {_size(self._shape)}, not square")
        if resolution is not None and resolution != self.resolution:
            raise UserError(f"{self.path}: the images are {_size(self._shape)}, not {resolution}x{resolution}")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self._shape

    @property
    def dtype(self) -> np.dtype:
        """uint8 for pixels, float32 for latents."""
        return self._dtype

    @property
    def num_channels(self) -> int:
        return self._shape[0]

    @property
    def resolution(self) -> int:
        return self._shape[1]

    @property
    def label_dim(self) -> int:
        """Length of the label vectors, 0 without labels."""
        return self._label_dim

    @property
    def has_labels(self) -> bool:
        return self._labels is not None

    @property
    def compressed(self) -> bool:
        """Whether images lie compressed in the ZIP file, so that reading them unpacks them each time."""
        if isinstance(self._source, _Folder):
            return False
        return bool((self._source.methods[self._files] != zipfile.ZIP_STORED).any())

    def __len__(self) -> int:
        return len(self._files) * (2 if self._xflip else 1)

    def __getitem__(self, idx: int) -> tuple[np.ndarray, np.ndarray]:
        image, label = self._view(idx)
        return image.copy(), label

    def __getitems__(self, indices: list[int]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Items for a DataLoader's batch: views into the file where it holds the numbers as they are, not copies."""
        return [self._view(idx) for idx in indices]

    def _view(self, idx: int) -> tuple[np.ndarray, np.ndarray]:
        flipped, base = divmod(range(len(self))[idx], len(self._files))
        image = self._image(base)
        return image[:, :, ::-1] if flipped else image, self.get_label(idx)

    def get_label(self, idx: int) -> np.ndarray:
        """Label vector of item `idx`, float32 [label_dim]."""
        if self._labels is None:
            return np.zeros([0], dtype=np.float32)
        label = self._labels[idx % len(self._files)]
        if label.ndim == 0:
            one_hot = np.zeros([self.label_dim], dtype=np.float32)
            one_hot[label] = 1
            return one_hot
        return label.copy()

    def name(self, idx: int) -> str:
        """File name of item `idx`."""
        return self._name(idx % len(self._files))

    def get_stored_label(self, idx: int) -> int | list[float]:
        """Label of item `idx` as dataset.json holds it."""
        assert self._labels is not None
        return self._labels[idx % len(self._files)].tolist()

    def decoded_bytes(self) -> int:
        """Size of all decoded images."""
        return len(self._files) * math.prod(self._shape) * self._dtype.itemsize

    def keep_in_memory(self) -> None:
        """Keep decoded images from now on."""
        if self._cache is None:
            self._cache = {}

    def verify(self) -> None:
        """Check the kind and size of every image by its header.

        Raises:
            UserError: one differs from the first; names both.
        """
        for base in range(len(self._files)):
            name = self._name(base)
            start = self._read(base, HEADER_BYTES)
            try:
                shape, dtype = _npy_header(start) if name.lower().endswith(".npy") else _png_header(start)
            except ValueError:  # another format, or damaged
                self._image(base)
                continue
            self._check(base, shape, dtype)

    def info(self) -> DatasetInfo:
        digest = hashlib.sha256()
        for base, file in enumerate(self._files):
            try:
                size = self._source.size(int(file))
            except OSError as err:
                raise UserError(f"{self.path}: cannot read {self._name(base)}: {err}") from None
            digest.update(f"{self._name(base)}\0{size}\0".encode())
        for base in evenly_spaced(len(self._files), FINGERPRINT_SAMPLES):
            digest.update(struct.pack("<I", self._source.crc(int(self._files[base]))))
        if self._labels is not None:
            digest.update(np.ascontiguousarray(self._labels).tobytes())
        return DatasetInfo(
            count=len(self),
            resolution=self.resolution,
            channels=self.num_channels,
            label_dim=self.label_dim,
            content_hash=digest.hexdigest(),
        )

    def _name(self, base: int) -> str:
        return self._source.names[int(self._files[base])]

    def _image(self, base: int) -> np.ndarray:
        """Image `base`, not mirrored and not to be changed."""
        if self._cache is not None and base in self._cache:
            return self._cache[base]
        image = self._decode(base)
        self._check(base, image.shape, image.dtype)
        if self._cache is not None:
            image = self._cache[base] = np.ascontiguousarray(image)
        return image

    def _check(self, base: int, shape: tuple[int, ...], dtype: np.dtype) -> None:
        if dtype == self._dtype and shape == self._shape:
            return
        name, first = self._name(base), self._name(0)
        if dtype != self._dtype:
            raise UserError(
                f"{self.path}: {name} holds {dtype}, but {first} {self._dtype}: do not mix pixels and latents"
            )
        raise UserError(
            f"{self.path}: {name} is {_size(shape)}, but {first} is {_size(self._shape)}: all images must be alike"
        )

    def _read(self, base: int, size: int | None = None) -> bytes | memoryview:
        idx = int(self._files[base])
        try:
            return self._source.read(idx) if size is None else self._source.read_start(idx, size)
        except (OSError, ValueError, struct.error, zlib.error) as err:
            raise UserError(f"{self.path}: cannot read {self._name(base)}: {err}") from None

    def _decode(self, base: int) -> np.ndarray:
        data = self._read(base)
        if self._npy_start and data[: len(self._npy_start)] == self._npy_start:
            image = np.frombuffer(data, self._dtype, offset=len(self._npy_start))
            # Looking at the numbers costs as much as copying them: once is enough.
            if image.size == math.prod(self._shape) and (self._seen[base] or np.isfinite(image).all()):
                self._seen[base] = True
                return image.reshape(self._shape)
        name = self._name(base)
        try:
            return _decode_npy(data) if name.lower().endswith(".npy") else _decode_image(data)
        except PIL.UnidentifiedImageError:
            raise UserError(f"{self.path}: cannot read {name}: damaged, or not an image") from None
        except Exception as err:  # a damaged file can fail in any way
            raise UserError(f"{self.path}: cannot read {name}: {err or type(err).__name__}") from None

    def _load_labels(self, names: list[str]) -> np.ndarray | None:
        """Labels of all images: int64 [n], float32 [n, label_dim], or None."""
        if not self.use_labels:
            return None
        if "dataset.json" not in self._source.names:
            tops = [name.split("/")[0] if "/" in name else None for name in names]
            classes = sorted({top for top in tops if top is not None})
            if len(classes) < 2 or None in tops:
                return None
            index = {name: i for i, name in enumerate(classes)}
            return np.array([index[top] for top in tops if top is not None])

        where = f"{self.path}: dataset.json"
        try:
            text = bytes(self._source.read(self._source.names.index("dataset.json")))
        except (ValueError, OSError, struct.error, zlib.error) as err:
            raise UserError(f"{where}: cannot be read ({one_line(err)})") from None
        labels = parse_labels_json(where, text)
        if labels is None:
            return None
        missing = [name for name in names if name not in labels]
        if missing:
            raise UserError(f"{where} has no label for {len(missing)} images, such as {', '.join(missing[:3])}")
        try:
            array = np.array([labels[name] for name in names])
        except ValueError:
            raise UserError(f"{where}: labels differ in length") from None
        if array.ndim == 1 and np.issubdtype(array.dtype, np.integer) and 0 <= array.min() <= array.max() <= MAX_LABEL:
            return array.astype(np.int64)
        if array.ndim == 2 and array.size > 0 and np.issubdtype(array.dtype, np.number):
            with np.errstate(over="ignore"):
                array = array.astype(np.float32)
            if np.isfinite(array).all():
                return array
        raise UserError(f"{where}: labels must be all integers from 0 to {MAX_LABEL}, or all lists of finite numbers")


def parse_labels_json(where: str, text: bytes) -> dict[str, Any] | None:
    """The labels of a dataset.json by name, None if it says that there are none.

    Raises:
        UserError: it is of another form, or a name has two labels.
    """
    labels: dict[str, Any] = {}
    try:
        listed = json.loads(text)["labels"]
        for name, label in listed if listed is not None else ():
            name = posixpath.normpath(name.replace("\\", "/"))
            if labels.setdefault(name, label) != label:
                raise UserError(f"{where}: {name} is there twice, as {labels[name]} and {label}")
    except UserError:
        raise
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError) as err:
        reason = one_line(err)
        raise UserError(f"{where} is not of the form {{'labels': [[name, label], ...]}}: {reason}") from None
    return labels if listed is not None else None


@functools.cache
def image_suffixes() -> frozenset[str]:
    """File types that Pillow opens, such as '.png'."""
    return frozenset(ext for ext, kind in PIL.Image.registered_extensions().items() if kind in PIL.Image.OPEN)


def subset(count: int, max_size: int | None, seed: int) -> np.ndarray:
    """A random choice of up to `max_size` of the indices below `count`, ascending: the same as the published tools'."""
    indices = np.arange(count)
    if max_size is not None and count > max_size:
        np.random.RandomState(seed % (1 << 31)).shuffle(indices)
        indices = np.sort(indices[:max_size])
    return indices


def evenly_spaced(count: int, most: int) -> np.ndarray:
    """Up to `most` of the indices below `count`, from the first to the last."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(int)


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[2]}x{shape[1]} with {shape[0]} channel{'s' if shape[0] != 1 else ''}"


def _png_header(data: bytes | memoryview) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and kind of the pixels of a PNG file with at most 8 bits per channel, from its start.

    Raises:
        ValueError: it is none.
    """
    if len(data) < PNG_HEADER.size:
        raise ValueError("too short")
    signature, chunk, width, height, bits, color = PNG_HEADER.unpack_from(data)
    if signature != b"\x89PNG\r\n\x1a\n" or chunk != b"IHDR" or bits > 8 or color not in PNG_CHANNELS:
        raise ValueError("not a PNG file of 8 bits per channel")
    return (PNG_CHANNELS[color], height, width), np.dtype(np.uint8)


def _decode_plain_png(data: bytes | memoryview) -> np.ndarray | None:
    """uint8 [C, H, W] of a PNG file of one data chunk and unfiltered rows, as `dataset_tool.py` writes them; else None.

    Several times as fast as Pillow, most of whose time goes into its own bookkeeping.
    """
    if len(data) < PNG_DATA.size:
        return None
    signature, width, height, bits, color, interlaced, size, chunk = PNG_DATA.unpack_from(data)
    rest = data[PNG_DATA.size + size + 8 : PNG_DATA.size + size + 12]
    plain = signature == b"\x89PNG\r\n\x1a\n" and bits == 8 and color in (0, 2, 4, 6) and interlaced == 0
    if not plain or chunk != b"IDAT" or rest != b"IEND":
        return None
    channels = PNG_CHANNELS[color]
    rows = np.frombuffer(zlib.decompress(data[PNG_DATA.size : PNG_DATA.size + size]), np.uint8)
    if rows.size != height * (1 + width * channels):
        raise ValueError("the image is truncated")
    rows = rows.reshape(height, 1 + width * channels)
    if rows[:, 0].any():
        return None
    return rows[:, 1:].reshape(height, width, channels).transpose(2, 0, 1)


def _npy_header(data: bytes | memoryview) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and kind of the items of an array file, from its start.

    Raises:
        ValueError: it is none, or not one that `_decode_npy` takes.
    """
    f = io.BytesIO(data)
    if np.lib.format.read_magic(f) != (1, 0):
        raise ValueError("another version")
    shape, _fortran_order, dtype = np.lib.format.read_array_header_1_0(f)
    if len(shape) != 3 or not (dtype == np.uint8 or np.issubdtype(dtype, np.floating)):
        raise ValueError("not an image")
    return shape, dtype if dtype == np.uint8 else np.dtype(np.float32)


def _decode_image(data: bytes | memoryview) -> np.ndarray:
    """uint8 [C, H, W] of an encoded image; palettes and CMYK become RGB."""
    plain = _decode_plain_png(data)
    if plain is not None:
        return plain
    if pyspng is not None and _is_simple_png(data):
        return _channels_first(pyspng.load(bytes(data)))
    with PIL.Image.open(io.BytesIO(data)) as image:
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"{image.mode} pixels have more than 8 bits: convert the image first")
        if image.mode not in ("L", "LA", "RGB", "RGBA"):
            image = image.convert("L" if image.mode == "1" else "RGB")
        return _channels_first(np.asarray(image))


def _channels_first(pixels: np.ndarray) -> np.ndarray:
    """[H, W] or [H, W, C] -> [C, H, W]."""
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _is_simple_png(data: bytes | memoryview) -> bool:
    """Whether this is a PNG file that pyspng reads as Pillow does: 8-bit grayscale, RGB or RGBA, not interlaced.

    Raises:
        ValueError: it is, but damaged: pyspng does not compare checksums.
    """
    if len(data) < PNG_DATA.size:
        return False
    signature, _width, _height, bits, color, interlaced, _size, _chunk = PNG_DATA.unpack_from(data)
    if signature != b"\x89PNG\r\n\x1a\n" or bits != 8 or color not in (0, 2, 6) or interlaced != 0:
        return False
    position, kind = 8, b""
    while kind != b"IEND":
        if len(data) < position + 8:
            raise ValueError("the image is truncated")
        size, kind = struct.unpack_from(">I4s", data, position)
        end = position + 8 + size
        if data[end : end + 4] != zlib.crc32(data[position + 4 : end]).to_bytes(4, "big"):
            raise ValueError("the image is truncated or damaged (a checksum differs)")
        position = end + 4
    return True


def _plain_npy_start(data: bytes | memoryview, shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """The header of an array file whose numbers can be used as they lie there; b'' if they cannot.

    Files of one dataset begin alike, so that this header need not be understood again for each.
    """
    f = io.BytesIO(data)
    if np.lib.format.read_magic(f) != (1, 0):
        return b""
    stored_shape, fortran_order, stored_dtype = np.lib.format.read_array_header_1_0(f)
    return bytes(data[: f.tell()]) if (stored_shape, fortran_order, stored_dtype) == (shape, False, dtype) else b""


def _decode_npy(data: bytes | memoryview) -> np.ndarray:
    array = np.load(io.BytesIO(data), allow_pickle=False)
    if array.ndim != 3 or array.size == 0:
        raise ValueError(f"expected an array [C, H, W], found shape {list(array.shape)}")
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"expected floating point latents or uint8 pixels, found {array.dtype}")
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise ValueError("the latents hold NaN or infinity (as float32)")
    return array


# ---------------------------------------------------------------------------------------------------------
# Training order


def dataset_indices(run_indices: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Which item of a dataset of `count` items the run's images show.

    Each pass over the dataset is a permutation that depends on (seed, pass) alone.

    Args:
        run_indices: indices of images in the run, int64 [n], ascending.
    """
    epochs, positions = np.divmod(run_indices, count)
    result = np.empty_like(run_indices)
    for epoch in np.unique(epochs):
        result[epochs == epoch] = _epoch_order(count, seed, int(epoch))[positions[epochs == epoch]]
    return result


@functools.lru_cache(maxsize=2)
def _epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    # RandomState is the generator whose numbers NumPy promises not to change.
    return np.random.RandomState([seed, epoch]).permutation(count)


class RunSampler(torch.utils.data.Sampler[list[int]]):
    """Endless batches of dataset indices for one process, a function of (seed, image index) alone.

    Args:
        count: items in the dataset.
        seed: seed of the run.
        start: index in the run of the first image of the first optimiser step.
        batch: images per optimiser step, over all processes.
        part: this process's share (first, last) of each step, as offsets into the step's batch.
        round_size: images per item yielded.
    """

    def __init__(self, count: int, seed: int, start: int, batch: int, part: tuple[int, int], round_size: int):
        self.count, self.seed, self.start, self.batch, self.part, self.round_size = (
            count,
            seed,
            start,
            batch,
            part,
            round_size,
        )

    def __iter__(self) -> Iterator[list[int]]:
        nimg = self.start
        while True:
            run_indices = np.arange(nimg + self.part[0], nimg + self.part[1])
            for indices in dataset_indices(run_indices, self.count, self.seed).reshape(-1, self.round_size):
                yield indices.tolist()
            nimg += self.batch


def collate(items: list[tuple[np.ndarray, np.ndarray]]) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*items, strict=True)
    shape = (len(images), *images[0].shape)
    dtype = torch.uint8 if images[0].dtype == np.uint8 else torch.float32
    if torch.utils.data.get_worker_info() is None:
        batch = torch.empty(shape, dtype=dtype)
    else:  # where the training process can see it, else it would be copied there
        storage = torch.UntypedStorage._new_shared(math.prod(shape) * dtype.itemsize)
        batch = torch.empty(0, dtype=dtype).set_(storage, 0, shape)  # type: ignore[call-overload]
    for row, image in zip(batch.numpy(), images, strict=True):  # np.stack takes longer to look at small images
        row[...] = image
    return batch, torch.from_numpy(np.stack(labels))


def begin_loader_process(_worker: int) -> None:
    """For loader processes: signals to the group (Ctrl-C, torchrun's SIGTERM) are the training process's to answer."""
    os.setsid()
    # When Python shuts down, the thread that sends batches may be about to free a tensor, for which it needs Python's
    # lock: that aborts the process, now and then. So leave before.
    multiprocessing.util.Finalize(None, os._exit, args=(0,), exitpriority=-100)
