"""Post-hoc reconstruction keeps to the memory that it is given."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, fails_with, run_cli

from dnnlib.errors import UserError
from reconstruct_phema import main as reconstruct
from training.encoders import StandardRGBEncoder
from training.networks.edm2 import Precond
from training.snapshot import open_snapshot, save_network
from training.snapshot.reconstruction import list_averages, reconstruct_phema

TIMES, WIDTHS, MB = (1000, 2000, 3000, 4000), (0.05, 0.10), 1_000_000
RESET = Path("/proc/self/clear_refs")
# A process tells its peak memory while it makes 8 averages, within so much memory and without a limit, beyond what it had
# after a first, small reconstruction.
MEASURE = """
import re, sys
from pathlib import Path
import torch
from training.snapshot.reconstruction import list_averages, reconstruct_phema

def status(key):
    return int(re.search(key + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

torch.set_num_threads(4)  # each of which takes its share
folder, out, memory = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
reconstruct_phema(list_averages(folder.with_name("small")), out, "small", [0.07])
inputs = list_averages(folder)
for limit in (memory, None):
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that from here on
    before = status("VmRSS")
    reconstruct_phema(inputs, out, "net", [0.02, 0.03, 0.04, 0.06, 0.07, 0.08, 0.12, 0.15], memory=limit)
    print(status("VmHWM") - before)
"""


def write_snapshots(folder: Path, channels: int, suffix: str) -> None:
    folder.mkdir(exist_ok=True)
    for nimg in TIMES:
        for std in WIDTHS:
            net = Precond(8, 3, 0, model_channels=channels, channel_mult=[1], num_blocks=1, attn_resolutions=[])
            path = folder / f"net-{nimg // 1000:07d}-{std:.3f}{suffix}"
            save_network(path, net, StandardRGBEncoder(), {"nimg": nimg, "ema_std": std})


@pytest.fixture(scope="module", params=[".safetensors", ".pkl"])
def large(request, tmp_path_factory):
    """A folder of snapshots of 6 MB each."""
    folder = tmp_path_factory.mktemp("snapshots")
    write_snapshots(folder / "small", 8, request.param)
    write_snapshots(folder / "large", 160, request.param)
    assert 5 * MB < next((folder / "large").iterdir()).stat().st_size < 8 * MB
    return folder / "large"


def kind(folder: Path) -> str:
    """Suffix of the files in a folder."""
    (suffix,) = {path.suffix for path in folder.iterdir()}
    return suffix


@pytest.mark.skipif(not RESET.exists(), reason="needs the peak memory of a process, as Linux tells it")
def test_peak_memory(large, tmp_path):
    """Also the pages of files that are mapped into memory count. Pickles are written when all of their values are there."""
    memory, unlimited = (4 * MB, 13 * MB) if kind(large) == ".safetensors" else (24 * MB, 40 * MB)
    command = [sys.executable, "-c", MEASURE, str(large), str(tmp_path), str(memory)]
    env = {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr
    within, without = map(int, result.stdout.split())
    assert within < memory + 8 * MB  # for Python and the C library
    assert without > unlimited


def test_results_do_not_depend_on_memory(large, tmp_path):
    inputs = list_averages(large)
    for memory in (None, 24 * MB):
        outdir = tmp_path / str(memory)
        lines: list[str] = []
        reconstruct_phema(inputs, outdir, "a", [0.03, 0.07, 0.15], memory=memory, log=lines.append)
        passes = next(line for line in lines if line.startswith("Reading"))
        assert (passes.endswith("2 times")) == (memory is not None and kind(large) == ".pkl")
    first, second = (sorted((tmp_path / memory).iterdir()) for memory in ("None", str(24 * MB)))
    for path, other in zip(first, second, strict=True):
        ours, theirs = open_snapshot(path), open_snapshot(other)
        for name in ours.names:
            torch.testing.assert_close(ours.get_tensor(name), theirs.get_tensor(name), rtol=2**-10, atol=2**-14)


def test_too_little_memory(large, tmp_path):
    args = [f"--indir={large}", f"--outdir={tmp_path}", "--outstd=0.07", "--format=pkl", "--memory=1MB"]
    fails_with(run_cli(reconstruct, *args), "--memory=1 MB: a result takes", "--format=safetensors needs less")
    with pytest.raises(UserError, match=r"--memory=0\.1 MB: a result takes"):
        reconstruct_phema(list_averages(large), tmp_path, "a", [0.07], suffix=".safetensors", memory=100_000)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "5", "-1GB", "0MB", "1e9B", "5 GB"])
def test_sizes_that_are_none(tmp_path, text):
    fails_with(run_cli(reconstruct, f"--indir={tmp_path}", "--outstd=0.07", f"--memory={text}"), "--memory")


def test_tensors_in_another_order_count(tmp_path):
    """Those of channels_last are loaded to be read, of all files at a time."""
    for nimg in TIMES:
        for std in WIDTHS:
            weight = torch.randn(64, 64, 3, 3).to(memory_format=torch.channels_last)
            torch.save({"weight": weight}, tmp_path / f"net-{nimg // 1000}-{std}.pt")
    inputs = list_averages(tmp_path)
    with pytest.raises(UserError, match="--memory=5 MB: a result takes"):
        reconstruct_phema(inputs, tmp_path / "out", "a", [0.07], suffix=".safetensors", memory=5 * MB)
    (made,) = reconstruct_phema(inputs, tmp_path / "out", "a", [0.05], memory=100 * MB)
    stored = torch.load(tmp_path / "net-4-0.05.pt")["weight"]
    torch.testing.assert_close(torch.load(made)["weight"], stored, rtol=1e-5, atol=1e-6)
