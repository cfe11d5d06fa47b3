"""Native snapshots: what goes in comes out, and damage is named."""

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import change_tensor, tiny_network

from dnnlib.errors import UserError
from training.encoders import RawLatentEncoder, StandardRGBEncoder
from training.snapshot import load_network, save_network
from training.snapshot.checksums import word_sum


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


@pytest.mark.parametrize("keep", [0, 4, 100, 5000, -1])
def test_truncated(snapshot_file, keep):
    snapshot_file.write_bytes(snapshot_file.read_bytes()[:keep])
    with pytest.raises(UserError, match="damaged or truncated"):
        load_network(snapshot_file)


@pytest.mark.parametrize("suffix", [".safetensors", ".pkl"])
def test_spoiled_weights_are_neither_written_nor_read(suffix, tmp_path, snapshot_file):
    """NaN, and what is infinite only in the type that it would be stored in."""
    name = "unet.out_conv.weight"
    for value, dtype in ((float("nan"), torch.float32), (1e5, torch.float16)):
        net = tiny_network()
        net.get_parameter(name)[0, 0, 0, 0] = value
        with pytest.raises(UserError, match=f"a{suffix}: not written, {name} would hold NaN or infinity as float"):
            save_network(tmp_path / f"a{suffix}", net, StandardRGBEncoder(), {}, dtype=dtype)
    assert list(tmp_path.iterdir()) == [snapshot_file]
    save_network(tmp_path / f"a{suffix}", net, StandardRGBEncoder(), {}, dtype=torch.float32)
    assert load_network(tmp_path / f"a{suffix}").net.get_parameter(name)[0, 0, 0, 0] == 1e5
    change_tensor(snapshot_file, name, lambda weight: weight.fill_(float("nan")))
    with pytest.raises(UserError, match=f"{name} holds NaN"):
        load_network(snapshot_file)


def test_encoders_that_no_reader_takes_are_not_written(tmp_path):
    with pytest.raises(UserError, match=r"a.safetensors: .*raw_std"):
        save_network(tmp_path / "a.safetensors", tiny_network(), RawLatentEncoder([1.0], [1e20]), {})
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------
# Checksums


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 64, 1003])
def test_checksums_of_parts_add_up(size):
    data = np.random.default_rng(size).bytes(size)
    words = np.frombuffer(data + bytes(-size % 8), "<u8")
    total = sum(int(word) for word in words) % 2**64
    assert word_sum(data) == total
    for cuts in ([], [size // 2], [1, size // 3, 2 * size // 3 + 1]):
        edges = [0, *sorted(min(cut, size) for cut in cuts), size]
        parts = [word_sum(data[a:b], a) for a, b in zip(edges, edges[1:], strict=False)]
        assert sum(parts) % 2**64 == total


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_every_flipped_bit_is_found(dtype, tmp_path):
    path = tmp_path / "a.safetensors"
    net = tiny_network()
    save_network(path, net, StandardRGBEncoder(), {}, dtype=dtype)
    data = path.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    rng = np.random.default_rng(0)
    for position in [begin, len(data) - 1, *rng.integers(begin, len(data), 25).tolist()]:
        changed = bytearray(data)
        changed[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(changed)
        with pytest.raises(
            UserError, match=r"a.safetensors: \S+ is damaged \(checksum mismatch\): copy the file again"
        ):
            load_network(path)
    changed = bytearray(data)
    changed[begin : begin + 1024], changed[begin + 1024 : begin + 2048] = (
        data[begin + 1024 : begin + 2048],
        bytes(1024),
    )
    path.write_bytes(changed)
    with pytest.raises(UserError, match="checksum mismatch"):
        load_network(path)


def test_damaged_list_of_checksums(snapshot_file):
    data = snapshot_file.read_bytes()
    start = data.index(b"openedm2_checksums") + len(b'openedm2_checksums": "')
    for position, message in ((start + 20, "is damaged"), (start, None)):  # of the second, it fits no tensors
        changed = bytearray(data)
        changed[position] = ord("x") if message is None else changed[position] ^ 1
        snapshot_file.write_bytes(changed)
        with pytest.raises(UserError, match="checksum"):
            load_network(snapshot_file)


def test_files_without_checksums(tmp_path, snapshot_file):
    """Those of earlier versions, and those that another program has changed."""
    expected = load_network(snapshot_file).net.state_dict()
    tensors = safetensors.torch.load_file(snapshot_file)
    with safetensors.safe_open(snapshot_file, framework="pt") as f:
        metadata = f.metadata()
    earlier = {key: value for key, value in metadata.items() if key != "openedm2_checksums"}
    for kept in (earlier, metadata):
        safetensors.torch.save_file({name: 2 * tensor for name, tensor in tensors.items()}, tmp_path / "b", kept)
        (tmp_path / "b").rename(tmp_path / "b.safetensors")
        state = load_network(tmp_path / "b.safetensors").net.state_dict()
        assert all(torch.equal(state[name], 2 * tensor) for name, tensor in expected.items())


def test_native_files_of_other_types(tmp_path, snapshot_file):
    tensors = safetensors.torch.load_file(snapshot_file)
    with safetensors.safe_open(snapshot_file, framework="pt") as f:
        metadata = f.metadata()
    for dtype in (torch.float64, torch.int64, torch.int8):
        changed = {**tensors, "unet.out_gain": tensors["unet.out_gain"].to(dtype)}
        safetensors.torch.save_file(changed, tmp_path / "other.safetensors", metadata)
        with pytest.raises(UserError, match="unet.out_gain is not of type float32, float16 or bfloat16"):
            load_network(tmp_path / "other.safetensors")
