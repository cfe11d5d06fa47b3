"""Runs that start with the weights of another network."""

import shutil

import pytest
import torch
from conftest import DIGITS, TINY, fails_with, run_cli, tiny_network

from dnnlib.errors import UserError
from train_edm2 import main as train
from training.encoders import StabilityVAEEncoder, StandardRGBEncoder
from training.networks.toy import ToyModel
from training.snapshot import load_network, save_network
from training.snapshot.initial import take_weights_


def saved(tmp_path, net):
    path = tmp_path / "start.safetensors"
    save_network(path, net, StandardRGBEncoder(), {"nimg": 1024}, torch.float32)
    return str(path)


def newest(run):
    return str(sorted(run.glob("network-snapshot-*"))[-1])


def test_what_fits_is_taken_and_the_rest_is_listed(tmp_path):
    source = tiny_network(label_dim=5, num_blocks=2)
    net = tiny_network(seed=1, label_dim=7)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    lines = take_weights_(net, saved(tmp_path, source), StandardRGBEncoder())
    state, found = net.state_dict(), source.state_dict()
    assert set(found) - set(state)  # it has more blocks
    for name, tensor in state.items():
        fits = name in found and found[name].shape == tensor.shape
        assert torch.equal(tensor, found[name] if fits else before[name]), name
    assert f"of {len(state)} tensors" in lines[0] and "trained on 1024 images" in lines[0]
    assert "  as initialised: unet.emb_label.weight [16, 7], [16, 5] there" in lines
    assert lines[-1].startswith("  not used: ")


def test_the_newest_snapshot_of_a_run_is_named(tmp_path):
    for nimg in (1, 2):
        shutil.copy(saved(tmp_path, tiny_network()), tmp_path / f"network-snapshot-000000{nimg}-0.050.safetensors")
    lines = take_weights_(tiny_network(), str(tmp_path), StandardRGBEncoder())
    assert lines[1] == f"Note: {tmp_path}: its newest snapshot is network-snapshot-0000002-0.050.safetensors"


def test_another_architecture_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"start\.safetensors: holds a network of toy example"):
        take_weights_(tiny_network(), saved(tmp_path, ToyModel(hidden_dim=8)), StandardRGBEncoder())
    with pytest.raises(UserError, match="no weight of it has a name and shape"):
        take_weights_(ToyModel(hidden_dim=16), saved(tmp_path, ToyModel(hidden_dim=8)), StandardRGBEncoder())


def test_other_latents_are_said(tmp_path):
    """The latents of a published U-ViT in a run whose data are scaled in another way."""
    theirs, ours = (StabilityVAEEncoder(scale=scale, pixel_range=(-1.0, 1.0)) for scale in (0.18215, 0.2301))
    path = tmp_path / "start.safetensors"
    save_network(path, tiny_network(), theirs, {}, torch.float32)
    assert not any("Note" in line for line in take_weights_(tiny_network(), str(path), theirs))
    note = take_weights_(tiny_network(), str(path), ours)[-1]
    assert note.startswith(f"Note: {path} was trained on other data")
    assert "times 0.18215; here: " in note and note.endswith("times 0.2301")


def test_a_run_starts_there_and_resumes_without_the_file(run, tmp_path):
    start = tmp_path / "start.safetensors"
    shutil.copy(newest(run), start)
    options = [f"--outdir={tmp_path / 'run'}", f"--data={DIGITS}", *TINY, "--cond=0", "--lr=1e-30"]
    result = run_cli(train, *options, f"--init-from={start}", "--duration=1Ki")
    assert result.exit_code == 0, result.output
    assert f"of {start}" in result.output and "emb_label" in result.output
    ours, theirs = (load_network(newest(path)).net.state_dict() for path in (tmp_path / "run", run))
    ours, theirs = (state["unet.out_conv.weight"].flatten() for state in (ours, theirs))
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.9999  # training normalises it
    start.unlink()
    result = run_cli(train, *options, f"--init-from={start}", "--duration=2Ki")
    assert result.exit_code == 0 and "Resuming at 1024 images" in result.output
    fails_with(run_cli(train, *options, "--duration=3Ki"), "was trained with --init-from=")


def test_a_missing_file_is_one_line(tmp_path):
    options = [f"--outdir={tmp_path / 'run'}", f"--data={DIGITS}", *TINY, "--duration=1Ki"]
    result = run_cli(train, *options, f"--init-from={tmp_path / 'nowhere.safetensors'}")
    assert result.exit_code == 2 and "nowhere.safetensors" in result.stderr.splitlines()[-1]
    assert not list(tmp_path.glob("run/network-snapshot-*"))
