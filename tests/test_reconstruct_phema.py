"""reconstruct_phema.py: every option, and bad input."""

import os
import re
import shutil
import sys

import PIL.Image
import pytest
import torch
from conftest import (
    ROOT,
    assert_all_options,
    fails_with,
    run_cli,
    tiny_network,
)

from dnnlib.errors import UserError
from dnnlib.files import atomic_write
from reconstruct_phema import main as reconstruct
from snapshot_tool import main as snapshot_tool
from training.encoders import StandardRGBEncoder
from training.phema import solve_posthoc_coefficients, std_to_exp
from training.snapshot import load_network, save_network
from training.snapshot.profiles import true_errors
from training.snapshot.reconstruction import list_averages, reconstruct_phema

sys.path.insert(0, str(ROOT / "scripts"))


def test_all_reconstruction_options(run, tmp_path):
    args = [
        f"--indir={run}", "--inprefix=network-snapshot", "--instd=0.05,0.1", f"--outdir={tmp_path}", "--outprefix=posthoc",
        "--outstd=0.05,0.10,...,0.20", "--outkimg=2", "--skip", "--batch=2", "--format=safetensors",
        f"--plot={tmp_path.parent / 'responses.png'}", "--verify", "--memory=64MiB",
    ]  # fmt: skip
    result = run_cli(reconstruct, *args)
    assert result.exit_code == 0, result.output
    assert_all_options(reconstruct, [*args, "--latest="])
    assert "Reading 0.0" in result.stdout and "MB of 4 snapshots, 2 times" in result.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        f"posthoc-0000002-0.{std}.safetensors" for std in ("050", "100", "150", "200")
    ]
    metadata = load_network(tmp_path / "posthoc-0000002-0.150.safetensors").metadata
    assert metadata["ema_std"] == 0.15
    assert metadata["nimg"] == 2048
    # Skipped when there.
    times = {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    (tmp_path / "posthoc-0000002-0.200.safetensors").unlink()
    lines = run_cli(reconstruct, *args).stdout.splitlines()
    lines = [line for line in lines if line.startswith(str(tmp_path))]
    assert [line.endswith("(skipped: it is there)") for line in lines] == [True, True, True, False]
    changed = [p.name for p, time in times.items() if p.stat().st_mtime_ns != time]
    assert changed == ["posthoc-0000002-0.200.safetensors"]
    with PIL.Image.open(tmp_path.parent / "responses.png") as picture:
        assert picture.size[0] > 1000 and "reconstruct_phema.py" in picture.info["Description"]


def test_leftovers_of_killed_commands(run, tmp_path):
    """Also of other widths than those that are made now; not of other programs, and not what is being written."""
    stale = [f".phema-000000{k}-0.0{std}0.safetensors.0123456789abcdef.tmp" for k in (1, 2) for std in (3, 4)]
    others = [".other-0000001-0.050.safetensors.0123456789abcdef.tmp", ".phema-mine.tmp"]
    for name in stale + others:
        (tmp_path / name).write_bytes(b"half")
    with atomic_write(tmp_path / "phema-0000002-0.090.safetensors") as f:
        f.write(b"half")
        result = run_cli(reconstruct, f"--indir={run}", f"--outdir={tmp_path}", "--outstd=0.07")
        assert result.exit_code == 0, result.output
    assert "Removed 4 half-written files of commands that were killed: phema-0000001-0.030.safeten" in result.stdout
    left = {"phema-0000003-0.070.safetensors", "phema-0000002-0.090.safetensors", *others}
    assert {path.name for path in tmp_path.iterdir()} == left


def test_progress_in_bytes_with_the_time_left(run, tmp_path, monkeypatch):
    monkeypatch.setattr("dnnlib.progress.INTERVAL", 0)
    result = run_cli(reconstruct, f"--indir={run}", f"--outdir={tmp_path}", "--outstd=0.07")
    assert re.search(r"^[\d.]+k?/[\d.]+k? B  elapsed \d+s  left \d+s  [\d.]+[kM]? B/s$", result.stderr, re.MULTILINE)


def test_unreadable_input_is_named(run, tmp_path):
    indir = tmp_path / "in"
    shutil.copytree(run, indir)
    path = indir / "network-snapshot-0000002-0.100.safetensors"
    path.write_bytes(path.read_bytes()[:3000])
    args = [f"--indir={indir}", f"--outdir={tmp_path / 'out'}", "--outstd=0.07"]
    fails_with(run_cli(reconstruct, *args), f"{path}: damaged or truncated")
    assert not (tmp_path / "out").exists()


def test_snapshots_that_are_too_alike(run, tmp_path):
    """Many widths at few times: what they do not have in common drowns in rounding."""
    for path in run.glob("network-snapshot-*-0.050.safetensors"):
        snapshot = load_network(path)
        for k in range(12):
            std = 0.05 + 0.001 * k
            copy = tmp_path / f"{path.name[:-18]}-{std:.3f}.safetensors"
            save_network(copy, snapshot.net, snapshot.encoder, {"nimg": snapshot.metadata["nimg"], "ema_std": std})
    args = [f"--indir={tmp_path}", f"--outdir={tmp_path / 'out'}", "--outstd=0.02"]
    fails_with(run_cli(reconstruct, *args), "36 stored averages are too alike", "(condition number ", "--instd")
    assert not (tmp_path / "out").exists()
    result = run_cli(reconstruct, *args, "--instd=0.05,0.052")
    assert re.search(r"Note: large sums nearly cancel.*: 0.020 \d", result.stdout)


def test_expected_and_true_errors(run, tmp_path):
    """Said before anything is made; a tracked width is exact, and one that is narrow beyond the snapshots is not."""
    args = [f"--indir={run}", f"--outdir={tmp_path}", "--verify"]
    result = run_cli(reconstruct, *args, "--outstd=0.010,0.050,0.100")
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("Expected errors")]
    errors = {std: float(error) for std, error in re.findall(r"(0\.\d{3}) ([\d.]+)%", line)}
    assert errors["0.050"] == errors["0.100"] == 0 and errors["0.010"] > 30
    assert "Note: the snapshots cannot represent 0.010 well" in result.stdout
    assert "Note" not in run_cli(reconstruct, *args, "--outstd=0.050,0.060").stdout
    found = re.findall(r"Width (0\.\d{3}) from the others: expected error ([\d.]+)%, true ([\d.]+)%", result.stdout)
    assert [std for std, _, _ in found] == ["0.050", "0.100"]
    assert all(0 < float(true) < float(expected) for _, expected, true in found)


def test_true_error_of_weights_on_a_line(tmp_path):
    """Averages of weights that grow as t have a closed form, and so has what others make of them."""
    net = tiny_network()
    exact = {std: (exp + 1) / (exp + 2) for std in (0.05, 0.1) for exp in [float(std_to_exp(std))]}
    for kimg in (1, 2, 3, 4):
        for std, mean in exact.items():
            for p in net.parameters():
                p.data.fill_(kimg * mean)
            path = tmp_path / f"network-snapshot-{kimg:07d}-{std:.3f}.safetensors"
            save_network(path, net, StandardRGBEncoder(), {"nimg": kimg * 1000, "ema_std": std}, torch.float32)
    inputs = list_averages(tmp_path)
    for std, _, true in true_errors(inputs, 4000):
        others = [avg for avg in inputs if (avg.nimg, avg.std) != (4000, std)]
        times, widths = [avg.nimg for avg in others], [avg.std for avg in others]
        coefs = solve_posthoc_coefficients(times, widths, 4000, std)[:, 0]
        made = sum(c * avg.nimg / 1000 * exact[round(avg.std, 2)] for c, avg in zip(coefs, others, strict=True))
        assert true == pytest.approx(abs(made / (4 * exact[round(std, 2)]) - 1), rel=1e-3)


def test_one_snapshot_cannot_be_verified(tmp_path, snapshot_file):
    folder = tmp_path / "one"
    folder.mkdir()
    shutil.copy(snapshot_file, folder / "tiny-0000001-0.050.safetensors")
    fails_with(
        run_cli(reconstruct, f"--indir={folder}", "--outstd=0.07", "--verify"), "--verify needs another snapshot"
    )


@pytest.mark.parametrize("kimg", [2, 3])
def test_tracked_width_is_reproduced(run, tmp_path, kimg):
    run_cli(reconstruct, f"--indir={run}", f"--outdir={tmp_path}", "--outstd=0.05,0.1", f"--outkimg={kimg}")
    for std in ("0.050", "0.100"):
        made, stored = (
            load_network(d / f"{p}-{kimg:07d}-{std}.safetensors").net
            for d, p in [(tmp_path, "phema"), (run, "network-snapshot")]
        )
        for name, tensor in stored.state_dict().items():
            torch.testing.assert_close(made.state_dict()[name], tensor, rtol=2**-10, atol=2**-14)


def test_batch_of_outputs_does_not_matter(run, tmp_path):
    for batch in (1, 8):
        run_cli(
            reconstruct, f"--indir={run}", f"--outdir={tmp_path / str(batch)}", "--outstd=0.03,0.15", f"--batch={batch}"
        )
    for std in ("0.030", "0.150"):
        a, b = (load_network(tmp_path / batch / f"phema-0000003-{std}.safetensors").net.state_dict() for batch in "18")
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=2**-10, atol=2**-14)


@pytest.mark.parametrize("preadv", [True, False])
def test_reconstruction_from_snapshots_of_several_kinds(run, tmp_path, monkeypatch, preadv):
    mixed = tmp_path / "mixed"
    shutil.copytree(run, mixed)
    for name, suffix, dtype in [("0000001-0.050", ".safetensors", "fp32"), ("0000002-0.100", ".pkl", "fp16")]:
        old = mixed / f"network-snapshot-{name}.safetensors"
        old.unlink()
        source = run / old.name
        result = run_cli(snapshot_tool, "convert", source, old.with_suffix(suffix), f"--dtype={dtype}")
        assert result.exit_code == 0, result.output
    if not preadv:  # as on Windows
        monkeypatch.delattr(os, "preadv")
    made = []
    for indir in (run, mixed):
        outdir = tmp_path / f"of-{indir.name}"
        result = run_cli(reconstruct, f"--indir={indir}", f"--outdir={outdir}", "--outstd=0.07", "--format=safetensors")
        assert result.exit_code == 0, result.output
        made.append(load_network(outdir / "phema-0000003-0.070.safetensors").net.state_dict())
    for name, tensor in made[0].items():
        torch.testing.assert_close(made[1][name], tensor, rtol=2**-10, atol=2**-14)


def test_snapshot_that_becomes_shorter(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    inputs = list_averages(tmp_path / "run", "network-snapshot")
    with open(inputs[1].path, "r+b") as f:
        f.truncate(inputs[1].path.stat().st_size - 100)
    with pytest.raises(UserError, match="cannot be read.*copy it again"):
        reconstruct_phema(inputs, tmp_path / "out", "phema", [0.07])
    assert not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (["--outstd=0.5"], ["--outstd", "between 0.001 and 0.289"]),
        (["--outstd=0.1,0.2,...,0.25"], ["--outstd", "even steps"]),
        (["--outstd=0.1,0.1001"], ["two widths share a file name"]),
        (
            ["--outstd=0.1", "--outkimg=7"],
            ["--outkimg=7: there is no snapshot of that time (nearest: 2, 3; 3 in all, from 1 to 3)"],
        ),
        (["--outstd=0.1", "--instd=0.07"], ["--instd: no snapshots of width 0.070", "(there are 0.050, 0.100)"]),
        (
            ["--outstd=0.1", "--inprefix=bogus"],
            ["no snapshots named bogus-KIMG-WIDTH", "(found: network-snapshot-0000001-0.050.safe", "and 5 more)"],
        ),
        (["--outstd=0.1", "--format=pt"], ["--format=pt is for plain state dicts"]),
        (["--outstd=0.1", "--latest=*mean"], ["--latest is for plain state dicts"]),
        (["--outstd=0.1", "--memory=5"], ["--memory: '5' is not a number of bytes: write 500MB"]),
        (["--outstd=0.289"], ["--outstd", "between 0.001 and 0.289"]),
        (["--outstd=0"], ["--outstd", "between 0.001 and 0.289"]),
        (["--outstd=0.1", "--outprefix=network-snapshot"], ["results in --indir need another prefix"]),
        (["--outstd=0.1", "--indir=nowhere"], ["--indir=nowhere: no such directory"]),
        ([], ["--outstd"]),
    ],
)
def test_bad_reconstruction_options(run, options, fragments):
    before = set(run.iterdir())
    fails_with(run_cli(reconstruct, f"--indir={run}", *options), *fragments)
    assert set(run.iterdir()) == before


def test_reconstruction_overwrites_nothing_but_reconstructions(run, tmp_path):
    for name in ("0000003-0.050", "0000003-0.100"):
        shutil.copy(run / f"network-snapshot-{name}.safetensors", tmp_path)
    args = [f"--indir={run}", f"--outdir={tmp_path}", "--instd=0.05", "--outstd=0.1"]
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    fails_with(
        run_cli(reconstruct, *args, "--outprefix=network-snapshot"),
        "network-snapshot-0000003-0.100.safetensors exists, and does not say that it is a reconstruction",
    )
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before
    for _again in range(2):
        assert run_cli(reconstruct, *args).exit_code == 0


def test_reconstructions_are_no_snapshots(run, tmp_path):
    args = [f"--indir={run}", f"--outdir={tmp_path}", "--outstd=0.08"]
    assert run_cli(reconstruct, *args).exit_code == 0
    fails_with(
        run_cli(reconstruct, f"--indir={tmp_path}", "--outstd=0.1"),
        f"--indir={tmp_path}: only reconstructions (phema-0000003-0.080.safetensors)",
    )


def test_snapshots_of_two_runs(run, tmp_path):
    shutil.copy(run / "network-snapshot-0000003-0.050.safetensors", tmp_path)
    save_network(
        tmp_path / "network-snapshot-0000001-0.050.safetensors",
        tiny_network(),
        StandardRGBEncoder(),
        {"nimg": 1024, "ema_std": 0.05},
    )
    fails_with(
        run_cli(reconstruct, f"--indir={tmp_path}", "--outstd=0.1"),
        "network-snapshot-0000001-0.050.safetensors holds another network than ",
        "(unet.dec.8x8_block0.conv_res0.weight is [8, 24, 3, 3], there [4, 8, 3, 3])",
    )
    save_network(tmp_path / "network-snapshot-0000001-0.050.safetensors", tiny_network(), StandardRGBEncoder(), {})
    fails_with(run_cli(reconstruct, f"--indir={tmp_path}", "--outstd=0.1"), "does not say its training time")
    shutil.copy(
        run / "network-snapshot-0000003-0.050.safetensors", tmp_path / "network-snapshot-0000001-0.050.safetensors"
    )
    fails_with(run_cli(reconstruct, f"--indir={tmp_path}", "--outstd=0.1"), "are of the same time and width")
