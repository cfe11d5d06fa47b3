"""Training that is killed at random, again and again: nothing is lost, nothing is torn, nothing is different at the end."""

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import DIGITS, TINY, run_cli
from faults import PLACES
from forked import Forks

from calculate_metrics import main as metrics_tool
from torch_utils.checkpoint import load_state
from training.snapshot import load_network

INTERVAL = 1024  # images between training states, and between snapshots
KILLED = -9
EVERYWHERE = (*PLACES, "at any time")
ON_FIRST = {
    "copying",
    "saving",
    "renaming",
    "renamed",
    "snapshots",
    "snapshot",
    "preview",
}  # what other processes do not do


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("ref") / "digits.safetensors"
    result = run_cli(metrics_tool, "ref", f"--data={DIGITS}", f"--dest={path}", "--metrics=fd_pixels", "--workers=0")
    assert result.exit_code == 0, result.output
    return path


def command(folder: Path, reference: Path, duration: int) -> list[tuple[str, list[str]]]:
    options = [
        *TINY,
        "--dropout=0.2",
        f"--duration={duration}",
        f"--snapshot={INTERVAL}",
        f"--checkpoint={INTERVAL}",
        f"--preview={2 * INTERVAL}",
        "--preview-images=2",
        "--preview-steps=2",
        "--metrics=fd_pixels",
        f"--metrics-ref={reference}",
        "--metrics-num=4",
        "--device=cpu",
    ]
    return [("train_edm2", [f"--outdir={folder}", f"--data={DIGITS}", *options])]


def newest_state(folder: Path) -> int:
    """Images of the newest training state; 0 = there is none. Every one that has its name is whole."""
    return max([load_state(path)["nimg"] for path in folder.glob("training-state-*.pt")], default=0)


def check_files(folder: Path) -> None:
    """Every file that has its name is whole."""
    for path in folder.glob("network-snapshot-*"):
        load_network(path)
    for path in folder.glob("*.png"):
        PIL.Image.open(path).load()
    for path in folder.glob("*.json"):
        json.loads(path.read_text())
    for path in folder.glob("*.jsonl"):
        for line in path.read_text().splitlines():
            json.loads(line)


def noted(progress: Path, rank: int) -> int:
    """Images that a process had seen when it ended."""
    path = progress.with_name(f"{progress.name}.{rank}")
    return int((path.is_file() and path.read_text()) or 0)


def kill_and_continue(
    forks: Forks, folder: Path, reference: Path, duration: int, kills: int, processes: int
) -> Counter:
    """Train to the end in spite of so many kills; how many there were at each place."""
    rng, tally, repeated = random.Random(0), Counter(), []
    places = [EVERYWHERE[i % len(EVERYWHERE)] for i in range(kills)]
    rng.shuffle(places)
    for where in places:
        before = newest_state(folder) if folder.is_dir() else 0
        progress = folder.with_name(f"progress-{tally.total()}")
        rank = 0 if where in ON_FIRST else rng.randrange(processes)
        if where == "at any time":
            fault = {"kill": (rank, rng.uniform(0.05, 1.0))}
        else:
            fault = {"fault": (rank, before + rng.randrange(INTERVAL), where)}
        codes = forks.run(processes, command(folder, reference, duration), progress=str(progress), **fault)
        log = forks.log.read_text()
        assert codes[rank] == KILLED, (where, codes, log)
        assert all(code in (KILLED, 1) for code in codes), (where, codes, log)
        check_files(folder)
        # One interval of work, and what was trained while the state at its end was being written.
        lost = noted(progress, rank) - newest_state(folder)
        assert newest_state(folder) >= before and lost < 2 * INTERVAL, (where, lost)
        repeated.append(max(lost, 0))
        tally[where] += 1
    assert newest_state(folder) < duration, "the run ended before the last kill: give it a longer duration"
    assert forks.run(processes, command(folder, reference, duration)) == [0] * processes, forks.log.read_text()
    for where in EVERYWHERE:
        print(f"{where:<12s} {tally[where]}")
    print(f"{tally.total()} kills; images repeated: {np.mean(repeated):.0f} on average, {max(repeated)} at most")
    return tally


def assert_same_run(ours: Path, theirs: Path, duration: int) -> None:
    """Two runs are equal bit by bit, but for when and how long."""
    a, b = (load_state(path / f"training-state-{duration // 1000:07d}.pt") for path in (ours, theirs))
    assert a["nimg"] == b["nimg"] == duration
    for part in ("net", "ema", "optimizer"):
        for x, y in zip(tensors(a[part]), tensors(b[part]), strict=True):
            assert torch.equal(x, y), part
    names = [sorted(path.name for path in folder.glob("*.safetensors")) for folder in (ours, theirs)]
    assert names[0] == names[1]
    for name in names[0]:
        x, y = (load_network(folder / name).net.state_dict() for folder in (ours, theirs))
        assert all(torch.equal(x[key], y[key]) for key in y), name
    for name in ("stats.jsonl", "metric-fd_pixels.jsonl"):
        x, y = (
            [comparable(json.loads(line)) for line in (path / name).read_text().splitlines()] for path in (ours, theirs)
        )
        assert x == y, name


def comparable(record: dict) -> dict:
    keep = ("nimg", "loss", "lr", "net", "results")
    return {name: record[name] for name in keep if name in record}


def tensors(value: object) -> list[torch.Tensor]:
    """All tensors of nested containers, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else []
    return [x for part in parts for x in tensors(part)]


def chaos(forks: Forks, folder: Path, reference: Path, duration: int, kills: int, processes: int) -> Counter:
    tally = kill_and_continue(forks, folder / "killed", reference, duration, kills, processes)
    assert forks.run(processes, command(folder / "whole", reference, duration)) == [0] * processes
    assert_same_run(folder / "killed", folder / "whole", duration)
    return tally


def test_ten_kills(forks, tmp_path, reference):
    tally = chaos(forks, tmp_path, reference, duration=11 * INTERVAL, kills=10, processes=1)
    assert tally.total() == 10


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "kills"), [(1, 120), (2, 80)])
def test_two_hundred_kills(forks, tmp_path, reference, processes, kills):
    tally = chaos(forks, tmp_path, reference, duration=kills * INTERVAL, kills=kills, processes=processes)
    assert tally.total() == kills
