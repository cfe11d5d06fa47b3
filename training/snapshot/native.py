"""Native snapshots: safetensors files with a JSON block."""

import functools
import json
import math
import struct
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
from training.snapshot.layout import GetTensor, Request, check_storable
from training.snapshot.places import FileOfPlaces

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


class NativeFile(FileOfPlaces):
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

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._header[1][name]["shape"])

    def dtype(self, name: str) -> torch.dtype | None:
        return DTYPES.get(self._header[1][name]["dtype"])

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
        (start, stop), place = self.place(name), self.place(other)
        whole = not self._sums or (stop - start) % WORD == 0
        return whole and self.dtype(name) == self.dtype(other) and stop == place[0]

    def place(self, name: str) -> tuple[int, int]:
        begin, layout = self._header
        start, stop = layout[name]["data_offsets"]
        return begin + start, begin + stop

    @functools.cached_property
    def _header(self) -> tuple[int, dict[str, Any]]:
        """Where the data begin in the file, and type, shape and place among them of each tensor.

        They are read from the header, which the library has checked: before version 0.6 it does not say where tensors
        lie, and later only in which order.
        """
        return read_header(self.path)[:2]

    @functools.cached_property
    def _sums(self) -> dict[str, int]:
        """The stored checksums; {} if there are none."""
        try:
            return stored_sums(self._sums_text, self._header[1])
        except ValueError as err:
            raise mismatch(self.path, f"the list of checksums ({one_line(err)[:50]})") from None


def read_header(path: Path) -> tuple[int, dict[str, Any], dict[str, str]]:
    """The header of a safetensors file that the library has opened: where the data begin, what it says of each tensor
    (dtype, shape, data_offsets), and its metadata."""
    with open(path, "rb") as f:
        (size,) = struct.unpack("<Q", f.read(8))
        header = json.loads(f.read(size))
    metadata = header.pop("__metadata__", None)
    return 8 + size, header, metadata or {}


def header_of_file(path: Path) -> tuple[int, dict[str, Any], dict[str, str]]:
    """As `read_header`, of any safetensors file.

    Raises:
        UserError: it is damaged.
    """
    try:
        with safetensors.safe_open(path, framework="pt"):
            return read_header(path)
    except (safetensors.SafetensorError, ValueError, RecursionError) as err:
        raise DamagedFileError(f"{path}: damaged or truncated ({one_line(err)}): copy it again") from None


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
    parameters = {name for name, _ in net.named_parameters()}
    state = net.state_dict()
    dtypes = {name: dtype if name in parameters else _buffer_dtype(tensor) for name, tensor in state.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    blocks = {path: {METADATA_KEY: json.dumps(described.to_json())} for path, described in descriptions.items()}
    write_safetensors(blocks, dtypes, shapes, get_pieces)


def write_safetensors(
    metadata: Mapping[Path, Mapping[str, str]],
    dtypes: Mapping[str, torch.dtype],
    shapes: Mapping[str, tuple[int, ...]],
    get_pieces: GetPieces,
) -> None:
    """Write files of the same tensors with other values together, each complete or not at all, piece by piece.

    Args:
        metadata: of each path; checksums are added.
        dtypes, shapes: of the tensors by name.
        get_pieces: gives the values, a network per path.

    Raises:
        UserError: a value is NaN, or infinite in the type that it is stored in.
        OSError: one could not be written.
    """
    layout = _plan(dtypes, shapes)
    sums = [dict.fromkeys(layout, 0) for _ in metadata]
    written = dict.fromkeys(layout, 0)
    with ExitStack() as stack:
        files = [stack.enter_context(atomic_write(path)) for path in metadata]
        for f, texts in zip(files, metadata.values(), strict=True):
            f.write(_header_of(texts, layout, [0] * len(layout)))
        for name, piece in get_pieces(layout):
            outputs = zip(metadata, files, piece.to("cpu", dtypes[name]), sums, strict=True)
            for path, f, values, of_file in outputs:
                check_storable(path, name, values)
                data = bytes_of(values)
                of_file[name] += word_sum(data, written[name])
                f.write(data)
            written[name] += piece.shape[1] * dtypes[name].itemsize
        for f, texts, of_file in zip(files, metadata.values(), sums, strict=True):
            f.seek(0)
            f.write(_header_of(texts, layout, list(of_file.values())))


def _plan(dtypes: Mapping[str, torch.dtype], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The places of tensors in a file as its header says them, in that order.

    Whole words come first, so that many tensors can be read and their checksums compared as one; and among these, and
    among the rest, wider types, as the format wants its tensors aligned.
    """
    sizes = {name: math.prod(shape) * dtypes[name].itemsize for name, shape in shapes.items()}
    layout, position = {}, 0
    for name in sorted(sizes, key=lambda name: (sizes[name] % WORD != 0, -dtypes[name].itemsize)):
        place = [position, position + sizes[name]]
        layout[name] = dict(dtype=DTYPE_NAMES[dtypes[name]], shape=list(shapes[name]), data_offsets=place)
        position += sizes[name]
    return layout


def _header_of(metadata: Mapping[str, str], layout: dict[str, Any], sums: list[int]) -> bytes:
    """What stands before the values; of the same length for all checksums."""
    texts = {**metadata, CHECKSUMS_KEY: stored_text(layout, sums)}
    text = json.dumps({"__metadata__": texts, **layout}).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor on the CPU."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _buffer_dtype(buffer: torch.Tensor) -> torch.dtype:
    """What a buffer is stored as: floats are never less than float32."""
    return torch.promote_types(buffer.dtype, torch.float32) if buffer.is_floating_point() else buffer.dtype
