"""Native snapshots: what goes in comes out, and damage is named."""

import pytest
import safetensors.torch
import torch
from conftest import tiny_network

from dnnlib.errors import UserError
from training.encoders import RawLatentEncoder, StandardRGBEncoder
from training.snapshot import load_network, save_network


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


def test_spoiled_weights_are_refused(tmp_path):
    net = tiny_network()
    net.get_parameter("unet.out_conv.weight")[0, 0, 0, 0] = float("nan")
    save_network(tmp_path / "a.safetensors", net, StandardRGBEncoder(), {})
    with pytest.raises(UserError, match="unet.out_conv.weight holds NaN"):
        load_network(tmp_path / "a.safetensors")


def test_native_files_of_other_types(tmp_path, snapshot_file):
    tensors = safetensors.torch.load_file(snapshot_file)
    with safetensors.safe_open(snapshot_file, framework="pt") as f:
        metadata = f.metadata()
    for dtype in (torch.float64, torch.int64, torch.int8):
        changed = {**tensors, "unet.out_gain": tensors["unet.out_gain"].to(dtype)}
        safetensors.torch.save_file(changed, tmp_path / "other.safetensors", metadata)
        with pytest.raises(UserError, match="unet.out_gain is not of type float32, float16 or bfloat16"):
            load_network(tmp_path / "other.safetensors")
