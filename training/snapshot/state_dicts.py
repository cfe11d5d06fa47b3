"""Plain state dicts of any module: `.pt` and `.pth` of `torch.save`, and `.safetensors`.

They are opened without loading their values, or running anything in them, and written.
"""

import functools
import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from dnnlib.errors import DamagedFileError, UserError, one_line
from dnnlib.files import atomic_write
from torch_utils.pickle_machine import Budget, Machine, Name, naming_source
from torch_utils.pickle_records import RefusedError, contiguous_strides, is_shape
from torch_utils.safe_pickle import STORAGE_DTYPES
from training.preconditioning import PRECISIONS
from training.snapshot.description import METADATA_KEY
from training.snapshot.layout import check_storable
from training.snapshot.native import DTYPES, GetPieces, header_of_file, write_safetensors
from training.snapshot.places import FileOfPlaces

SUFFIXES = (".pt", ".pth", ".safetensors")
MADE_KEY = "openedm2_reconstructed_from"  # in the metadata of .safetensors: names of files
# Names of tensors that are no averages over time: running statistics of batch norms.
LATEST = ("*running_mean", "*running_var")
LOCAL_HEADER = 30  # bytes of a part's header in a ZIP file, before its name


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its type, shape and strides, where its first element is, and where its storage ends."""

    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    start: int
    stop: int

    @property
    def is_contiguous(self) -> bool:
        """Whether its elements lie in one piece, in their order."""
        steps = contiguous_strides(self.size)
        return all(n == 1 or a == b for n, a, b in zip(self.size, self.stride, steps, strict=True))


class StateDictFile(FileOfPlaces):
    """An open state dict.

    `reconstructed_from` names the files that it was made of, where it says so.

    Raises:
        UserError: a damaged file, or one that holds something else than tensors by name.
    """

    def __init__(self, path: Path):
        self.path = path
        self.reconstructed_from: list[str] | None = None
        if path.suffix == ".safetensors":
            self._tensors, made_from = _inspect_safetensors(path)
            self.reconstructed_from = None if made_from is None else made_from.split("\n")
        else:
            self._tensors = _inspect_archive(path)
        self.names = list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].size

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def place(self, name: str) -> tuple[int, int] | None:
        tensor = self._tensors[name]
        if not tensor.is_contiguous:
            return None
        return tensor.start, tensor.start + math.prod(tensor.size) * tensor.dtype.itemsize

    def get_tensor(self, name: str) -> torch.Tensor:
        tensor = self._tensors[name]
        if math.prod(tensor.size) == 0:
            return torch.empty(tensor.size, dtype=tensor.dtype)
        with open(self.path, "rb") as f:
            f.seek(tensor.start)
            data = bytearray(f.read(tensor.stop - tensor.start))
        if len(data) < tensor.stop - tensor.start:
            raise DamagedFileError(f"{self.path}: cannot be read (the file ends early): copy it again")
        values = torch.frombuffer(data, dtype=tensor.dtype)
        return values.as_strided(tensor.size, tensor.stride).contiguous()

    def is_followed(self, name: str, other: str) -> bool:
        """Whether a tensor's elements begin where those of `name` end, and are of the same type."""
        place, following = self.place(name), self.place(other)
        if place is None or following is None:
            return False
        return place[1] == following[0] and self.dtype(name) == self.dtype(other)

    def summed(self, latest: Sequence[str] = LATEST) -> set[str]:
        """Names of the tensors that averages are sums of: floating-point ones that match none of these patterns."""
        return {
            name
            for name, tensor in self._tensors.items()
            if tensor.dtype.is_floating_point
            and math.prod(tensor.size) > 0
            and not any(fnmatchcase(name, pattern) for pattern in latest)
        }


def is_state_dict(path: Path) -> bool:
    """Whether a file is a plain state dict by its name, or a .safetensors file that says nothing of a network.

    Raises:
        UserError: a damaged file.
    """
    if path.suffix == ".safetensors":
        return METADATA_KEY not in header_of_file(path)[2]
    return path.suffix in SUFFIXES


def _inspect_safetensors(path: Path) -> tuple[dict[str, Stored], str | None]:
    begin, layout, metadata = header_of_file(path)
    tensors = {}
    for name, entry in layout.items():
        dtype, size, (start, stop) = DTYPES.get(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
        if dtype is None:
            raise UserError(f"{path}: {one_line(name)[:50]!r} is of type {entry['dtype']}, which is not known here")
        tensors[name] = Stored(dtype, size, contiguous_strides(size), begin + start, begin + stop)
    return tensors, metadata.get(MADE_KEY)


# ---------------------------------------------------------------------------------------------------------
# Archives of torch.save


@dataclass(frozen=True)
class _Part:
    """A storage: its type, and the bytes in the file that it has."""

    dtype: torch.dtype
    start: int
    stop: int


def _inspect_archive(path: Path) -> dict[str, Stored]:
    """The tensors of an archive of `torch.save` by name: the list of them is read, and no values.

    Raises:
        UserError: a damaged file, one of the format before torch 1.6, or one that holds more than tensors by name.
    """
    source = str(path)
    try:
        with open(path, "rb") as f, naming_source(source):
            if not zipfile.is_zipfile(f):
                raise DamagedFileError(f"{path}: no archive of torch.save (1.6 or later), or truncated: copy it again")
            with zipfile.ZipFile(f) as archive:
                parts = {info.filename.partition("/")[2]: info for info in archive.infolist()}
                listed = archive.read(parts["data.pkl"])
            starts = {
                name.removeprefix("data/"): (_first_byte(f, info), info.file_size)
                for name, info in parts.items()
                if name.startswith("data/") and info.compress_type == zipfile.ZIP_STORED
            }
            state = Machine(memoryview(listed), Budget(), _meaning, functools.partial(_part, starts)).run()
    except (zipfile.BadZipFile, zipfile.LargeZipFile, EOFError) as err:
        raise DamagedFileError(f"{path}: damaged ({one_line(err)[:150]}): copy it again") from None
    if type(state) is not dict or not state:
        raise UserError(f"{path}: holds no tensors by name: save net.state_dict() alone")
    for name, value in state.items():
        if type(name) is not str or type(value) is not Stored:
            raise UserError(f"{path}: {one_line(name)[:50]!r} in it is no tensor: save net.state_dict() alone")
    return state


def _first_byte(f: Any, info: zipfile.ZipInfo) -> int:
    """Where the contents of a part begin, after the name and more in its own header."""
    f.seek(info.header_offset)
    header = f.read(LOCAL_HEADER)
    return info.header_offset + LOCAL_HEADER + sum(int.from_bytes(header[i : i + 2], "little") for i in (26, 28))


def _part(starts: Mapping[str, tuple[int, int]], pid: Any) -> _Part:
    """The storage that a persistent id of the list means."""
    kind, storage_type, key, _location, numel = pid
    if kind != "storage" or type(storage_type) is not Name or type(numel) is not int or key not in starts:
        raise ValueError("a tensor of unknown form")
    dtype, (start, size) = STORAGE_DTYPES[storage_type.name], starts[key]
    if not 0 <= numel * dtype.itemsize <= size:
        raise ValueError("a tensor is truncated")
    return _Part(dtype, start, start + numel * dtype.itemsize)


def _tensor(part: Any, offset: Any, size: Any, stride: Any, _grad: Any, _hooks: Any, _metadata: Any = None) -> Stored:
    if type(part) is not _Part or not (is_shape(size) and is_shape(stride) and is_shape((offset,))):
        raise ValueError("a tensor of unknown form")
    start, numel = part.start + offset * part.dtype.itemsize, math.prod(size)
    last = sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    # Overlapping elements would make a large tensor of a small file.
    stop = start + (last + 1) * part.dtype.itemsize
    if numel > 0 and (stop > part.stop or numel * part.dtype.itemsize > part.stop - part.start):
        raise ValueError("a tensor is larger than its storage")
    return Stored(part.dtype, size, stride, start, stop)


def _parameter(data: Any, _grad: Any, _hooks: Any) -> Stored:
    if type(data) is not Stored:
        raise TypeError("a parameter that is no tensor")
    return data


_MEANINGS = {
    "collections.OrderedDict": lambda: {},
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
}


def _meaning(name: str) -> Name:
    """What a global name in the list means."""
    if name not in _MEANINGS and name not in STORAGE_DTYPES:
        raise RefusedError(f"it asks for {name[:100]!r}, which no state dict of plain tensors needs")
    return Name(name, _MEANINGS.get(name))


# ---------------------------------------------------------------------------------------------------------
# Writing


def write_state_dicts(
    paths: Sequence[Path], like: StateDictFile, get_pieces: GetPieces, made_from: Sequence[str]
) -> None:
    """Write state dicts with the names, shapes and types of another, each complete or not at all.

    Args:
        paths: '.safetensors', written piece by piece, or '.pt' and '.pth', whose tensors are all in memory first.
        get_pieces: gives the values, a state dict per path.
        made_from: names of files, for the metadata of .safetensors.

    Raises:
        UserError: a value is NaN, or infinite in the type that it is stored in.
        OSError: one could not be written.
    """
    dtypes = {name: like.dtype(name) for name in like.names}
    shapes = {name: like.shape(name) for name in like.names}
    if all(path.suffix == ".safetensors" for path in paths):
        write_safetensors({path: {MADE_KEY: "\n".join(made_from)} for path in paths}, dtypes, shapes, get_pieces)
        return
    outputs = gathered(dtypes, shapes, get_pieces, len(paths))
    for path, state in zip(paths, outputs, strict=True):
        for name, tensor in state.items():
            check_storable(path, name, tensor)
        with atomic_write(path) as f:
            torch.save(state, f)


def gathered(
    dtypes: Mapping[str, torch.dtype], shapes: Mapping[str, tuple[int, ...]], get_pieces: GetPieces, count: int
) -> list[dict[str, torch.Tensor]]:
    """The tensors of so many networks by name, of these types and shapes, from their pieces."""
    outputs = [{name: torch.empty(shapes[name], dtype=dtypes[name]) for name in dtypes} for _ in range(count)]
    position = dict.fromkeys(dtypes, 0)
    for name, piece in get_pieces(dtypes):
        stop = position[name] + piece.shape[1]
        for tensors, values in zip(outputs, piece, strict=True):
            tensors[name].view(-1)[position[name] : stop] = values
        position[name] = stop
    return outputs


def common_dtype(file: StateDictFile, names: Sequence[str]) -> torch.dtype:
    """The type that sums of these tensors come in: theirs if it is one for all, else float32.

    Raises:
        UserError: one is of a type that is not summed.
    """
    for name in names:
        if file.dtype(name) not in PRECISIONS.values():
            kind = str(file.dtype(name)).removeprefix("torch.")
            raise UserError(f"{file.path}: {name} is of type {kind}, not float32, float16 or bfloat16")
    kinds = {file.dtype(name) for name in names}
    return kinds.pop() if len(kinds) == 1 else torch.float32
