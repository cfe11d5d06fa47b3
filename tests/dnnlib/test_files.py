"""Whole files, locks and checksums."""

import errno
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import ROOT

from dnnlib.files import append_line, atomic_write, clear_leftovers, file_sha256, leftovers, locked, naming_errors


def refuse() -> None:
    raise LookupError("busy")


# ---------------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("sync", [False, True])
def test_a_file_appears_when_it_is_complete(sync, tmp_path):
    path = tmp_path / "new" / "a.bin"
    with atomic_write(path, sync=sync) as f:
        f.write(b"half")
        f.flush()
        assert not path.exists()
        assert [p.read_bytes() for p in leftovers(path.parent)] == [b"half"]
        f.write(b" and half")
    assert path.read_bytes() == b"half and half"
    assert os.listdir(path.parent) == ["a.bin"]


def test_text(tmp_path):
    with atomic_write(tmp_path / "a.txt", "w") as f:
        f.write("text\n")
    assert (tmp_path / "a.txt").read_text() == "text\n"


def test_a_failure_leaves_the_file_before(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"before")

    def fail() -> None:
        with atomic_write(path) as f:
            f.write(b"half")
            f.flush()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_files_have_the_usual_permissions(tmp_path):
    with atomic_write(tmp_path / "a.bin") as f:
        f.write(b"x")
    (tmp_path / "b.bin").write_bytes(b"x")
    assert (tmp_path / "a.bin").stat().st_mode == (tmp_path / "b.bin").stat().st_mode


def test_one_process_id_writes_a_file_twice_at_once(tmp_path):
    """Process 1 of two containers, say: neither may take the other's half-written file."""
    path = tmp_path / "a.bin"
    with atomic_write(path) as first:
        first.write(b"first")
        with atomic_write(path) as second:
            second.write(b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["a.bin"]


KILLED = """
import os, signal, sys
from pathlib import Path
from dnnlib.files import atomic_write
with atomic_write(sys.argv[1], sync=False) as f:
    f.write(b"half")
    f.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_leftovers_are_cleared_when_a_file_is_written_again(tmp_path):
    """Those of killed processes, of the same file; not what is being written."""
    for name in ("a.bin", "b.bin", "a.bin.x"):
        subprocess.run([sys.executable, "-c", KILLED, tmp_path / name], cwd=ROOT)
    foreign = tmp_path / ".a.bin.tmp"
    foreign.write_bytes(b"mine")
    assert len(leftovers(tmp_path)) == 4
    with atomic_write(tmp_path / "a.bin") as f:
        f.write(b"first")
        with atomic_write(tmp_path / "a.bin") as g:
            g.write(b"second")
        assert len(leftovers(tmp_path)) == 4  # foreign, this one, and those of the other files
    assert (tmp_path / "a.bin").read_bytes() == b"first"
    with atomic_write(tmp_path / "a.bin", sync=False) as f:
        clear_leftovers([tmp_path / "a.bin", tmp_path / "b.bin", tmp_path / "a.bin.x", tmp_path / "no" / "c.bin"])
    assert leftovers(tmp_path) == [foreign]


def test_many_writers_of_one_file(tmp_path):
    path = tmp_path / "a.bin"
    start = threading.Barrier(4)

    def write(number: int) -> None:
        start.wait()
        for _ in range(50):
            with atomic_write(path, sync=False) as f:
                f.write(bytes([number]) * 100_000)
            assert len(set(path.read_bytes())) == 1  # one writer's

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    assert path.stat().st_size == 100_000
    assert os.listdir(tmp_path) == ["a.bin"]


def test_errors_name_the_file_asked_for(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(OSError, match="folder") as err, atomic_write(folder) as f:
        f.write(b"x")
    assert err.value.filename == str(folder)
    with pytest.raises(OSError, match="folder") as err:
        append_line(folder, "x")
    assert err.value.filename == str(folder)
    assert os.listdir(tmp_path) == ["folder"]


def test_naming_errors():
    with pytest.raises(OSError, match="No space left on device: 'mine'") as err, naming_errors("mine"):
        raise OSError(errno.ENOSPC, "No space left on device", ".mine.123.tmp")
    assert (err.value.errno, err.value.filename) == (errno.ENOSPC, "mine")
    with pytest.raises(OSError, match="strange") as err, naming_errors("mine"):
        raise OSError("strange")
    assert (err.value.errno, err.value.filename) == (errno.EIO, "mine")


def test_append_line(tmp_path):
    for line in ("a", "b"):
        append_line(tmp_path / "log.txt", line)
    assert (tmp_path / "log.txt").read_text() == "a\nb\n"


def test_file_sha256(tmp_path):
    data = bytes(range(256)) * 10_000
    (tmp_path / "a.bin").write_bytes(data)
    assert file_sha256(tmp_path / "a.bin") == hashlib.sha256(data).hexdigest()


WRITE_FOR_EVER = """
import sys, time
from dnnlib.files import atomic_write
with atomic_write(sys.argv[1]) as f:
    f.write(b"half")
    f.flush()
    print("writing", flush=True)
    time.sleep(60)
"""


def start(code: str, *args: object) -> subprocess.Popen:
    """A process that runs the code and has printed its first line."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline()
    return process


def kill(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()


def test_leftovers_of_a_killed_process(tmp_path):
    process = start(WRITE_FOR_EVER, tmp_path / "state-1.pt")
    kill(process)
    (tmp_path / "state-0.pt").write_bytes(b"whole")
    (tmp_path / ".mine").write_bytes(b"x")
    (tmp_path / "mine.tmp").write_bytes(b"x")
    (left,) = leftovers(tmp_path)
    assert left.read_bytes() == b"half"
    assert leftovers(tmp_path, "state") == [left]
    assert leftovers(tmp_path, "stats") == []


# ---------------------------------------------------------------------------------------------------------
# Locks

HOLD = """
import os, sys, time
from pathlib import Path
from dnnlib.files import locked
with locked(Path(sys.argv[1]), lambda: sys.exit("busy")):
    if sys.argv[2] == "fork" and os.fork() == 0:
        time.sleep(20)
        os._exit(0)
    print("held", flush=True)
    time.sleep(60)
"""


def held(path) -> bool:
    try:
        with locked(path, refuse):
            return False
    except LookupError:
        return True


def test_one_at_a_time(tmp_path):
    path = tmp_path / "lock"
    with locked(path, refuse):
        assert held(path)
        assert not held(tmp_path / "another")
    assert not held(path)
    assert path.read_bytes() == b""


def test_waiting(tmp_path):
    path, waiting = tmp_path / "lock", threading.Event()
    events = []

    def wait() -> None:
        with locked(path, waiting.set):
            events.append("second")

    with ThreadPoolExecutor(1) as pool, locked(path, refuse):
        pool.submit(wait)
        assert waiting.wait(30)
        events.append("first")
    assert events == ["first", "second"]


def test_a_lock_ends_with_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "lock", refuse):
        1 / 0  # noqa: B018
    assert not held(tmp_path / "lock")


@pytest.mark.parametrize("children", ["alone", "fork"])
def test_a_killed_process_holds_no_lock(children, tmp_path):
    """Even where its loader processes live a little longer."""
    process = start(HOLD, tmp_path / "lock", children)
    assert held(tmp_path / "lock")
    kill(process)
    # A forked process lets go in its first moments, which on a busy machine may come late; it sleeps for 20 seconds.
    deadline = time.monotonic() + 10
    while held(tmp_path / "lock") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not held(tmp_path / "lock")


def no_flock(code: int):
    def flock(_fd: int, _operation: int) -> None:
        raise OSError(code, os.strerror(code))

    return flock


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_file_systems_without_locks(code, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fcntl.flock", no_flock(code))
    path = tmp_path / "lock"
    with locked(path, refuse):
        note = capsys.readouterr().err
        assert note.count("\n") == 1 and f"the file system of {tmp_path} has no locks" in note
        assert "lock.held" in note and (tmp_path / "lock.held").is_file()
        assert held(path)
    assert not held(path)
    assert not (tmp_path / "lock.held").exists()


def test_a_marker_without_its_process_counts(tmp_path, monkeypatch, capsys):
    """The rule of the fallback: of a process on another machine, nobody knows whether it is alive."""
    monkeypatch.setattr("fcntl.flock", no_flock(errno.ENOLCK))
    (tmp_path / "lock.held").write_text("1\nanother-machine\n")
    os.utime(tmp_path / "lock.held", (0, 0))
    assert held(tmp_path / "lock")
    assert "delete it if a process was killed" in capsys.readouterr().err
    (tmp_path / "lock.held").unlink()
    assert not held(tmp_path / "lock")


def test_other_failures_of_locking_are_errors(tmp_path, monkeypatch):
    monkeypatch.setattr("fcntl.flock", no_flock(errno.EIO))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        held(tmp_path / "lock")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="file"):
        held(tmp_path / "file" / "lock")
