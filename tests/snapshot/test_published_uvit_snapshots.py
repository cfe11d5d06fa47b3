"""Published U-ViT files as snapshots: loaded, converted both ways, and what is said of them."""

import dataclasses

import pytest
import torch
from conftest import fails_with, make_dataset, random_images, run_cli

from dnnlib.errors import UserError
from generate_images import main as generate
from snapshot_tool import main as snapshot_tool
from train_uvit import main as train
from training.conditioning import Conditioning, DataSpec
from training.config.uvit_presets import UVIT_PRESETS
from training.encoders import StandardRGBEncoder
from training.families import preset_network
from training.networks.uvit_denoiser import UViTDenoiser
from training.schedules import VP
from training.schedules_uvit import InterpolatedVP
from training.snapshot import load_network, save_network
from training.snapshot.published_uvit import write

SIGMA = torch.tensor([0.3, 2.0])


def as_published(preset: str, tmp_path, **changes):
    """A published network of random numbers that is smaller than its preset by its depth, as a .pth file."""
    chosen = UVIT_PRESETS[preset]
    network = dataclasses.replace(chosen.config.network, depth=2, **changes)
    conditioning = (
        Conditioning.of_text(*chosen.context) if chosen.context[0] else Conditioning.of_labels(chosen.classes)
    )
    data = DataSpec(channels=chosen.channels, resolution=chosen.resolution, conditioning=conditioning)
    net = UViTDenoiser(data, **network.to_json()).requires_grad_(False)
    path = tmp_path / "net.pth"
    write(path, net.net.state_dict())
    return path, net


def test_a_preset_names_what_weights_do_not_say(tmp_path):
    torch.manual_seed(0)
    net = preset_network(UVIT_PRESETS["digits-uvit"]).requires_grad_(False)
    path = tmp_path / "digits.pth"
    save_network(path, net, StandardRGBEncoder(), {}, torch.float32)
    snapshot = load_network(path, preset="digits-uvit")
    assert snapshot.net.spec == net.spec and snapshot.note == "" and snapshot.metadata["source"] == "digits.pth"
    x, classes = torch.randn(2, 1, 8, 8), torch.tensor([3, 10])
    assert torch.equal(snapshot.net(x, SIGMA, classes), net(x, SIGMA, classes))
    with pytest.raises(UserError, match=r"how many attention heads\?.*name its preset \(--arch\)"):
        load_network(path)
    with pytest.raises(UserError, match="not a checkpoint of score_sde"):
        load_network(path, preset="digits-vp")
    with pytest.raises(UserError, match="do not fit"):
        load_network(path, preset="cifar10_uvit_small")


@pytest.mark.parametrize("preset", ["imagenet64_uvit_mid", "mscoco_uvit_small"])
def test_presets_are_found_by_sizes(preset, tmp_path, monkeypatch):
    small = dataclasses.replace(UVIT_PRESETS[preset].config.network, depth=2)
    chosen = dataclasses.replace(UVIT_PRESETS[preset].config, network=small)
    monkeypatch.setitem(UVIT_PRESETS, preset, dataclasses.replace(UVIT_PRESETS[preset], config=chosen))
    path, net = as_published(preset, tmp_path)
    snapshot = load_network(path)
    assert snapshot.note == f"taken for {preset}, by the sizes of its weights (--arch names another)"
    assert snapshot.net.spec == net.spec and snapshot.net.init_kwargs == net.init_kwargs
    kind = type(snapshot.net.preconditioning.schedule)
    if preset.startswith("mscoco"):
        assert kind is InterpolatedVP and snapshot.encoder.scale == 0.2301 and snapshot.encoder.pixel_range == [-1, 1]
        assert snapshot.net.empty_context.shape == (77, 768)
    else:
        assert kind is VP and isinstance(snapshot.encoder, StandardRGBEncoder)
        assert snapshot.net.spec.conditioning.size == 1000 and not snapshot.net.spec.conditioning.optional


def test_networks_of_other_sizes(tmp_path):
    path, _ = as_published("imagenet256_uvit_large", tmp_path)
    snapshot = load_network(path)
    assert "16 heads" in snapshot.note and "1001 classes with class for none" in snapshot.note
    assert snapshot.net.spec.conditioning == Conditioning(kind="classes", size=1000, optional=True)
    assert snapshot.encoder.scale == 0.18215


def test_training_checkpoints(tmp_path):
    nets = [preset_network(UVIT_PRESETS["digits-uvit"]).requires_grad_(False) for _ in range(2)]
    folder = tmp_path / "ckpts" / "300.ckpt"
    for net, name in zip(nets, ("nnet_ema", "nnet"), strict=True):
        write(folder / f"{name}.pth", net.net.state_dict())
    for place in (folder, folder.parent):
        for net, which in zip(nets, ("ema", "net"), strict=True):
            loaded = load_network(place, which=which, preset="digits-uvit").net
            assert torch.equal(loaded.net.pos_embed, net.net.pos_embed)
        with pytest.raises(UserError, match="holds no network 'other'"):
            load_network(place, which="other", preset="digits-uvit")


def test_conversion_both_ways(tmp_path):
    torch.manual_seed(0)
    net = preset_network(UVIT_PRESETS["digits-uvit"]).requires_grad_(False)
    native, back, again = tmp_path / "net.safetensors", tmp_path / "net.pth", tmp_path / "again.safetensors"
    save_network(native, net, StandardRGBEncoder(), {}, torch.float32)
    assert run_cli(snapshot_tool, "convert", native, back).exit_code == 0
    state = torch.load(back, weights_only=True)
    assert list(state) == list(net.net.state_dict())
    result = run_cli(snapshot_tool, "convert", back, again, "--arch=digits-uvit")
    assert result.exit_code == 0, result.output
    loaded = load_network(again).net
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in net.state_dict().items())
    folder = tmp_path / "5.ckpt"
    write(folder / "nnet_ema.pth", net.net.state_dict())
    result = run_cli(snapshot_tool, "convert", folder, tmp_path / "c.safetensors", "--arch=digits-uvit")
    assert result.exit_code == 0, result.output
    assert "uvit.UViTDenoiser" in run_cli(snapshot_tool, "inspect", folder, "--arch=digits-uvit").output
    fails_with(run_cli(snapshot_tool, "convert", native, tmp_path / "net.pkl"), "cannot hold a network of uvit")


def test_generating_from_a_published_file(tmp_path):
    torch.manual_seed(0)
    write(tmp_path / "net.pth", preset_network(UVIT_PRESETS["digits-uvit"]).net.state_dict())
    args = [
        f"--net={tmp_path / 'net.pth'}",
        "--arch=digits-uvit",
        f"--outdir={tmp_path / 'out'}",
        "--steps=2",
        "--seeds=0",
    ]
    result = run_cli(generate, *args, "--guidance=1.5", "--class=3")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "000000.png").is_file()


def test_training_from_a_published_checkpoint(tmp_path):
    """A folder of the published code is where a run starts; a learning rate of nearly 0 leaves its weights."""
    path, net = as_published("cifar10_uvit_small", tmp_path)
    folder = tmp_path / "5.ckpt"
    folder.mkdir()
    path.rename(folder / "nnet_ema.pth")
    data = make_dataset(tmp_path / "data.zip", random_images(1, size=32))
    options = ["--preset=cifar10_uvit_small", "--depth=2", "--xflip=0", "--duration=1", "--batch=1", "--lr=1e-30"]
    options += ["--preview=0", f"--init-from={folder}", "--precision=fp32", "--device=cpu"]
    result = run_cli(train, f"--outdir={tmp_path / 'run'}", f"--data={data}", *options)
    assert result.exit_code == 0, result.output
    assert "(100.0% of the values)" in result.output and "as initialised" not in result.output
    (trained,) = (tmp_path / "run").glob("network-snapshot-*-ema.safetensors")
    torch.testing.assert_close(load_network(trained).net.net.pos_embed, net.net.pos_embed, rtol=1e-3, atol=1e-5)
