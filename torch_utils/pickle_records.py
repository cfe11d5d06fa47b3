"""What a pickle of the published layout is reduced to: records of objects, and tensors and arrays still in the file.

Besides these, the contents of a pickle are dict, list, tuple, set, str, int, float, bool, None and bytes.
"""

import io
import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch._utils import _rebuild_tensor_v2

from dnnlib.errors import DamagedFileError, one_line

CONTAINERS = ("ModuleDict", "ModuleList", "Sequential")  # of torch.nn
NUMBER_KINDS = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")  # NumPy's, and their bytes
MAX_DIMS = 8  # of tensors and arrays


class RefusedError(Exception):
    """The file asks for something that the layout does not need."""


class Record:
    """A value that takes its attributes from the file (instruction BUILD)."""

    def build(self, state: Any) -> None:
        """Take over the attributes.

        Raises:
            RefusedError, TypeError, ValueError: they are not as in the layout.
        """
        raise NotImplementedError


@dataclass(eq=False)
class PersistentObject(Record):
    """Record of a library object, such as a network: the name of its class, and its attributes.

    `module` is where writing says the class is; reading leaves it empty. torch's own containers of modules, such
    as `ModuleDict`, are records as well.
    """

    class_name: str
    state: dict[str, Any] = field(default_factory=dict)
    module: str = ""

    def build(self, state: Any) -> None:
        if type(state) is not dict or self.state:
            raise TypeError("attributes that are none")
        self.state = state

    @property
    def init_args(self) -> tuple:
        """Positional arguments that the object was made with."""
        args = self.state.get("_init_args", ())
        return args if isinstance(args, tuple) else ()

    @property
    def init_kwargs(self) -> dict:
        """Keyword arguments that the object was made with."""
        kwargs = self.state.get("_init_kwargs", {})
        return kwargs if isinstance(kwargs, dict) else {}


@dataclass(eq=False)
class ArrayType(Record):
    """A NumPy type of numbers, such as 'f8'."""

    kind: str
    byte_order: str = "|"

    def __post_init__(self) -> None:
        if type(self.kind) is not str or self.kind not in NUMBER_KINDS:
            raise RefusedError("it holds an array that is not of numbers")

    def build(self, state: Any) -> None:
        if type(state) is not tuple or state[1:2] not in [("<",), (">",), ("|",)]:
            raise TypeError("a type of arrays of unknown form")
        (self.byte_order,) = state[1:2]


@dataclass(eq=False)
class StoredArray(Record):
    """A NumPy array, or a NumPy number (of shape ()), that is still in the file."""

    data: memoryview | bytes = b""
    dtype: str = "|u1"
    shape: tuple[int, ...] = (0,)
    order: str = "C"

    def build(self, state: Any) -> None:
        if type(state) is not tuple:
            raise TypeError("an array of unknown form")
        _version, shape, dtype, fortran, data = state
        self.fill(data, dtype, shape, "F" if fortran else "C")

    def fill(self, data: memoryview, dtype: ArrayType, shape: tuple[int, ...], order: str) -> "StoredArray":
        """The array itself, with these contents.

        Raises:
            RefusedError, ValueError: they are not those of an array of numbers.
        """
        if type(dtype) is not ArrayType or type(data) is not memoryview or order not in ("C", "F"):
            raise RefusedError("it holds an array that is not of numbers")
        if not is_shape(shape) or math.prod(shape) * int(dtype.kind[1]) != len(data):
            raise ValueError("an array whose size does not fit its shape")
        self.data, self.dtype, self.shape, self.order = data, dtype.byte_order + dtype.kind, shape, order
        return self

    def load(self) -> np.ndarray:
        """The array, of `dtype` and `shape`; it is read-only and shares the file's memory."""
        return np.ndarray(self.shape, self.dtype, self.data, order=self.order)  # type: ignore[call-overload]


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor that is still in the file."""

    source: str
    storage: memoryview  # a file of its own as `torch.save` writes it, holding one storage
    values: memoryview  # those of the storage, which are its end
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def elements(self) -> memoryview | None:
        """The bytes of the tensor's elements in the file; None = they are not in one piece, or not in their order."""
        steps = contiguous_strides(self.size)
        if any(n != 1 and a != b for n, a, b in zip(self.size, self.stride, steps, strict=True)):
            return None
        start = self.offset * self.dtype.itemsize
        return self.values[start : start + math.prod(self.size) * self.dtype.itemsize]

    def load(self) -> torch.Tensor:
        """The tensor, of `dtype` and `size`, on the CPU.

        Raises:
            UserError: the file is damaged here.
        """
        try:
            storage = torch.load(io.BytesIO(self.storage), map_location="cpu", weights_only=True)
            return _rebuild_tensor_v2(storage, self.offset, self.size, self.stride, False, OrderedDict())
        except Exception as err:  # torch has many ways to say that a file is damaged
            reason = one_line(err)
            raise DamagedFileError(f"{self.source}: a tensor cannot be read ({reason}): copy the file again") from None


@dataclass(frozen=True, eq=False)
class LazyTensor:
    """For writing: a tensor that is made when its turn comes."""

    load: Callable[[], torch.Tensor]
    is_parameter: bool


def contiguous_strides(size: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a tensor whose elements lie in one piece, in their order."""
    return tuple(math.prod(size[i + 1 :]) for i in range(len(size)))


def is_shape(size: Any) -> bool:
    """Whether a value from a file can be the shape of a tensor or array."""
    return type(size) is tuple and len(size) <= MAX_DIMS and all(type(n) is int and 0 <= n < 2**48 for n in size)
