"""Shards of WebDataset: tar files in which the files of a sample share their name up to the first dot."""

import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from dnnlib.errors import UserError
from training.conversion.sources import Source, SourceImage, class_of, images_naming_damage, is_image
from training.conversion.tar import read_member, tar_members


def tar_shards(path: Path, shards: Sequence[Path], note: str = "") -> Source:
    """The images of all samples of some shards, one after another."""

    def images() -> Iterator[SourceImage]:
        for shard in shards:
            with tarfile.open(shard) as archive:
                yield from images_naming_damage(shard, _samples(shard, archive))

    return Source(f"tar shards{note}", path, None, images)


def _samples(shard: Path, archive: tarfile.TarFile) -> Iterator[SourceImage]:
    key, files = "", []
    for member in tar_members(archive):
        folder, _, name = member.name.rpartition("/")
        base, _, extension = name.partition(".")
        if not member.isfile() or not base:
            continue
        if f"{folder}/{base}" != key:
            yield from _sample(shard, files)
            key, files = f"{folder}/{base}", []
        files.append((member.name, extension.lower(), read_member(archive, member)))
    yield from _sample(shard, files)


def _sample(shard: Path, files: list[tuple[str, str, bytes]]) -> Iterator[SourceImage]:
    """The images of a sample; its class is in a file of type .cls."""
    labels = [
        class_of(data.decode("utf-8", "replace").strip()) for _name, extension, data in files if extension == "cls"
    ]
    images = [(name, data) for name, _extension, data in files if is_image(name)]
    if labels and not images:
        raise UserError(
            f"--source={shard}: {files[0][0]} has no image beside it: the files of a sample must lie together"
        )
    for name, data in images:
        yield SourceImage(f"{shard.name}/{name}", data, labels[0] if labels else None)
