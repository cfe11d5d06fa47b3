"""Snapshots and training states on disk: what goes in comes out, and damage is named."""

import json
import struct
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, tiny_network

from dnnlib.errors import UserError
from dnnlib.files import atomic_write
from torch_utils import checkpoint
from training.encoders import RawLatentEncoder, StandardRGBEncoder
from training.snapshot import load_network, read_metadata, save_network


def edit_metadata(path, **changes):
    """Change fields of a snapshot's JSON block in the file's header."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    metadata = {**json.loads(header["__metadata__"]["openedm2"]), **changes}
    header["__metadata__"]["openedm2"] = json.dumps(metadata)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def test_round_trip(tmp_path):
    net = tiny_network()
    save_network(tmp_path / "a.safetensors", net, RawLatentEncoder([1.0], [2.0]), {"nimg": 5, "ema_std": 0.1})
    snapshot = load_network(tmp_path / "a.safetensors")
    for name, parameter in net.named_parameters():
        assert torch.equal(snapshot.net.get_parameter(name), parameter.half().float())
    for name, buffer in net.named_buffers():
        assert torch.equal(snapshot.net.get_buffer(name), buffer)
    assert isinstance(snapshot.encoder, RawLatentEncoder)
    assert (snapshot.encoder.raw_mean, snapshot.encoder.raw_std) == ([1.0], [2.0])
    assert snapshot.metadata["nimg"] == 5
    assert snapshot.metadata["ema_std"] == 0.1
    assert snapshot.metadata["architecture"]["name"] == "edm2.Precond"
    assert snapshot.metadata["code_version"].startswith("0.")
    assert not snapshot.net.training
    assert not any(p.requires_grad for p in snapshot.net.parameters())


def test_float32_is_exact(tmp_path):
    net = tiny_network()
    save_network(tmp_path / "a.safetensors", net, StandardRGBEncoder(), {}, dtype=torch.float32)
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(load_network(tmp_path / "a.safetensors").net(x, torch.tensor(1.0)), net(x, torch.tensor(1.0)))


def test_missing_or_of_another_kind(tmp_path, snapshot_file):
    with pytest.raises(UserError, match="no such file"):
        load_network(tmp_path / "nowhere.safetensors")
    other = tmp_path / "net.pt"
    other.write_bytes(b"x")
    with pytest.raises(UserError, match="snapshots are .safetensors or .pkl files"):
        load_network(other)
    with pytest.raises(UserError, match="holds no network 'net'"):
        load_network(snapshot_file, which="net")
    import safetensors.torch

    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="not a snapshot of this project"):
        load_network(tmp_path / "other.safetensors")


@pytest.mark.parametrize("keep", [0, 4, 100, 5000, -1])
def test_truncated(snapshot_file, keep):
    snapshot_file.write_bytes(snapshot_file.read_bytes()[:keep])
    with pytest.raises(UserError, match="damaged or truncated"):
        load_network(snapshot_file)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(format_version=99), "format version 99"),
        (dict(architecture={"name": "os.system", "kwargs": {}}), "unknown architecture 'os.system'"),
        (dict(encoder={"name": "eval", "kwargs": {}}), "unknown encoder 'eval'"),
        (dict(architecture=3), "architecture is not of type dict"),
        (dict(nimg="many"), "nimg is not of type int"),
        (dict(config=5), "config is not of type dict"),
        (dict(dataset_kwargs={"a": 10**400}), "damaged"),
        (dict(ema_std=float("nan")), "damaged"),
        (dict(source="\ud800"), "damaged"),
        (dict(architecture={"name": "edm2.Precond"}), "incomplete"),
        (dict(architecture={"name": "edm2.Precond", "kwargs": {"bogus": 1}}), "do not fit"),
        (dict(encoder={"name": "StandardRGBEncoder", "kwargs": {"bogus": 1}}), "do not fit"),
        (
            dict(
                architecture={
                    "name": "edm2.Precond",
                    "kwargs": {"img_resolution": 8, "img_channels": 1, "label_dim": 0, "channel_mult": []},
                }
            ),
            "do not fit",
        ),
    ],
)
def test_unknown_content(snapshot_file, changes, message):
    edit_metadata(snapshot_file, **changes)
    with pytest.raises(UserError, match=message):
        load_network(snapshot_file)


def test_weights_of_another_size(snapshot_file):
    kwargs = read_metadata(snapshot_file)["architecture"]["kwargs"]
    edit_metadata(snapshot_file, architecture={"name": "edm2.Precond", "kwargs": {**kwargs, "model_channels": 16}})
    with pytest.raises(UserError, match="do not fit the architecture") as err:
        load_network(snapshot_file)
    assert "\n" not in str(err.value)


# ---------------------------------------------------------------------------------------------------------
# Whole files only


def test_failed_write_leaves_nothing(tmp_path):
    target = tmp_path / "file"
    target.write_bytes(b"old")

    def write_half():
        with atomic_write(target) as f:
            f.write(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        write_half()
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


FULL_DISK = """
import resource, sys, torch
from pathlib import Path
sys.path.insert(0, {tests!r})
from conftest import tiny_network
from torch_utils.checkpoint import save_state
from training.encoders import StandardRGBEncoder
from training.snapshot import save_network
resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))
target = Path({target!r})
try:
    if target.suffix == ".pt":
        save_state(target, {{"x": torch.zeros(100000)}})
    else:
        save_network(target, tiny_network(), StandardRGBEncoder(), {{}})
except OSError as err:
    assert err.filename == str(target), err.filename
    print("refused")
"""


@pytest.mark.parametrize("name", ["state.pt", "net.safetensors"])
def test_no_space_left(tmp_path, name):
    # A limit on the size of files stands for a full disk.
    code = FULL_DISK.format(tests=str(ROOT / "tests"), target=str(tmp_path / name))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "refused\n", done.stderr
    assert list(tmp_path.iterdir()) == []


PATTERN = r"state-(\d+)\.pt"


def test_newest_state_that_loads(tmp_path):
    messages, restored = [], []

    def newest() -> bool:
        return checkpoint.restore_newest_state(
            tmp_path, PATTERN, lambda state: restored.append(state["i"]), messages.append
        )

    assert not newest()
    for i in (1, 2, 3, 10):
        checkpoint.save_state(tmp_path / f"state-{i}.pt", {"i": i, "x": torch.tensor([float(i)])})
    (tmp_path / "state-11.pt.tmp").write_bytes(b"")
    assert newest()
    (tmp_path / "state-10.pt").write_bytes((tmp_path / "state-10.pt").read_bytes()[:500])
    (tmp_path / "state-3.pt").write_bytes(b"")
    checkpoint.save_state(tmp_path / "state-2.pt", {"bogus": 1})  # loads, but cannot be restored
    assert newest()
    assert restored == [10, 1]
    assert [next(i for i in (10, 3, 2) if f"state-{i}.pt is damaged" in m) for m in messages] == [10, 3, 2]
    (tmp_path / "state-1.pt").unlink()
    with pytest.raises(UserError, match="no training state can be read"):
        newest()


class Hostile:
    def __reduce__(self):
        return (print, ("executed",))


def test_states_run_no_code(tmp_path, capsys):
    torch.save({"x": Hostile()}, tmp_path / "state-1.pt")
    with pytest.raises(UserError, match="no training state can be read"):
        checkpoint.restore_newest_state(tmp_path, PATTERN, lambda state: None, print)
    output = capsys.readouterr().out
    assert "is damaged and skipped" in output
    assert "executed\n" not in output


def test_spoiled_weights_are_refused(tmp_path):
    net = tiny_network()
    net.get_parameter("unet.out_conv.weight")[0, 0, 0, 0] = float("nan")
    save_network(tmp_path / "a.safetensors", net, StandardRGBEncoder(), {})
    with pytest.raises(UserError, match="unet.out_conv.weight holds NaN"):
        load_network(tmp_path / "a.safetensors")
