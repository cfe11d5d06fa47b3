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

from dnnlib.errors import DamagedFileError, UserError, one_line
from dnnlib.files import atomic_write
from training.snapshot.checksums import WORD, mismatch, stored_sums, stored_text, word_sum
from training.snapshot.description import METADATA_KEY, Description
from training.snapshot.layout import GetTensor, Request, SnapshotFile, check_storable

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
CHECKSUMS_KEY = "openedm2_checksums"
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
            raise DamagedFileError(f"{path}: damaged or truncated snapshot ({one_line(err)}): copy it again") from None
        if description is None and block is None:
            raise UserError(f"{path}: a safetensors file, but not a snapshot of this project")
        self.description = description or Description.from_json(str(path), block)
        self.names = list(self._file.keys())
        self._sums_text = (self._file.metadata() or {}).get(CHECKSUMS_KEY)
        self._lock = threading.Lock()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._kinds[name][0]

    def dtype(self, name: str) -> torch.dtype | None:
        return self._kinds[name][1]

    def get_tensor(self, name: str) -> torch.Tensor:
        try:
            tensor = self._file.get_tensor(name)
        except (safetensors.SafetensorError, RuntimeError, ValueError) as err:
            raise DamagedFileError(
                f"{self.path}: tensor {name} cannot be read ({one_line(err)}): copy the file again"
            ) from None
        expected = self.checksum(name)
        if expected is not None and word_sum(bytes_of(tensor)) != expected:
            raise mismatch(self.path, name)
        return tensor

    def checksum(self, name: str) -> int | None:
        return self._sums.get(name)

    def is_followed(self, name: str, other: str) -> bool:
        """Whether a tensor's elements begin where those of `name` end, are of the same type, and whole words if there
        are checksums."""
        (start, stop), place = self._places[name], self._places[other]
        whole = not self._sums or (stop - start) % WORD == 0
        return whole and self.dtype(name) == self.dtype(other) and stop == place[0]

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
                raise DamagedFileError(f"{self.path}: cannot be read (the file ends early): copy it again")

        return read

    @functools.cached_property
    def _kinds(self) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        """Shape and type of each tensor, asked for once: the library takes its time."""
        slices = {name: self._file.get_slice(name) for name in self.names}
        return {name: (tuple(part.get_shape()), DTYPES.get(part.get_dtype())) for name, part in slices.items()}

    @functools.cached_property
    def _header(self) -> tuple[int, dict[str, Any]]:
        """Where the data begin in the file, and type, shape and place among them of each tensor.

        They are read from the header, which the library has checked: before version 0.6 it does not say where tensors
        lie, and later only in which order.
        """
        with open(self.path, "rb") as f:
            (size,) = struct.unpack("<Q", f.read(8))
            header = json.loads(f.read(size))
        return 8 + size, {name: header[name] for name in self.names}

    @functools.cached_property
    def _places(self) -> dict[str, tuple[int, int]]:
        """First byte of each tensor in the file, and the byte after its last one."""
        begin, layout = self._header
        places = {name: layout[name]["data_offsets"] for name in self.names}
        return {name: (begin + start, begin + stop) for name, (start, stop) in places.items()}

    @functools.cached_property
    def _sums(self) -> dict[str, int]:
        """The stored checksums; {} if there are none."""
        try:
            return stored_sums(self._sums_text, self._header[1])
        except ValueError as err:
            raise mismatch(self.path, f"the list of checksums ({one_line(err)[:50]})") from None

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
        UserError: as for `write_native_files`.
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
        UserError: a value is NaN, or infinite in the type that it is stored in.
        OSError: one could not be written.
    """
    dtypes, layout = _plan(net, dtype)
    sums = [dict.fromkeys(layout, 0) for _ in descriptions]
    written = dict.fromkeys(layout, 0)
    with ExitStack() as stack:
        files = [stack.enter_context(atomic_write(path)) for path in descriptions]
        for f, description in zip(files, descriptions.values(), strict=True):
            f.write(_header_of(description, layout, [0] * len(layout)))
        for name, piece in get_pieces(layout):
            outputs = zip(descriptions, files, piece.to("cpu", dtypes[name]), sums, strict=True)
            for path, f, values, of_file in outputs:
                check_storable(path, name, values)
                data = bytes_of(values)
                of_file[name] += word_sum(data, written[name])
                f.write(data)
            written[name] += piece.shape[1] * dtypes[name].itemsize
        for f, description, of_file in zip(files, descriptions.values(), sums, strict=True):
            f.seek(0)
            f.write(_header_of(description, layout, list(of_file.values())))


def _plan(net: nn.Module, dtype: torch.dtype) -> tuple[dict[str, torch.dtype], dict[str, Any]]:
    """Types of a network's tensors, and their places in a file as its header says them, in that order.

    Whole words come first, so that many tensors can be read and their checksums compared as one; and among these, and
    among the rest, wider types, as the format wants its tensors aligned.
    """
    parameters = {name for name, _ in net.named_parameters()}
    state = net.state_dict()
    dtypes = {name: dtype if name in parameters else _buffer_dtype(tensor) for name, tensor in state.items()}
    sizes = {name: tensor.numel() * dtypes[name].itemsize for name, tensor in state.items()}
    layout, position = {}, 0
    for name in sorted(state, key=lambda name: (sizes[name] % WORD != 0, -dtypes[name].itemsize)):
        place = [position, position + sizes[name]]
        layout[name] = dict(dtype=DTYPE_NAMES[dtypes[name]], shape=list(state[name].shape), data_offsets=place)
        position += sizes[name]
    return dtypes, layout


def _header_of(description: Description, layout: dict[str, Any], sums: list[int]) -> bytes:
    """What stands before the values; of the same length for all checksums."""
    metadata = {METADATA_KEY: json.dumps(description.to_json()), CHECKSUMS_KEY: stored_text(layout, sums)}
    text = json.dumps({"__metadata__": metadata, **layout}).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor on the CPU."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _buffer_dtype(buffer: torch.Tensor) -> torch.dtype:
    """What a buffer is stored as: floats are never less than float32."""
    return torch.promote_types(buffer.dtype, torch.float32) if buffer.is_floating_point() else buffer.dtype
