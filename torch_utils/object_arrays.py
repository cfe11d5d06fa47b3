"""Arrays of objects in NumPy's files, as old code wrote pairs of arrays and numbers: read without executing anything.

NumPy keeps such arrays as pickles. Here, an unpickler that knows four names of NumPy's rebuilds what they hold; what
stands for these names are classes of this file, so nothing of NumPy is called by what the file says.
"""

import io
import math
import pickle
from typing import Any

import numpy as np

MAX_BYTES = 1 << 30  # of an array
KINDS = {f"{kind}{size}" for kind in "iuf" for size in (1, 2, 4, 8)} - {"f1"}


class _Type:
    """A data type by its name, such as 'f4' or 'O8'."""

    def __init__(self, kind: str, _align: bool = False, _copy: bool = False):
        self.kind, self.order = str(kind), "<"

    def __setstate__(self, state: tuple) -> None:
        self.order = ">" if state[1] == ">" else "<"

    def numbers(self, data: bytes) -> np.ndarray:
        if self.kind not in KINDS:
            raise pickle.UnpicklingError(f"an array of {self.kind[:20]!r}")
        return np.frombuffer(data, np.dtype(f"{self.order}{self.kind}"))


class _Array:
    """An array that is being rebuilt; `value` is it, or a list of what an array of objects holds."""

    value: Any = None

    def __setstate__(self, state: tuple) -> None:
        _version, shape, dtype, fortran, data = state
        if not (isinstance(shape, tuple) and all(isinstance(n, int) and n >= 0 for n in shape)):
            raise pickle.UnpicklingError("an array of no shape")
        if isinstance(data, list):
            self.value = data
            return
        numbers = dtype.numbers(data)
        if math.prod(shape) != len(numbers):
            raise pickle.UnpicklingError("an array of another size than its data")
        self.value = numbers.reshape(shape, order="F" if fortran else "C")


class _ArrayName:
    """Stands for the name `numpy.ndarray`."""


def _reconstruct(_kind: Any, _shape: Any, _code: Any) -> _Array:
    return _Array()


def _scalar(dtype: _Type, data: bytes) -> Any:
    return dtype.numbers(data)[0].item()


KNOWN = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("numpy", "ndarray"): _ArrayName,
    ("numpy", "dtype"): _Type,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in KNOWN:
            raise pickle.UnpicklingError(f"it asks for {module[:50]}.{name[:50]}; nothing in the file was run")
        return KNOWN[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to something outside of it")


def load_values(data: bytes | memoryview) -> list[Any]:
    """What a file of NumPy's holds: the values of an array of objects (arrays, numbers, texts), or one plain array.

    Raises:
        ValueError: it is damaged, holds something else, or asks for more than data.
    """
    f = io.BytesIO(data)
    version = np.lib.format.read_magic(f)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        shape, _, dtype = read_header(f)
    except Exception as err:  # NumPy parses it as Python text, and lets the parser's errors through
        raise ValueError(str(err) or type(err).__name__) from None
    if not dtype.hasobject:
        if math.prod(shape) * dtype.itemsize > MAX_BYTES:
            raise ValueError("an array that is too large")
        return [np.load(io.BytesIO(data), allow_pickle=False)]
    try:
        found = _Unpickler(f).load()
    except ValueError:
        raise
    except Exception as err:  # a damaged pickle can fail in any way
        raise ValueError(str(err) or type(err).__name__) from None
    if not (isinstance(found, _Array) and isinstance(found.value, list)):
        raise ValueError("not an array of objects")
    return [value.value if isinstance(value, _Array) else value for value in found.value]
