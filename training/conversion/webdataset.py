"""Shards of WebDataset: tar files in which the files of a sample share their name up to the first dot."""

import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from dnnlib.errors import UserError, one_line
from training.conversion.sources import Choice, Label, Source, SourceImage, images_naming_damage
from training.conversion.tar import list_tar, read_member, tar_members
from training.dataset.listing import HIDDEN, image_suffixes

LABEL_KEY = "cls"
JSON_LABELS = ("label", "labels", "cls", "class")  # keys of a sample's JSON file


class _File(NamedTuple):
    name: str
    key: str  # what follows the first dot, in small letters: 'jpg', 'seg.png', 'cls'
    data: bytes

    @property
    def is_image(self) -> bool:
        return _is_image(self.key)


def _is_image(key: str) -> bool:
    return f".{key.rpartition('.')[2]}" in image_suffixes()


def has_samples(names: Sequence[str]) -> bool:
    """Whether files of a tar file go together as samples: images with a file of type .cls or .json each."""
    keys: dict[str, set[str]] = {}
    for name in names:
        base, key = _split(name)
        keys.setdefault(base, set()).add(key)
    labels = [found for found in keys.values() if found & {LABEL_KEY, "json"}]
    return any(LABEL_KEY in found for found in labels) or any(
        any(f".{key}" in image_suffixes() for key in found) for found in labels
    )


def _split(name: str) -> tuple[str, str]:
    """'a/b.seg.png' -> 'a/b', 'seg.png'."""
    folder, _, base = name.rpartition("/")
    base, _, key = base.partition(".")
    return f"{folder}/{base}", key.lower()


def tar_shards(path: Path, shards: Sequence[Path], choice: Choice, note: str = "") -> Source:
    """One image for each sample of some shards, one shard after another."""

    def images() -> Iterator[SourceImage]:
        for shard in shards:
            with tarfile.open(shard) as archive:
                samples = _samples(archive)
                yield from images_naming_damage(shard, _with_images(shard, samples, choice))

    names = list_tar(shards[0]).names
    labels, notes = f"key {choice.label_key}" if choice.label_key else "files .cls, or keys of .json", []
    if not choice.label_key and not has_samples(names):
        labels = ""
        notes = ["no labels beside the images: if each tar file is a class, unpack each into a folder of its name"]
    kinds = {key for _base, key in map(_split, names) if _is_image(key)}
    others = sorted(kinds - {choice.image_key.lower()} if choice.image_key else {key for key in kinds if "." in key})
    if others and len(others) < len(kinds):
        notes.append(f"one image per sample: others beside it are left out ({', '.join(others)}; see --image-key)")
    return Source(f"tar shards{note}", path, None, images, labels, has_keys=True, notes=notes)


def _samples(archive: tarfile.TarFile) -> Iterator[list[_File]]:
    base, files = "", []
    for member in tar_members(archive):
        member_base, key = _split(member.name)
        if not member.isfile() or not key or HIDDEN.search(member.name):
            continue
        if member_base != base:
            if files:
                yield files
            base, files = member_base, []
        files.append(_File(member.name, key, read_member(archive, member)))
    if files:
        yield files


def _with_images(shard: Path, samples: Iterator[list[_File]], choice: Choice) -> Iterator[SourceImage]:
    for files in samples:
        image = _image_of(shard, files, choice.image_key)
        if image is not None:
            yield SourceImage(f"{shard.name}/{image.name}", image.data, _label_of(shard, files, choice.label_key))
        elif any(file.key == LABEL_KEY for file in files):
            raise UserError(
                f"--source={shard}: {files[0].name} has no image beside it: the files of a sample must lie together"
            )


def _image_of(shard: Path, files: list[_File], key: str | None) -> _File | None:
    """The image with that key, or else the only one whose key is a file type alone, or the only one at all."""
    images = [file for file in files if file.is_image]
    if key is not None:
        chosen = [file for file in images if file.key == key.lower()]
    else:
        chosen = [file for file in images if "." not in file.key] or images
    keys = ", ".join(sorted(file.key for file in images))
    if len(chosen) > 1:
        raise UserError(f"--source={shard}: {chosen[0].name} is one of several images ({keys}): choose by --image-key")
    if images and not chosen:
        raise UserError(f"--source={shard}: no image {key} beside {images[0].name}: choose --image-key from {keys}")
    return chosen[0] if chosen else None


def _label_of(shard: Path, files: list[_File], key: str | None) -> Label:
    """The contents of the file with that key, or that entry of a JSON file."""
    by_key = {file.key: file.data for file in files}
    for name in (LABEL_KEY,) if key is None else (key.lower(),):
        if name in by_key:
            return by_key[name].decode("utf-8", "replace").strip()
    if "json" not in by_key:
        return None
    try:
        entries = json.loads(by_key["json"])
    except (ValueError, RecursionError) as err:
        raise UserError(
            f"--source={shard}: the JSON file beside {files[0].name} is damaged ({one_line(err)}): copy it again"
        ) from None
    names = JSON_LABELS if key is None else (key,)
    return next((entries[name] for name in names if name in entries), None) if isinstance(entries, dict) else None
