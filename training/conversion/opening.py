"""From a path to a source: what kind of folder or file it is."""

import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path, PurePosixPath

from dnnlib.errors import UserError
from training.conversion.files import image_folder, image_tar, image_zip
from training.conversion.formats import CIFAR_FILES, CIFAR_FOLDERS, cifar, idx_files, idx_shape, lmdb_database
from training.conversion.parquet import parquet_tables
from training.conversion.sources import Source, files_of_split, images_naming_damage, is_image, naming_damage, no_images
from training.conversion.tar import TarContents, list_tar
from training.conversion.webdataset import tar_shards
from training.dataset.storage import files_below


def open_source(path: Path, split: str = "train") -> Source:
    """The source at a path, of whichever kind it is.

    Args:
        split: 'train', 'validation', 'test' or 'all': which files to read of a source whose files name these parts.

    Raises:
        UserError: there is no such path, it is of no known kind, or damaged.
    """
    if not path.is_dir() and not path.is_file():
        raise UserError(f"--source={path}: no such file or folder")
    source = naming_damage(path, lambda: _open_folder(path, split) if path.is_dir() else _open_file(path, split))
    return replace(source, images=lambda: images_naming_damage(path, source.images()))


def _open_file(path: Path, split: str) -> Source:
    with open(path, "rb") as f:
        start = f.read(8)
    if zipfile.is_zipfile(path):
        return image_zip(path)
    if path.suffix == ".parquet" or start[:4] == b"PAR1":
        return parquet_tables(path, [path])
    if idx_shape(path) is not None:
        return idx_files(path, [path])
    if tarfile.is_tarfile(path):
        return _open_tar(path, list_tar(path), split)
    raise UserError(
        f"--source={path}: neither a ZIP, tar, Parquet or IDX file nor a CIFAR tarball (it begins with {start!r})"
    )


def _open_tar(path: Path, contents: TarContents, split: str) -> Source:
    if any(name.split("/")[0] in CIFAR_FOLDERS for name in contents.names):
        batches = [name for name in contents.names if PurePosixPath(name).name.startswith(CIFAR_FILES)]
        return cifar(path, *files_of_split(path, batches, split))
    if any(name.lower().endswith(".cls") for name in contents.names):
        return tar_shards(path, [path])
    return image_tar(path, contents)


def _open_folder(path: Path, split: str) -> Source:
    if (path / "data.mdb").is_file():
        return lmdb_database(path)
    files = sorted(name for name in files_below(path) if not PurePosixPath(name).name.startswith("."))
    images = [name for name in files if is_image(name)]
    shards = [name for name in files if name.endswith((".tar", ".tar.gz", ".tgz"))]
    tables = [name for name in files if name.endswith(".parquet")]
    if images and (shards or tables):
        raise UserError(
            f"--source={path}: holds images (such as {images[0]}) and other sources ({(shards + tables)[0]}): "
            "give the one that you mean, or move the other away"
        )
    if images:
        return image_folder(path, images, "dataset.json" in files)
    arrays = [name for name in files if "images" in name and not shards + tables and idx_shape(path / name) is not None]
    for found, make in ((shards, tar_shards), (tables, parquet_tables), (arrays, idx_files)):
        if found:
            chosen, note = files_of_split(path, found, split)
            return make(path, [path / name for name in chosen], note)
    raise no_images(path, files)
