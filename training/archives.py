"""Writing datasets: a ZIP file or folder that gets its name when it is complete, and goes on where it stopped."""

import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

from dnnlib.util import UserError, atomic_write, naming_errors

# ZIP records (APPNOTE 4.3): local file header, entry of the central directory, end of it in both sizes.
LOCAL = struct.Struct("<4s5H3I2H")
CENTRAL = struct.Struct("<4s6H3I5H2I")
END64 = struct.Struct("<4sQ2H2I4Q")
END64_LOCATOR = struct.Struct("<4sIQI")
END = struct.Struct("<4s4H2IH")
DATE = (1 << 5) | 1  # 1 January 1980 for all files: the same images make the same archive
VERSION, UNIX, STORED, UTF8 = 45, 3 << 8, 0, 1 << 11
LAST_FILES = ("dataset.json", "report.json")  # written when all images are there
MAX32, MAX16 = 0xFFFFFFFF, 0xFFFF


class DatasetWriter:
    """A dataset in the making, beside its destination. Leave with `finish`; else the partial one stays to go on from.

    Args:
        dest: file name ending in '.zip', or a folder.
        options: what makes the contents; going on with other ones is refused.
        resume: go on with what an interrupted run has left.

    Raises:
        UserError: `dest` exists, or something partial that is not to be or cannot be gone on with.
        OSError: it cannot be written.
    """

    def __init__(self, dest: Path, options: dict[str, Any], resume: bool = False):
        self.dest = dest
        if dest.exists() and not (dest.is_dir() and not any(dest.iterdir())):
            raise UserError(f"--dest={dest}: is there already: choose another name, or delete it")
        self.partial = dest.with_name(f"{dest.name}.partial")
        self._options_file = dest.with_name(f"{dest.name}.partial.json")
        dest.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(options, indent=2)
        if self.partial.exists() or self._options_file.exists():
            if not resume:
                raise UserError(f"{self.partial}: an interrupted run left this: go on with --resume, or delete it")
            before = self._options_file.read_text() if self._options_file.is_file() else ""
            if before != text:
                raise UserError(f"--resume: {self.partial} was begun with other options ({self._options_file})")
        with atomic_write(self._options_file, "w") as f:
            f.write(text)
        self._files = _ZipFiles(self.partial) if dest.suffix == ".zip" else _FolderFiles(self.partial)
        self.names = self._files.names  # what is there

    def write(self, name: str, data: bytes) -> None:
        self._files.write(name, data)

    def close(self) -> None:
        """Stop; what is there stays to go on from."""
        self._files.close()
        if not self.names:
            self.partial.rmdir() if self.partial.is_dir() else self.partial.unlink()
            self._options_file.unlink()

    def finish(self) -> None:
        """Give the complete dataset its name."""
        self._files.finish()
        if self.dest.is_dir():
            self.dest.rmdir()
        os.replace(self.partial, self.dest)
        self._options_file.unlink()


class _FolderFiles:
    def __init__(self, path: Path):
        self.path = path
        path.mkdir(exist_ok=True)
        files = (Path(root) / name for root, _folders, names in os.walk(path) for name in names)
        self.names = {file.relative_to(path).as_posix() for file in files if not file.name.endswith(".tmp")}

    def write(self, name: str, data: bytes) -> None:
        with atomic_write(self.path / name, sync=False) as f:
            f.write(data)
        self.names.add(name)

    def close(self) -> None:
        pass

    def finish(self) -> None:
        for file in self.path.rglob(".*.tmp"):  # of a run that was killed while writing
            file.unlink()


class _ZipFiles:
    """An uncompressed ZIP file, with a few bytes of memory per entry, and its entries found again without a directory.

    Python's zipfile keeps half a kilobyte per entry and cannot read a file that was never closed.
    """

    def __init__(self, path: Path):
        self.path = path
        self.names: set[str] = set()
        self._directory = bytearray()
        self._count = 0
        with naming_errors(path):
            self._f = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115
        self._recover()

    def _recover(self) -> None:
        """Find the complete entries of an interrupted run; cut off the rest."""
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
            if zlib.crc32(self._f.read(size)) != crc:
                break
            self._add(name, crc, size, position)
            position = after
        self._f.seek(position)
        self._f.truncate()

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
        self.names.add(name.decode())

    def close(self) -> None:
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
