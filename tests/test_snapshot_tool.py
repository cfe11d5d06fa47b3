"""snapshot_tool.py: convert, inspect, export."""

import json
import os
import shutil
import sys

import numpy as np
import torch
from conftest import (
    DIGITS,
    ROOT,
    change_tensor,
    fails_with,
    run_cli,
)

from reconstruct_phema import main as reconstruct
from snapshot_tool import main as snapshot_tool
from training.snapshot import load_network, open_snapshot

sys.path.insert(0, str(ROOT / "scripts"))


def test_convert_one(run, tmp_path):
    source = run / "network-snapshot-0000003-0.100.safetensors"
    half = tmp_path / "half.safetensors"
    assert run_cli(snapshot_tool, "convert", source, half, "--dtype=bf16").exit_code == 0
    stored = {name: open_snapshot(half).get_tensor(name) for name in open_snapshot(half).names}
    assert stored["unet.out_conv.weight"].dtype == torch.bfloat16
    assert stored["unet.emb_fourier.freqs"].dtype == torch.float32
    assert open_snapshot(half).metadata == open_snapshot(source).metadata


def test_convert_directory(run, tmp_path):
    result = run_cli(snapshot_tool, "convert", run, tmp_path / "pkl", "--format=pkl")
    assert result.exit_code == 0, result.output
    names = sorted(path.stem for path in run.glob("*.safetensors"))
    assert sorted(path.name for path in (tmp_path / "pkl").iterdir()) == [f"{name}.pkl" for name in names]
    assert result.output.split() == [str(tmp_path / "pkl" / f"{name}.pkl") for name in names]
    result = run_cli(snapshot_tool, "convert", tmp_path / "pkl", tmp_path / "back", "--skip")
    for name in names:
        before, after = (open_snapshot(folder / f"{name}.safetensors") for folder in (run, tmp_path / "back"))
        for tensor in before.names:
            assert before.dtype(tensor) == after.dtype(tensor)
            assert torch.equal(before.get_tensor(tensor), after.get_tensor(tensor))
    (tmp_path / "back" / f"{names[0]}.safetensors").write_bytes(b"mine")
    result = run_cli(snapshot_tool, "convert", tmp_path / "pkl", tmp_path / "back", "--skip")
    assert (tmp_path / "back" / f"{names[0]}.safetensors").read_bytes() == b"mine"
    # In place; a second time there is nothing to do for those that are there.
    assert run_cli(snapshot_tool, "convert", tmp_path / "pkl", tmp_path / "pkl").exit_code == 0
    assert len(list((tmp_path / "pkl").iterdir())) == 2 * len(names)


def test_conversions_that_cannot_be(run, snapshot_file, tmp_path):
    (tmp_path / "empty").mkdir()
    fails_with(run_cli(snapshot_tool, "convert", tmp_path / "empty", tmp_path / "x"), "empty: no .safetensors or .pkl")
    fails_with(run_cli(snapshot_tool, "convert", snapshot_file, tmp_path / "x.bin"), "x.bin: snapshots are")
    fails_with(
        run_cli(snapshot_tool, "convert", tmp_path / "no.pkl", tmp_path / "x.pkl"), "no.pkl: no such file or directory"
    )
    fails_with(run_cli(snapshot_tool, "convert", run, snapshot_file), "a directory is converted into a directory")
    both = tmp_path / "both"
    both.mkdir()
    for suffix in (".pkl", ".safetensors"):
        assert run_cli(snapshot_tool, "convert", snapshot_file, both / f"a{suffix}").exit_code == 0
    fails_with(run_cli(snapshot_tool, "convert", both, tmp_path / "c"), "another file of that name")
    fails_with(run_cli(snapshot_tool, "bogus"), "No such command 'bogus'")
    assert run_cli(snapshot_tool).output.startswith("Usage:")
    # Nothing is written over what it is made of, or over another original.
    kept = {suffix: (both / f"a{suffix}").read_bytes() for suffix in (".pkl", ".safetensors")}
    fails_with(run_cli(snapshot_tool, "convert", both / "a.pkl", both / "a.pkl"), "is what is converted")
    for suffix in ("pkl", "safetensors"):
        result = run_cli(snapshot_tool, "convert", both, both, f"--format={suffix}", "--dtype=bf16")
        assert "Nothing to convert." in result.output
    assert kept == {suffix: (both / f"a{suffix}").read_bytes() for suffix in (".pkl", ".safetensors")}


def test_spoiled_weights_go_no_further(run, tmp_path):
    for path in run.glob("*.safetensors"):
        shutil.copy(path, tmp_path)
    spoiled = tmp_path / "network-snapshot-0000002-0.050.safetensors"
    change_tensor(spoiled, "unet.out_conv.weight", lambda weight: weight.fill_(float("inf")))
    message = "0000002-0.050.safetensors: unet.out_conv.weight holds NaN or infinity"
    fails_with(run_cli(snapshot_tool, "convert", spoiled, tmp_path / "out.pkl"), message)
    fails_with(run_cli(reconstruct, f"--indir={tmp_path}", "--outstd=0.07"), message)
    assert not (tmp_path / "out.pkl").exists() and not list(tmp_path.glob("phema*"))


def test_inspect(run, tmp_path, digits_ref):
    path = run / "network-snapshot-0000003-0.100.safetensors"
    text = run_cli(snapshot_tool, "inspect", path).output
    for fragment in (
        "edm2.Precond",
        "ema_std:            0.1",
        "nimg:               3072",
        "dtype:              float16",
    ):
        assert fragment in text
    facts = json.loads(run_cli(snapshot_tool, "inspect", path, "--json").output)
    assert facts["bytes"] == path.stat().st_size
    assert facts["parameters"] == sum(p.numel() for p in load_network(path).net.parameters())
    facts = json.loads(run_cli(snapshot_tool, "inspect", digits_ref, "--json").output)
    assert facts["fd_pixels"] == "mean and covariance of 192 features, 192 features of 1797 images"
    assert (facts["num_images"], facts["resolution"], facts["facts"]["data"]) == (1797, 8, str(DIGITS))
    digits_ref = shutil.copy(digits_ref, tmp_path / "cut.safetensors")
    os.truncate(digits_ref, 50_000)
    fails_with(run_cli(snapshot_tool, "inspect", digits_ref), "cut.safetensors: damaged or truncated")
    np.savez(tmp_path / "ref.npz", mu=np.zeros(3), sigma=np.eye(3))
    facts = json.loads(run_cli(snapshot_tool, "inspect", tmp_path / "ref.npz", "--json").output)
    assert facts["fid"] == "mean and covariance of 3 features"
