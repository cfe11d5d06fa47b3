"""Published checkpoints of NVAE that are hostile, damaged, or of another architecture."""

import argparse
import os

import pytest
import torch

from dnnlib.util import UserError
from training.networks.nvae import NVAE
from training.snapshot.published_nvae import OLD_ARGS, Checkpoint, load_checkpoint, network_options, save_checkpoint

ARGS = dict(
    dataset="cifar10",
    num_x_bits=8,
    arch_instance="res_mbconv",
    num_latent_scales=1,
    num_groups_per_scale=2,
    num_latent_per_group=3,
    ada_groups=False,
    min_groups_per_scale=1,
    num_channels_enc=4,
    num_channels_dec=4,
    num_preprocess_blocks=1,
    num_preprocess_cells=1,
    num_cell_per_cond_enc=1,
    num_postprocess_blocks=1,
    num_postprocess_cells=1,
    num_cell_per_cond_dec=1,
    num_mixture_dec=2,
    num_nf=0,
    use_se=True,
    res_dist=True,
)


@pytest.fixture
def contents(tmp_path):
    """What a small published checkpoint holds."""
    torch.manual_seed(0)
    save_checkpoint(tmp_path / "whole.pt", Checkpoint(NVAE(**network_options(ARGS)), ARGS, epoch=3, global_step=30))
    return torch.load(tmp_path / "whole.pt", weights_only=False)


def refused(tmp_path, contents, *fragments: str) -> None:
    """The file leads to one line that names it."""
    path = tmp_path / "checkpoint.pt"
    torch.save(contents, path)
    with pytest.raises(UserError) as err:
        load_checkpoint(path)
    text = str(err.value)
    assert text.startswith(f"{path}: ") and "\n" not in text
    for fragment in fragments:
        assert fragment in text, text


@pytest.mark.parametrize("arch", ["res_mbconv", "res_elu", "mbconv_sep"])
def test_round_trip(arch, tmp_path):
    torch.manual_seed(0)
    args = {**ARGS, "arch_instance": arch}
    net = NVAE(**network_options(args))
    state = {"step": 7, "exp_avg": torch.ones(4), "exp_inf": torch.ones(4)}
    save_checkpoint(
        tmp_path / "a.pt", Checkpoint(net, args, 3, 30, {"stem.bias": state}, {"T_max": 2.0}, {"scale": 1.0})
    )
    back = load_checkpoint(tmp_path / "a.pt")
    for key, value in net.state_dict().items():
        if not key.endswith("init_done"):
            assert torch.equal(back.net.state_dict()[key], value), key
    # Trained weights of res_elu stay as they are in a forward pass of training.
    before = back.net.state_dict()["pre_process.0.skip.conv_1.weight"].clone()
    back.net.train()(torch.rand(2, 3, 32, 32))
    assert torch.equal(back.net.state_dict()["pre_process.0.skip.conv_1.weight"], before)
    assert all(value for key, value in back.net.state_dict().items() if key.endswith("init_done"))
    assert (back.args, back.epoch, back.global_step) == (args, 3, 30)
    assert back.scheduler == {"T_max": 2.0} and back.grad_scalar == {"scale": 1.0}
    assert back.optimizer.keys() == {"stem.bias"} and back.optimizer["stem.bias"]["step"] == 7


def test_old_options(tmp_path):
    """Files that are older than some options get what these meant."""
    args = {key: value for key, value in ARGS.items() if key not in OLD_ARGS}
    net = NVAE(**network_options(args))
    assert net.decoder.mixtures == 10
    save_checkpoint(tmp_path / "old.pt", Checkpoint(net, {**args, **OLD_ARGS}))
    contents = torch.load(tmp_path / "old.pt", weights_only=False)
    contents["args"] = argparse.Namespace(**args)
    torch.save(contents, tmp_path / "old.pt")
    assert load_checkpoint(tmp_path / "old.pt").args == {**args, **OLD_ARGS}


class Attack:
    def __reduce__(self):
        return os.mkdir, ("attacked",)


@pytest.mark.parametrize("place", ["args", "state_dict", "extra"])
def test_nothing_is_run(place, tmp_path, contents, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if place == "args":
        contents["args"].attack = Attack()
    elif place == "state_dict":
        contents["state_dict"]["attack"] = Attack()
    else:
        contents["attack"] = Attack()
    refused(tmp_path, contents, "mkdir", "nothing in the file was run")
    assert not (tmp_path / "attacked").exists()


def change_args(contents, **changes):
    contents["args"] = argparse.Namespace(**{**vars(contents["args"]), **changes})


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        (dict(num_mixture_dec=3), "image_conditional.1.weight"),
        (dict(num_channels_enc=8), "shape"),
        (dict(use_se=False), "se.se"),
        (dict(num_nf=1), "nf_cells"),
        (dict(arch_instance="mbconv_sep"), "another architecture"),
        (dict(arch_instance="none"), "arch_instance"),
        (dict(dataset="none"), "dataset"),
        (dict(num_channels_enc=10**9), "out of range"),
        (dict(num_groups_per_scale=4000), "more layers"),
        (dict(num_cell_per_cond_dec=4000), "more layers"),
        (dict(num_nf=4000), "more layers"),
        (dict(num_latent_scales=4000), "more layers"),
        (dict(num_channels_enc="many"), "num_channels_enc"),
        (dict(num_latent_scales=0), "out of range"),
    ],
)
def test_options_of_another_network(changes, fragment, tmp_path, contents):
    change_args(contents, **changes)
    refused(tmp_path, contents, fragment)


def test_missing_parts(tmp_path, contents):
    state = contents["state_dict"]
    refused(tmp_path, {**contents, "state_dict": {k: v for k, v in state.items() if k != "stem.bias"}}, "stem.bias")
    refused(tmp_path, {**contents, "state_dict": {**state, "other": torch.ones(1)}}, "other")
    refused(tmp_path, {**contents, "state_dict": {**state, "stem.bias": 1}}, "stem.bias")
    refused(tmp_path, {key: value for key, value in contents.items() if key != "args"}, "'args'")
    refused(tmp_path, [1, 2], "not a checkpoint of NVAE")
    delattr(contents["args"], "num_nf")
    refused(tmp_path, contents, "num_nf")


def test_damaged_files(tmp_path, contents):
    path = tmp_path / "checkpoint.pt"
    torch.save(contents, path)
    data = path.read_bytes()
    for damaged in (b"", data[: len(data) // 2], b"x" * 100):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="damaged"):
            load_checkpoint(path)
    with pytest.raises(UserError, match="no such file"):
        load_checkpoint(tmp_path / "none.pt")


def test_networks_that_published_options_cannot_describe(tmp_path):
    net = NVAE(**{**network_options(ARGS), "num_channels_enc": 8})
    with pytest.raises(UserError, match="do not describe"):
        save_checkpoint(tmp_path / "a.pt", Checkpoint(net, ARGS))
    assert not (tmp_path / "a.pt").exists()
