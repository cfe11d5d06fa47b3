"""Pickles of the published layout (networks, statistics), read without running anything that is named in them.

`load` gives records, plain values, and tensors and arrays that stay in the file until they are asked for; source text
in the file is dropped unread. `module_tensors` and `plain` take results apart, `save` writes the layout.
"""

import functools
import math
import mmap
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dnnlib.errors import DamagedFileError, UserError
from torch_utils.pickle_machine import MAX_NAME, Budget, Machine, Name, checked_key, naming_source
from torch_utils.pickle_records import (
    CONTAINERS,
    ArrayType,
    LazyTensor,
    PersistentObject,
    RefusedError,
    StoredArray,
    StoredTensor,
    is_shape,
)
from torch_utils.pickle_writing import save

__all__ = [
    "CONTAINERS",
    "LazyTensor",
    "PersistentObject",
    "StoredArray",
    "StoredTensor",
    "load",
    "loads",
    "module_tensors",
    "plain",
    "save",
]

# Limits against hostile files, beside those of the machine.
MAX_NODES = 100_000  # values or modules visited while a result is taken apart
MAX_DEPTH = 64  # of their nesting


def load(path: str | os.PathLike) -> Any:
    """The contents of a pickle of the published layout: records, plain values, stored tensors and arrays.

    Raises:
        UserError: no such file, a truncated or damaged one, or one that asks for more than the layout needs.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file")
    if os.path.getsize(path) == 0:
        raise DamagedFileError(f"{path}: the file is empty: copy it again")
    with open(path, "rb") as f:
        data = memoryview(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ))
    return loads(data, path)


def loads(data: memoryview | bytes, source: str = "pickle") -> Any:
    """As `load`, for the contents of a file; `source` names it in errors."""
    data = memoryview(data)
    if len(data) < 2 or data[0] != pickle.PROTO[0] or not 2 <= data[1] <= 5:
        raise UserError(f"{source}: not a pickle of protocol 2 to 5, as published files are")
    file = _File(source, Budget(), {})
    with naming_source(source):
        return Machine(data, file.budget, functools.partial(_published_name, file)).run()


# ---------------------------------------------------------------------------------------------------------
# Names of the published layout


@dataclass(frozen=True, eq=False)
class _Storage:
    """A nested file that holds the values of a tensor."""

    source: str
    blob: memoryview
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True)
class _File:
    """What is known of a file while it is read."""

    source: str
    budget: Budget
    storages: dict[int, _Storage]  # by the id of their bytes: each is inspected once


def _published_name(file: _File, name: str) -> Name:
    """What a global name means."""
    call = _PUBLISHED_NAMES.get(name.replace("numpy._core.", "numpy.core.", 1))
    if call is None:
        raise RefusedError(f"it asks for {name[:MAX_NAME]!r}, which no published file needs")
    return Name(name, functools.partial(call, file) if call is _storage else call)


def _persistent_object(meta: dict[str, Any]) -> PersistentObject:
    if meta.get("type") != "class" or type(meta.get("class_name")) is not str or type(meta.get("state")) is not dict:
        raise RefusedError("it holds an object that is no class instance")
    return PersistentObject(meta["class_name"], meta["state"])


def _container(class_name: str) -> PersistentObject:
    return PersistentObject(class_name)


def _set(items: list[Any] | tuple = ()) -> set:
    if type(items) not in (list, tuple):
        raise TypeError("a set of something that is no list")
    return set(map(checked_key, items))


def _array_type(kind: str, _align: bool = False, _copy: bool = False) -> ArrayType:
    return ArrayType(kind)


def _array(_kind: Name, _shape: tuple, _code: Any) -> StoredArray:
    return StoredArray()


def _array_from(data: memoryview, dtype: ArrayType, shape: tuple, order: str) -> StoredArray:
    return StoredArray().fill(data, dtype, shape, order)


def _scalar(dtype: ArrayType, data: memoryview) -> StoredArray:
    return StoredArray().fill(data, dtype, (), "C")


LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # begins what torch.save writes with _use_new_zipfile_serialization=False
STORAGE_DTYPES = {
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.FloatStorage": torch.float32,
    "torch.DoubleStorage": torch.float64,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}


def _storage(file: _File, blob: memoryview) -> _Storage:
    """A nested file of `torch.save`, inspected before torch reads it: it must be one storage."""
    if type(blob) is not memoryview:
        raise TypeError("a storage must be bytes")
    if id(blob) not in file.storages:
        file.storages[id(blob)] = _inspect_storage(file, blob)
    return file.storages[id(blob)]


def _inspect_storage(file: _File, blob: memoryview) -> _Storage:
    keys_found = []

    def find(name: str) -> Name:
        if name == "collections.OrderedDict":
            return Name(name, lambda: {})
        if name not in STORAGE_DTYPES:
            raise RefusedError(f"a tensor in it asks for {name[:MAX_NAME]!r}")
        return Name(name, None)

    def find_persistent(pid: Any) -> _Storage:
        kind, storage_type, key, location, numel, view = pid
        known = kind == "storage" and type(storage_type) is Name and view is None
        if not known or type(key) is not str or type(location) is not str or type(numel) is not int:
            raise ValueError("a tensor of unknown form")
        keys_found.append(key)
        return _Storage(file.source, blob, STORAGE_DTYPES[storage_type.name], numel)

    machine = Machine(blob, file.budget, find, find_persistent)
    magic, version, _system = machine.run(), machine.run(), machine.run()
    storage, keys = machine.run(), machine.run()
    known = magic == LEGACY_MAGIC and version == 1001 and machine.protocols == {2}
    if not known or type(storage) is not _Storage or len(keys_found) != 1 or keys != keys_found:
        raise ValueError("a tensor of unknown form")
    if machine.number("<q") != storage.numel or len(blob) - machine.position != storage.numel * storage.dtype.itemsize:
        raise ValueError("a tensor is truncated")
    return storage


def _tensor(
    storage: _Storage, offset: int, size: tuple, stride: tuple, _requires_grad: Any, _hooks: Any, _metadata: Any = None
) -> StoredTensor:
    if type(storage) is not _Storage or not (is_shape(size) and is_shape(stride) and is_shape((offset,))):
        raise ValueError("a tensor of unknown form")
    numel = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    # Overlapping elements would make a large tensor of a small file.
    if numel > storage.numel or (numel > 0 and last >= storage.numel):
        raise ValueError("a tensor is larger than its storage")
    values = storage.blob[len(storage.blob) - storage.numel * storage.dtype.itemsize :]
    return StoredTensor(storage.source, storage.blob, values, storage.dtype, offset, size, stride)


def _parameter(data: StoredTensor, _requires_grad: Any, _hooks: Any) -> StoredTensor:
    if type(data) is not StoredTensor:
        raise TypeError("a parameter that is no tensor")
    return data


_PUBLISHED_NAMES: dict[str, Callable[..., Any]] = {
    "dnnlib.util.EasyDict": lambda: {},
    "collections.OrderedDict": lambda: {},
    "builtins.set": _set,
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent_object,
    **{f"torch.nn.modules.container.{name}": functools.partial(_container, name) for name in CONTAINERS},
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch.storage._load_from_bytes": _storage,
    "numpy.dtype": _array_type,
    "numpy.ndarray": _array,
    "numpy.core.multiarray._reconstruct": _array,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy.core.numeric._frombuffer": _array_from,
}


# ---------------------------------------------------------------------------------------------------------
# Taking results apart


def module_tensors(module: PersistentObject, source: str) -> dict[str, StoredTensor]:
    """Parameters and buffers of a network's record, named as in its state dict.

    Raises:
        UserError: it is not the record of a network. `source` names the file.
    """
    tensors: dict[str, StoredTensor] = {}
    visited = 0
    todo: list[tuple[str, Any, int]] = [("", module, 0)]
    with naming_source(source):
        while todo:
            prefix, record, depth = todo.pop()
            if type(record) is not PersistentObject:
                raise TypeError("a module that is none")
            parts = [record.state[key] for key in ("_parameters", "_buffers", "_modules")]
            visited += 1 + sum(len(part) for part in parts)
            if visited > MAX_NODES or depth > MAX_DEPTH:
                raise RefusedError("its modules are too many or too deeply nested")
            if not all(type(name) is str and len(name) <= MAX_NAME for part in parts for name in part):
                raise TypeError("the name of a module or tensor is none")
            for name, tensor in {**parts[0], **parts[1]}.items():
                if tensor is not None:
                    if type(tensor) is not StoredTensor:
                        raise TypeError(f"{prefix}{name} is no tensor")
                    tensors[f"{prefix}{name}"] = tensor
            children = [(f"{prefix}{name}.", child, depth + 1) for name, child in parts[2].items()]
            todo += [child for child in reversed(children) if child[1] is not None]
        # Tensors that share their values would make a large network of a small file.
        stored = {id(tensor.storage): len(tensor.storage) for tensor in tensors.values()}
        if sum(math.prod(t.size) * t.dtype.itemsize for t in tensors.values()) > sum(stored.values()):
            raise RefusedError("its tensors share their values")
    return tensors


def plain(value: Any, source: str) -> Any:
    """Options as JSON knows them: tuples become lists, NumPy numbers and arrays plain numbers and lists.

    Raises:
        UserError: there is something else among them, or far too much. `source` names the file.
    """
    nodes = 0

    def count(more: int) -> None:
        nonlocal nodes
        nodes += more
        if nodes > MAX_NODES:
            raise RefusedError("its options are too many or too deeply nested")

    def reduce(value: Any, depth: int) -> Any:
        count(1 if depth <= MAX_DEPTH else MAX_NODES)
        if type(value) is StoredArray:
            count(math.prod(max(n, 1) for n in value.shape) * (1 + len(value.shape)))
            return reduce(value.load().tolist(), depth + 1)
        if type(value) is dict:
            return {reduce(str(key), depth + 1): reduce(item, depth + 1) for key, item in value.items()}
        if type(value) in (list, tuple):
            return [reduce(item, depth + 1) for item in value]
        if type(value) is str:
            count(len(value) // 16)
            value.encode()  # fails for what no file could hold
            return value
        if value is None or type(value) is bool:
            return value
        if (type(value) is int and abs(value) < 2**63) or (type(value) is float and math.isfinite(value)):
            return value
        raise TypeError(f"a {type(value).__name__} among its options that JSON does not know")

    with naming_source(source):
        return reduce(value, 0)
