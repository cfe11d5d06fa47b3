"""A writer of pickles that the published tools read: values become the instructions that make them."""

import io
import itertools
import os
import pickle
import struct
from collections import OrderedDict
from collections.abc import Iterable
from typing import IO, Any

import numpy as np
import torch

from dnnlib.files import atomic_write
from torch_utils.pickle_records import CONTAINERS, LazyTensor, PersistentObject


def save(path: str | os.PathLike, data: Any) -> None:
    """Write plain data, `PersistentObject`s, NumPy arrays and `LazyTensor`s, complete or not at all.

    The file names classes of the published tools and holds one line of source per class, which imports it.

    Raises:
        OSError: it could not be written.
    """
    with atomic_write(path) as f:
        _Writer(f).dump(data)


class _Writer:
    """Writes values as the instructions that make them. Tensors are made and written one at a time."""

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
