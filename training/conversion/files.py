"""Sources whose images are files: folders, ZIP files and tar files of them, labelled by dataset.json or by folder."""

import posixpath
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from dnnlib.errors import UserError, one_line
from training.conversion.sources import CLASS_FOLDERS, Choice, Label, Source, SourceImage, check_no_parts, no_images
from training.conversion.tar import TarContents, read_member, tar_members
from training.dataset.folders import folders_as_classes, parts_of_folders, shared_folder
from training.dataset.labels import parse_labels_json
from training.dataset.listing import Listing, contact_sheets, counted, is_image, list_files, printable, suffix_of
from training.dataset.storage import MAX_FILE_BYTES


def image_folder(path: Path, files: Listing, text: bytes | None, choice: Choice) -> Source:
    """The images below a folder, labelled by the dataset.json `text` or by folder."""
    found = _understand(path, files, text, choice.split)

    def read(name: str) -> SourceImage:
        try:
            data, error = (path / name).read_bytes(), ""
        except OSError as err:
            data, error = b"", err.strerror or str(err)
        return SourceImage(printable(name), data, found.labels_by_name.get(name), error)

    return found.source("folder", path, lambda: map(read, found.names))


def image_zip(path: Path, choice: Choice) -> Source:
    """The images of a ZIP file, sorted by name."""
    with zipfile.ZipFile(path) as archive:
        infos = [info for info in archive.infolist() if not info.is_dir()]
        named = sorted(((info.filename.replace("\\", "/"), info) for info in infos), key=lambda pair: pair[0])
        text = _unpacked(archive, archive.getinfo("dataset.json")) if "dataset.json" in archive.namelist() else None
        entries = dict(named)
        sheets = contact_sheets(entries, lambda name: _unpacked(archive, entries[name]))
        listing = list_files((name for name, _info in named), sheets=sheets)
        for position in listing.odd:
            archive.open(named[position][1]).close()  # compares the two copies of a name
    found = _understand(path, listing, text, choice.split)
    chosen = set(found.names)

    def images() -> Iterator[SourceImage]:
        with zipfile.ZipFile(path) as archive:
            for name, info in named:
                if name not in chosen:
                    continue
                data, error = b"", ""
                try:
                    data = _unpacked(archive, info)
                except Exception as err:  # a damaged entry can fail in any way
                    error = one_line(err) or type(err).__name__
                yield SourceImage(name, data, found.labels_by_name.get(name), error)

    return found.source("ZIP file", path, images)


def _unpacked(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """An entry of a ZIP file. Unlike by `ZipFile.read`, no more is ever unpacked than it should be.

    Raises:
        ValueError: it should be too much.
        zipfile.BadZipFile, zlib.error and others: the entry is damaged.
    """
    if info.file_size > MAX_FILE_BYTES:
        raise ValueError(f"it would unpack to {info.file_size} bytes, more than {MAX_FILE_BYTES}")
    with archive.open(info) as f:
        return f.read(info.file_size)


def image_tar(path: Path, contents: TarContents, choice: Choice) -> Source:
    """The images of a tar file, in its order."""
    found = _understand(path, list_files(contents.names), contents.labels_json, choice.split)
    chosen = set(found.names)

    def images() -> Iterator[SourceImage]:
        with tarfile.open(path) as archive:
            for member in tar_members(archive):
                name = posixpath.normpath(member.name)
                if member.isfile() and name in chosen and is_image(name):
                    yield SourceImage(name, read_member(archive, member), found.labels_by_name.get(name))

    return found.source("tar file", path, images)


@dataclass
class _Found:
    """Which images are taken, in which order, with which labels."""

    names: list[str]
    labels: str = ""  # where they come from
    labels_by_name: dict[str, Label] = field(default_factory=dict)
    classes: list[str] | None = None
    notes: list[str] = field(default_factory=list)

    def source(self, kind: str, path: Path, images: Callable[[], Iterator[SourceImage]]) -> Source:
        kind = f"{kind} ({counted(Counter(map(suffix_of, self.names)))})"
        labels = self.labels_by_name.values()
        known = None if any(isinstance(label, list) for label in labels) else len(set(map(str, labels)))
        return Source(
            kind, path, len(self.names), images, self.labels, self.classes, num_classes=known, notes=self.notes
        )


def _understand(path: Path, files: Listing, text: bytes | None, split: str) -> _Found:
    """Labels of dataset.json, or else by folder, of the part of the dataset that `split` names.

    Raises:
        UserError: there are no images, or none of that part; labels are of other images; folders are no classes.
    """
    if not files.images:
        raise no_images(path, files)
    contents = parse_labels_json(f"{path}: dataset.json", text) if text is not None else None
    if contents is not None:
        labels = contents.labels or {}
        if labels and labels.keys().isdisjoint(files.images):
            raise UserError(
                f"--source={path}: its dataset.json has labels, but of none of its images (it says "
                f"{next(iter(labels))}, the images are such as {files.images[0]}): correct it, or give --labels"
            )
        where = "dataset.json" if labels else ""
        return _Found(files.images, where, labels, contents.class_names, files.left_out())
    names, below, notes = _of_part(path, files.images, split)
    folders = folders_as_classes(f"--source={path}", below, files.unreadable)
    if not folders.names:
        return _Found(names, notes=[*notes, *folders.notes, *files.unused_tables(), *files.left_out()])
    by_name: dict[str, Label] = {name: folders.names[label] for name, label in zip(names, folders.labels, strict=True)}
    return _Found(names, CLASS_FOLDERS, by_name, notes=[*notes, *folders.notes, *files.left_out()])


def _of_part(path: Path, names: list[str], split: str) -> tuple[list[str], list[str], list[str]]:
    """The images of a part of a dataset whose folders are parts (else all), their names below that, and a note."""
    parts = parts_of_folders(names)
    if not parts:
        check_no_parts(path, split)
        return names, names, []
    start = len(shared_folder(names))
    present = sorted(set(parts.values()))
    if split not in (*present, "all"):
        raise UserError(f"--source={path}: no {split} data in it: choose --split={' or '.join([*present, 'all'])}")
    chosen = [name for name in names if split in ("all", parts.get(name[start:].split("/")[0]))]
    note = f"folders {', '.join(sorted(parts))} are parts: --split={split} takes {len(chosen)} of {len(names)} images"
    return chosen, [name[start:].split("/", 1)[-1] for name in chosen], [note]
