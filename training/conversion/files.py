"""Sources whose images are files: folders, ZIP files and tar files of them, labelled by dataset.json or by folder."""

import os
import posixpath
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from dnnlib.errors import UserError, one_line
from training.conversion.sources import Label, Source, SourceImage, is_image, no_images
from training.conversion.tar import TarContents, read_member, tar_members
from training.dataset.labels import parse_labels_json


def image_folder(path: Path, names: Sequence[str], with_json: bool) -> Source:
    """The images `names` below a folder, and its dataset.json if it has one."""
    text = (path / "dataset.json").read_bytes() if with_json else None
    labels = _labels_by_name(path, names, text)

    def read(name: str) -> SourceImage:
        shown = os.fsencode(name).decode("utf-8", "replace")  # names need not be text
        try:
            return SourceImage(shown, (path / name).read_bytes(), labels.get(name))
        except OSError as err:
            return SourceImage(shown, b"", labels.get(name), error=err.strerror or str(err))

    return Source("folder", path, len(names), lambda: map(read, names))


def image_zip(path: Path) -> Source:
    """The images of a ZIP file, sorted by name."""
    with zipfile.ZipFile(path) as archive:
        named = [(info.filename.replace("\\", "/"), info) for info in archive.infolist()]  # as some Windows tools write
        entries = sorted(((name, info) for name, info in named if is_image(name)), key=lambda pair: pair[0])
        if not entries:
            raise no_images(path, [name for name, _info in named])
        text = archive.read("dataset.json") if "dataset.json" in archive.namelist() else None
    labels = _labels_by_name(path, [name for name, _info in entries], text)

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


def image_tar(path: Path, contents: TarContents) -> Source:
    """The images of a tar file, in its order."""
    names = [name for name in contents.names if is_image(name)]
    if not names:
        raise no_images(path, contents.names)
    labels = _labels_by_name(path, names, contents.labels_json)

    def images() -> Iterator[SourceImage]:
        with tarfile.open(path) as archive:
            for member in tar_members(archive):
                name = posixpath.normpath(member.name)
                if member.isfile() and is_image(name):
                    yield SourceImage(name, read_member(archive, member), labels.get(name))

    return Source("tar file", path, len(names), images)


def _labels_by_name(path: Path, names: Sequence[str], text: bytes | None) -> dict[str, Label]:
    """Labels of dataset.json, or else the top-level folders where all images are in several of them."""
    if text is not None:
        labels = parse_labels_json(f"{path}: dataset.json", text) or {}
        if labels and labels.keys().isdisjoint(names):
            raise UserError(
                f"--source={path}: its dataset.json has labels, but of none of its images (it says "
                f"{next(iter(labels))}, the images are such as {names[0]}): correct it, or give --labels"
            )
        return labels
    tops = {name: PurePosixPath(name).parts[0] for name in names if "/" in name}
    return dict(tops) if len(tops) == len(set(names)) and len(set(tops.values())) > 1 else {}
