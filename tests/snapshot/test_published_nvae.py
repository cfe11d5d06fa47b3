"""Published checkpoints of NVAE as snapshots: read, converted both ways, and files that are none."""

import argparse
import os
import zipfile

import pytest
import torch
from conftest import DIGITS, fails_with, run_cli

from calculate_likelihood import main as likelihood
from dnnlib.errors import UserError
from snapshot_tool import main as snapshot_tool
from training.config.nvae import TRAINING_PRESETS
from training.encoders import StandardRGBEncoder
from training.families import preset_network
from training.networks.nvae import NVAE
from training.snapshot import load_network, save_network
from training.snapshot.published_nvae import Checkpoint, load_checkpoint, save_checkpoint

ARGS = dict(
    dataset="cifar10",
    num_x_bits=5,
    arch_instance="res_mbconv",
    num_latent_scales=2,
    num_groups_per_scale=2,
    num_latent_per_group=2,
    ada_groups=True,
    min_groups_per_scale=1,
    num_channels_enc=4,
    num_channels_dec=4,
    num_preprocess_blocks=1,
    num_preprocess_cells=1,
    num_cell_per_cond_enc=1,
    num_postprocess_blocks=1,
    num_postprocess_cells=1,
    num_cell_per_cond_dec=1,
    num_mixture_dec=3,
    num_nf=1,
    use_se=True,
    res_dist=True,
    learning_rate=0.02,
)
NETWORK = {key: value for key, value in ARGS.items() if key not in ("dataset", "num_x_bits", "learning_rate")}


@pytest.fixture(scope="module")
def net() -> NVAE:
    torch.manual_seed(0)
    return NVAE(32, 3, levels=32, published_decoder=True, **NETWORK).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def checkpoint(net, tmp_path_factory):
    path = tmp_path_factory.mktemp("nvae") / "checkpoint.pt"
    save_checkpoint(path, Checkpoint(net, dict(ARGS), epoch=3, global_step=77))
    return path


def outputs(net: NVAE) -> tuple[torch.Tensor, ...]:
    rnd = torch.Generator().manual_seed(0)
    x = torch.rand(2, net.img_channels, net.img_resolution, net.img_resolution, generator=rnd)
    noise = [torch.randn(2, *shape, generator=rnd) for shape in net.latent_shapes]
    return net(x, noise)


def same(a: NVAE, b: NVAE) -> bool:
    return all(torch.equal(x, y) for x, y in zip(outputs(a), outputs(b), strict=True))


def test_there_and_back(net, checkpoint, tmp_path):
    """Published -> native -> published, with the options of its run."""
    snapshot = load_network(checkpoint)
    assert same(snapshot.net, net) and not snapshot.net.training
    assert not any(p.requires_grad for p in snapshot.net.parameters())
    assert snapshot.metadata["published"] == {"args": ARGS, "epoch": 3, "global_step": 77}
    native, again = tmp_path / "native.safetensors", tmp_path / "again.pt"
    for source, dest in [(checkpoint, native), (native, again)]:
        result = run_cli(snapshot_tool, "convert", source, dest)
        assert result.exit_code == 0, result.output
    assert same(load_network(native).net, net)
    read = load_checkpoint(again)
    assert same(read.net, net) and read.args == ARGS and (read.epoch, read.global_step) == (3, 77)
    assert run_cli(snapshot_tool, "inspect", again).exit_code == 0


def test_own_networks_become_published_ones(tmp_path):
    torch.manual_seed(0)
    net = NVAE(32, 1, decoder="bernoulli", loss_crop=2, **NETWORK).eval()
    save_network(tmp_path / "own.pt", net, StandardRGBEncoder(), {})
    assert load_checkpoint(tmp_path / "own.pt").args["dataset"] == "mnist"
    assert same(load_network(tmp_path / "own.pt").net, net)
    digits = preset_network(TRAINING_PRESETS["digits-nvae"])
    with pytest.raises(UserError, match="own2.pt: the published code has no such networks"):
        save_network(tmp_path / "own2.pt", digits, StandardRGBEncoder(), {})
    with pytest.raises(UserError, match="no networks with levels=17"):
        save_network(tmp_path / "own2.pt", NVAE(32, 3, levels=17, **NETWORK), StandardRGBEncoder(), {})
    assert not (tmp_path / "own2.pt").exists()


def test_presets(checkpoint):
    with pytest.raises(UserError, match="another network than that of preset 'nvae-cifar10'"):
        load_network(checkpoint, preset="nvae-cifar10")
    with pytest.raises(UserError, match="holds no network 'net'"):
        load_network(checkpoint, which="net")


# ---------------------------------------------------------------------------------------------------------
# Files that are none


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def tampered(checkpoint, path, **changes):
    data = torch.load(checkpoint, weights_only=False)
    for key, value in changes.items():
        data[key] = value(data[key]) if callable(value) else value
    torch.save(data, path)
    return path


def with_args(**changes):
    return lambda args: argparse.Namespace(**{**vars(args), **changes})


@pytest.mark.parametrize("place", ["args", "epoch", "extra"])
def test_nothing_is_run(checkpoint, tmp_path, place):
    bomb = Bomb(tmp_path / "ran")
    value = argparse.Namespace(**ARGS, bomb=bomb) if place == "args" else bomb
    data = torch.load(checkpoint, weights_only=False)
    data[place] = value
    torch.save(data, tmp_path / "bomb.pt")
    with pytest.raises(UserError, match=r"mkdir.* nothing in the file was run"):
        load_network(tmp_path / "bomb.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_x_bits": 10**9}, "no number of bits"),
        ({"num_x_bits": "x"}, "no number of bits"),
        ({"num_latent_scales": 10**9}, "num_latent_scales must be at most 8"),
        ({"num_groups_per_scale": 128, "num_cell_per_cond_dec": 16}, "cells, more than"),
        ({"num_groups_per_scale": 128}, "ask for 192 groups"),
        ({"num_preprocess_cells": -1}, "num_preprocess_cells must be"),
        ({"num_channels_enc": 1024}, "is of shape"),
        ({"num_nf": True}, "num_nf must be a whole number"),
        ({"arch_instance": "os.system"}, "arch_instance must be one of"),
        ({"arch_instance": []}, "lack arch_instance|arch_instance must be"),
        ({"arch_instance": "res_elu"}, "another architecture"),
        ({"dataset": "x" * 10**5}, "dataset"),
        ({"dataset": "celeba_9999"}, "resolution|shape"),
        ({"use_se": None}, "use_se"),
        ({"num_nf": 2}, "it lacks"),
        ({"num_nf": 0}, "have no place for"),
    ],
)
def test_hostile_options(checkpoint, tmp_path, changes, message):
    path = tampered(checkpoint, tmp_path / "hostile.pt", args=with_args(**changes))
    with pytest.raises(UserError, match=message) as err:
        load_network(path)
    assert str(path) in str(err.value) and len(str(err.value)) < 500 and "\n" not in str(err.value)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "it lacks"),
        ([], "not a checkpoint"),
        ({"stem.weight": 3}, "'stem.weight' in it is no tensor"),
        ({3: torch.zeros(1)}, "not a checkpoint|no tensor"),
        ({"stem.weight": torch.zeros(1).expand(10**6, 10**6)}, "share their values"),
        ({"stem.weight": torch.zeros(2, 2, dtype=torch.complex64)}, "no tensor of numbers"),
    ],
)
def test_hostile_states(checkpoint, tmp_path, state, message):
    with pytest.raises(UserError, match=message):
        load_network(tampered(checkpoint, tmp_path / "hostile.pt", state_dict=state))


def test_values_that_are_not_finite(checkpoint, tmp_path):
    def spoil(state):
        state["stem.bias"][0] = float("nan")
        return state

    with pytest.raises(UserError, match="stem.bias holds NaN"):
        load_network(tampered(checkpoint, tmp_path / "nan.pt", state_dict=spoil))


def test_damaged_files(checkpoint, tmp_path):
    data = checkpoint.read_bytes()
    path = tmp_path / "x.pt"
    for content in (b"", b"PK\x03\x04", b"hello", data[: len(data) // 2], data[:-100]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"x\.pt: "):
            load_network(path)
    torch.save({"model": {}}, path)
    with pytest.raises(UserError, match="has no 'args' and 'state_dict'"):
        load_network(path)
    with zipfile.ZipFile(checkpoint) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(UserError, match="a compressed archive"):
        load_network(path)
    with pytest.raises(UserError, match="no such file"):
        load_network(tmp_path / "none.pt")


def test_commands_say_it_in_one_line(checkpoint, tmp_path):
    path = tampered(checkpoint, tmp_path / "hostile.pt", args=with_args(num_nf=2))
    options = [f"--net={path}", f"--data={DIGITS}", f"--out={tmp_path / 'x.jsonl'}"]
    fails_with(run_cli(likelihood, *options), "hostile.pt: it lacks")
