"""Training state on disk: tensors and plain containers, whole files only."""

import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dnnlib.errors import UserError
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


def restore_newest_state(
    directory: str | Path,
    pattern: str,
    restore: Callable[[dict[str, Any]], None],
    log: Callable[[str], None],
) -> bool:
    """Restore the newest state of a directory that can be.

    Args:
        pattern: regular expression that the whole file name matches, its first group a number that grows.
        restore: puts a state (on the CPU) into effect; may fail on one that is incomplete.
        log: gets a line about each damaged file, which is skipped.

    Returns:
        Whether there was a state.

    Raises:
        UserError: there are states, and none can be restored.
    """
    found = [(int(match[1]), path) for path in Path(directory).iterdir() if (match := re.fullmatch(pattern, path.name))]
    for _number, path in sorted(found, reverse=True):
        try:
            _check_sums(path)
            restore(torch.load(path, map_location="cpu", mmap=True, weights_only=True))
            return True
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as err:  # a damaged file can fail in any way
            reason = str(err).strip().splitlines()[0] if str(err).strip() else type(err).__name__
            log(f"Warning: {path} is damaged and skipped ({reason})")
    if found:
        raise UserError(f"{directory}: no training state can be read: bring one back, or choose another --outdir")
    return False


def _check_sums(path: Path) -> None:
    """Compare the checksums in a state file with its content, which torch does not do.

    Raises:
        ValueError: they differ; or another error where the file is no state at all.
    """
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"checksum mismatch in {damaged}")
