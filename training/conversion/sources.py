"""Images as people have them: folders, ZIP and tar files, Python tarballs of CIFAR, IDX files of MNIST, LMDB of LSUN,
shards of WebDataset, Parquet files of the Hugging Face hub. Each is read in order, one encoded image at a time."""

import csv
import gzip
import io
import json
import os
import posixpath
import re
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from dnnlib.errors import RunError, UserError, one_line
from torch_utils import safe_pickle
from training.config.metrics import SPLITS
from training.dataset.images import files_below, image_suffixes, parse_labels_json

Label = int | str | list[float] | None
MAX_DIGITS = 9  # of a label that is a number
CIFAR_FILES = ("data_batch", "test_batch", "train", "test")
PARQUET_LABELS = ("label", "labels", "fine_label", "cls")


@dataclass(frozen=True)
class SourceImage:
    """An image as it is stored.

    `data` is an encoded file, or pixels: uint8 [H, W] or [H, W, C]. `label` is the number or name of a class, a vector,
    or None. `name` says to people where it is from. Where `error` says why, it could not be read.
    """

    name: str
    data: bytes | np.ndarray
    label: Label = None
    error: str = ""


@dataclass(frozen=True)
class Source:
    """Images of one place. `images` starts to read them anew at each call; where that fails for all further images, it
    raises a UserError."""

    kind: str
    path: Path
    count: int | None  # None: not known before all are read
    images: Callable[[], Iterator[SourceImage]]
    classes: list[str] | None = None  # names of the classes 0, 1, ..., where labels are numbers with names


def open_source(path: Path, split: str = "train") -> Source:
    """Find out what kind of source a path is.

    Args:
        split: 'train', 'validation', 'test' or 'all': which files to read of a source whose files name these parts.

    Raises:
        UserError: no such path, none of the known kinds, or damaged.
    """
    if not path.is_dir() and not path.is_file():
        raise UserError(f"--source={path}: no such file or folder")
    source = _naming_damage(path, lambda: _open_folder(path, split) if path.is_dir() else _open_file(path, split))

    def images() -> Iterator[SourceImage]:
        iterator = source.images()
        while (image := _naming_damage(path, lambda: next(iterator, None))) is not None:
            yield image

    return replace(source, images=images)


def _naming_damage(path: Path, function: Callable[[], Any]) -> Any:
    """The result of `function`, which reads `path`: a damaged file can fail in any way."""
    try:
        return function()
    except (UserError, RunError, MemoryError):
        raise
    except Exception as err:
        reason = one_line(err) or type(err).__name__
        raise UserError(f"--source={path}: damaged ({reason}): copy or make it again") from None


def _open_file(path: Path, split: str) -> Source:
    with open(path, "rb") as f:
        start = f.read(512)
    if zipfile.is_zipfile(path):
        return _zip(path)
    if path.suffix == ".parquet" or start[:4] == b"PAR1":
        return _parquet(path, [path])
    if _idx_shape(path) is not None:
        return _idx(path, [path])
    if tarfile.is_tarfile(path):
        return _tar(path, split)
    raise UserError(
        f"--source={path}: neither a ZIP, tar, Parquet or IDX file nor a CIFAR tarball (it begins with {start[:8]!r})"
    )


def is_image(name: str) -> bool:
    """Whether a file is an image by its name, and not one that a system has put aside for itself."""
    parts = posixpath.normpath(name).split("/")
    hidden = any((part.startswith(".") and part != "..") or part == "__MACOSX" for part in parts)
    return os.path.splitext(name)[1].lower() in image_suffixes() and not hidden


def _part_of(name: str) -> str | None:
    """The part of a dataset that the name of a file, or else of its folders, tells."""
    for text in (PurePosixPath(name).name, str(PurePosixPath(name).parent)):
        found = {part: re.search(f"(?<![a-z])({words})", text) for part, words in SPLITS.items()}
        starts = {part: match.start() for part, match in found.items() if match is not None}
        if starts:
            return min(starts, key=lambda part: starts[part])
    return None


def _of_split(path: Path, names: Sequence[str], split: str) -> tuple[list[str], str]:
    """The files that hold this part of a dataset, and a note if there are others.

    Raises:
        UserError: there are none, but of other parts.
    """
    parts = {name: _part_of(name) for name in names}
    there = [part for part in SPLITS if part in parts.values()]
    if split == "all" or not there:
        order = [*there, None]
        return sorted(names, key=lambda name: (order.index(parts[name]), name)), ""
    if split not in there:
        raise UserError(f"--source={path}: no {split} data in it: choose --split={' or '.join([*there, 'all'])}")
    chosen = sorted(name for name in names if parts[name] == split)
    return chosen, f" ({len(chosen)} of {len(names)} files: --split={split})" if len(chosen) < len(names) else ""


def _open_folder(path: Path, split: str) -> Source:
    if (path / "data.mdb").is_file():
        return _lmdb(path)
    files = sorted(name for name in files_below(path) if not PurePosixPath(name).name.startswith("."))
    images = [name for name in files if is_image(name)]
    shards = [name for name in files if name.endswith((".tar", ".tar.gz", ".tgz"))]
    tables = [name for name in files if name.endswith(".parquet")]
    if images and (shards or tables):
        raise UserError(
            f"--source={path}: holds images (such as {images[0]}) and other sources ({(shards + tables)[0]}): "
            "give the one that is meant, or move the other away"
        )
    if images:
        return _images(path, images, (path / "dataset.json").read_bytes() if "dataset.json" in files else None)
    if shards:
        chosen, note = _of_split(path, shards, split)
        return _shards(path, [path / name for name in chosen], note)
    if tables:
        chosen, note = _of_split(path, tables, split)
        return _parquet(path, [path / name for name in chosen], note)
    arrays = [name for name in files if "images" in name and _idx_shape(path / name) is not None]
    if arrays:
        chosen, note = _of_split(path, arrays, split)
        return _idx(path, [path / name for name in chosen], note)
    raise _no_images(path, files)


def _images(path: Path, names: Sequence[str], text: bytes | None) -> Source:
    labels = _stored_labels(path, names, text)

    def read(name: str) -> SourceImage:
        shown = os.fsencode(name).decode("utf-8", "replace")  # names need not be text
        try:
            return SourceImage(shown, (path / name).read_bytes(), labels.get(name))
        except OSError as err:
            return SourceImage(shown, b"", labels.get(name), error=err.strerror or str(err))

    return Source("folder", path, len(names), lambda: map(read, names))


def _no_images(path: Path, names: Iterable[str]) -> UserError:
    found = sorted({os.path.splitext(name)[1] or PurePosixPath(name).name for name in names})[:5]
    return UserError(
        f"--source={path}: no images in it (found {', '.join(found) if found else 'no files'}); unpack archives first"
    )


def _stored_labels(path: Path, names: Sequence[str], text: bytes | None) -> dict[str, Label]:
    """Labels by name: of dataset.json, or the top-level folders where all images are in several of them."""
    if text is not None:
        labels = parse_labels_json(f"{path}: dataset.json", text) or {}
        if labels and labels.keys().isdisjoint(names):
            raise UserError(
                f"--source={path}: its dataset.json has labels, but of none of its images (it says "
                f"{next(iter(labels))}, there is {names[0]}): mend it, or give --labels"
            )
        return labels
    tops = {name: PurePosixPath(name).parts[0] for name in names if "/" in name}
    return dict(tops) if len(tops) == len(set(names)) and len(set(tops.values())) > 1 else {}


def read_label_file(path: Path) -> dict[str, Label]:
    """Labels by image name from a table of filename,label (with or without a line of headings), or a dataset.json.

    Labels that are all whole numbers are such; else they are names of classes.

    Raises:
        UserError: no such file, or it is of another form.
    """
    try:
        data = path.read_bytes()
        if path.suffix == ".json":
            return parse_labels_json(f"--labels={path}", data) or {}
        rows = [row for row in csv.reader(io.StringIO(data.decode("utf-8-sig"))) if row]
    except (OSError, UnicodeError, csv.Error) as err:
        raise UserError(f"--labels={path}: cannot be read ({err})") from None
    if rows and not is_image(rows[0][0]) and (len(rows) == 1 or is_image(rows[1][0])):
        rows = rows[1:]  # headings
    if not rows:
        raise UserError(f"--labels={path}: holds no labels")
    bad = next((row for row in rows if len(row) != 2 or not row[0].strip() or not row[1].strip()), None)
    if bad is not None:
        raise UserError(f"--labels={path}: {one_line(','.join(bad))!r} is not of the form filename,label")
    labels: dict[str, str] = {}
    for name, label in rows:
        name, label = posixpath.normpath(name.strip().replace("\\", "/")), label.strip()
        if labels.setdefault(name, label) != label:
            raise UserError(f"--labels={path}: {name} is there twice, as {labels[name]} and {label}")
    classes = {name: _class_of(label) for name, label in labels.items()}
    names = [label for label in classes.values() if isinstance(label, str)]
    if not names:
        return dict(classes)
    odd = next((name for name in names if re.fullmatch(r"[-+]?[0-9]*\.?[0-9]+", name)), None)
    if odd is not None:
        raise UserError(
            f"--labels={path}: {odd[:50]!r} beside other labels: classes have whole numbers from 0, or names"
        )
    return dict(labels)


def _class_of(text: str) -> int | str:
    """The number or name of a class."""
    return int(text) if text.isdecimal() and len(text) <= MAX_DIGITS else text


# ---------------------------------------------------------------------------------------------------------
# Kinds of sources


def _zip(path: Path) -> Source:
    with zipfile.ZipFile(path) as archive:
        named = [(info.filename.replace("\\", "/"), info) for info in archive.infolist()]  # as some Windows tools write
        entries = sorted(((name, info) for name, info in named if is_image(name)), key=lambda pair: pair[0])
        if not entries:
            raise _no_images(path, [name for name, _info in named])
        text = archive.read("dataset.json") if "dataset.json" in archive.namelist() else None
    labels = _stored_labels(path, [name for name, _info in entries], text)

    def images() -> Iterator[SourceImage]:
        with zipfile.ZipFile(path) as archive:
            for name, info in entries:
                data, error = b"", ""
                try:
                    data = archive.read(info)
                except Exception as err:  # a damaged entry can fail in any way
                    error = one_line(err) or type(err).__name__
                yield SourceImage(name, data, labels.get(name), error)

    return Source("ZIP file", path, len(entries), images)


def _tar(path: Path, split: str) -> Source:
    """A tar file of images: CIFAR's own, a shard of WebDataset, or any other."""
    names, text = [], None
    with tarfile.open(path) as archive:
        for member in _members(archive):
            if is_image(member.name) and (member.islnk() or member.issym()):
                raise UserError(f"--source={path}: {member.name} is a link, not an image: unpack it, give the folder")
            if member.isfile():
                names.append(posixpath.normpath(member.name))
                text = _read(archive, member) if names[-1] == "dataset.json" else text
    if any(name.split("/")[0] in ("cifar-10-batches-py", "cifar-100-python") for name in names):
        batches = [name for name in names if PurePosixPath(name).name.startswith(CIFAR_FILES)]
        return _cifar(path, *_of_split(path, batches, split))
    if any(name.lower().endswith(".cls") for name in names):
        return _shards(path, [path], "")
    images_there = [name for name in names if is_image(name)]
    if not images_there:
        raise _no_images(path, names)
    labels = _stored_labels(path, images_there, text)

    def images() -> Iterator[SourceImage]:
        with tarfile.open(path) as archive:
            for member in _members(archive):
                name = posixpath.normpath(member.name)
                if member.isfile() and is_image(name):
                    yield SourceImage(name, _read(archive, member), labels.get(name))

    return Source("tar file", path, len(images_there), images)


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    f = archive.extractfile(member)
    return f.read() if f is not None else b""


def _members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members of a tar file.

    Raises:
        tarfile.TarError: it does not end as such files do; Python takes a damaged header for the end.
    """
    while (member := archive.next()) is not None:
        archive.members = []  # type: ignore[attr-defined] # else all are kept
        yield member
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    block = archive.fileobj.read(tarfile.BLOCKSIZE)
    if block.strip(b"\0") or len(block) not in (0, tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"it breaks off at byte {archive.offset}")
    while rest := archive.fileobj.read(1 << 20):
        if rest.strip(b"\0"):
            raise tarfile.ReadError("something follows its end; joined tar files must be split again")


def _shards(path: Path, shards: Sequence[Path], note: str) -> Source:
    """Tar files in which the files of a sample share their name up to the first dot (WebDataset)."""

    def images() -> Iterator[SourceImage]:
        for shard in shards:
            with tarfile.open(shard) as archive:
                yield from _naming_shard(shard, _samples(shard, archive))

    return Source(f"tar shards{note}", path, None, images)


def _naming_shard(shard: Path, samples: Iterator[SourceImage]) -> Iterator[SourceImage]:
    while (sample := _naming_damage(shard, lambda: next(samples, None))) is not None:
        yield sample


def _samples(shard: Path, archive: tarfile.TarFile) -> Iterator[SourceImage]:
    key, files = "", []
    for member in _members(archive):
        folder, _, name = member.name.rpartition("/")
        base, _, extension = name.partition(".")
        if not member.isfile() or not base:
            continue
        if f"{folder}/{base}" != key:
            yield from _sample(shard, files)
            key, files = f"{folder}/{base}", []
        files.append((member.name, extension.lower(), _read(archive, member)))
    yield from _sample(shard, files)


def _sample(shard: Path, files: list[tuple[str, str, bytes]]) -> Iterator[SourceImage]:
    """The images of a sample; its class is in a file of type .cls."""
    labels = [
        _class_of(data.decode("utf-8", "replace").strip()) for _name, extension, data in files if extension == "cls"
    ]
    images = [(name, data) for name, _extension, data in files if is_image(name)]
    if labels and not images:
        raise UserError(f"--source={shard}: {files[0][0]} comes without its image: files of a sample must lie together")
    for name, data in images:
        yield SourceImage(f"{shard.name}/{name}", data, labels[0] if labels else None)


def _cifar(path: Path, names: Sequence[str], note: str) -> Source:
    """The Python tarballs of CIFAR-10 and CIFAR-100."""

    def images() -> Iterator[SourceImage]:
        with tarfile.open(path) as archive:
            members = {posixpath.normpath(member.name): member for member in archive.getmembers()}
            for name in names:
                try:
                    batch = safe_pickle.loads(_read(archive, members[name]), name)
                except UserError as err:
                    raise UserError(
                        f"--source={path}: not as CIFAR is published ({err}): fetch it again from its home page"
                    ) from None
                name = PurePosixPath(name).name
                try:
                    pixels = batch["data"].load().reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
                    labels = batch["fine_labels"] if "fine_labels" in batch else batch["labels"]
                    pairs = list(zip(pixels, labels, strict=True))
                except (KeyError, AttributeError, TypeError, ValueError) as err:
                    raise UserError(f"--source={path}: {name} is not a batch of CIFAR images ({err!r})") from None
                for i, (image, label) in enumerate(pairs):
                    yield SourceImage(f"{name}[{i}]", np.ascontiguousarray(image), int(label))

    return Source(f"CIFAR tarball{note}", path, None, images)


def _idx_shape(path: Path) -> tuple[int, ...] | None:
    """The shape of an IDX file of bytes (plain or gzip), None if it is something else."""
    try:
        with _open_idx(path) as f:
            start = f.read(20)
    except (OSError, EOFError):
        return None
    if len(start) < 8 or start[:3] != b"\0\0\x08" or not 1 <= start[3] <= 4 or len(start) < 4 + 4 * start[3]:
        return None
    return struct.unpack_from(f">{start[3]}I", start, 4)


def _open_idx(path: Path) -> Any:
    with open(path, "rb") as f:
        compressed = f.read(2) == b"\x1f\x8b"
    return gzip.open(path) if compressed else open(path, "rb")


def _idx(path: Path, files: Sequence[Path], note: str = "") -> Source:
    """Images of IDX files as MNIST ships them, with the labels of the file that goes with each."""
    count = 0
    for file in files:
        shape = _idx_shape(file)
        if shape is None or len(shape) not in (3, 4):
            raise UserError(f"--source={file}: an IDX file of shape {list(shape or ())}, not of images")
        count += shape[0]

    def images() -> Iterator[SourceImage]:
        for file in files:
            pixels, labels = _read_idx(file), _idx_labels(file)
            if labels is not None and labels.shape != pixels.shape[:1]:
                raise UserError(f"--source={file}: {len(pixels)} images, but labels of shape {list(labels.shape)}")
            for i, image in enumerate(pixels):
                gray = image[:, :, 0] if image.ndim == 3 and image.shape[2] == 1 else image
                yield SourceImage(f"{file.name}[{i}]", gray, int(labels[i]) if labels is not None else None)

    return Source(f"IDX files{note}", path, count, images)


def _idx_labels(file: Path) -> np.ndarray | None:
    """The labels that lie beside a file of images, compressed or not."""
    name = re.sub(r"images([-.])idx[0-9]", r"labels\1idx1", file.name).removesuffix(".gz")
    found = next((path for path in (file.with_name(name), file.with_name(f"{name}.gz")) if path.is_file()), None)
    return _read_idx(found) if found is not None and name != file.name.removesuffix(".gz") else None


def _read_idx(path: Path) -> np.ndarray:
    shape = _idx_shape(path)
    try:
        if shape is None:
            raise ValueError("not an IDX file of bytes")
        with _open_idx(path) as f:
            data = f.read()
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

    with lmdb.open(str(path), readonly=True, lock=False) as env:
        count = env.stat()["entries"]
        size = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
        if (path / "data.mdb").stat().st_size < size:  # reading it would kill the process
            raise UserError(f"--source={path}: data.mdb is truncated, it should have {size} bytes: copy it again")
    return Source("LMDB database", path, count, images)


def _parquet(path: Path, tables: Sequence[Path], note: str = "") -> Source:
    """Parquet files of image datasets as on the Hugging Face hub: a column of images, perhaps one of labels."""
    try:
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
                        error = "" if isinstance(data, bytes) else f"no image in column {image}"
                        yield SourceImage(
                            f"{table.name}[{row}]", data or b"", values[label] if label is not None else None, error
                        )
                        row += 1

    schemas = {table: pq.read_schema(table) for table in tables}
    classes = {table: _parquet_classes(schema) for table, schema in schemas.items()}
    for table, schema in schemas.items():
        _parquet_columns(table, schema)
        if classes[table] != classes[tables[0]]:
            raise UserError(f"--source={table}: other names of classes than {tables[0]}: convert them one by one")
    count = sum(pq.read_metadata(table).num_rows for table in tables)
    return Source(f"Parquet files{note}", path, count, images, classes[tables[0]])


def _parquet_columns(table: Path, schema: Any) -> tuple[str, str | None]:
    """Names of the columns of images and labels."""
    import pyarrow.types as kinds

    def holds_images(kind: Any) -> bool:
        views = getattr(kinds, "is_binary_view", lambda _kind: False)  # pyarrow 16
        binary = kinds.is_binary(kind) or kinds.is_large_binary(kind) or views(kind)
        return binary or (kinds.is_struct(kind) and kind.get_field_index("bytes") >= 0)

    images = [field.name for field in schema if holds_images(field.type)]
    if not images:
        raise UserError(f"--source={table}: no column of images (there are {', '.join(schema.names)})")
    usual = [name for name in images if name.lower() in ("image", "img", "images", "pixels", "png", "jpg", "jpeg")]
    known = [name for name in _class_labels(schema) if name in schema.names]
    labels = known or [name for name in schema.names if name.lower() in PARQUET_LABELS]
    return (usual or images)[0], labels[0] if labels else None


def _class_labels(schema: Any) -> dict[str, list[str]]:
    """Names of the classes by column, which the library `datasets` keeps beside the columns."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {
            column: [str(name) for name in feature["names"]]
            for column, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def _parquet_classes(schema: Any) -> list[str] | None:
    """Names of the classes 0, 1, ... of the column of labels."""
    return next(iter(_class_labels(schema).values()), None)
