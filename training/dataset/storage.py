"""Where the files of a dataset are: in a folder, or in a ZIP file that is read through a memory map."""

import io
import mmap
import os
import struct
import weakref
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dnnlib.errors import UserError, one_line
from training.dataset.listing import Listing, contact_sheets, list_files

# Of the local header of a ZIP entry: its fixed size, and where its flags and the lengths of name and extra field are.
LOCAL_HEADER_BYTES, LOCAL_FLAGS, LOCAL_LENGTHS = 30, 6, 26
UTF8_FLAG = 1 << 11
MAX_FILE_BYTES = 1 << 30  # of a compressed entry: more would only be there to fill the memory


class Storage(Protocol):
    """Files that are found by their position in a sorted list of names."""

    names: list[str]

    def read(self, idx: int) -> bytes | memoryview:
        """The contents of a file."""
        ...

    def read_start(self, idx: int, size: int) -> bytes:
        """The first `size` bytes of a file."""
        ...

    def size(self, idx: int) -> int:
        """The number of bytes of a file."""
        ...

    def crc(self, idx: int) -> int:
        """The CRC-32 of a file."""
        ...

    def check(self, idx: int, data: bytes | memoryview) -> None:
        """Compare the contents of a file with the checksum stored for it, if there is one.

        Raises:
            ValueError: they differ.
        """
        ...

    def check_name(self, idx: int) -> None:
        """Compare the name of a file with its second copy, if there is one.

        Raises:
            ValueError: they differ.
        """
        ...

    def compressed(self, indices: np.ndarray) -> bool:
        """Whether any of these files is unpacked each time it is read."""
        ...


def open_storage(path: Path) -> Storage:
    """The files of a folder or a ZIP file.

    Raises:
        UserError: there is neither a folder nor a ZIP file of that name, or the ZIP file is damaged.
        OSError: the folder or file cannot be read.
    """
    if path.is_dir():
        return _Folder(path)
    if path.is_file():
        return _Zip(path)
    raise UserError(f"{path}: no such dataset: give a ZIP file or a folder of images")


def files_of_dataset(storage: Storage) -> Listing:
    """The files by what is done with them; arrays are images, too."""
    sheets = contact_sheets(storage.names, lambda name: storage.read(storage.names.index(name)))
    return list_files(storage.names, arrays=True, sheets=sheets)


def files_below(folder: Path) -> Iterator[str]:
    """Relative names of the files below a folder. Links are followed; broken ones are listed, pipes and devices not.

    Raises:
        UserError: a link leads back to a folder that contains it.
        OSError: a folder cannot be read.
    """

    def walk(path: str, prefix: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.is_dir():
                    facts = os.stat(entry.path)
                    key = (facts.st_dev, facts.st_ino)
                    if key in above:
                        raise UserError(f"{entry.path}: this link leads back to a folder that contains it: remove it")
                    yield from walk(entry.path, f"{prefix}{entry.name}/", (*above, key))
                elif entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path)):
                    yield prefix + entry.name

    facts = os.stat(folder)
    yield from walk(os.fspath(folder), "", ((facts.st_dev, facts.st_ino),))


def inflate(data: bytes | memoryview, size: int, wbits: int) -> bytes:
    """Decompressed data of that size; no more is ever unpacked.

    Raises:
        ValueError: there is less or more of it.
        zlib.error: the data is damaged.
    """
    decompressor = zlib.decompressobj(wbits)
    result = decompressor.decompress(data, size + 1)
    if len(result) != size or not decompressor.eof:
        raise ValueError(f"truncated or damaged: it should unpack to {size} bytes")
    return result


class _Folder:
    """Files below a directory, sorted by relative name. Each has to stay as it was when it was first read."""

    def __init__(self, path: Path):
        self.path = path
        self.names = sorted(files_below(path))
        self._versions = np.zeros(len(self.names), np.int64)  # hashes of size and time; 0 = not read yet

    @contextmanager
    def _open(self, idx: int) -> Iterator[io.BufferedReader]:
        with open(self.path / self.names[idx], "rb") as f:
            facts = os.fstat(f.fileno())
            version = hash((facts.st_size, facts.st_mtime_ns))
            if self._versions[idx] not in (0, version):
                raise ValueError("it has changed since it was first read: restore it, and repeat the command")
            self._versions[idx] = version
            yield f

    def read(self, idx: int) -> bytes:
        with self._open(idx) as f:
            return f.read()

    def read_start(self, idx: int, size: int) -> bytes:
        with self._open(idx) as f:
            return f.read(size)

    def size(self, idx: int) -> int:
        return (self.path / self.names[idx]).stat().st_size

    def crc(self, idx: int) -> int:
        return zlib.crc32(self.read(idx))

    def check(self, idx: int, data: bytes | memoryview) -> None:
        pass

    def check_name(self, idx: int) -> None:
        pass

    def compressed(self, indices: np.ndarray) -> bool:
        return False


def _identity(facts: os.stat_result) -> tuple[int, ...]:
    return (facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns)


class _Zip:
    """Entries of a ZIP file, sorted by name. The directory is read once, into arrays; entries then come from a memory
    map, so processes and threads can read at the same time."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                infos = [info for info in archive.infolist() if not info.is_dir()]
        except (OSError, MemoryError):
            raise
        except Exception as err:  # a damaged directory can fail in any way
            raise UserError(f"{path}: not a complete ZIP file ({one_line(err)}): copy or convert it again") from None
        for info in infos:
            info.filename = info.filename.replace("\\", "/")  # as some Windows tools write
        infos.sort(key=lambda info: info.filename)
        self.names = [info.filename for info in infos]
        self._originals = {i: info.orig_filename for i, info in enumerate(infos) if info.orig_filename != info.filename}
        fields = [(i.header_offset, i.compress_size, i.file_size, i.CRC, i.compress_type) for i in infos]
        self._offsets, self._stored_sizes, self._sizes, self._crcs, self._methods = (
            np.array(fields, np.int64).reshape(-1, 5).T
        )
        self._identity = _identity(os.stat(path))
        self._file = -1  # descriptor
        self._map: mmap.mmap | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": -1, "_map": None}

    def _local_header(self, idx: int) -> tuple[mmap.mmap, int, int, int]:
        """The file, and the place of an entry's local header in it, with the lengths of its name and extra field."""
        if self._map is None:
            self._file = os.open(self.path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._file)
            self._map = mmap.mmap(self._file, 0, access=mmap.ACCESS_READ)
        # What is no longer there would end the process (SIGBUS), and what was overwritten would be trained on.
        if _identity(os.fstat(self._file)) != self._identity:
            raise ValueError("the ZIP file has changed since it was opened: restore it, and repeat the command")
        offset = int(self._offsets[idx])
        return self._map, offset, *struct.unpack_from("<HH", self._map, offset + LOCAL_LENGTHS)

    def _stored(self, idx: int) -> memoryview:
        """The bytes of an entry as they lie in the file."""
        contents, offset, name_length, extra_length = self._local_header(idx)
        start = offset + LOCAL_HEADER_BYTES + name_length + extra_length
        return memoryview(contents)[start : start + int(self._stored_sizes[idx])]

    def read(self, idx: int) -> bytes | memoryview:
        data, method = self._stored(idx), int(self._methods[idx])
        if method == zipfile.ZIP_STORED:
            return data
        if method == zipfile.ZIP_DEFLATED:
            if self._sizes[idx] > MAX_FILE_BYTES:
                raise ValueError(f"it would unpack to {self._sizes[idx]} bytes, more than {MAX_FILE_BYTES}")
            return inflate(data, int(self._sizes[idx]), -zlib.MAX_WBITS)
        raise ValueError(f"ZIP compression method {method} is not supported: store the file uncompressed")

    def read_start(self, idx: int, size: int) -> bytes:
        return bytes(self.read(idx)[:size])

    def size(self, idx: int) -> int:
        return int(self._sizes[idx])

    def crc(self, idx: int) -> int:
        return int(self._crcs[idx])

    def check(self, idx: int, data: bytes | memoryview) -> None:
        if zlib.crc32(data) != self._crcs[idx]:
            raise ValueError("damaged (checksum mismatch): copy or convert the dataset again")

    def check_name(self, idx: int) -> None:
        contents, offset, name_length, _extra_length = self._local_header(idx)
        start = offset + LOCAL_HEADER_BYTES
        is_utf8 = struct.unpack_from("<H", contents, offset + LOCAL_FLAGS)[0] & UTF8_FLAG
        name = contents[start : start + name_length].decode("utf-8" if is_utf8 else "cp437", "replace")
        if name != self._originals.get(idx, self.names[idx]):
            raise ValueError(f"damaged (it is also called {one_line(name)[:50]}): copy or convert the dataset again")

    def compressed(self, indices: np.ndarray) -> bool:
        return bool((self._methods[indices] != zipfile.ZIP_STORED).any())
