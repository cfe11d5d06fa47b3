"""Hostile and damaged pickles: one clear error each, and nothing in them is run."""

import io
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

from dnnlib.util import EasyDict, UserError
from torch_utils import safe_pickle
from torch_utils.safe_pickle import LazyTensor, PersistentObject
from training.metrics import load_stats
from training.snapshot import load_network
from training.snapshot.__main__ import main as snapshot_tool

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
    "ours": (pickle.dumps(Trap()), "asks for 'test_safe_pickle.spring'"),
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
    "storage that runs": (nested(saved(Trap())), "a tensor in it asks for 'test_safe_pickle.spring'"),
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
        assert message in str(err.value)
        assert "\n" not in str(err.value) and len(str(err.value)) < 500
    assert not Trap.sprung
    fails_with(run_cli(snapshot_tool, "inspect", path), "hostile.pkl", message)


def test_a_tensor_that_fits(tmp_path):
    (tmp_path / "x.pkl").write_bytes(nested(saved(storage())))
    assert torch.equal(safe_pickle.load(tmp_path / "x.pkl").load(), torch.zeros(2))


def repeated(start: bytes, part: bytes, count: int, end: bytes = b".") -> bytes:
    return pickle.PROTO + b"\x04" + start + part * count + end


EXHAUSTING = {
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
    start = time.monotonic()
    for read in (load_network, load_stats):
        with pytest.raises(UserError, match="hostile.pkl"):
            read(path)
    assert time.monotonic() - start < 60


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
        with pytest.raises(UserError, match="nested beyond all measure"):
            safe_pickle.plain(value, "x.pkl")


def test_cyclic_network():
    network = PersistentObject("ModuleDict", dict(_parameters={}, _buffers={}, _modules={}))
    network.state["_modules"].update(a=network, b=network)
    with pytest.raises(UserError, match="modules are nested beyond all measure"):
        safe_pickle.module_tensors(network, "x.pkl")


def hostile_network(tmp_path: Path, **kwargs) -> Path:
    state = dict(_init_args=(), _init_kwargs=kwargs, _parameters={}, _buffers={}, _modules={})
    safe_pickle.save(tmp_path / "net.pkl", dict(ema=PersistentObject("Precond", state, "somewhere")))
    return tmp_path / "net.pkl"


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(num_blocks=10**7),
        dict(channel_mult=[1] * 1000),
        dict(model_channels=10**12),
        dict(model_channels=-1),
        dict(model_channels=64.5),
        dict(sigma_data="0.5"),
        dict(label_dim=None),
        dict(img_resolution=1 << 40),
        dict(channels_per_head=0),
        dict(bogus=1),
    ],
)
def test_networks_that_would_take_forever(kwargs, tmp_path):
    defaults = dict(img_resolution=8, img_channels=1, label_dim=0)
    with pytest.raises(UserError, match="do not fit the architecture"):
        load_network(hostile_network(tmp_path, **{**defaults, **kwargs}))


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
            start = time.monotonic()
            for read in (load_network, load_stats):
                message = ""
                try:
                    read(path)
                    outcomes["read"] += 1
                except UserError as err:
                    message = str(err)
                    outcomes["refused"] += 1
                assert "\n" not in message and len(message) < 500
            slowest = max(slowest, time.monotonic() - start)
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
