"""Files that are written whole or not at all, locks, checksums, and errors that say which file."""

import errno
import hashlib
import json
import os
import re
import secrets
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from dnnlib.errors import UserError

if TYPE_CHECKING:
    import filelock

# What systems answer where a file system has no locks: some network mounts and FUSE.
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP}


@contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "wb", sync: bool = True) -> Iterator[IO]:
    """Open a file for writing that appears under its name only when it is complete.

    Several processes may write the same file at once, on one machine or on many: the last one to finish wins. What
    killed processes left half-written of the same file is deleted.

    Args:
        mode: "wb" or "w".
        sync: wait until the disk has it, so that even a power failure leaves no half file. Slow for many small ones,
            whose leftovers stay, too, until `clear_leftovers` is called for all of them.

    Raises:
        OSError: it could not be written, `filename` being the path asked for; nothing is left behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if sync:
        clear_leftovers([path])
    # Random: containers and hosts that share a file system can have the same process id.
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with naming_errors(path):
            with _locked_file(partial, mode.replace("w", "x")) as f:
                yield f
                f.flush()
                if sync:
                    os.fsync(f.fileno())
            os.replace(partial, path)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


@contextmanager
def _locked_file(partial: Path, mode: str) -> Iterator[IO]:
    """A new file, which `clear_leftovers` leaves alone as long as it is open."""
    while True:
        with open(partial, mode) as f:
            _lock(f)
            if partial.exists():  # and was not taken for a leftover before it was locked
                yield f
                return


def _lock(f: IO) -> bool:
    """Lock an open file until it is closed; False if another process has, or the system has no such locks."""
    try:
        import fcntl  # not on Windows

        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except (ImportError, OSError):
        return False


def clear_leftovers(paths: Iterable[Path]) -> None:
    """Delete what killed processes left half-written of these files; what is being written stays."""
    names_in: dict[Path, set[str]] = {}
    for path in paths:
        names_in.setdefault(path.parent, set()).add(path.name)
    for folder, names in names_in.items():
        _clear(partial for partial in leftovers(folder) if _meant(partial) in names)


def clear_leftovers_of(folder: Path, prefix: str) -> list[str]:
    """Delete what killed processes left half-written in a folder, of files whose names begin with `prefix`.

    What is being written stays.

    Returns:
        The names that the files would have had.
    """
    return _clear(partial for partial in leftovers(folder, prefix) if _meant(partial))


def _meant(partial: Path) -> str:
    """The name that a half-written file would have had; '' = it is none of `atomic_write`."""
    match = re.fullmatch(r"\.(.+)\.[0-9a-f]{16}\.tmp", partial.name)
    return match[1] if match else ""


def _clear(partials: Iterable[Path]) -> list[str]:
    """Delete half-written files that no process is writing, and say which."""
    deleted = []
    for partial in partials:
        with suppress(OSError), open(partial, "rb+") as f:
            if _lock(f):
                partial.unlink()
                deleted.append(_meant(partial))
    return deleted


def leftovers(folder: Path, prefix: str = "") -> list[Path]:
    """Half-written files of `atomic_write` in a folder, of those whose names begin with `prefix`.

    Those of processes that are still writing are among them.
    """
    return sorted(folder.glob(f".{prefix}*.tmp"))


def allow_open_files(count: int) -> None:
    """Let this process have so many files open, as far as the system allows: often no more than 1024 at first."""
    try:
        import resource  # not on Windows
    except ImportError:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def append_line(path: str | os.PathLike, line: str) -> None:
    """Add a line to a text file.

    Raises:
        OSError: with the file's name.
    """
    with naming_errors(path), open(path, "a") as f:
        f.write(line + "\n")


def read_records(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; without those lines that a full disk or a power failure has spoiled."""
    records = []
    for line in Path(path).read_text(errors="replace").splitlines():
        with suppress(ValueError):
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict)]


def check_not_input(option: str, path: Path, inputs: Mapping[str, str | os.PathLike | None]) -> None:
    """Refuse to write over what is read, or into a folder that is read.

    Args:
        option: that asks to write `path`, for the message.
        inputs: what other options, by their names, ask to read.

    Raises:
        UserError: `path` is one of them, or inside.
    """
    for name, source in inputs.items():
        if not source or not os.path.exists(source):
            continue
        inside = os.path.isdir(source) and path.resolve().is_relative_to(Path(source).resolve())
        if inside or (path.exists() and path.samefile(source)):
            where = "inside" if inside else "the same as"
            raise UserError(f"{option}={path}: is {where} {name}={os.fspath(source)}: choose another place")


@contextmanager
def naming_errors(path: str | os.PathLike) -> Iterator[None]:
    """Inside, every OSError names `path`: that of a failed write names no file, or a temporary one."""
    try:
        yield
    except OSError as err:
        raise OSError(err.errno or errno.EIO, err.strerror or str(err), str(path)) from err


def file_sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file's contents, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while data := f.read(1 << 20):
            digest.update(data)
    return digest.hexdigest()


@contextmanager
def locked(path: Path, busy: Callable[[], object]) -> Iterator[None]:
    """Inside, this process alone holds the lock file `path`.

    The system releases the lock when the process ends, even if it is killed. The empty file stays, as deleting it could
    let two processes in. On a file system without locks, a second file beside it, `path`.held, is the lock as long as
    it exists: it is deleted at the end, and a note says to delete it by hand should a killed process have left it.

    Args:
        busy: called where another process holds it; may raise, else this one waits.

    Raises:
        OSError: the lock file could not be made.
    """
    import filelock  # takes a while; most commands need none

    path = Path(path)
    try:
        lock = _acquired(filelock.FileLock(path, fallback_to_soft=False), busy)
    except OSError as err:
        if err.errno not in NO_LOCKS:
            raise
        marker = path.with_name(f"{path.name}.held")
        print(
            f"Note: the file system of {path.parent} has no locks, so {marker.name} stands for one: delete it if a "
            "process was killed and left it there",
            file=sys.stderr,
        )
        lock = _acquired(filelock.SoftFileLock(marker), busy)
    try:
        yield
    finally:
        lock.release()


def _acquired(lock: "filelock.BaseFileLock", busy: Callable[[], object]) -> "filelock.BaseFileLock":
    """The lock, which this process holds then."""
    import filelock

    with suppress(filelock.Timeout):
        lock.acquire(timeout=0)
    if not lock.is_locked:
        busy()
        lock.acquire()
    return lock
