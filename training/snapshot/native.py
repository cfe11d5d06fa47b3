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
from torch import nn

from dnnlib.errors import UserError, one_line
from dnnlib.files import atomic_write
from training.snapshot.description import METADATA_KEY, Description
from training.snapshot.layout import GetTensor, Request, SnapshotFile

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
# Gives (name, piece) for names: the values of several networks' tensors in the order of names and elements, as pieces
# [networks, n] of any sizes.
GetPieces = Callable[[Iterable[str]], Iterable[tuple[str, torch.Tensor]]]


class NativeFile(SnapshotFile):
    """A native snapshot.

    Args:
        description: what the file would say of itself, where that is kept beside it.

    Raises:
        UserError: a damaged file, or one of another kind.
    """

    def __init__(self, path: Path, description: Description | None = None):
        self.path = path
        try:
            self._file = safetensors.safe_open(path, framework="pt")
            text = (self._file.metadata() or {}).get(METADATA_KEY)
            block = None if text is None or description is not None else json.loads(text)
        except (safetensors.SafetensorError, ValueError, RecursionError) as err:
            raise UserError(f"{path}: damaged or truncated snapshot ({one_line(err)}): copy it again") from None
        if description is None and block is None:
            raise UserError(f"{path}: a safetensors file, but not a snapshot of this project")
        self.description = description or Description.from_json(str(path), block)
        self.names = list(self._file.keys())
        self._lock = threading.Lock()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._kinds[name][0]

    def dtype(self, name: str) -> torch.dtype | None:
        return self._kinds[name][1]

    def get_tensor(self, name: str) -> torch.Tensor:
        try:
            return self._file.get_tensor(name)
        except (safetensors.SafetensorError, RuntimeError, ValueError) as err:
            raise UserError(
                f"{self.path}: tensor {name} cannot be read ({one_line(err)}): copy the file again"
            ) from None

    def is_followed(self, name: str, other: str) -> bool:
        """Whether a tensor's elements begin where those of `name` end, and are of the same type."""
        return self.dtype(name) == self.dtype(other) and self._places[name][1] == self._places[other][0]

    def reader(self, name: str) -> Callable[[int, memoryview], None]:
        """As `SnapshotFile.reader`; it reads on into tensors that follow.

        The function raises `UserError` where the file ends early.
        """
        dtype = self.dtype(name)
        assert dtype is not None  # whoever asks has looked
        itemsize, offset = dtype.itemsize, self._places[name][0]
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
    def _kinds(self) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        """Shape and type of each tensor, asked for once: the library takes its time."""
        slices = {name: self._file.get_slice(name) for name in self.names}
        return {name: (tuple(part.get_shape()), DTYPES.get(part.get_dtype())) for name, part in slices.items()}

    @functools.cached_property
    def _places(self) -> dict[str, tuple[int, int]]:
        """First byte of each tensor in the file, and the byte after its last one.

        They are read from the header, which the library has checked: before version 0.6 it does not say where tensors
        lie, and later only in which order.
        """
        with open(self.path, "rb") as f:
            (size,) = struct.unpack("<Q", f.read(8))
            header = json.loads(f.read(size))
        places = {name: header[name]["data_offsets"] for name in self.names}
        return {name: (8 + size + start, 8 + size + stop) for name, (start, stop) in places.items()}

    @functools.cached_property
    def _handle(self) -> io.FileIO:
        handle = io.FileIO(self.path)
        weakref.finalize(self, handle.close)
        return handle


def open_native(request: Request) -> NativeFile:
    """Open a native snapshot.

    Raises:
        UserError: no such file, a damaged one, or one of another kind.
    """
    path = request.fetch()
    request.check_which(path)
    return NativeFile(path)


def write_native(
    path: str | Path, net: nn.Module, get_tensor: GetTensor, dtype: torch.dtype, description: Description
) -> None:
    """Write a snapshot, complete or not at all, one tensor at a time.

    Args:
        net: network that says names and shapes, and the types of buffers; its values do not matter.
        get_tensor: the values of a name.
        dtype: of the weights; buffers keep theirs (Fourier features are float32).

    Raises:
        OSError: it could not be written.
    """

    def get_pieces(names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, get_tensor(name).detach().reshape(1, -1)) for name in names)

    write_native_files({Path(path): description}, net, get_pieces, dtype)


def write_native_files(
    descriptions: Mapping[Path, Description], net: nn.Module, get_pieces: GetPieces, dtype: torch.dtype
) -> None:
    """Write snapshots of one network together, each complete or not at all, piece by piece.

    Args:
        descriptions: of each path.
        net, dtype: as for `write_native`.
        get_pieces: gives the values, a network per path.

    Raises:
        OSError: one could not be written.
    """
    parameters = {name for name, _ in net.named_parameters()}
    layout: dict[str, Any] = {}
    position = 0
    state = net.state_dict()
    dtypes = {name: dtype if name in parameters else _buffer_dtype(tensor) for name, tensor in state.items()}
    # Wider types first, as the format wants its tensors aligned.
    names = sorted(state, key=lambda name: -dtypes[name].itemsize)
    for name in names:
        end = position + state[name].numel() * dtypes[name].itemsize
        layout[name] = dict(
            dtype=DTYPE_NAMES[dtypes[name]], shape=list(state[name].shape), data_offsets=[position, end]
        )
        position = end
    with ExitStack() as stack:
        files = [stack.enter_context(atomic_write(path)) for path in descriptions]
        for f, description in zip(files, descriptions.values(), strict=True):
            block = json.dumps(description.to_json())
            text = json.dumps({"__metadata__": {METADATA_KEY: block}, **layout}).encode()
            text += b" " * (-len(text) % 8)
            f.write(struct.pack("<Q", len(text)) + text)
        for name, piece in get_pieces(names):
            for f, values in zip(files, piece.to("cpu", dtypes[name]), strict=True):
                f.write(values.contiguous().view(torch.uint8).numpy().data)


def _buffer_dtype(buffer: torch.Tensor) -> torch.dtype:
    """What a buffer is stored as: floats are never less than float32."""
    return torch.promote_types(buffer.dtype, torch.float32) if buffer.is_floating_point() else buffer.dtype
