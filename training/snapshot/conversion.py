"""Conversion of snapshots to another layout or type of weights, one file or a whole directory."""

import functools
from pathlib import Path

import torch

from dnnlib.download import is_url
from dnnlib.errors import UserError
from training.families import architecture_name
from training.snapshot.files import READERS, check_suffix, open_snapshot, write_snapshot
from training.snapshot.hub import FOLDER_FILES
from training.snapshot.layout import FOLDER, Request, build_for, finite_tensor, is_training_state, weights_dtype
from training.snapshot.published_uvit import is_checkpoint_folder


def plan_conversion(source: str, dest: Path, suffix: str | None = None) -> dict[str, Path]:
    """The file that each snapshot becomes: `dest`, or if `source` is a directory of snapshots, files in `dest`.

    Args:
        source: a snapshot, as `open_snapshot` takes it, or a directory.
        suffix: of the results; None = that of `dest`, or in a directory that of native snapshots.

    Raises:
        UserError: there is nothing to convert, or no place for the result, or it has another suffix.
    """
    if not is_url(source) and not Path(source).exists():
        raise UserError(f"{source}: no such file or directory")
    if Path(source).is_dir() and not (Path(source, FOLDER_FILES[0]).is_file() or is_checkpoint_folder(Request(source))):
        return _plan_directory(Path(source), dest, suffix or ".safetensors")
    if suffix not in (None, check_suffix(dest)):
        raise UserError(f"{dest}: the --format that is asked for is that of {suffix} files: change one of them")
    if dest.exists() and Path(source).exists() and dest.samefile(source):
        raise UserError(f"{dest}: is what is converted: choose another name for the result")
    return {source: dest}


def _plan_directory(source: Path, dest: Path, suffix: str) -> dict[str, Path]:
    suffixes = dict.fromkeys(reader.suffix for reader in READERS if reader.suffix != FOLDER)
    files = sorted(path for path in source.iterdir() if path.suffix in suffixes and not is_training_state(path))
    if not files:
        raise UserError(f"{source}: no {' or '.join(suffixes)} files in this directory")
    if dest.exists() and not dest.is_dir():
        raise UserError(f"{dest}: a directory is converted into a directory, and this is a file")
    targets: dict[str, Path] = {}
    for path in files:
        target = dest / (path.stem + suffix)
        if target in files:
            continue  # converted already, or of this format from the beginning
        if target in targets.values():
            raise UserError(f"{path}: another file of that name in {source} would become {target}, too")
        targets[str(path)] = target
    return targets


def convert_snapshot(
    source: str, dest: Path, dtype: torch.dtype | None = None, arch: str | None = None, family: str | None = None
) -> None:
    """Write the snapshot `source` to `dest`, whose suffix chooses the layout.

    Args:
        dtype: of the weights; None = as they are.
        arch: training preset that names the architecture, for layouts that do not say it.
        family: that the network must be of; None = any.

    Raises:
        UserError: `source` is no snapshot, is damaged or holds NaN, is of another family, or the layout cannot hold it.
        OSError: it could not be written.
    """
    file = open_snapshot(source, preset=arch)
    net, _ = build_for(file)
    name = architecture_name(net)
    if family is not None and name.partition(".")[0] != family:
        raise UserError(f"{source}: holds a network of {name}, which --format={family} is not for")
    get_tensor = functools.partial(finite_tensor, file)
    write_snapshot(dest, net, get_tensor, dtype or weights_dtype(file, net), file.description)
