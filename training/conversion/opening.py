"""From a path to a source: what kind of folder or file it is."""

import tarfile
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from dnnlib.errors import UserError
from training.conversion.files import image_folder, image_tar, image_zip
from training.conversion.formats import CIFAR_FILES, CIFAR_FOLDERS, cifar, idx_files, idx_shape, lmdb_database
from training.conversion.label_table import LabelTable, read_label_file
from training.conversion.mat import MAT_MAGIC, svhn_files
from training.conversion.nvae_data import is_omniglot, omniglot
from training.conversion.parquet import parquet_tables
from training.conversion.sources import Choice, Source, files_of_split, images_naming_damage, naming_damage, no_images
from training.conversion.tar import TarContents, list_tar
from training.conversion.tfrecord import is_tfrecord, tfrecord_files
from training.conversion.webdataset import has_samples, tar_shards
from training.dataset.listing import HIDDEN, contact_sheets, list_files
from training.dataset.storage import files_below

DEFAULT = Choice()


def open_sources(paths: Sequence[Path], choice: Choice, labels: Path | None) -> tuple[list[Source], LabelTable | None]:
    """The sources at some paths, and the table of labels that goes with them.

    Raises:
        UserError: as `open_source` and `read_label_file`; or there is no use for the keys of the choice.
    """
    of_sources = choice if labels is None else replace(choice, label_key=None)
    sources = [open_source(path, of_sources) for path in paths]
    has_keys = any(source.has_keys for source in sources)
    if labels is not None:
        return sources, read_label_file(labels, replace(choice, image_key=None) if has_keys else choice)
    for option, key in (("--image-key", choice.image_key), ("--label-key", choice.label_key)):
        if key is not None and not has_keys:
            raise UserError(f"{option}={key}: --source={paths[0]} is a {sources[0].kind}: leave the option out")
    return sources, None


def open_source(path: Path, choice: Choice = DEFAULT) -> Source:
    """The source at a path, of whichever kind it is.

    Raises:
        UserError: there is no such path, it is of no known kind, damaged, or does not offer the choice.
    """
    if not path.is_dir() and not path.is_file():
        raise UserError(f"--source={path}: no such file or folder")
    source = naming_damage(path, lambda: _open_folder(path, choice) if path.is_dir() else _open_file(path, choice))
    return replace(source, images=lambda: images_naming_damage(path, source.images()))


def _open_file(path: Path, choice: Choice) -> Source:
    with open(path, "rb") as f:
        start = f.read(8)
    if zipfile.is_zipfile(path):
        return image_zip(path, choice)
    if path.suffix == ".parquet" or start[:4] == b"PAR1":
        _check_own_part(path, choice.split)
        return parquet_tables(path, [path], choice)
    if idx_shape(path) is not None:
        _check_own_part(path, choice.split)
        return idx_files(path, [path])
    if start == MAT_MAGIC and is_omniglot(path):
        return omniglot(path, choice.split)
    for is_one, make in ((start == MAT_MAGIC, svhn_files), (is_tfrecord(path), tfrecord_files)):
        if is_one:
            _check_own_part(path, choice.split)
            return make(path, [path])
    if tarfile.is_tarfile(path):
        return _open_tar(path, list_tar(path), choice)
    raise UserError(
        f"--source={path}: neither a ZIP, tar, Parquet, IDX, TFRecord or SVHN file nor a CIFAR tarball (it begins with "
        f"{start!r})"
    )


def _check_own_part(path: Path, split: str) -> None:
    """Take what the user has named, whichever part that is, unless --split asks for another one.

    Raises:
        UserError: it does.
    """
    if split not in ("train", "all"):
        files_of_split(path, [path.name], split)


def _open_tar(path: Path, contents: TarContents, choice: Choice) -> Source:
    if any(name.split("/")[0] in CIFAR_FOLDERS for name in contents.names):
        batches = [name for name in contents.names if PurePosixPath(name).name.startswith(CIFAR_FILES)]
        return cifar(path, *files_of_split(path, batches, choice.split))
    if has_samples(contents.names):
        _check_own_part(path, choice.split)
        return tar_shards(path, [path], choice)
    return image_tar(path, contents, choice)


def _open_folder(path: Path, choice: Choice) -> Source:
    if (path / "data.mdb").is_file():
        _check_own_part(path, choice.split)
        return lmdb_database(path)
    names = sorted(files_below(path))
    files = list_files(names, sheets=contact_sheets(names, lambda name: (path / name).read_bytes()))
    visible = [name for name in names if HIDDEN.search(name) is None]
    shards = [name for name in visible if name.lower().endswith((".tar", ".tar.gz", ".tgz"))]
    tables = [name for name in visible if name.lower().endswith(".parquet")]
    if files.images and (shards or tables):
        raise UserError(
            f"--source={path}: holds images (such as {files.images[0]}) and other sources ({(shards + tables)[0]}): "
            "give the one that you mean, or move the other away"
        )
    if files.images:
        text = (path / "dataset.json").read_bytes() if "dataset.json" in names else None
        return image_folder(path, files, text, choice)
    if len(shards) == 1 and not has_samples((contents := list_tar(path / shards[0])).names):
        _chosen, note = files_of_split(path, shards, choice.split)
        return _open_tar(path / shards[0], contents, replace(choice, split="all") if note else choice)
    for found, make in ((shards, tar_shards), (tables, parquet_tables)):
        if found:
            chosen, note = files_of_split(path, found, choice.split)
            return make(path, [path / name for name in chosen], choice, note)
    for endings, make in (((".tfrecord", ".tfrecords"), tfrecord_files), (("_32x32.mat",), svhn_files)):
        chosen = [name for name in visible if name.lower().endswith(endings)]
        if chosen:
            chosen, note = files_of_split(path, chosen, choice.split)
            return make(path, [path / name for name in chosen], note)
    arrays = [name for name in visible if "images" in name and idx_shape(path / name) is not None]
    if arrays:
        chosen, note = files_of_split(path, arrays, choice.split)
        return idx_files(path, [path / name for name in chosen], note)
    raise no_images(path, files)
