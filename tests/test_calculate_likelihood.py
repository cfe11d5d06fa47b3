"""calculate_likelihood.py: every option, sharing, resuming, and bad input."""

import json
import zipfile

import pytest
import torch
from conftest import DIGITS, assert_all_options, fails_with, make_dataset, random_images, run_cli, torchrun

from calculate_likelihood import main as calculate
from training.config.nvae import TRAINING_PRESETS
from training.dataset_likelihood import summarize
from training.encoders import StandardRGBEncoder
from training.families import preset_network
from training.snapshot import save_network


@pytest.fixture(scope="module")
def nvae(tmp_path_factory):
    torch.manual_seed(0)
    net = preset_network(TRAINING_PRESETS["digits-nvae"])
    with torch.no_grad():
        for _ in range(3):
            net(torch.rand(32, 1, 8, 8))
    path = tmp_path_factory.mktemp("nvae") / "nvae.safetensors"
    save_network(path, net, StandardRGBEncoder(), {}, torch.float32)
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """The first digits, without their labels."""
    with zipfile.ZipFile(DIGITS) as archive:
        names = [name for name in archive.namelist() if name.endswith(".png")][:11]
        files = {name: archive.read(name) for name in names}
    return make_dataset(tmp_path_factory.mktemp("data") / "digits.zip", files)


def lines_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(nvae, images, out, *options):
    result = run_cli(calculate, f"--net={nvae}", f"--data={images}", f"--out={out}", *options)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_all_options(nvae, images, tmp_path):
    out = tmp_path / "folder" / "likelihood.jsonl"
    options = ["--num=5", "--seed=3", "--batch=2", "--samples=4", "--max-batch=6", "--precision=fp32", "--device=cpu"]
    summary = run(nvae, images, out, *options, "--offline")
    args = [f"--net={nvae}", f"--data={images}", f"--out={out}", *options, "--offline"]
    assert_all_options(calculate, args)
    facts, *rows, last = lines_of(out)
    assert facts["facts"]["samples"] == 4 and facts["facts"]["levels"] == 17 and facts["facts"]["dims"] == 64
    assert [row["index"] for row in rows] == [0, 1, 2, 3, 4] and last["summary"] == summary == summarize(rows)
    groups = [f"kl_{i:02d}" for i in range(3)]
    for row in rows:
        assert row["nelbo"] == pytest.approx(row["recon"] + sum(row[name] for name in groups))
        assert row["bits_per_dim"] == pytest.approx(row["iw_bound"] / 64 / 0.6931472)


def test_an_image_depends_on_itself_alone_and_a_rest_is_computed(nvae, images, tmp_path):
    run(nvae, images, tmp_path / "whole.jsonl", "--samples=3", "--batch=11")
    whole = {row["index"]: row for row in lines_of(tmp_path / "whole.jsonl") if "index" in row}
    out = tmp_path / "parts.jsonl"
    run(nvae, images, out, "--samples=3", "--num=4", "--batch=3")
    text = out.read_text()
    out.write_text(text + '{"index": 9, "bits_p')  # cut off when the process was killed
    summary = run(nvae, images, out, "--samples=3", "--batch=2")
    assert out.read_text().splitlines()[1:5] == text.splitlines()[1:5]
    rows = [row for row in lines_of(out) if "index" in row]
    assert sorted(row["index"] for row in rows) == list(range(11)) and summary["num_images"] == 11
    for row in rows:
        assert row == pytest.approx(whole[row["index"]], rel=1e-5, abs=1e-6)
    before = out.read_text()
    assert run(nvae, images, out, "--samples=3", "--batch=2") == summary
    assert out.read_text() == before


def test_two_processes_leave_nothing_out_and_repeat_nothing(nvae, images, tmp_path):
    alone = run(nvae, images, tmp_path / "one.jsonl", "--batch=2")
    out = tmp_path / "two.jsonl"
    done = torchrun(
        2, "calculate_likelihood.py", f"--net={nvae}", f"--data={images}", f"--out={out}", "--batch=2", "--device=cpu"
    )
    assert done.returncode == 0, done.stderr
    rows = [row for row in lines_of(out) if "index" in row]
    assert sorted(row["index"] for row in rows) == list(range(11))
    assert json.loads(done.stdout.splitlines()[-1]) == pytest.approx(alone, rel=1e-6, abs=1e-9)


def test_bad_input(nvae, images, tmp_path, snapshot_file):
    out = tmp_path / "x.jsonl"
    options = [f"--data={images}", f"--out={out}"]
    fails_with(run_cli(calculate, f"--net={snapshot_file}", *options), "likelihoods of EDM2 networks")
    fails_with(run_cli(calculate, f"--net={nvae}", *options, "--samples=0"), "--samples must be at least 1")
    colour = make_dataset(tmp_path / "colour.zip", random_images(2))
    fails_with(run_cli(calculate, f"--net={nvae}", f"--data={colour}", f"--out={out}"), "(1, 8, 0)", "(3, 8, 0)")
    assert not out.exists()
    out.write_text("{}\n")
    fails_with(run_cli(calculate, f"--net={nvae}", *options), "holds no likelihoods")
    out.unlink()
    run(nvae, images, out, "--num=1")
    fails_with(run_cli(calculate, f"--net={nvae}", *options, "--samples=2"), "likelihoods of another samples")
