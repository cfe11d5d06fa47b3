"""Files in which tensors lie as they are, each in one piece: parts are read without loading or mapping the rest."""

import functools
import io
import os
import threading
import weakref
from abc import abstractmethod
from collections.abc import Callable

from dnnlib.errors import DamagedFileError
from training.snapshot.layout import SnapshotFile


class FileOfPlaces(SnapshotFile):
    """An open snapshot that knows where in the file its tensors are."""

    @abstractmethod
    def place(self, name: str) -> tuple[int, int] | None:
        """First byte of a tensor's elements in the file, and the byte after the last one; None = they do not lie in one
        piece, or not in their order."""

    def is_loaded_to_read(self, name: str) -> bool:
        return self.place(name) is None

    def reader(self, name: str) -> Callable[[int, memoryview], None]:
        """As `SnapshotFile.reader`; it reads on into what follows in the file.

        The function raises `UserError` where the file ends early.
        """
        dtype, place = self.dtype(name), self.place(name)
        assert dtype is not None  # whoever asks has looked
        if place is None:
            return super().reader(name)
        itemsize, (offset, _) = dtype.itemsize, place
        handle, lock = self._handle  # opened here, before threads share it
        has_preadv = hasattr(os, "preadv")  # not on Windows

        def read_at(position: int, out: memoryview) -> int:
            if has_preadv:
                return os.preadv(handle.fileno(), [out], position)
            with lock:
                handle.seek(position)
                return handle.readinto(out)

        def read(start: int, out: memoryview) -> None:
            if read_at(offset + start * itemsize, out) < len(out):
                raise DamagedFileError(f"{self.path}: cannot be read (the file ends early): copy it again")

        return read

    @functools.cached_property
    def _handle(self) -> tuple[io.FileIO, threading.Lock]:
        handle = io.FileIO(self.path)
        weakref.finalize(self, handle.close)
        return handle, threading.Lock()
