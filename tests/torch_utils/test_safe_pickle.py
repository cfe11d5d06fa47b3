"""Hostile and damaged pickles: one clear error each, and nothing in them is run."""

import io
import math
import os
import pickle
import pickletools
import random
import struct
import time
import warnings
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN, fails_with, run_cli

from dnnlib.errors import UserError
from dnnlib.util import EasyDict
from snapshot_tool import main as snapshot_tool
from torch_utils import safe_pickle
from torch_utils.safe_pickle import LazyTensor, PersistentObject
from training.metrics.files import load_stats
from training.snapshot import load_network

OFFICIAL = sorted((GOLDEN / "official").glob("*.pkl"))


class Trap:
    """Unpickling this with Python's own reader would show."""

    sprung = False

    def __init__(self, function=None, args=()):
        self.function, self.args = function, args

    def __reduce__(self):
        return (self.function or spring), self.args


def spring(*args):
    Trap.sprung = True
    return {}


# ---------------------------------------------------------------------------------------------------------
# What is read


def round_trip(value, tmp_path):
    safe_pickle.save(tmp_path / "x.pkl", value)
    return safe_pickle.load(tmp_path / "x.pkl")


PLAIN = {
    "a": [1, -2, 0, 2**40, -(2**70), True, False, None, 1.5, "text \u00e4 \ud800"],
    "b": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
    "c": {},
    "d": set(),
    3: {"x", 5},
}


def test_plain_values(tmp_path):
    assert round_trip(PLAIN, tmp_path) == PLAIN


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_files_of_pythons_own_pickle(protocol, tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    data = EasyDict(
        plain=PLAIN,
        ordered=OrderedDict(a=1),
        tensor=torch.arange(6.0).reshape(2, 3).t(),
        array=array,
        fortran=np.asfortranarray(array),
        swapped=array.astype(">f8"),
        number=np.float64(3),
    )
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(data, protocol))
    result = safe_pickle.load(tmp_path / "x.pkl")
    assert result["plain"] == PLAIN
    assert result["ordered"] == {"a": 1}
    assert torch.equal(result["tensor"].load(), data["tensor"])
    for key in ("array", "fortran", "swapped"):
        np.testing.assert_array_equal(result[key].load(), array)
    assert result["number"].load() == 3


def test_python_reads_what_we_write(tmp_path):
    tensors = dict(
        weight=LazyTensor(lambda: torch.arange(3.0).half(), True), buffer=LazyTensor(lambda: torch.ones(2), False)
    )
    safe_pickle.save(tmp_path / "x.pkl", EasyDict(PLAIN, tensors=tensors, array=np.arange(3.0)))
    with open(tmp_path / "x.pkl", "rb") as f:
        data = pickle.load(f)
    assert type(data) is EasyDict
    assert {key: data[key] for key in PLAIN} == PLAIN
    weight, buffer = data.tensors["weight"], data.tensors["buffer"]
    assert isinstance(weight, torch.nn.Parameter) and not isinstance(buffer, torch.nn.Parameter)
    assert torch.equal(weight, torch.arange(3.0).half()) and torch.equal(buffer, torch.ones(2))
    np.testing.assert_array_equal(data.array, np.arange(3.0))


def test_source_text_stays_unread():
    # Each of these files carries text that raises when it is executed.
    for path in OFFICIAL:
        assert b"must never be executed" in path.read_bytes()
        load_network(path)


# ---------------------------------------------------------------------------------------------------------
# What is refused


def nested(storage_file: bytes, numel: int = 2) -> bytes:
    """A pickle whose one tensor has the given storage."""
    code = pickle.PROTO + b"\x04"
    code += pickle.GLOBAL + b"torch._utils\n_rebuild_tensor_v2\n" + pickle.MARK
    code += pickle.GLOBAL + b"torch.storage\n_load_from_bytes\n"
    code += pickle.BINBYTES + struct.pack("<I", len(storage_file)) + storage_file + pickle.TUPLE1 + pickle.REDUCE
    code += pickle.BININT1 + b"\0" + pickle.BININT1 + bytes([numel]) + pickle.TUPLE1
    code += pickle.BININT1 + b"\1" + pickle.TUPLE1 + pickle.NEWFALSE + pickle.EMPTY_DICT
    return code + pickle.TUPLE + pickle.REDUCE + pickle.STOP


def saved(value, zipped: bool = False) -> bytes:
    f = io.BytesIO()
    torch.save(value, f, _use_new_zipfile_serialization=zipped)
    return f.getvalue()


def storage(numel: int = 2) -> torch.storage.TypedStorage:
    return torch.zeros(numel)._typed_storage()


def name(module: str, attribute: str) -> bytes:
    return pickle.PROTO + b"\x04" + pickle.GLOBAL + f"{module}\n{attribute}\n".encode()


CALL = pickle.EMPTY_TUPLE + pickle.REDUCE + pickle.STOP
HOSTILE = {
    "system": (pickle.dumps(Trap(os.system, ("true",))), "asks for 'posix.system'"),
    "eval": (pickle.dumps(Trap(eval, ("spring()",))), "asks for 'builtins.eval'"),
    "ours": (pickle.dumps(Trap()), f"asks for '{__name__}.spring'"),
    "attribute of an allowed name": (name("dnnlib.util", "EasyDict.__init__.__globals__") + CALL, "asks for"),
    "allowed name in another module": (name("os", "EasyDict") + CALL, "asks for 'os.EasyDict'"),
    "instruction that builds classes": (pickle.PROTO + b"\x02(ios\nsystem\n.", "instruction"),
    "registered extension": (pickle.PROTO + b"\x02" + pickle.EXT1 + b"\x01.", "instruction"),
    "object outside the file": (pickle.PROTO + b"\x02" + pickle.NONE + pickle.BINPERSID + b".", "outside the file"),
    "not a pickle": (b"<!DOCTYPE html>", "not a pickle"),
    "text protocol": (pickle.dumps({"a": 1}, 0), "not a pickle"),
    "nothing": (b"", "empty"),
    "two bytes": (b"\x80\x04", "truncated"),
    "huge length": (pickle.PROTO + b"\x04" + pickle.BINBYTES8 + b"\xff" * 8 + b".", "truncated"),
    "long name": (pickle.PROTO + b"\x04" + pickle.GLOBAL + b"a" * 1000 + b"\nb\n.", ""),
    "nothing on the stack": (pickle.PROTO + b"\x04.", "damaged"),
    "two values on the stack": (pickle.PROTO + b"\x04NN.", "damaged"),
    "unknown memo": (pickle.PROTO + b"\x04" + pickle.LONG_BINGET + b"\xff\xff\xff\x7f.", "damaged"),
    "list as a key": (pickle.PROTO + b"\x04" + pickle.EMPTY_DICT + pickle.EMPTY_LIST + b"Ns.", "a list as a key"),
    "tuple as a key": (pickle.PROTO + b"\x04" + pickle.EMPTY_DICT + pickle.EMPTY_TUPLE + b"Ns.", "a tuple as a key"),
    "call of data": (pickle.PROTO + b"\x04" + pickle.EMPTY_DICT + CALL, "no function"),
    "attributes of data": (pickle.PROTO + b"\x04" + pickle.EMPTY_LIST + pickle.EMPTY_DICT + b"b.", "damaged"),
    "object array": (pickle.dumps(np.array([{}])), "array that is not of numbers"),
    "text array": (pickle.dumps(np.array(["a"])), "array that is not of numbers"),
    "storage that runs": (nested(saved(Trap())), f"a tensor in it asks for '{__name__}.spring'"),
    "storage that is no storage": (nested(saved({"a": 1})), "unknown form"),
    "storage that is zipped": (nested(saved(storage(), zipped=True)), "instruction"),
    "storage that is truncated": (nested(saved(storage())[:-1]), "a tensor is truncated"),
    "tensor beyond its storage": (nested(saved(storage()), numel=3), "larger than its storage"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files(case, tmp_path):
    data, message = HOSTILE[case]
    path = tmp_path / "hostile.pkl"
    path.write_bytes(data)
    for read in (load_network, safe_pickle.load, load_stats):
        with pytest.raises(UserError, match="hostile.pkl") as err:
            read(path)
        # What is no pickle may be another format of statistics, and load_stats names those that it reads.
        expected = "holds no statistics" if (read, message) == (load_stats, "not a pickle") else message
        assert expected in str(err.value)
        assert "\n" not in str(err.value) and len(str(err.value)) < 500
    assert not Trap.sprung
    fails_with(run_cli(snapshot_tool, "inspect", path), "hostile.pkl", message)


def test_a_tensor_that_fits(tmp_path):
    (tmp_path / "x.pkl").write_bytes(nested(saved(storage())))
    assert torch.equal(safe_pickle.load(tmp_path / "x.pkl").load(), torch.zeros(2))


def repeated(start: bytes, part: bytes, count: int, end: bytes = b".") -> bytes:
    return pickle.PROTO + b"\x04" + start + part * count + end


def text(value: str) -> bytes:
    data = value.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(data)) + data


def code_of(module: str, attribute: str) -> bytes:
    return text(module) + text(attribute) + pickle.STACK_GLOBAL


PUT0, PUT1, GET0, GET1 = pickle.BINPUT + b"\0", pickle.BINPUT + b"\1", pickle.BINGET + b"\0", pickle.BINGET + b"\1"
START = pickle.PROTO + b"\x04"
DEEP_TUPLE = pickle.EMPTY_TUPLE + pickle.TUPLE1 * 300_000
WIDE_TUPLE = pickle.EMPTY_TUPLE + pickle.TUPLE1 + (PUT0 + GET0 + pickle.TUPLE2) * 60


def dict_of(key: bytes) -> bytes:
    """A nested storage file that makes an OrderedDict of one pair."""
    pairs = pickle.EMPTY_LIST + pickle.MARK + key + pickle.NONE + pickle.TUPLE2 + pickle.APPENDS
    code = pickle.PROTO + b"\x02" + code_of("collections", "OrderedDict") + pairs + pickle.TUPLE1 + pickle.REDUCE + b"."
    return (
        START
        + code_of("torch.storage", "_load_from_bytes")
        + pickle.BINBYTES
        + struct.pack("<I", len(code))
        + code
        + pickle.TUPLE1
        + pickle.REDUCE
        + b"."
    )


def many_calls(function: bytes, argument: bytes, count: int) -> bytes:
    call = GET1 + GET0 + pickle.REDUCE + pickle.POP
    return START + argument + PUT0 + pickle.POP + function + PUT1 + pickle.POP + call * count + pickle.NONE + b"."


def colliding_keys(count: int) -> bytes:
    """Pairs for a dict whose keys are integers that all have the same hash."""
    keys = (((1 << 61) - 1) * (i + (1 << 20)) for i in range(count))
    return b"".join(pickle.LONG1 + b"\x0c" + key.to_bytes(12, "little") + pickle.NONE for key in keys)


EXHAUSTING = {
    "deep tuple as a key": START + pickle.EMPTY_DICT + DEEP_TUPLE + pickle.NONE + pickle.SETITEM + b".",
    "wide tuple as a key": START + pickle.EMPTY_DICT + WIDE_TUPLE + pickle.NONE + pickle.SETITEM + b".",
    "wide tuple in a set": START + pickle.EMPTY_SET + pickle.MARK + WIDE_TUPLE + pickle.ADDITEMS + b".",
    "keys that collide": START + pickle.EMPTY_DICT + pickle.MARK + colliding_keys(60_000) + pickle.SETITEMS + b".",
    "memo of any size": START + pickle.NONE + pickle.LONG_BINPUT + b"\xff\xff\xff\x7f.",
    "frame of any size": START + pickle.FRAME + b"\xff\xff\xff\xff\xff\0\0\0" + pickle.NONE + b".",
    "text of any size": START + pickle.BINUNICODE8 + b"\xff\xff\xff\xff\xff\0\0\0.",
    "only marks": repeated(b"", pickle.MARK, 10**6),
    "only tuples": repeated(b"", pickle.MARK + pickle.NONE * 1000 + pickle.TUPLE, 5000),
    "hash of a deep tuple": dict_of(DEEP_TUPLE),
    "hash of a wide tuple": dict_of(WIDE_TUPLE),
    "type of a deep tuple": START + code_of("numpy", "dtype") + DEEP_TUPLE + pickle.TUPLE1 + pickle.REDUCE + b".",
    "sets of a long text": many_calls(code_of("builtins", "set"), text("a" * 500_000) + pickle.TUPLE1, 60_000),
    "long text unpacked": START + text("a" * 300_000) + PUT0 + pickle.POP + code_of("numpy", "dtype") + text("f8") + pickle.TUPLE1
    + pickle.REDUCE + (GET0 + pickle.BUILD) * 100_000 + b".",
    "deep lists": repeated(b"", pickle.EMPTY_LIST, 10**6, pickle.APPEND * (10**6 - 1) + b"."),
    "doubled tuples": repeated(pickle.EMPTY_TUPLE, pickle.MEMOIZE + pickle.BINGET + b"\0" + pickle.TUPLE2, 100),
    "endless memo": repeated(pickle.NONE, pickle.MEMOIZE, 5 * 10**6),
    "cyclic list": repeated(b"", pickle.EMPTY_LIST + pickle.MEMOIZE + pickle.BINGET + b"\0" + pickle.APPEND, 1),
    "one storage many times": name("torch.storage", "_load_from_bytes") + pickle.MEMOIZE
    + pickle.BINBYTES + struct.pack("<I", 100_007) + b"\x80\x02" + b"NN0" * 33_335 + pickle.MEMOIZE
    + (pickle.POP + pickle.BINGET + b"\0" + pickle.BINGET + b"\1" + pickle.TUPLE1 + pickle.REDUCE) * 1000 + b".",
}  # fmt: skip


@pytest.mark.parametrize("case", EXHAUSTING)
def test_files_that_would_take_forever(case, tmp_path):
    path = tmp_path / "hostile.pkl"
    path.write_bytes(EXHAUSTING[case])
    start = time.process_time()
    for read in (load_network, load_stats):
        with pytest.raises(UserError, match="hostile.pkl"):
            read(path)
    assert time.process_time() - start < 60


@pytest.mark.parametrize(
    "shape", [(60_000_000, 0), (2**40, 0), (4_000_000, 1, 1, 1, 1, 1, 1, 1), (0, 2**47, 2**47), (200_000,)]
)
def test_arrays_as_options(shape):
    data = b"x" * math.prod(shape)
    with pytest.raises(UserError, match="too many or too deeply nested"):
        safe_pickle.plain({"a": safe_pickle.StoredArray(data, "|u1", shape)}, "x.pkl")


@pytest.mark.parametrize("value", [10**400, float("nan"), float("inf"), b"x", "\ud800", {"a": {1}}])
def test_no_options(value):
    with pytest.raises(UserError, match="x.pkl: damaged .* among its options|x.pkl: damaged .*surrogates"):
        safe_pickle.plain({"a": [value]}, "x.pkl")


def test_text_many_times():
    with pytest.raises(UserError, match="too many or too deeply nested"):
        safe_pickle.plain(["a" * 500_000] * 60_000, "x.pkl")


def test_shared_parts_of_networks():
    def chain(depth: int, **state) -> PersistentObject:
        network = PersistentObject("M", dict(dict(_parameters={}, _buffers={}, _modules={}), **state))
        for _ in range(depth):
            network = PersistentObject("M", dict(_parameters={}, _buffers={}, _modules=dict(a=network, b=network)))
        return network

    for network in (
        chain(16, _parameters=dict.fromkeys(map(str, range(40_000)))),
        chain(0, _modules={"a" * 200_000: chain(0)}),
        chain(0, _modules={1: chain(0)}),
    ):
        with pytest.raises(UserError, match="x.pkl: "):
            safe_pickle.module_tensors(network, "x.pkl")
    tensor = safe_pickle.loads(nested(saved(storage())))
    with pytest.raises(UserError, match="its tensors share their values"):
        safe_pickle.module_tensors(chain(0, _parameters={str(i): tensor for i in range(1000)}), "x.pkl")


def test_options_nested_beyond_measure():
    deep: list = []
    for _ in range(1000):
        deep = [deep]
    wide: list = [0] * 10
    for _ in range(10):
        wide = [wide] * 10
    cyclic: dict = {}
    cyclic["a"] = cyclic
    for value in (deep, wide, cyclic):
        with pytest.raises(UserError, match="too many or too deeply nested"):
            safe_pickle.plain(value, "x.pkl")


def test_cyclic_network():
    network = PersistentObject("ModuleDict", dict(_parameters={}, _buffers={}, _modules={}))
    network.state["_modules"].update(a=network, b=network)
    with pytest.raises(UserError, match="modules are too many or too deeply nested"):
        safe_pickle.module_tensors(network, "x.pkl")


# ---------------------------------------------------------------------------------------------------------
# Fuzzing


def mutations(rng: random.Random, count: int):
    """Damaged, recombined and made-up pickles."""
    files = [path.read_bytes() for path in OFFICIAL]
    files.append(pickle.dumps(EasyDict(fid=dict(mu=np.zeros(3), sigma=np.eye(3)), num_images=3), protocol=4))
    files.sort(key=len)
    positions = [[pos for _, _, pos in pickletools.genops(data) if pos is not None] for data in files]
    opcodes = [ord(op.code) for op in pickletools.opcodes]
    for i in range(count):
        # Small files more often: a change in a large one mostly hits the middle of a tensor.
        which = min(rng.randrange(len(files)), rng.randrange(len(files)))
        data, starts = bytearray(files[which]), positions[which]
        kind = i % 6
        if kind == 0:  # anywhere
            for _ in range(rng.choice([1, 2, 8, 64])):
                data[rng.randrange(len(data))] = rng.randrange(256)
        elif kind == 1:  # one instruction for another
            for _ in range(rng.choice([1, 1, 4])):
                data[rng.choice(starts)] = rng.choice(opcodes)
        elif kind == 2:  # cut off
            del data[rng.randrange(len(data)) :]
        elif kind == 3:  # instructions taken out or done twice
            a, b = sorted(rng.choice(starts) for _ in range(2))
            b = min(b, a + 200)
            data = data[:a] + data[a:b] * rng.choice([0, 2]) + data[b:]
        elif kind == 4:  # a part of another file
            other = files[rng.randrange(len(files))]
            a, b = rng.choice(starts), rng.randrange(len(other))
            data = data[:a] + other[b : b + rng.randrange(300)] + data[a:]
        else:  # made up
            codes = bytes(rng.choice([*opcodes, rng.randrange(256)]) for _ in range(rng.randrange(1, 200)))
            data = bytearray(pickle.PROTO + b"\x04" + codes + pickle.STOP)
        yield bytes(data)


def fuzz(tmp_path: Path, count: int, seed: int) -> dict[str, int]:
    path = tmp_path / "fuzz.pkl"
    outcomes = {"refused": 0, "read": 0}
    slowest = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for data in mutations(random.Random(seed), count):
            path.write_bytes(data)
            start = time.process_time()
            for read in (load_network, load_stats):
                message = ""
                try:
                    read(path)
                    outcomes["read"] += 1
                except UserError as err:
                    message = str(err)
                    outcomes["refused"] += 1
                assert "\n" not in message and len(message) < 500
            slowest = max(slowest, time.process_time() - start)
    assert not Trap.sprung
    assert slowest < 60
    return {**outcomes, "slowest_ms": round(slowest * 1000)}


def test_fuzz(tmp_path):
    outcomes = fuzz(tmp_path, 300, seed=1)
    assert outcomes["refused"] > 300


@pytest.mark.slow
def test_fuzz_at_length(tmp_path, record_property):
    outcomes = fuzz(tmp_path, 20_000, seed=2)
    record_property("outcomes", outcomes)
    print(outcomes)
    assert outcomes["refused"] > 20_000
