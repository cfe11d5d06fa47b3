"""Reader and writer of the published pickle layout (networks, statistics) that run nothing named in a file.

A pickle is a program for a small stack machine. The reader here is such a machine with the few instructions and
names that the layout needs; whatever else a file asks for is refused by name. Library objects become plain records,
source text in the file is dropped unread, tensors and arrays stay in the file until they are asked for.
"""

import functools
import io
import itertools
import math
import mmap
import os
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np
import torch
from torch._utils import _rebuild_tensor_v2

from dnnlib.errors import UserError, one_line
from dnnlib.files import atomic_write

# Limits against hostile files. The largest published network takes about a hundredth of the steps.
MAX_STEPS = 4_000_000  # instructions, and items that they handle
MAX_NODES = 100_000  # values or modules visited while a result is taken apart
MAX_DEPTH = 64  # of their nesting
MAX_DIMS = 8  # of tensors and arrays
MAX_NAME = 100  # characters
MAX_KEY = 1 << 31  # integers as keys: larger ones can be chosen to collide

CONTAINERS = ("ModuleDict", "ModuleList", "Sequential")  # of torch.nn


# ---------------------------------------------------------------------------------------------------------
# What a pickle is reduced to: besides these, dict, list, tuple, set, str, int, float, bool, None and bytes


@dataclass(eq=False)
class PersistentObject:
    """Record of a library object: its class by name, and its attributes.

    `module` is where writing says the class is; reading leaves it empty. torch's own containers of modules, such
    as `ModuleDict`, are records as well.
    """

    class_name: str
    state: dict[str, Any] = field(default_factory=dict)
    module: str = ""

    @property
    def init_args(self) -> tuple:
        args = self.state.get("_init_args", ())
        return args if isinstance(args, tuple) else ()

    @property
    def init_kwargs(self) -> dict:
        kwargs = self.state.get("_init_kwargs", {})
        return kwargs if isinstance(kwargs, dict) else {}


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor that is still in the file."""

    source: str
    storage: memoryview  # a file of its own as `torch.save` writes it, holding one storage
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def load(self) -> torch.Tensor:
        """Read the values.

        Raises:
            UserError: the file is damaged here.
        """
        try:
            storage = torch.load(io.BytesIO(self.storage), map_location="cpu", weights_only=True)
            return _rebuild_tensor_v2(storage, self.offset, self.size, self.stride, False, OrderedDict())
        except Exception as err:  # torch has many ways to say that a file is damaged
            raise UserError(f"{self.source}: a tensor cannot be read ({one_line(err)}): copy the file again") from None


@dataclass(eq=False)
class StoredArray:
    """A NumPy array, or number, that is still in the file."""

    data: memoryview | bytes = b""
    dtype: str = "|u1"
    shape: tuple[int, ...] = (0,)
    order: str = "C"

    def load(self) -> np.ndarray:
        return np.ndarray(self.shape, self.dtype, self.data, order=self.order)  # type: ignore[call-overload]


@dataclass(frozen=True, eq=False)
class LazyTensor:
    """For writing: a tensor that is made when its turn comes."""

    load: Callable[[], torch.Tensor]
    is_parameter: bool


# ---------------------------------------------------------------------------------------------------------
# Reading


def load(path: str | os.PathLike) -> Any:
    """Read a pickle of the published layout without running anything in it.

    Raises:
        UserError: no such file, a truncated or damaged one, or one that asks for more than the layout needs.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file")
    if os.path.getsize(path) == 0:
        raise UserError(f"{path}: the file is empty: copy it again")
    with open(path, "rb") as f:
        data = memoryview(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ))
    return loads(data, path)


def loads(data: memoryview | bytes, source: str = "pickle") -> Any:
    """As `load`, for the contents of a file; `source` names it in errors."""
    data = memoryview(data)
    if len(data) < 2 or data[0] != pickle.PROTO[0] or not 2 <= data[1] <= 5:
        raise UserError(f"{source}: not a pickle of protocol 2 to 5, as published files are")
    file = _File(source)
    with _refusals_name(source):
        return _Machine(data, file, functools.partial(_published_name, file)).run()


class _RefusedError(Exception):
    """The file asks for something that the layout does not need."""


@contextmanager
def _refusals_name(source: str) -> Iterator[None]:
    """Inside, whatever a damaged or hostile file brings about becomes one error that names the file."""
    try:
        yield
    except UserError:
        raise
    except _RefusedError as err:
        raise UserError(f"{source}: {err}; nothing in the file was run") from None
    except EOFError:
        raise UserError(f"{source}: the file is truncated: copy it again") from None
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as err:
        raise UserError(f"{source}: damaged pickle ({one_line(err)}): copy it again") from None


@dataclass(frozen=True, eq=False)
class _Name:
    """A global name that the layout uses, and what calling it gives."""

    name: str
    call: Callable[..., Any] | None


@dataclass
class _File:
    """What the machines that read one file share."""

    source: str
    steps: int = 0
    storages: dict[int, "_Storage"] = field(default_factory=dict)  # by id of their bytes, looked through once

    def work(self, items: int) -> None:
        self.steps += items
        if self.steps > MAX_STEPS:
            raise _RefusedError(f"it takes more than {MAX_STEPS} steps, which no published file needs")


class _Mark:
    pass


class _Machine:
    """The stack machine. `find` gives the meaning of a global name, `find_persistent` that of a persistent id."""

    def __init__(
        self,
        data: memoryview,
        file: _File,
        find: Callable[[str], _Name],
        find_persistent: Callable[[Any], Any] | None = None,
    ):
        self.data = data
        self.file = file
        self.find = find
        self.find_persistent = find_persistent
        self.position = 0
        self.protocols: set[int] = set()

    def run(self) -> Any:
        """One pickle, from `position` to its end."""
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        while True:
            code = self.take(1)[0]
            if code == pickle.STOP[0]:
                (value,) = self.stack
                return value
            instruction = _INSTRUCTIONS.get(code)
            if instruction is None:
                raise _RefusedError(
                    f"byte {self.position - 1} is an instruction ({code:#04x}) that such files do not use"
                )
            self.file.work(1)
            instruction(self)

    def take(self, count: int) -> memoryview:
        part = self.data[self.position : self.position + count]
        if len(part) < count:
            raise EOFError
        self.position += count
        return part

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self, length: int) -> str:
        return str(self.take(length), "utf-8", "surrogatepass")

    def line(self) -> str:
        text = bytes(self.data[self.position : self.position + MAX_NAME]).partition(b"\n")
        self.take(len(text[0]) + 1)
        return str(text[0], "ascii")

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _Mark:
            raise ValueError("a mark where a value is needed")
        return value

    def pop_to_mark(self) -> list[Any]:
        start = len(self.stack)
        while self.stack[start - 1] is not _Mark:
            start -= 1
            if start == 0:
                raise ValueError("no mark")
        items = self.stack[start:]
        del self.stack[start - 1 :]
        self.file.work(len(items))
        return items

    def top(self, kind: type) -> Any:
        value = self.stack[-1]
        if type(value) is not kind:
            raise TypeError(f"a {kind.__name__} was expected")
        return value

    # Instructions

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def tuple_of(self, count: int) -> None:
        if count > 0:
            items = tuple(self.pop() for _ in range(count))[::-1]
            self.push(items)

    def extend(self, items: list[Any]) -> None:
        self.top(list).extend(items)

    def add_items(self, items: list[Any]) -> None:
        self.top(set).update(map(_key, items))

    def set_items(self, items: list[Any]) -> None:
        target = self.top(dict)
        if len(items) % 2:
            raise ValueError("a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_key(key)] = value

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        self.push(self.memo[index])

    def global_name(self, module: Any, name: Any) -> None:
        self.push(self.find(f"{module}.{name}"))

    def stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        if type(name) is not str or type(module) is not str:
            raise TypeError("a name must be text")
        self.global_name(module, name)

    def call(self) -> None:
        args, name = self.pop(), self.pop()
        if type(name) is not _Name or name.call is None or type(args) is not tuple:
            raise TypeError("a call of something that is no function")
        self.file.work(sum(len(arg) for arg in args if isinstance(arg, (list, tuple, set, dict))))
        self.push(name.call(*args))

    def build(self) -> None:
        state, target = self.pop(), self.stack[-1]
        if type(target) is PersistentObject and type(state) is dict and not target.state:
            target.state = state
        elif type(target) is StoredArray and type(state) is tuple:
            _fill_array(target, *state)
        elif type(target) is _DType and type(state) is tuple and state[1:2] in [("<",), (">",), ("|",)]:
            (target.byte_order,) = state[1:2]
        elif not (type(target) is dict and state is None):
            raise TypeError("attributes for something that has none")

    def persistent(self) -> None:
        if self.find_persistent is None:
            raise _RefusedError("it refers to objects outside the file")
        self.push(self.find_persistent(self.pop()))


def _key(key: Any) -> Any:
    """Keys and members of sets: text or small integers, whose hashes cost nothing and do not collide."""
    if type(key) is str or (type(key) is int and abs(key) < MAX_KEY):
        return key
    raise TypeError(f"a {type(key).__name__} as a key")


def _instructions() -> dict[int, Callable[[_Machine], None]]:
    table: dict[bytes, Callable[[_Machine], Any]] = {
        pickle.PROTO: lambda self: self.protocols.add(self.take(1)[0]),
        pickle.FRAME: lambda self: self.take(8),
        # Constants
        pickle.NONE: lambda self: self.push(None),
        pickle.NEWTRUE: lambda self: self.push(True),
        pickle.NEWFALSE: lambda self: self.push(False),
        pickle.BININT: lambda self: self.push(self.number("<i")),
        pickle.BININT1: lambda self: self.push(self.number("<B")),
        pickle.BININT2: lambda self: self.push(self.number("<H")),
        pickle.LONG1: lambda self: self.push(int.from_bytes(self.take(self.number("<B")), "little", signed=True)),
        pickle.BINFLOAT: lambda self: self.push(self.number(">d")),
        pickle.SHORT_BINUNICODE: lambda self: self.push(self.text(self.number("<B"))),
        pickle.BINUNICODE: lambda self: self.push(self.text(self.number("<I"))),
        pickle.BINUNICODE8: lambda self: self.push(self.text(self.number("<Q"))),
        # Text and bytes of Python 2, in which CIFAR is published: the short ones are names.
        pickle.SHORT_BINSTRING: lambda self: self.push(str(self.take(self.number("<B")), "latin-1")),
        pickle.BINSTRING: lambda self: self.push(self.take(self.number("<I"))),
        pickle.SHORT_BINBYTES: lambda self: self.push(self.take(self.number("<B"))),
        pickle.BINBYTES: lambda self: self.push(self.take(self.number("<I"))),
        pickle.BINBYTES8: lambda self: self.push(self.take(self.number("<Q"))),
        pickle.BYTEARRAY8: lambda self: self.push(self.take(self.number("<Q"))),
        # Containers
        pickle.EMPTY_DICT: lambda self: self.push({}),
        pickle.EMPTY_LIST: lambda self: self.push([]),
        pickle.EMPTY_SET: lambda self: self.push(set()),
        pickle.EMPTY_TUPLE: lambda self: self.push(()),
        pickle.TUPLE1: lambda self: self.tuple_of(1),
        pickle.TUPLE2: lambda self: self.tuple_of(2),
        pickle.TUPLE3: lambda self: self.tuple_of(3),
        pickle.TUPLE: lambda self: self.push(tuple(self.pop_to_mark())),
        pickle.APPEND: lambda self: self.extend([self.pop()]),
        pickle.APPENDS: lambda self: self.extend(self.pop_to_mark()),
        pickle.SETITEM: lambda self: self.set_items([self.pop(), self.pop()][::-1]),
        pickle.SETITEMS: lambda self: self.set_items(self.pop_to_mark()),
        pickle.ADDITEMS: lambda self: self.add_items(self.pop_to_mark()),
        # Stack and memo
        pickle.MARK: lambda self: self.push(_Mark),
        pickle.POP: lambda self: self.stack.pop(),
        pickle.POP_MARK: lambda self: self.pop_to_mark(),
        pickle.BINPUT: lambda self: self.put(self.number("<B")),
        pickle.LONG_BINPUT: lambda self: self.put(self.number("<I")),
        pickle.MEMOIZE: lambda self: self.put(len(self.memo)),
        pickle.BINGET: lambda self: self.get(self.number("<B")),
        pickle.LONG_BINGET: lambda self: self.get(self.number("<I")),
        # Names and what is done with them
        pickle.GLOBAL: lambda self: self.global_name(self.line(), self.line()),
        pickle.STACK_GLOBAL: _Machine.stack_global,
        pickle.REDUCE: _Machine.call,
        pickle.NEWOBJ: _Machine.call,
        pickle.BUILD: _Machine.build,
        pickle.BINPERSID: _Machine.persistent,
    }
    return {code[0]: instruction for code, instruction in table.items()}


_INSTRUCTIONS = _instructions()


# Names of the published layout


def _published_name(file: _File, name: str) -> _Name:
    call = _PUBLISHED_NAMES.get(name.replace("numpy._core.", "numpy.core.", 1))
    if call is None:
        raise _RefusedError(f"it asks for {name[:MAX_NAME]!r}, which no published file needs")
    return _Name(name, functools.partial(call, file) if call is _storage else call)


def _persistent_object(meta: dict[str, Any]) -> PersistentObject:
    if meta.get("type") != "class" or type(meta.get("class_name")) is not str or type(meta.get("state")) is not dict:
        raise _RefusedError("it holds an object that is no class instance")
    return PersistentObject(meta["class_name"], meta["state"])


def _container(class_name: str) -> PersistentObject:
    return PersistentObject(class_name)


def _set(items: list[Any] | tuple = ()) -> set:
    if type(items) not in (list, tuple):
        raise TypeError("a set of something that is no list")
    return set(map(_key, items))


@dataclass(eq=False)
class _DType:
    """A NumPy type of numbers, such as 'f8'."""

    kind: str
    byte_order: str = "|"

    def code(self) -> str:
        return self.byte_order + self.kind


def _dtype(kind: str, _align: bool = False, _copy: bool = False) -> _DType:
    if type(kind) is not str or kind not in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"):
        raise _RefusedError("it holds an array that is not of numbers")
    return _DType(kind)


def _array(_kind: _Name, _shape: tuple, _code: Any) -> StoredArray:
    return StoredArray()


def _fill_array(
    array: StoredArray, _version: int, shape: tuple, dtype: _DType, fortran: bool, data: memoryview
) -> None:
    filled = _array_of(data, dtype, shape, "F" if fortran else "C")
    array.data, array.dtype, array.shape, array.order = filled.data, filled.dtype, filled.shape, filled.order


def _array_of(data: memoryview, dtype: _DType, shape: tuple, order: str) -> StoredArray:
    if type(dtype) is not _DType or type(data) is not memoryview or type(order) is not str or order not in "CF":
        raise _RefusedError("it holds an array that is not of numbers")
    if not _is_shape(shape) or math.prod(shape) * int(dtype.kind[1]) != len(data):
        raise ValueError("an array whose size does not fit its shape")
    return StoredArray(data, dtype.code(), shape, order)


def _scalar(dtype: _DType, data: memoryview) -> StoredArray:
    return _array_of(data, dtype, (), "C")


def _is_shape(size: Any) -> bool:
    return type(size) is tuple and len(size) <= MAX_DIMS and all(type(n) is int and 0 <= n < 2**48 for n in size)


@dataclass(frozen=True, eq=False)
class _Storage:
    source: str
    blob: memoryview
    dtype: torch.dtype
    numel: int


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
    """A nested file of `torch.save`, looked through before torch gets to read it: it must be one storage."""
    if type(blob) is not memoryview:
        raise TypeError("a storage must be bytes")
    if id(blob) not in file.storages:
        file.storages[id(blob)] = _look_through(file, blob)
    return file.storages[id(blob)]


def _look_through(file: _File, blob: memoryview) -> _Storage:
    keys_found = []

    def find(name: str) -> _Name:
        if name == "collections.OrderedDict":
            return _Name(name, lambda: {})
        if name not in STORAGE_DTYPES:
            raise _RefusedError(f"a tensor in it asks for {name[:MAX_NAME]!r}")
        return _Name(name, None)

    def find_persistent(pid: Any) -> _Storage:
        kind, storage_type, key, location, numel, view = pid
        known = kind == "storage" and type(storage_type) is _Name and view is None
        if not known or type(key) is not str or type(location) is not str or type(numel) is not int:
            raise ValueError("a tensor of unknown form")
        keys_found.append(key)
        return _Storage(file.source, blob, STORAGE_DTYPES[storage_type.name], numel)

    machine = _Machine(blob, file, find, find_persistent)
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
    if type(storage) is not _Storage or not (_is_shape(size) and _is_shape(stride) and _is_shape((offset,))):
        raise ValueError("a tensor of unknown form")
    numel = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    # Overlapping elements would make a large tensor of a small file.
    if numel > storage.numel or (numel > 0 and last >= storage.numel):
        raise ValueError("a tensor is larger than its storage")
    return StoredTensor(storage.source, storage.blob, storage.dtype, offset, size, stride)


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
    "numpy.dtype": _dtype,
    "numpy.ndarray": _array,
    "numpy.core.multiarray._reconstruct": _array,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy.core.numeric._frombuffer": _array_of,
}


# ---------------------------------------------------------------------------------------------------------
# Taking results apart


def module_tensors(module: PersistentObject, source: str) -> dict[str, StoredTensor]:
    """Parameters and buffers of a network's record, named as in its state dict.

    Raises:
        UserError: it is not the record of a network.
    """
    tensors: dict[str, StoredTensor] = {}
    visited = 0
    todo: list[tuple[str, Any, int]] = [("", module, 0)]
    with _refusals_name(source):
        while todo:
            prefix, record, depth = todo.pop()
            if type(record) is not PersistentObject:
                raise TypeError("a module that is none")
            parts = [record.state[key] for key in ("_parameters", "_buffers", "_modules")]
            visited += 1 + sum(len(part) for part in parts)
            if visited > MAX_NODES or depth > MAX_DEPTH:
                raise _RefusedError("its modules are nested beyond all measure")
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
            raise _RefusedError("its tensors share their values")
    return tensors


def plain(value: Any, source: str) -> Any:
    """Options as JSON knows them: tuples become lists, NumPy numbers and arrays plain numbers and lists.

    Raises:
        UserError: there is something else among them, or far too much.
    """
    nodes = 0

    def count(more: int) -> None:
        nonlocal nodes
        nodes += more
        if nodes > MAX_NODES:
            raise _RefusedError("its options are nested beyond all measure")

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
        raise TypeError(f"{type(value).__name__} among its options that is none of JSON's")

    with _refusals_name(source):
        return reduce(value, 0)


# ---------------------------------------------------------------------------------------------------------
# Writing


def save(path: str | os.PathLike, data: Any) -> None:
    """Write plain data, `PersistentObject`s and tensors so that the published tools can read them.

    The file names classes of theirs and holds one line of source per class, which imports it.

    Raises:
        OSError: it could not be written.
    """
    with atomic_write(path) as f:
        _Writer(f).dump(data)


class _Writer:
    """Writes values as the instructions that make them."""

    def __init__(self, file: IO[bytes]):
        self.write = file.write

    def dump(self, value: Any) -> None:
        self.write(pickle.PROTO + b"\x04")
        self.save(value)
        self.write(pickle.STOP)

    def save(self, value: Any) -> None:
        if value is None:
            self.write(pickle.NONE)
        elif isinstance(value, bool):
            self.write(pickle.NEWTRUE if value else pickle.NEWFALSE)
        elif isinstance(value, int):
            data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            self.write(pickle.LONG1 + struct.pack("<B", len(data)) + data)
        elif isinstance(value, float):
            self.write(pickle.BINFLOAT + struct.pack(">d", value))
        elif isinstance(value, str):
            data = value.encode("utf-8", "surrogatepass")
            self.write(pickle.BINUNICODE + struct.pack("<I", len(data)) + data)
        elif isinstance(value, (bytes, memoryview)):
            self.write(pickle.BINBYTES8 + struct.pack("<Q", len(value)))
            self.write(value)
        elif isinstance(value, tuple):
            self.save_items(pickle.MARK, value, pickle.TUPLE)
        elif isinstance(value, list):
            self.save_items(pickle.EMPTY_LIST + pickle.MARK, value, pickle.APPENDS)
        elif isinstance(value, set):
            self.save_items(pickle.EMPTY_SET + pickle.MARK, value, pickle.ADDITEMS)
        elif isinstance(value, dict):
            if type(value) is dict:
                self.write(pickle.EMPTY_DICT)
            elif isinstance(value, OrderedDict):
                self.call("collections.OrderedDict")
            else:
                self.call("dnnlib.util.EasyDict", code=pickle.NEWOBJ)
            self.save_items(pickle.MARK, itertools.chain.from_iterable(value.items()), pickle.SETITEMS)
        elif isinstance(value, PersistentObject):
            self.save_object(value)
        elif isinstance(value, LazyTensor):
            self.save_tensor(value)
        else:
            assert isinstance(value, np.ndarray), type(value)
            self.save_array(value)

    def save_items(self, start: bytes, items: Iterable[Any], end: bytes) -> None:
        self.write(start)
        for item in items:
            self.save(item)
        self.write(end)

    def call(self, name: str, *args: Any, code: bytes = pickle.REDUCE) -> None:
        self.name(name)
        self.save(args)
        self.write(code)

    def name(self, name: str) -> None:
        for part in name.rsplit(".", 1):
            self.save(part)
        self.write(pickle.STACK_GLOBAL)

    def save_object(self, obj: PersistentObject) -> None:
        if obj.class_name in CONTAINERS:
            self.call(f"torch.nn.modules.container.{obj.class_name}", code=pickle.NEWOBJ)
            self.save(obj.state)
            self.write(pickle.BUILD)
            return
        meta = dict(
            type="class",
            version=6,
            module_src=f"from {obj.module} import {obj.class_name}\n",
            class_name=obj.class_name,
            state=obj.state,
        )
        self.call("torch_utils.persistence._reconstruct_persistent_obj", meta)

    def save_array(self, array: np.ndarray) -> None:
        # The older name of NumPy's module, which all its versions know.
        self.name("numpy.core.multiarray._reconstruct")
        self.write(pickle.MARK)
        self.name("numpy.ndarray")
        self.save((0,))
        self.save(b"b")
        self.write(pickle.TUPLE + pickle.REDUCE + pickle.MARK)
        self.save(1)
        self.save(array.shape)
        self.call("numpy.dtype", array.dtype.str[1:], False, True)
        self.save((3, array.dtype.str[0], None, None, None, -1, -1, 0))
        self.write(pickle.BUILD)
        self.save(False)
        self.save(array.tobytes())
        self.write(pickle.TUPLE + pickle.BUILD)

    def save_tensor(self, lazy: LazyTensor) -> None:
        tensor = lazy.load().detach().cpu().contiguous().clone()
        storage = io.BytesIO()
        torch.save(tensor._typed_storage(), storage, _use_new_zipfile_serialization=False)
        if lazy.is_parameter:
            self.name("torch._utils._rebuild_parameter")
            self.write(pickle.MARK)
        self.name("torch._utils._rebuild_tensor_v2")
        self.write(pickle.MARK)
        self.call("torch.storage._load_from_bytes", storage.getbuffer())
        for arg in (0, tuple(tensor.shape), tensor.stride(), False, OrderedDict()):
            self.save(arg)
        self.write(pickle.TUPLE + pickle.REDUCE)
        if lazy.is_parameter:
            self.save(False)
            self.save(OrderedDict())
            self.write(pickle.TUPLE + pickle.REDUCE)
