"""Training state on disk: tensors and plain containers, whole files only."""

import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

from dnnlib.errors import UserError, one_line
from dnnlib.files import atomic_write


def save_state(path: str | Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors, numbers, text and containers of them) under `path` once it is complete.

    Raises:
        OSError: it could not be written; nothing is left behind.
    """
    with atomic_write(path) as f:
        try:
            torch.save(state, f)
        except RuntimeError as err:
            # torch wraps a failed write.
            if isinstance(err.__context__, OSError):
                raise err.__context__ from None
            raise


def load_state(path: str | Path) -> dict[str, Any]:
    """A state as it was saved, its tensors on the CPU. Runs nothing that is named in the file.

    Raises:
        ValueError: the checksum of a part does not match, which torch would not notice.
        Exception: the file is damaged in another way; torch has many errors for that.
    """
    return load_checked(path, mmap=True)


def load_checked(path: str | os.PathLike, mmap: bool = False) -> Any:
    """What `torch.save` wrote into a file, on the CPU, after its checksums were compared. Runs nothing named in it.

    Args:
        mmap: read tensors when they are used, where the format allows it.

    Raises:
        ValueError: the checksum of a part does not match, which torch would not notice.
        Exception: the file is damaged in another way; torch has many errors for that.
    """
    with open(path, "rb") as f:
        is_archive = check_archive(f)
    return torch.load(path, map_location="cpu", mmap=mmap and is_archive, weights_only=True)


def check_archive(f: IO[bytes]) -> bool:
    """Compare the checksums in a file of `torch.save`; False for the older format, which has none.

    Raises:
        ValueError: one does not match, or the file would unpack to more than it holds.
        zipfile.BadZipFile: it is damaged.
    """
    if not zipfile.is_zipfile(f):
        return False
    with zipfile.ZipFile(f) as archive:
        if sum(info.file_size for info in archive.infolist()) > f.seek(0, os.SEEK_END):
            raise ValueError("its parts are larger than the file")
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"checksum mismatch in {one_line(damaged)[:50]}")
    return True


def restore_newest_state(
    directory: str | Path,
    pattern: str,
    restore: Callable[[dict[str, Any]], None],
    log: Callable[[str], None],
    load: Callable[[Path], dict[str, Any]] = load_state,
) -> bool:
    """Restore the newest state of a directory that is not damaged.

    Args:
        pattern: regular expression that the whole file name matches, its first group a number that grows.
        restore: puts a state (on the CPU) into effect; may fail on one that is incomplete.
        log: takes a warning about each damaged file, which is skipped.
        load: reads a state; raises where it is damaged.

    Returns:
        Whether there was a state.

    Raises:
        UserError: there are states, and none can be restored.
    """
    found = [(int(match[1]), path) for path in Path(directory).iterdir() if (match := re.fullmatch(pattern, path.name))]
    for _number, path in sorted(found, reverse=True):
        try:
            restore(load(path))
            return True
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as err:  # a damaged file can fail in any way
            log(f"Warning: {path} is damaged and skipped ({one_line(err) or type(err).__name__})")
    if found:
        raise UserError(f"{directory}: no training state can be read: bring one back, or choose another --outdir")
    return False
