"""Images as people have them: folders, ZIP and tar files, Python tarballs of CIFAR, IDX files of MNIST, LMDB of LSUN,
shards of WebDataset, Parquet files of the Hugging Face hub. Each is read in order, one encoded image at a time."""

import csv
import gzip
import io
import json
import os
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import PIL.Image

from dnnlib.util import UserError
from torch_utils import safe_pickle

Label = int | str | list[float] | None


@dataclass(frozen=True)
class SourceImage:
    """An image as it is stored.

    `data` is an encoded file, or pixels: uint8 [H, W] or [H, W, C]. `label` is the number or name of a class, a vector,
    or None. `name` says to people where it is from.
    """

    name: str
    data: bytes | np.ndarray
    label: Label = None


@dataclass(frozen=True)
class Source:
    """Images of one place. `images` starts to read them anew at each call."""

    kind: str
    path: Path
    count: int | None  # None: not known before all are read
    images: Callable[[], Iterator[SourceImage]]


def open_source(path: Path) -> Source:
    """Find out what kind of source a path is.

    Raises:
        UserError: no such path, or none of the known kinds.
    """
    if path.is_dir():
        return _open_folder(path)
    if not path.is_file():
        raise UserError(f"--source={path}: no such file or folder")
    with open(path, "rb") as f:
        start = f.read(512)
    if zipfile.is_zipfile(path):
        return _zip(path)
    if path.suffix == ".parquet" or start[:4] == b"PAR1":
        return _parquet(path, [path])
    idx = _idx_start(path, start)
    if idx is not None:
        return _idx(path)
    if tarfile.is_tarfile(path):
        return _tar(path)
    raise UserError(
        f"--source={path}: neither a ZIP, tar, Parquet or IDX file nor a CIFAR tarball (it begins with {start[:8]!r})"
    )


def is_image(name: str) -> bool:
    """Whether a file is an image by its name, and not one that a system has put aside for itself."""
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in name.replace("../", "").split("/"))
    return os.path.splitext(name)[1].lower() in PIL.Image.registered_extensions() and not hidden


def _open_folder(path: Path) -> Source:
    if (path / "data.mdb").is_file():
        return _lmdb(path)
    files = sorted(
        (Path(root) / name).relative_to(path).as_posix()
        for root, _folders, names in os.walk(path)
        for name in names
        if not name.startswith(".")
    )
    images = [name for name in files if is_image(name)]
    if images:
        labels = _stored_labels(path, images, lambda name: (path / name).read_bytes() if name in files else None)
        return Source(
            "folder",
            path,
            len(images),
            lambda: (SourceImage(name, (path / name).read_bytes(), labels.get(name)) for name in images),
        )
    shards = [path / name for name in files if name.endswith(".tar")]
    if shards:
        return _shards(path, shards)
    tables = [path / name for name in files if name.endswith(".parquet")]
    if tables:
        return _parquet(path, tables)
    for name in files:
        with open(path / name, "rb") as f:
            if "images" in name and _idx_start(path / name, f.read(512)) is not None:
                return _idx(path / name)
    found = sorted({os.path.splitext(name)[1] or name for name in files})[:5]
    raise UserError(f"--source={path}: no images in it (found {', '.join(found) if found else 'no files'})")


def _stored_labels(path: Path, names: Sequence[str], read: Callable[[str], bytes | None]) -> dict[str, Label]:
    """Labels by name: of dataset.json, or the top-level folders where all images are in several of them."""
    text = read("dataset.json")
    if text is not None:
        return parse_labels_json(f"{path}: dataset.json", text)
    tops = {name: PurePosixPath(name).parts[0] for name in names if "/" in name}
    return dict(tops) if len(tops) == len(names) and len(set(tops.values())) > 1 else {}


def parse_labels_json(where: str, text: bytes) -> dict[str, Label]:
    """The labels of a dataset.json.

    Raises:
        UserError: it is of another form.
    """
    try:
        listed = json.loads(text)["labels"]
        return {} if listed is None else {str(name).replace("\\", "/"): label for name, label in listed}
    except (ValueError, TypeError, KeyError, RecursionError) as err:
        raise UserError(f"{where} is not of the form {{'labels': [[name, label], ...]}}: {err}") from None


def read_label_file(path: Path) -> dict[str, Label]:
    """Labels by image name from a table of filename,label (with or without a line of headings), or a dataset.json.

    Labels that are all whole numbers are such; else they are names of classes.

    Raises:
        UserError: no such file, or it is of another form.
    """
    try:
        data = path.read_bytes()
        if path.suffix == ".json":
            return parse_labels_json(f"--labels={path}", data)
        rows = [row for row in csv.reader(io.StringIO(data.decode("utf-8-sig"))) if row]
    except (OSError, UnicodeError, csv.Error) as err:
        raise UserError(f"--labels={path}: cannot be read ({err})") from None
    bad = next((i for i, row in enumerate(rows) if len(row) != 2), None)
    if bad is not None:
        raise UserError(f"--labels={path}: row {bad + 1} has {len(rows[bad])} columns instead of filename,label")
    if rows and not is_image(rows[0][0]) and len(rows) > 1 and is_image(rows[1][0]):
        rows = rows[1:]  # headings
    labels: dict[str, str] = {}
    for name, label in rows:
        name, label = name.replace("\\", "/"), label.strip()
        if labels.setdefault(name, label) != label:
            raise UserError(f"--labels={path}: {name} is there twice, as {labels[name]} and {label}")
    if not labels:
        raise UserError(f"--labels={path}: holds no labels")
    if all(label.isdecimal() for label in labels.values()):
        return {name: int(label) for name, label in labels.items()}
    return dict(labels)


# ---------------------------------------------------------------------------------------------------------
# Kinds of sources


def _zip(path: Path) -> Source:
    with zipfile.ZipFile(path) as archive:
        names = sorted(info.filename for info in archive.infolist() if is_image(info.filename))
        stored = set(archive.namelist())
        labels = _stored_labels(path, names, lambda name: archive.read(name) if name in stored else None)

    def images() -> Iterator[SourceImage]:
        with zipfile.ZipFile(path) as archive:
            for name in names:
                try:
                    data = archive.read(name)
                except (zipfile.BadZipFile, OSError, NotImplementedError) as err:
                    raise UserError(f"--source={path}: cannot read {name}: {err}") from None
                yield SourceImage(name, data, labels.get(name))

    return Source("ZIP file", path, len(names), images)


def _tar(path: Path) -> Source:
    """A tar file of images: CIFAR's own, a shard of WebDataset, or any other."""
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.name.split("/")[0] in ("cifar-10-batches-py", "cifar-100-python"):
                    return _cifar(path)
                if member.isfile():
                    break
    except (tarfile.TarError, OSError, EOFError) as err:
        raise UserError(f"--source={path}: damaged tar file ({err}): copy it again") from None
    return _shards(path, [path])


def _shards(path: Path, shards: Sequence[Path]) -> Source:
    """Tar files in which the files of a sample share their name up to the first dot (WebDataset)."""

    def images() -> Iterator[SourceImage]:
        for shard in shards:
            try:
                with tarfile.open(shard) as archive:
                    yield from _samples(shard, archive)
                    if archive.fileobj is not None:
                        archive.fileobj.seek(archive.offset)
                        if len(archive.fileobj.read(tarfile.BLOCKSIZE)) not in (0, tarfile.BLOCKSIZE):
                            raise EOFError("it ends within a file")
            except (tarfile.TarError, OSError, EOFError) as err:
                raise UserError(f"--source={shard}: damaged tar file ({err}): copy it again") from None

    return Source("tar shards", path, None, images)


def _samples(shard: Path, archive: tarfile.TarFile) -> Iterator[SourceImage]:
    key, sample = "", {}
    for member in archive:
        folder, _, name = member.name.rpartition("/")
        base, _, extension = name.partition(".")
        if not member.isfile() or not base:
            continue
        if f"{folder}/{base}" != key:
            yield from _sample(shard, sample)
            key, sample = f"{folder}/{base}", {}
        f = archive.extractfile(member)
        sample[extension.lower()] = (member.name, f.read() if f is not None else b"")
    yield from _sample(shard, sample)


def _sample(shard: Path, sample: dict[str, tuple[str, bytes]]) -> Iterator[SourceImage]:
    label: Label = None
    if "cls" in sample:
        text = sample["cls"][1].decode("utf-8", "replace").strip()
        label = int(text) if text.isdecimal() else text
    for name, data in sample.values():
        if is_image(name):
            yield SourceImage(f"{shard.name}/{name}", data, label)


def _cifar(path: Path) -> Source:
    """The Python tarballs of CIFAR-10 and CIFAR-100: training images, then test images."""

    def images() -> Iterator[SourceImage]:
        with tarfile.open(path) as archive:
            members = {PurePosixPath(m.name).name: m for m in archive.getmembers() if m.isfile()}
            for name in [*sorted(n for n in members if n.startswith("data_batch")), "train", "test_batch", "test"]:
                f = archive.extractfile(members[name]) if name in members else None
                if f is None:
                    continue
                batch = safe_pickle.loads(f.read(), f"{path}: {name}")
                try:
                    pixels = batch["data"].load().reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
                    labels = batch["fine_labels"] if "fine_labels" in batch else batch["labels"]
                    pairs = list(zip(pixels, labels, strict=True))
                except (KeyError, AttributeError, TypeError, ValueError) as err:
                    raise UserError(f"--source={path}: {name} is not a batch of CIFAR images ({err!r})") from None
                for i, (image, label) in enumerate(pairs):
                    yield SourceImage(f"{name}[{i}]", np.ascontiguousarray(image), int(label))

    return Source("CIFAR tarball", path, None, images)


def _idx_start(path: Path, start: bytes) -> tuple[int, ...] | None:
    """The shape of an IDX file of bytes (plain or gzip), None if it is something else."""
    if start[:2] == b"\x1f\x8b":
        try:
            with gzip.open(path) as f:
                start = f.read(20)
        except (OSError, EOFError):
            return None
    if len(start) < 8 or start[:3] != b"\0\0\x08" or not 1 <= start[3] <= 4 or len(start) < 4 + 4 * start[3]:
        return None
    return struct.unpack_from(f">{start[3]}I", start, 4)


def _idx(path: Path) -> Source:
    """Images of an IDX file as MNIST ships them, with the labels of the file that goes with it."""
    pixels = _read_idx(path)
    if pixels.ndim not in (3, 4):
        raise UserError(f"--source={path}: an IDX file of shape {list(pixels.shape)}, not of images")
    label_path = path.with_name(path.name.replace("images-idx3", "labels-idx1").replace("images.idx3", "labels.idx1"))
    labels = _read_idx(label_path) if label_path != path and label_path.is_file() else None
    if labels is not None and labels.shape != pixels.shape[:1]:
        raise UserError(f"--source={path}: {len(pixels)} images, but {label_path.name} has {len(labels)} labels")

    def images() -> Iterator[SourceImage]:
        for i, image in enumerate(pixels):
            yield SourceImage(f"{path.name}[{i}]", image, int(labels[i]) if labels is not None else None)

    return Source("IDX file", path, len(pixels), images)


def _read_idx(path: Path) -> np.ndarray:
    data = path.read_bytes()
    try:
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        shape = _idx_start(path, data[:512])
        if shape is None:
            raise ValueError("not an IDX file of bytes")
        return np.frombuffer(data, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)
    except (ValueError, OSError, EOFError) as err:
        raise UserError(f"--source={path}: damaged IDX file ({err}): copy it again") from None


def _lmdb(path: Path) -> Source:
    """An LMDB environment whose values are encoded images, as LSUN ships them."""
    try:
        import lmdb
    except ImportError:
        raise UserError(f"--source={path}: an LMDB database needs a package: pip install lmdb") from None

    def images() -> Iterator[SourceImage]:
        with lmdb.open(str(path), readonly=True, lock=False) as env, env.begin(buffers=False) as transaction:
            for key, value in transaction.cursor():
                yield SourceImage(key.decode("latin-1"), value)

    try:
        with lmdb.open(str(path), readonly=True, lock=False) as env:
            count = env.stat()["entries"]
    except lmdb.Error as err:
        raise UserError(f"--source={path}: damaged LMDB database ({err})") from None
    return Source("LMDB database", path, count, images)


def _parquet(path: Path, tables: Sequence[Path]) -> Source:
    """Parquet files of image datasets as on the Hugging Face hub: a column of images, perhaps one of labels."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(f"--source={path}: Parquet files need a package: pip install pyarrow") from None

    def images() -> Iterator[SourceImage]:
        for table in tables:
            with pq.ParquetFile(table) as file:
                image, label = _parquet_columns(table, file.schema_arrow)
                row = 0
                for batch in file.iter_batches(64, columns=[c for c in (image, label) if c is not None]):
                    for values in batch.to_pylist():
                        data = values[image]["bytes"] if isinstance(values[image], dict) else values[image]
                        if not isinstance(data, bytes):
                            raise UserError(f"--source={table}: row {row} of column {image} holds no image")
                        yield SourceImage(f"{table.name}[{row}]", data, values[label] if label is not None else None)
                        row += 1

    try:
        count = sum(pq.read_metadata(table).num_rows for table in tables)
    except (pa.ArrowInvalid, OSError) as err:
        raise UserError(f"--source={path}: damaged Parquet file ({err}): copy it again") from None
    return Source("Parquet files", path, count, images)


def _parquet_columns(table: Path, schema: Any) -> tuple[str, str | None]:
    """Names of the columns of images and labels."""
    import pyarrow as pa

    def holds_images(kind: Any) -> bool:
        return pa.types.is_binary(kind) or (pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0)

    images = [field.name for field in schema if holds_images(field.type)]
    if not images:
        raise UserError(f"--source={table}: no column of images (there are {', '.join(schema.names)})")
    labels = [name for name in ("label", "labels", "fine_label", "cls") if name in schema.names]
    return images[0], labels[0] if labels else None
