"""Gradients that are not finite: what they come from, and what is done about them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DIGITS, TINY, fails_with, run_cli
from torch import nn

from train_edm2 import main as train_edm2
from train_nvae import main as train_nvae
from train_score_sde import main as train_score_sde
from train_uvit import main as train_uvit
from training.config.nvae import TRAINING_PRESETS, NVAETraining
from training.dataset.images import ImageFolderDataset
from training.dataset.order import dataset_indices
from training.families import preset_network
from training.losses import EDM2Loss, NoiseLoss, ScoreLoss
from training.losses_vae import PixelObjective
from training.monitoring.incidents import Counts, Incidents
from training.networks.uvit import UViT
from training.optimizers import AdamaxOptimizer, AdamOptimizer

BATCH = 64
RUN = ["--duration=256", f"--batch={BATCH}", "--status=256", "--snapshot=0", "--checkpoint=0", "--preview=0"]
UVIT = ["--preset=digits-uvit", "--depth=2", "--embed-dim=32"]
FAMILIES = {
    "edm2": (train_edm2, TINY, EDM2Loss),
    "score_sde": (train_score_sde, ["--preset=digits-vp", "--nf=8"], ScoreLoss),
    "uvit": (train_uvit, UVIT, NoiseLoss),
    "nvae": (
        train_nvae,
        ["--preset=digits-nvae", "--num_channels_enc=4", "--num_channels_dec=4", "--num_groups_per_scale=1"],
        PixelObjective,
    ),
}
STEP = 128  # images before the step in which the bad image comes


def bad_image() -> tuple[int, torch.Tensor]:
    """Index of an image that a run of seed 0 sees in the step at `STEP`, and what it looks like."""
    data = ImageFolderDataset(DIGITS)
    index = int(dataset_indices(np.array([STEP + 37]), len(data), 0)[0])
    return index, torch.from_numpy(data[index][0]).float()


def spoil(monkeypatch, objective: type, image: torch.Tensor) -> None:
    """Make losses of one image NaN."""
    original = objective.__call__

    def spoiled(self, net, images, *args, **kwargs):
        low, high = images.min(), images.max()
        levels = (images - low) / (high - low) * image.max()
        bad = (levels - image).abs().flatten(1).amax(1) < 1e-2
        loss = original(self, net, images, *args, **kwargs)
        return torch.where(bad.reshape(-1, *[1] * (loss.ndim - 1)), torch.nan, 1.0) * loss

    monkeypatch.setattr(objective, "__call__", spoiled)


def state(run: Path) -> dict:
    return torch.load(run / "training-state-0000000.pt", weights_only=True)


def incidents(run: Path) -> list[dict]:
    lines = map(json.loads, (run / "diagnosis.jsonl").read_text().splitlines())
    return [line["nonfinite"] for line in lines if "nonfinite" in line]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_that_is_not_finite_is_named(family, tmp_path, monkeypatch):
    command, options, objective = FAMILIES[family]
    index, image = bad_image()
    name = ImageFolderDataset(DIGITS).name(index)
    spoil(monkeypatch, objective, image)
    args = [f"--data={DIGITS}", *options, *RUN]
    result = run_cli(command, f"--outdir={tmp_path / 'run'}", *args)
    assert result.exit_code == 0, result.output
    assert f"gradients of the step at {STEP} images were not finite" in result.output
    assert f"and were not when it was repeated; caused by image {index} ({name})" in result.output
    (incident,) = incidents(tmp_path / "run")
    assert incident["step"] == STEP and incident["repeated"] and incident["parameters"] and not incident["weights"]
    (found,) = incident["images"]
    assert found["name"] == name
    assert found["index"] == index and found["run_index"] == STEP + 37
    assert ("sigma" in found) == (family != "nvae")
    default = "1 steps with non-finite gradients were skipped" if family == "nvae" else "were replaced by 0"
    assert default in result.output
    # Looking into it changes nothing.
    monkeypatch.setattr(Incidents, "look", lambda *_: None)
    assert run_cli(command, f"--outdir={tmp_path / 'blind'}", *args).exit_code == 0
    a, b = state(tmp_path / "run"), state(tmp_path / "blind")
    assert all(torch.equal(a["net"][name], b["net"][name]) for name in a["net"])
    assert a["nonfinite"] == b["nonfinite"] > 0


def test_skip_and_stop(tmp_path, monkeypatch):
    index, image = bad_image()
    spoil(monkeypatch, EDM2Loss, image)
    args = [f"--data={DIGITS}", *TINY, *RUN]
    skipped = run_cli(train_edm2, f"--outdir={tmp_path / 'skip'}", *args, "--on-nonfinite=skip")
    assert "1 steps with non-finite gradients were skipped" in skipped.output
    assert state(tmp_path / "skip")["nonfinite"] == 1
    assert all(x["step"] == 3 for x in state(tmp_path / "skip")["optimizer"]["state"].values())  # of 4
    stopped = run_cli(train_edm2, f"--outdir={tmp_path / 'stop'}", *args, "--on-nonfinite=stop")
    fails_with(stopped, f"image {index} ", "--on-nonfinite=skip or zero", exit_code=1)
    assert not list((tmp_path / "stop").glob("training-state-*"))


def test_a_fault_that_does_not_come_again(tmp_path, monkeypatch):
    original, calls = EDM2Loss.__call__, []

    def fails_once(self, *args, **kwargs):
        calls.append(1)
        return original(self, *args, **kwargs) * (torch.inf if len(calls) == 2 else 1)

    monkeypatch.setattr(EDM2Loss, "__call__", fails_once)
    result = run_cli(train_edm2, f"--outdir={tmp_path}", f"--data={DIGITS}", *TINY, *RUN)
    assert "step at 64 images were not finite" in result.output
    assert "but were when it was repeated: the processor, its memory or a driver" in result.output
    (incident,) = incidents(tmp_path)
    assert not incident["repeated"] and incident["images"] == [] and incident["layer"] is None


@pytest.mark.parametrize("value", [3e38, torch.inf])
def test_weights_that_are_too_large(value, tmp_path, monkeypatch):
    original = UViT.__init__

    def spoiled(self, *args, **kwargs):
        original(self, *args, **kwargs)
        nn.init.constant_(self.mid_block.mlp.fc1.weight, value)

    monkeypatch.setattr(UViT, "__init__", spoiled)
    args = [f"--outdir={tmp_path}", f"--data={DIGITS}", *UVIT, *RUN, "--on-nonfinite=stop"]
    cause = (
        "weights are not finite: net.mid_block.mlp.fc1.weight"
        if value == torch.inf
        else "every image that was tried alone does it"
    )
    fails_with(run_cli(train_uvit, *args), "first in layer net.mid_block.mlp.fc1; ", cause, exit_code=1)


@pytest.mark.parametrize("policy", ["zero", "skip"])
def test_adam(policy):
    net = nn.Linear(2, 1, bias=False)
    optimizer = AdamOptimizer(net, lambda _nimg: 0.1, betas=(0.9, 0.999), eps=1e-8, on_nonfinite=policy)
    optimizer.gradients.copy_(torch.tensor([1.0, 1.0]))
    optimizer.step(0)
    before, seen = net.weight.detach().clone(), []
    optimizer.gradients.copy_(torch.tensor([1.0, torch.nan]))
    optimizer.step(1, seen.append)
    changed = (net.weight != before).flatten().tolist()
    assert seen == [1] and optimizer.nonfinite == 1
    # Of the weight without a gradient, the moments of the step before move it on.
    assert changed == ([True, True] if policy == "zero" else [False, False])
    assert net.weight.isfinite().all()


def test_adamax_sets_gradients_to_zero():
    config = NVAETraining.from_flat({"on_nonfinite": "zero"}, TRAINING_PRESETS["digits-nvae"].config)
    torch.manual_seed(0)
    net = preset_network(TRAINING_PRESETS["digits-nvae"])
    optimizer = AdamaxOptimizer(net, config)
    optimizer.gradients.fill_(1)
    optimizer.gradients[0] = torch.inf
    before = optimizer.weights.detach().clone()
    optimizer.step(5120)
    assert optimizer.nonfinite == 1 and "replaced by 0" in optimizer.describe_nonfinite(1)
    assert (optimizer.weights != before).float().mean() > 0.9 and optimizer.weights.isfinite().all()


@pytest.mark.gpu
def test_counts_of_a_gpu_are_read_later():
    counts = Counts(torch.device("cuda"))
    for nimg in range(4):
        counts.add(nimg, torch.tensor(int(nimg != 1), device="cuda"))
        assert counts.read(wait=False) == ([nimg - 2] if nimg == 2 else [])
    assert counts.read(wait=True) == [2, 3]


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["zero", "skip", "stop"])
def test_policies_on_a_gpu(policy, tmp_path, monkeypatch):
    index, image = bad_image()
    spoil(monkeypatch, EDM2Loss, image.cuda())
    args = [f"--outdir={tmp_path}", f"--data={DIGITS}", *TINY, *RUN, f"--on-nonfinite={policy}", "--device=cuda"]
    result = run_cli(train_edm2, *args, "--precision=fp32")
    assert f"image {index} " in result.output and (result.exit_code == 1) == (policy == "stop")
