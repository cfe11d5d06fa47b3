"""Native snapshots: safetensors files with a JSON block."""

import functools
import io
import json
import os
import struct
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import safetensors
import torch

from dnnlib.errors import UserError, one_line
from dnnlib.files import atomic_write
from training.snapshot.description import METADATA_KEY, checked_metadata

DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
# Gives (name, piece) for names: the values of several networks' tensors in the order of names and elements, as pieces
# [networks, n] of any sizes.
GetPieces = Callable[[Iterable[str]], Iterable[tuple[str, torch.Tensor]]]


class NativeFile:
    """A snapshot whose tensors are read when asked for.

    Args:
        metadata: the JSON block, where it is kept beside the file.

    Raises:
        UserError: a damaged file, or one of another kind.
    """

    def __init__(self, path: Path, metadata: dict[str, Any] | None = None):
        self.path = path
        try:
            self._file = safetensors.safe_open(path, framework="pt")
            if metadata is None:
                text = (self._file.metadata() or {}).get(METADATA_KEY)
                metadata = None if text is None else json.loads(text)
        except (safetensors.SafetensorError, ValueError, RecursionError) as err:
            raise UserError(f"{path}: damaged or truncated snapshot ({one_line(err)}): copy it again") from None
        if metadata is None:
            raise UserError(f"{path}: a safetensors file, but not a snapshot of this project")
        self.metadata = checked_metadata(str(path), metadata)
        with open(path, "rb") as f:  # the library does not tell where the tensors are
            (size,) = struct.unpack("<Q", f.read(8))
            self._layout: dict[str, Any] = json.loads(f.read(size))
        self._data_start = 8 + size
        self.names = list(self._file.keys())
        self._lock = threading.Lock()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._layout[name]["shape"])

    def dtype(self, name: str) -> torch.dtype | None:
        """One of `DTYPE_NAMES`; None = another."""
        return DTYPES.get(self._layout[name]["dtype"])

    def get_tensor(self, name: str) -> torch.Tensor:
        try:
            return self._file.get_tensor(name)
        except (safetensors.SafetensorError, RuntimeError, ValueError) as err:
            raise UserError(
                f"{self.path}: tensor {name} cannot be read ({one_line(err)}): copy the file again"
            ) from None

    def is_followed(self, name: str, other: str) -> bool:
        """Whether a tensor's elements begin where those of `name` end, and are of the same type."""
        first, second = self._layout[name], self._layout[other]
        return first["dtype"] == second["dtype"] and first["data_offsets"][1] == second["data_offsets"][0]

    def reader(self, name: str) -> Callable[[int, memoryview], None]:
        """A function (start, out) that fills a buffer with the bytes of a tensor's elements from `start` on.

        It reads on into tensors that follow. Threads may share it. It raises `UserError` where the file ends early.
        """
        dtype, layout = self.dtype(name), self._layout[name]
        assert dtype is not None  # whoever asks has looked
        itemsize, offset = dtype.itemsize, self._data_start + layout["data_offsets"][0]
        handle = self._handle  # opened here, before threads share it
        has_preadv = hasattr(os, "preadv")  # not on Windows

        def read_at(position: int, out: memoryview) -> int:
            if has_preadv:
                return os.preadv(handle.fileno(), [out], position)
            with self._lock:
                handle.seek(position)
                return handle.readinto(out)

        def read(start: int, out: memoryview) -> None:
            if read_at(offset + start * itemsize, out) < len(out):
                raise UserError(f"{self.path}: cannot be read (the file ends early): copy it again")

        return read

    @functools.cached_property
    def _handle(self) -> io.FileIO:
        handle = io.FileIO(self.path)
        weakref.finalize(self, handle.close)
        return handle


def write_native(
    path: str | Path,
    net: torch.nn.Module,
    get_tensor: Callable[[str], torch.Tensor],
    dtype: torch.dtype,
    metadata: Mapping,
) -> None:
    """Write a snapshot, complete or not at all, one tensor at a time.

    Args:
        net: network that says names and shapes; its values do not matter.
        get_tensor: the values of a name.
        dtype: of the weights; buffers (Fourier features) are float32.
        metadata: the complete JSON block.

    Raises:
        OSError: it could not be written.
    """

    def get_pieces(names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, get_tensor(name).detach().reshape(1, -1)) for name in names)

    write_native_files({Path(path): metadata}, net, get_pieces, dtype)


def write_native_files(
    metadata: Mapping[Path, Mapping],
    net: torch.nn.Module,
    get_pieces: GetPieces,
    dtype: torch.dtype,
) -> None:
    """Write snapshots of one network together, each complete or not at all, piece by piece.

    Args:
        metadata: the complete JSON block of each path.
        net, dtype: as for `write_native`.
        get_pieces: gives the values, a network per path.

    Raises:
        OSError: one could not be written.
    """
    parameters = {name for name, _ in net.named_parameters()}
    layout: dict[str, Any] = {}
    position = 0
    state = net.state_dict()
    dtypes = {name: dtype if name in parameters else torch.float32 for name in state}
    # Wider types first, as the format wants its tensors aligned.
    names = sorted(state, key=lambda name: -dtypes[name].itemsize)
    for name in names:
        end = position + state[name].numel() * dtypes[name].itemsize
        layout[name] = dict(
            dtype=DTYPE_NAMES[dtypes[name]], shape=list(state[name].shape), data_offsets=[position, end]
        )
        position = end
    with ExitStack() as stack:
        files = [stack.enter_context(atomic_write(path)) for path in metadata]
        for f, block in zip(files, metadata.values(), strict=True):
            text = json.dumps({"__metadata__": {METADATA_KEY: json.dumps(block)}, **layout}).encode()
            text += b" " * (-len(text) % 8)
            f.write(struct.pack("<Q", len(text)) + text)
        for name, piece in get_pieces(names):
            for f, values in zip(files, piece.to("cpu", dtypes[name]), strict=True):
                f.write(values.contiguous().view(torch.uint8).numpy().data)
