"""Files that are written whole or not at all, and errors that say which file."""

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


@contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "wb", sync: bool = True) -> Iterator[IO]:
    """Open a file for writing that appears under its name only when it is complete.

    Args:
        sync: wait until the disk has it, so that even a power failure leaves no half file. Slow for many small ones.

    Raises:
        OSError: it could not be written, `filename` being the path asked for; nothing is left behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming_errors(path):
            with open(partial, mode) as f:
                yield f
                f.flush()
                if sync:
                    os.fsync(f.fileno())
            os.replace(partial, path)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def append_line(path: str | os.PathLike, line: str) -> None:
    """Add a line to a text file.

    Raises:
        OSError: with the file's name.
    """
    with naming_errors(path), open(path, "a") as f:
        f.write(line + "\n")


@contextmanager
def naming_errors(path: str | os.PathLike) -> Iterator[None]:
    """Inside, every OSError names `path`: that of a failed write names no file, or a temporary one."""
    try:
        yield
    except OSError as err:
        raise OSError(err.errno or errno.EIO, err.strerror or str(err), str(path)) from err


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while data := f.read(1 << 20):
            digest.update(data)
    return digest.hexdigest()
