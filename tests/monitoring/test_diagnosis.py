"""What a run records of its insides."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import DIGITS, TINY, fails_with, run_cli, torchrun

from train_classifier import main as train_classifier
from train_edm2 import main as train_edm2
from train_nvae import main as train_nvae
from train_score_sde import main as train_score_sde
from train_uvit import main as train_uvit
from training.families import ARCHITECTURES, preset_network
from training.monitoring.diagnosis import LossByNoiseLevel, norms_by_part, parts_of

RUN = ["--duration=512", "--batch=128", "--status=512", "--snapshot=0", "--checkpoint=0", "--preview=0"]
FAMILIES = {
    "classifier": (train_classifier, ["--preset=digits-classifier"]),
    "score_sde": (train_score_sde, ["--preset=digits-vp", "--nf=8"]),
    "uvit": (train_uvit, ["--preset=digits-uvit", "--depth=2", "--embed-dim=32"]),
    "nvae": (train_nvae, ["--preset=digits-nvae", "--num_channels_enc=4", "--num_channels_dec=4", "--num_groups_per_scale=1"]),
}  # fmt: skip


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "diagnosis.jsonl").read_text().splitlines()]


def weights(run: Path, kimg: int = 1) -> dict[str, torch.Tensor]:
    return torch.load(run / f"training-state-{kimg:07d}.pt", weights_only=True)["net"]


def train(run: Path, *options) -> Path:
    result = run_cli(train_edm2, f"--outdir={run}", f"--data={DIGITS}", *TINY, "--preview=0", *options)
    assert result.exit_code == 0, result.output
    return run


@pytest.fixture(scope="module")
def diagnosed(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("diagnosed") / "run", "--diagnose=512")


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, tmp_path):
    command, options = FAMILIES[family]
    result = run_cli(command, f"--outdir={tmp_path}", f"--data={DIGITS}", *options, *RUN, "--diagnose=256")
    assert result.exit_code == 0, result.output
    found = records(tmp_path)
    assert [record["nimg"] for record in found] == [256, 512]
    for record in found:
        assert record["gradient_norm"] > 0 and record["weight_norm"] > 0
        levels = record["loss_by_sigma"]
        assert sum(levels["count"]) == (0 if family == "nvae" else 256)
        assert len(levels["sigma"]) == len(levels["loss"]) and "error" not in levels
        parts = record["parts"]
        total = math.hypot(*(part["weight_norm"] for part in parts.values()))
        assert total == pytest.approx(record["weight_norm"], rel=1e-4)
        with_activations = [name for name, part in parts.items() if part.get("activation", 0) > 0]
        assert len(with_activations) > 0.6 * len(parts)  # tables of embeddings, and what is 0 at first, have none
    assert "gradient norm" in result.output and "largest activations" in result.output


def test_training_is_left_alone(diagnosed, tmp_path):
    plain, other = weights(train(tmp_path)), weights(diagnosed)
    assert all(torch.equal(plain[name], other[name]) for name in plain)
    assert not (tmp_path / "diagnosis.jsonl").exists()


def test_uncertainty_of_edm2(diagnosed):
    """The learned one begins at a random value; the error of a network that gives 0 is that of c_skip x."""
    first, last = records(diagnosed)
    assert first["nimg"] == 512 and last["nimg"] == 1024
    levels = first["loss_by_sigma"]
    assert sum(levels["count"]) == 512 and set(levels) == {"sigma", "count", "loss", "error", "logvar"}
    for sigma, error, count in zip(levels["sigma"], levels["error"], levels["count"], strict=True):
        if count > 50:
            c_skip = 0.25 / (sigma**2 + 0.25)
            square = 0.72  # of the pixels of the digits, in [-1, 1]
            expected = (1 - c_skip) ** 2 * square + (c_skip * sigma) ** 2
            assert error == pytest.approx(expected * (sigma**2 + 0.25) / (sigma * 0.5) ** 2, rel=0.25)


def test_resumed_run_records_the_same(diagnosed, tmp_path):
    train(tmp_path, "--diagnose=512", "--slice=256")
    assert not (tmp_path / "diagnosis.jsonl").exists()
    train(tmp_path, "--diagnose=512")
    assert records(tmp_path) == records(diagnosed)


@pytest.mark.slow
def test_two_processes_record_the_same(diagnosed, tmp_path):
    args = [f"--outdir={tmp_path}", f"--data={DIGITS}", *TINY, "--preview=0", "--diagnose=512"]
    result = torchrun(2, "train_edm2.py", *args)
    assert result.returncode == 0, result.stderr
    for one, two in zip(records(diagnosed), records(tmp_path), strict=True):
        for name in ("gradient_norm", "weight_norm"):
            assert one[name] == pytest.approx(two[name], rel=1e-3)
        assert one["loss_by_sigma"]["count"] == two["loss_by_sigma"]["count"]
        assert one["loss_by_sigma"]["loss"] == pytest.approx(two["loss_by_sigma"]["loss"], rel=1e-3)
        activations = [[part.get("activation", 0) for part in r["parts"].values()] for r in (one, two)]
        assert activations[0] == pytest.approx(activations[1], rel=1e-3)


@pytest.mark.slow
def test_activations_of_a_compiled_network(diagnosed, tmp_path):
    compiled = records(train(tmp_path, "--diagnose=512", "--compile=1"))[0]["parts"]
    for name, part in records(diagnosed)[0]["parts"].items():
        assert part.get("activation", 0) == pytest.approx(compiled[name].get("activation", 0), rel=1e-2)


def test_interval_is_a_multiple_of_the_batch(tmp_path):
    result = run_cli(train_edm2, f"--outdir={tmp_path}", f"--data={DIGITS}", *TINY, "--diagnose=100")
    fails_with(result, "--diagnose=100 must be multiples of --batch=256")


def test_loss_by_noise_level():
    losses = LossByNoiseLevel(torch.device("cpu"))
    sigma, error = torch.tensor([1.1, 1.2, 5.0, 1e-9, 1.1]), torch.tensor([1.0, 2.0, 8.0, 3.0, torch.nan])
    u = sigma.log()
    losses.add(error / u.exp() + u, {"sigma": sigma, "logvar": u})
    losses.add(torch.ones(3), {})
    found = losses.collect()
    assert found["count"] == [1, 2, 1]
    assert found["sigma"] == pytest.approx([math.exp(-7.75), math.exp(0.25), math.exp(1.75)], rel=1e-5)
    assert found["error"] == pytest.approx([3, 1.5, 8], rel=1e-4)
    assert found["logvar"] == pytest.approx([math.log(1e-9), (u[0] + u[1]).item() / 2, math.log(5)], rel=1e-5)
    assert losses.collect()["count"] == []


@pytest.mark.parametrize("name", [name for name, entry in ARCHITECTURES.items() if entry.presets])
def test_parts_hold_nearly_all_parameters_once(name):
    for preset in list(ARCHITECTURES[name].presets.values())[-2:]:
        with torch.device("meta"):
            net = preset_network(preset)
        parts = parts_of(net)
        held = [id(p) for part in parts.values() for p in part.parameters()]
        assert len(held) == len(set(held)) and len(parts) > 8
        outside = sum(p.numel() for p in net.parameters() if id(p) not in set(held))
        assert outside < 0.1 * sum(p.numel() for p in net.parameters())


def test_norms():
    net = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 1))
    for p in net.parameters():
        torch.nn.init.constant_(p, 2)
        p.grad = torch.full_like(p, 3)
    parts = {"first": net[0]}
    assert norms_by_part(net, parts, gradients=False) == pytest.approx({"first": 4, "1.weight": 8**0.5, "1.bias": 2})
    assert norms_by_part(net, parts, gradients=True) == pytest.approx({"first": 6, "1.weight": 18**0.5, "1.bias": 3})
