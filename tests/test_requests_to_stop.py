"""Training that is asked to stop, in any phase: it saves what is new, soon, and makes up for what it left."""

import json
import signal
import time
from pathlib import Path

import pytest
from conftest import DIGITS, TINY

from torch_utils.checkpoint import load_state

PICTURE, METRIC = "fakes-0000001.png", "metric-fd_pixels.jsonl"


def command(folder: Path, reference: Path, *more: str) -> list[tuple[str, list[str]]]:
    measured = ["--metrics=fd_pixels", f"--metrics-ref={reference}", "--metrics-num=4", "--preview-images=4"]
    # States only where a signal asks for them, or at the end.
    options = [*TINY, "--duration=4096", "--snapshot=1024", "--checkpoint=0", "--device=cpu", *measured, *more]
    return [("train_edm2", [f"--outdir={folder}", f"--data={DIGITS}", *options])]


@pytest.mark.parametrize(
    ("where", "nimg", "number"),
    [
        ("loading", 0, signal.SIGTERM),
        ("training", 256, signal.SIGTERM),
        ("training", 256, signal.SIGUSR1),
        ("saving", 1024, signal.SIGTERM),
        ("snapshots", 1024, signal.SIGTERM),
        ("preview", 1024, signal.SIGTERM),
        ("metrics", 1024, signal.SIGTERM),
    ],
)
def test_a_signal_in_any_phase_saves(forks, tmp_path, digits_ref, where, nimg, number):
    folder, log = tmp_path / "run", len(forks.log.read_text())
    options = ["--checkpoint=1024"] if where == "saving" else []
    start = time.monotonic()
    codes = forks.run(1, command(folder, digits_ref, *options), signal=(0, number, where))
    assert codes == [0] and time.monotonic() - start < 30
    said = forks.log.read_text()[log:]
    assert "Asked to stop: trying to save the state first" in said
    assert f"Suspended at {nimg} images" in said
    states = sorted(folder.glob("training-state-*.pt"))
    assert [load_state(path)["nimg"] for path in states] == ([nimg] if nimg else [])
    if where in ("preview", "metrics"):
        assert (folder / PICTURE).is_file() == (where == "metrics")
        assert not (folder / METRIC).exists() and "is not measured: the run is to stop" in said
        # When it continues, it draws and measures what it owes before anything else.
        assert forks.run(1, command(folder, digits_ref, "--slice=256")) == [0]
        assert load_state(max(folder.glob("training-state-*.pt")))["nimg"] == nimg + 256
        records = [json.loads(line) for line in (folder / METRIC).read_text().splitlines()]
        assert [record["nimg"] for record in records] == [nimg, nimg] and (folder / PICTURE).is_file()


def test_a_finished_run_that_owes_metrics(forks, tmp_path, digits_ref):
    """Killed after its last state, or asked for metrics later."""
    options = ["--duration=1024", "--checkpoint=1024"]
    assert forks.run(1, command(tmp_path / "run", digits_ref, *options), fault=(0, 1024, "metrics")) == [-9]
    assert not (tmp_path / "run" / METRIC).exists()
    for _ in range(2):
        assert forks.run(1, command(tmp_path / "run", digits_ref, *options)) == [0]
        assert len((tmp_path / "run" / METRIC).read_text().splitlines()) == 2
    assert "Nothing to do" in forks.log.read_text()


def test_a_process_with_other_weights_is_named(forks, tmp_path, digits_ref):
    log = len(forks.log.read_text())
    options = ["--checkpoint=1024", "--duration=2048", "--snapshot=0", "--preview=0"]
    assert forks.run(2, command(tmp_path / "run", digits_ref, *options), spoil=(1, 512)) == [1, 1]
    said = forks.log.read_text()[log:]
    assert said.count("Error: ") == 1 and "holds other weights at 1024 images than the rest" in said, said
    assert "process 1 of 2" in said and not list((tmp_path / "run").glob("training-state-*"))


@pytest.mark.slow
def test_the_first_process_is_waited_for(forks, tmp_path, digits_ref):
    """Pictures and states may take it longer than exchanges wait."""
    options = ["--checkpoint=1024", "--duration=1024"]
    assert forks.run(2, command(tmp_path / "run", digits_ref, *options), slow=(0.25, 20)) == [0, 0], (
        forks.log.read_text()
    )


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("how", ["stopped", "waiting"])
def test_a_process_that_hangs_ends_the_job(forks, tmp_path, digits_ref, how, rank):
    """Be it stopped as a whole, or its main thread alone, as one that waits for a disk."""
    log = len(forks.log.read_text())
    fault = {"signal": (rank, signal.SIGSTOP, "training")} if how == "stopped" else {"hang": (rank, 1024, "training")}
    start = time.monotonic()
    codes = forks.run(2, command(tmp_path / "run", digits_ref, "--preview=0", "--duration=16384"), patience=1, **fault)
    assert codes[1 - rank] == 1 and time.monotonic() - start < 60 + 10, codes  # 10 for the start
    said = forks.log.read_text()[log:]
    assert f"Error: process {rank} of 2" in said and said.count("Error: ") == 1, said
