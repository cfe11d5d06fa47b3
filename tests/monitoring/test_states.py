"""Training states: written in the background, pruned, and refused where there is no room."""

import re
import shutil
import threading
from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import DIGITS, TINY, fails_with, run_cli

from dnnlib.errors import RunError
from torch_utils.checkpoint import load_state
from train_edm2 import main as train
from training.monitoring import states
from training.monitoring.states import StateWriter, on_cpu
from training.training_loop import TrainingRun


@pytest.fixture
def lines() -> list[str]:
    return []


def found(folder) -> list[int]:
    """Thousands of images of the states."""
    return sorted(int(path.stem[-7:]) for path in folder.glob("training-state-0*.pt"))


def test_a_copy_does_not_follow(tmp_path, lines):
    """What is written is the state at the time of saving, not at the time of writing."""
    weights = torch.zeros(1000)
    with StateWriter(tmp_path, 2, 0, lines.append) as writer:
        writer.save(1000, {"net": {"w": weights}, "numbers": [1, (2.0, weights[:2])], "nimg": 1000})
        weights += 1
    saved = load_state(tmp_path / "training-state-0000001.pt")
    assert torch.equal(saved["net"]["w"], torch.zeros(1000)) and saved["numbers"][0] == 1 and saved["nimg"] == 1000
    assert torch.equal(saved["numbers"][1][1], torch.zeros(2))
    assert re.fullmatch(r"Saving a training state of 0.0 MB: training waited \d+ ms", lines[0])


def test_copies_keep_what_state_dicts_say_of_themselves():
    given = torch.nn.BatchNorm1d(3).state_dict()
    copied = on_cpu(given)
    assert isinstance(copied, OrderedDict) and vars(copied) == vars(given) != {}
    assert all(torch.equal(copied[name], given[name]) and copied[name] is not given[name] for name in given)


def test_training_goes_on_while_a_state_is_written(tmp_path, lines, monkeypatch):
    begun, finish = threading.Event(), threading.Event()
    original = states.save_state

    def slow(path, state):
        begun.set()
        assert finish.wait(60)
        original(path, state)

    monkeypatch.setattr(states, "save_state", slow)
    writer = StateWriter(tmp_path, 2, 0, lines.append)
    writer.save(1000, {"nimg": 1000})
    assert begun.wait(60)  # and yet save() came back
    assert found(tmp_path) == []
    finish.set()
    writer.wait()
    assert found(tmp_path) == [1]


@pytest.mark.parametrize(
    ("keep", "milestones", "left"),
    [(2, 0, [5, 6]), (1, 0, [6]), (10, 0, [1, 2, 3, 4, 5, 6]), (2, 3000, [3, 5, 6]), (1, 2048, [2, 4, 6])],
)
def test_the_newest_and_milestones_are_kept(tmp_path, lines, keep, milestones, left):
    other = tmp_path / "training-state-best.pt"
    other.write_bytes(b"a user's")
    step = 1024 if milestones == 2048 else 1000
    with StateWriter(tmp_path, keep, milestones, lines.append) as writer:
        for i in range(1, 7):
            writer.save(i * step, {"nimg": i * step})
    assert found(tmp_path) == left
    assert other.is_file()


def test_a_state_just_written_stays_beside_damaged_newer_ones(tmp_path, lines):
    """Those that a run has skipped when it resumed must not push out good ones."""
    (tmp_path / "training-state-0000096.pt").write_bytes(b"damaged")
    with StateWriter(tmp_path, 1, 0, lines.append) as writer:
        writer.save(64000, {"nimg": 64000})
    assert found(tmp_path) == [64]


def test_what_keeps_a_state_from_being_written_ends_the_training(tmp_path, lines, monkeypatch):
    def full(path, state):
        raise OSError(28, "No space left on device", str(path))

    with StateWriter(tmp_path, 2, 0, lines.append) as writer:
        writer.save(1000, {"nimg": 1000})
    monkeypatch.setattr(states, "save_state", full)
    writer.save(2000, {"nimg": 2000})
    with pytest.raises(OSError, match="No space left"):
        writer.wait()
    writer.raise_failure()  # once only
    assert found(tmp_path) == [1]


def test_no_room(tmp_path, lines, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=1000))
    with pytest.raises(RunError, match=r"a training state needs 4\.0 MB, and 0\.0 MB are free: make room"):
        StateWriter(tmp_path, 2, 0, lines.append).save(1000, {"w": torch.zeros(1_000_000)})
    assert found(tmp_path) == []
    result = run_cli(train, f"--outdir={tmp_path}", f"--data={DIGITS}", *TINY, "--dry-run")
    assert "Warning: that is not enough" in result.output


def test_slices_make_up_a_run(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    common = [f"--data={DIGITS}", *TINY, "--preview=0"]
    assert run_cli(train, f"--outdir={whole}", *common).exit_code == 0
    first = run_cli(train, f"--outdir={parts}", *common, "--slice=300")
    assert "Suspended at 512 images by --slice=300; repeat the command to continue" in first.output
    assert "training states of" in first.output and "are free" in first.output
    while "Done" not in run_cli(train, f"--outdir={parts}", *common, "--slice=300").output:
        assert found(parts)
    a, b = (torch.load(path / "training-state-0000001.pt")["net"] for path in (whole, parts))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_time_limits(tmp_path):
    common = [f"--outdir={tmp_path}", f"--data={DIGITS}", *TINY, "--preview=0", "--checkpoint=0"]
    result = run_cli(train, *common, "--max-time=1e-6")
    assert re.search(r"Suspended at (0|256|512|768) images by --max-time=1e-06; repeat the command", result.output)
    result = run_cli(train, *common, "--checkpoint-minutes=1e-9", "--keep-checkpoints=9", "--slice=512")
    assert result.output.count("Saving a training state") == 2


@pytest.mark.parametrize("rank", [0, 1])
def test_minutes_are_those_of_the_process_that_writes(rank, monkeypatch):
    """On the others, the last state never gets younger."""
    monkeypatch.setattr("torch_utils.distributed.get_rank", lambda: rank)
    run: Any = SimpleNamespace(states=SimpleNamespace(age=lambda: 61.0))
    for minutes, old in {0.0: False, 1.0: rank == 0, 2.0: False}.items():
        run.config = SimpleNamespace(run=SimpleNamespace(checkpoint_minutes=minutes))
        assert TrainingRun.is_state_old(run) is old


def test_milestones_are_states_that_are_saved(tmp_path):
    common = [f"--outdir={tmp_path}", f"--data={DIGITS}", *TINY]
    result = run_cli(train, *common, "--checkpoint=1024", "--milestones=1536")
    fails_with(result, "--milestones=1536 must be a multiple of --checkpoint=1024")
    fails_with(run_cli(train, *common, "--checkpoint=0", "--milestones=1536"), "a multiple of --checkpoint=0")
