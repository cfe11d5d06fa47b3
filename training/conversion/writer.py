"""Writing datasets: a ZIP file or folder that gets its name when it is complete, and can be resumed until then."""

import contextlib
import json
import os
import shutil
import struct
import tempfile
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dnnlib.errors import UserError
from dnnlib.files import atomic_write, locked, naming_errors
from training.dataset.listing import NAMES_FILE

# ZIP records (APPNOTE 4.3): local file header, entry of the central directory, end of it in both sizes.
LOCAL = struct.Struct("<4s5H3I2H")
CENTRAL = struct.Struct("<4s6H3I5H2I")
END64 = struct.Struct("<4sQ2H2I4Q")
END64_LOCATOR = struct.Struct("<4sIQI")
END = struct.Struct("<4s4H2IH")
DATE = (1 << 5) | 1  # 1 January 1980 for all files: the same images make the same archive
VERSION, UNIX, STORED, UTF8 = 45, 3 << 8, 0, 1 << 11
LAST_FILES = ("dataset.json", "report.json", NAMES_FILE)  # written after all images
MAX32, MAX16 = 0xFFFFFFFF, 0xFFFF
PNG_COLOR_TYPES = {1: 0, 3: 2}  # by number of channels


def image_name(index: int, pattern: str = "img{}.png") -> str:
    """'00000/img00000000.png' and so on, a thousand per folder."""
    return f"{index // 1000:05d}/" + pattern.format(f"{index:08d}")


def encode_png(pixels: np.ndarray) -> bytes:
    """Uncompressed PNG file of uint8 [H, W, 1 or 3], its rows unfiltered, so that reading costs next to nothing."""
    height, width, channels = pixels.shape
    rows = np.zeros([height, 1 + width * channels], dtype=np.uint8)
    rows[:, 1:] = pixels.reshape(height, -1)
    header = struct.pack(">2I5B", width, height, 8, PNG_COLOR_TYPES[channels], 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 0)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


class DatasetWriter:
    """Writes a dataset beside its destination, and moves it there with `finish`; `close` leaves it to be resumed.

    `names` are the files written so far.

    Args:
        dest: file name ending in '.zip', or a folder.
        options: what makes the contents; a run with other options cannot be resumed.
        resume: continue what an interrupted run has left.

    Raises:
        UserError: `dest` exists, another run is writing it, or an interrupted run left something that is not to be
            resumed, or cannot be.
        OSError: it cannot be written.
    """

    def __init__(self, dest: Path, options: dict[str, Any], resume: bool = False):
        if not dest.name:
            raise UserError(f"--dest={dest}: has no name: give the name of a ZIP file or folder to make")
        dest = Path(os.path.realpath(dest)) if dest.is_symlink() else dest
        self.dest = dest
        self._check_free()
        if os.path.ismount(dest):
            raise UserError(f"--dest={dest}: a disk is mounted there: give the name of a folder within")
        self.partial = dest.with_name(f"{dest.name}.partial")
        self._useless = False
        self._options_file = dest.with_name(f"{dest.name}.partial.json")
        dest.parent.mkdir(parents=True, exist_ok=True)
        with naming_errors(dest):  # filelock would take a folder that cannot be written to for a lock that is taken
            tempfile.TemporaryFile(dir=dest.parent).close()
        self._lock_file = dest.with_name(f"{dest.name}.partial.lock")
        self._lock = contextlib.ExitStack()
        self._lock.enter_context(locked(self._lock_file, self._refuse))
        try:
            self._begin(options, resume)
        except BaseException:
            self._unlock()
            raise

    def _check_free(self) -> None:
        if self.dest.exists() and not (self.dest.is_dir() and not any(self.dest.iterdir())):
            raise UserError(f"--dest={self.dest}: exists already: choose another name, or delete it")

    def _begin(self, options: dict[str, Any], resume: bool) -> None:
        if self.partial.exists() or self._options_file.exists():
            if not resume:
                raise UserError(f"{self.partial}: an interrupted run left this: continue with --resume, or delete it")
            try:
                before = json.loads(self._options_file.read_text())
                changed = [name for name in {**before, **options} if before.get(name) != options.get(name)]
            except (OSError, ValueError, TypeError, AttributeError):
                changed = ["options"]
            if changed:
                raise UserError(
                    f"--resume: {self.partial} was started with different {', '.join(changed)} "
                    f"(see {self._options_file}): delete both to start over"
                )
        with atomic_write(self._options_file, "w") as f:
            json.dump(options, f, indent=2)
        is_zip = self.dest.suffix.lower() == ".zip"
        self._files = _ZipFiles(self.partial) if is_zip else _FolderFiles(self.partial)
        self.names: Collection[str] = self._files.names

    def _refuse(self) -> None:
        raise UserError(f"--dest={self.dest}: another run is writing it: wait for that run, or stop it")

    def _unlock(self) -> None:
        self._lock_file.unlink(missing_ok=True)
        self._lock.close()

    def write(self, name: str, data: bytes) -> None:
        """Add a file.

        Raises:
            OSError: it cannot be written.
        """
        self._files.write(name, data)

    def crc(self, name: str) -> int:
        """CRC-32 of a file written before."""
        return self._files.crc(name)

    def contents(self) -> Iterator[tuple[str, bytes]]:
        """Names and contents of the files written so far, in the order of their names."""
        return self._files.contents()

    def discard(self) -> None:
        """Have `close` delete the files written so far: they are of no use."""
        self._useless = True

    def close(self) -> None:
        """Stop; the files written so far stay to be resumed."""
        try:
            self._files.close()
            if self._useless or not self.names:
                shutil.rmtree(self.partial) if self.partial.is_dir() else self.partial.unlink()
                self._options_file.unlink()
        finally:
            self._unlock()

    def finish(self) -> None:
        """Give the complete dataset its name.

        Raises:
            UserError: a file or folder of that name has appeared meanwhile.
            OSError: it cannot be written.
        """
        self._check_free()
        self._files.finish()
        if self.dest.is_dir():
            self.dest.rmdir()
        os.replace(self.partial, self.dest)
        self._options_file.unlink()
        self._unlock()


class _FolderFiles:
    """Files of a folder in the making."""

    def __init__(self, path: Path):
        self.path = path
        path.mkdir(exist_ok=True)
        files = (Path(root) / name for root, _folders, names in os.walk(path) for name in names)
        # A file is empty if its contents had not reached the disk when the power failed.
        whole = (file for file in files if not file.name.endswith(".tmp") and file.stat().st_size > 0)
        self.names = {file.relative_to(path).as_posix() for file in whole}

    def write(self, name: str, data: bytes) -> None:
        with atomic_write(self.path / name, sync=False) as f:
            f.write(data)
        self.names.add(name)

    def crc(self, name: str) -> int:
        return zlib.crc32((self.path / name).read_bytes())

    def contents(self) -> Iterator[tuple[str, bytes]]:
        return ((name, (self.path / name).read_bytes()) for name in sorted(self.names))

    def close(self) -> None:
        pass

    def finish(self) -> None:
        for file in self.path.rglob(".*.tmp"):  # of a run that was killed while writing
            file.unlink()


class _ZipFiles:
    """Entries of an uncompressed ZIP file in the making, which takes a few bytes of memory per entry.

    Python's zipfile keeps half a kilobyte per entry, and cannot read a file that was never closed, as `_recover` does.
    """

    def __init__(self, path: Path):
        self.path = path
        self._crcs: dict[str, int] = {}
        self.names = self._crcs.keys()
        self._directory = bytearray()
        self._count = 0
        with naming_errors(path):
            self._f = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115
        self._recover()

    def _recover(self) -> None:
        """Find the complete entries of an interrupted run; cut off the rest."""
        end = 0
        for name, data, position in self._entries():
            self._add(name, zlib.crc32(data), len(data), position)
            end = self._f.tell()
        self._f.seek(end)
        self._f.truncate()

    def contents(self) -> Iterator[tuple[str, bytes]]:
        self._f.flush()
        try:
            yield from ((name.decode(), data) for name, data, _ in self._entries())
        finally:
            self._f.seek(0, os.SEEK_END)

    def _entries(self) -> Iterator[tuple[bytes, bytes, int]]:
        """Name, contents and position of each complete entry, up to the first that is not."""
        end = self._f.seek(0, os.SEEK_END)
        position = 0
        while position + LOCAL.size <= end:
            self._f.seek(position)
            signature, *_, crc, size, _size, name_length, extra_length = LOCAL.unpack(self._f.read(LOCAL.size))
            after = position + LOCAL.size + name_length + extra_length + size
            if signature != b"PK\3\4" or after > end:
                break
            name = self._f.read(name_length)
            if name.decode() in LAST_FILES:
                break
            self._f.seek(extra_length, os.SEEK_CUR)
            data = self._f.read(size)
            if zlib.crc32(data) != crc:
                break
            yield name, data, position
            position = after

    def write(self, name: str, data: bytes) -> None:
        encoded, crc = name.encode(), zlib.crc32(data)
        header = LOCAL.pack(b"PK\3\4", VERSION, UTF8, STORED, 0, DATE, crc, len(data), len(data), len(encoded), 0)
        with naming_errors(self.path):
            position = self._f.tell()
            self._f.write(header + encoded)
            self._f.write(data)
        self._add(encoded, crc, len(data), position)

    def _add(self, name: bytes, crc: int, size: int, position: int) -> None:
        extra = b"" if position < MAX32 else struct.pack("<2HQ", 1, 8, position)
        mode = 0o100644 << 16
        fields = (UNIX | VERSION, VERSION, UTF8, STORED, 0, DATE, crc, size, size, len(name), len(extra), 0, 0, 0, mode)
        self._directory += CENTRAL.pack(b"PK\1\2", *fields, min(position, MAX32)) + name + extra
        self._count += 1
        self._crcs[name.decode()] = crc

    def crc(self, name: str) -> int:
        return self._crcs[name]

    def close(self) -> None:
        # What is still buffered may not fit on the disk: one entry less to resume from. The first error is reported.
        with contextlib.suppress(OSError):
            self._f.close()

    def finish(self) -> None:
        with naming_errors(self.path):
            start, size, count = self._f.tell(), len(self._directory), self._count
            self._f.write(self._directory)
            if count >= MAX16 or start >= MAX32:
                end = self._f.tell()
                self._f.write(END64.pack(b"PK\6\6", 44, VERSION, VERSION, 0, 0, count, count, size, start))
                self._f.write(END64_LOCATOR.pack(b"PK\6\7", 0, end, 1))
            small = min(count, MAX16)
            self._f.write(END.pack(b"PK\5\6", 0, 0, small, small, min(size, MAX32), min(start, MAX32), 0))
            self._f.flush()
            os.fsync(self._f.fileno())
            self._f.close()
