"""count_flops.py."""

import json
import sys

import pytest
import torch
from conftest import (
    GOLDEN,
    ROOT,
    fails_with,
    run_cli,
    tiny_network,
)

from count_flops import main as count_flops
from training.encoders import StandardRGBEncoder
from training.snapshot import save_network

sys.path.insert(0, str(ROOT / "scripts"))


@pytest.mark.parametrize(
    ("preset", "parameters", "gflops"),
    [
        ("edm2-img512-xxs", 31.31, 11.5),
        ("edm2-img512-xs", 124.71, 45.5),
        ("edm2-img512-s", 280.21, 101.9),
        ("edm2-img512-m", 497.81, 180.8),
        ("edm2-img512-l", 778, 282),
        ("edm2-img512-xl", 1120, 406),
        ("edm2-img512-xxl", 1523.16, 552.1),
        ("edm2-img64-s", 280.21, 101.9),
    ],
)
def test_published_costs(preset, parameters, gflops):
    result = json.loads(run_cli(count_flops, preset, "--json").output)
    assert result["parameters"] / 1e6 == pytest.approx(parameters, rel=1e-3)
    assert result["gflops"] == pytest.approx(gflops, rel=0.005)
    assert sum(result["gflops_by_layer"].values()) == pytest.approx(result["gflops"])


def test_cost_of_files(run, snapshot_file):
    toy = GOLDEN / "official" / "toy-clsA-layers03-dim32.pkl"
    result = run_cli(count_flops, snapshot_file, f"--net={toy}", "--json")
    assert result.exit_code == 0, result.output
    ours, theirs = (json.loads(line) for line in result.output.splitlines())
    assert ours["net"] == str(snapshot_file)
    assert ours["parameters"] == sum(p.numel() for p in tiny_network().parameters())
    # One 4x32 and three 32x32 matrices.
    assert theirs["gflops_by_layer"]["linear"] == pytest.approx((4 * 32 + 3 * 32 * 32) / 1e9)
    table = run_cli(count_flops, snapshot_file).output
    for text in ("parameters", "3x3 convolution", "attention", "weight normalization"):
        assert text in table
    assert torch.cuda.is_available() or "not measured: no CUDA device" in table


def test_nothing_to_count():
    fails_with(run_cli(count_flops), "which network?", "edm2-img512-xxl")
    fails_with(run_cli(count_flops, "edm2-img512-x"), "unknown preset 'edm2-img512-x'", "edm2-img512-xs")
    fails_with(run_cli(count_flops, "nowhere.pkl"), "nowhere.pkl: no such file")


def test_dropout_costs_nothing(tmp_path):
    counts = []
    for dropout in (0.0, 0.5):
        save_network(tmp_path / "net.safetensors", tiny_network(dropout=dropout), StandardRGBEncoder(), {})
        counts.append(json.loads(run_cli(count_flops, tmp_path / "net.safetensors", "--json").output)["gflops"])
    assert counts[0] == counts[1]


@pytest.mark.gpu
def test_memory_per_sample():
    result = json.loads(run_cli(count_flops, "edm2-img512-xxs", "--json").output)
    assert 10 * 2**20 < result["peak_memory_per_sample"] < 500 * 2**20
