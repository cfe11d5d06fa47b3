"""What a run records, and how it keeps other runs out."""

import errno
import io
import json
import math
import os
import signal
import subprocess
import sys

import pytest
from conftest import DIGITS, ROOT, TINY, fails_with, run_cli
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dnnlib.errors import UserError
from train_edm2 import main as train
from training.monitoring.journal import Journal

HOLD = """
import sys, time
from pathlib import Path
from training.monitoring.journal import Journal
with Journal(Path(sys.argv[1])) as journal:
    journal.log("running")
    sys.stdout.flush()
    time.sleep(60)
"""


def names(folder) -> set[str]:
    return {name for name in os.listdir(folder) if not name.startswith("events.")}


def write_lines(path, *records) -> None:
    path.write_text("".join(f"{record if isinstance(record, str) else json.dumps(record)}\n" for record in records))


def read_lines(path) -> list:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------------
# One run at a time


def test_another_run_is_refused(tmp_path):
    with Journal(tmp_path / "a"):
        with pytest.raises(UserError, match="a is in use by another training run: wait for it, or stop it"):
            Journal(tmp_path / "a")
        with Journal(tmp_path / "b"):
            pass
    with Journal(tmp_path / "a"):
        pass


def test_a_killed_run_leaves_no_lock(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"running\n"
    (tmp_path / ".training-state-0000001.pt.0a1b.tmp").write_bytes(b"half")
    command = [train, f"--outdir={tmp_path}", f"--data={DIGITS}", *TINY]
    fails_with(run_cli(*command), "is in use by another training run")
    assert names(tmp_path) == {".lock", ".training-state-0000001.pt.0a1b.tmp", "log.txt"}  # nothing of it is touched
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    with Journal(tmp_path) as journal:
        journal.log("again")
    assert (tmp_path / "log.txt").read_text() == "running\nagain\n"
    assert names(tmp_path) == {".lock", "log.txt"}


def test_a_run_on_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    def flock(_fd: int, _operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)
    with Journal(tmp_path):
        assert "has no locks, so .lock.held stands for one" in capsys.readouterr().err
        with pytest.raises(UserError, match="is in use by another training run"):
            Journal(tmp_path)
    assert names(tmp_path) == {".lock"}


def test_leftovers_of_killed_runs_are_cleared(tmp_path):
    ours = ("training_options.json", "network-snapshot-1-0.1.safetensors", "fakes-1.png", "reals.png", "stats.jsonl")
    for name in (*ours, "metric-fid.jsonl"):
        (tmp_path / f".{name}.0123456789abcdef.tmp").write_bytes(b"half")
    others = {".phema-1-0.1.safetensors.0123456789abcdef.tmp", "training.tmp", ".training"}
    for name in others:
        (tmp_path / name).write_bytes(b"not a run's")
    with Journal(tmp_path):
        assert names(tmp_path) == others | {".lock"}


# ---------------------------------------------------------------------------------------------------------
# Records


def test_records(tmp_path, capsys):
    with Journal(tmp_path) as journal:
        journal.start(0, 100)
        journal.report({"nimg": 50, "time": 1.0, "loss": 2.0, "grad": math.nan, "scale": math.inf})
        journal.report_metrics(50, "EMA-0.100", {"fid": 12.5})
    assert read_lines(tmp_path / "stats.jsonl") == [{"nimg": 50, "time": 1.0, "loss": 2.0, "grad": None, "scale": None}]
    line = "EMA-0.100 at 50 images: fid 12.5\n"
    assert (tmp_path / "log.txt").read_text() == line == capsys.readouterr().out
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "grad", "scale", "fid/EMA-0.100"}
    assert [(e.step, e.value) for e in events.Scalars("fid/EMA-0.100")] == [(50, 12.5)]


def test_resuming_removes_later_records(tmp_path):
    stats = [{"nimg": nimg, "loss": 1.0} for nimg in (50, 100, 150)]
    write_lines(tmp_path / "stats.jsonl", *stats, '{"nimg": 60', "", "[]", '{"nimg": "many"}', "\0\0")
    write_lines(tmp_path / "metric-fid.jsonl", {"nimg": 150}, {"nimg": 50}, {"fid": 1.0})
    with Journal(tmp_path) as journal:
        journal.start(100, 200)
    assert read_lines(tmp_path / "stats.jsonl") == stats[:2]
    assert read_lines(tmp_path / "metric-fid.jsonl") == [{"nimg": 50}, {"fid": 1.0}]


def test_a_progress_bar_on_terminals(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stderr", Terminal())
    with Journal(tmp_path) as journal:
        journal.start(100, 200)
        journal.advance(50)
    shown = [part.split("[")[0] for part in sys.stderr.getvalue().split("\r") if "/200" in part]
    assert " 50%" in shown[1] and "100/200" in shown[1]
    assert " 75%" in shown[-1] and "150/200" in shown[-1]


def test_only_the_first_process_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch_utils.distributed.get_rank", lambda: 1)
    with Journal(tmp_path / "run") as journal, Journal(tmp_path / "run"):
        journal.start(0, 100)
        journal.report({"nimg": 50, "loss": 2.0})
        journal.report_metrics(50, "EMA-0.100", {"fid": 12.5})
        journal.advance(50)
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr() == ("", "")


def test_lines_between_the_reports_where_there_is_no_terminal(tmp_path, monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("dnnlib.progress.monotonic", lambda: now[0])
    monkeypatch.setattr("dnnlib.progress.INTERVAL", 30.0)
    with Journal(tmp_path) as journal:
        journal.start(1000, 2000)
        for seconds in (20, 20, 20):
            now[0] += seconds
            journal.advance(100)
        journal.log("a report")
        now[0] += 20
        journal.advance(100)
    captured = capsys.readouterr()
    assert captured.err == "1200/2000 img  elapsed 40s  left 2m 40s  5 img/s\n" and captured.out == "a report\n"
    assert (tmp_path / "log.txt").read_text() == "a report\n"
