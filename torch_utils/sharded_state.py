"""Training states of which each process writes and reads its own pieces, by torch.distributed.checkpoint (DCP).

A state is a directory: `*.distcp` and `.metadata` as DCP writes them, with the tensors of which processes hold pieces;
and `rest.pt` with all else, in which such a tensor is replaced by its name and that of the parameter that it is shaped
like, and with the checksums of the files. Any number of processes can read it. Nothing that is named in a file is run.
"""

import os
import pickle
import shutil
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dnnlib.errors import RunError, one_line
from torch_utils import distributed
from torch_utils.checkpoint import load_state, save_state
from torch_utils.sharding import Pieces

REST = "rest.pt"
PIECE, LIKE = "piece", "shaped like"  # keys of what stands for a tensor
BLOCK = 1 << 24  # bytes read at a time
# What DCP's own record may name: records of numbers, and types of numbers.
RECORDS = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata",
        "TensorStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size", "float32", "float64", "float16", "bfloat16", "int64"),
    "pathlib": ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath", "Path"),
}

Owner = Callable[[tuple], str | None]  # path of keys in a state -> the parameter that a tensor there is shaped like


def save_pieces(path: Path, state: dict[str, Any], pieces: Pieces, owner: Owner) -> None:
    """Write a state under `path` once it is complete; to be called by all processes.

    Args:
        state: tensors, numbers, text and containers of them; pieces, and what all processes have.
        pieces: the network.
        owner: which tensors are pieces, and of what.

    Raises:
        RunError: it could not be written; nothing is left under `path`.
    """
    from torch.distributed import checkpoint as dcp

    found: dict[str, Any] = {}

    def set_apart(place: tuple, tensor: torch.Tensor) -> Any:
        name = owner(place)
        if name is None or not pieces.is_shared_out(name):
            return tensor
        key = "/".join(map(str, place))
        found[key] = pieces.like(name, tensor)
        return {PIECE: key, LIKE: name}

    rest = _mapped(state, _is_tensor, set_apart)
    beginning = path.with_name(f".{path.name}.tmp")
    with distributed.fail_together():
        if distributed.get_rank() == 0:
            shutil.rmtree(beginning, ignore_errors=True)
            beginning.mkdir()
    failure = ""
    try:
        dcp.save(found, storage_writer=dcp.FileSystemWriter(beginning))
    except dcp.api.CheckpointException as err:  # the same on all processes
        failure = one_line("; ".join(sorted({str(cause[0]) for cause in err.failures.values()})))
    with distributed.fail_together():
        if failure:
            shutil.rmtree(beginning, ignore_errors=True)
            raise RunError(f"{path}: the training state could not be written ({failure}): the last one is kept")
        if distributed.get_rank() == 0:
            checksums = {file.name: _crc32(file) for file in beginning.iterdir()}
            save_state(beginning / REST, {"state": rest, "checksums": checksums})
            shutil.rmtree(path, ignore_errors=True)
            os.replace(beginning, path)


def load_rest(path: Path) -> dict[str, Any]:
    """What is in a state beside pieces, of which there are names.

    Raises:
        Exception: it is damaged.
    """
    return load_state(path / REST)["state"]


def load_pieces(path: Path, pieces: Pieces | None) -> dict[str, Any]:
    """A state as `save_pieces` got it, on any number of processes. They need not call it together.

    Args:
        pieces: the network that this process holds pieces of, and is to have pieces for; None = it gets whole tensors.

    Raises:
        ValueError: a checksum does not match.
        Exception: the state is damaged in another way.
    """
    from torch.distributed import checkpoint as dcp

    for name, checksum in load_state(path / REST)["checksums"].items():
        if _crc32(path / name) != checksum:
            raise ValueError(f"checksum mismatch in {name}")
    reader = _reader(path)
    stored: Any = reader.read_metadata().state_dict_metadata
    wanted: dict[str, Any] = {}

    def make_room(_place: tuple, stands: dict[str, str]) -> torch.Tensor:
        key, name = stands[PIECE], stands[LIKE]
        size, dtype = stored[key].size, stored[key].properties.dtype
        if pieces is None or not pieces.is_shared_out(name):
            wanted[key] = torch.empty(size, dtype=dtype)
            return wanted[key]
        shape = pieces.rows(name, torch.empty(size, device="meta")).shape
        mine = torch.empty(shape, dtype=dtype, device=pieces.net.get_parameter(name).device)
        wanted[key] = pieces.like(name, mine)
        return mine

    state = _mapped(load_rest(path), _is_stand, make_room)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as is meant
        dcp.load(wanted, storage_reader=reader, no_dist=True)
    return state


def take_pieces(state: dict[str, Any], pieces: Pieces, owner: Owner) -> dict[str, Any]:
    """A state of a whole network as one of pieces.

    Args:
        pieces: the network that this process holds pieces of.
        owner: which tensors are shaped like parameters, and which.
    """

    def cut(place: tuple, tensor: torch.Tensor) -> torch.Tensor:
        name = owner(place)
        return tensor if name is None else pieces.rows(name, tensor)

    return _mapped(state, _is_tensor, cut)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _is_stand(value: Any) -> bool:
    """Whether something in `rest.pt` stands for a tensor."""
    return isinstance(value, dict) and value.keys() == {PIECE, LIKE}


def _mapped(value: Any, is_meant: Callable[[Any], bool], change: Callable[[tuple, Any], Any], place: tuple = ()) -> Any:
    """A state in which what is meant is what `change` makes of the path of keys that leads to it, and of it."""
    if is_meant(value):
        return change(place, value)
    if isinstance(value, dict):
        return {key: _mapped(item, is_meant, change, (*place, key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(item, is_meant, change, (*place, i)) for i, item in enumerate(value))
    return value


def _crc32(path: Path) -> int:
    checksum = 0
    with open(path, "rb") as f:
        while block := f.read(BLOCK):
            checksum = zlib.crc32(block, checksum)
    return checksum


class _Record(pickle.Unpickler):
    """Reads DCP's record of a state, and refuses one that names anything but RECORDS."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in RECORDS.get(module, ()):
            raise ValueError(f"the record names {one_line(f'{module}.{name}')[:100]}")
        return super().find_class(module, name)


def _reader(path: Path) -> Any:
    """DCP's reader of a directory, which runs nothing that is named there."""
    from torch.distributed.checkpoint import FileSystemReader

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            with open(path / ".metadata", "rb") as f:
                return _Record(f).load()

    return Reader(path)
