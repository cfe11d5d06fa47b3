"""Training states on disk: whole files only, and damage is named."""

import random
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from dnnlib.errors import UserError
from dnnlib.files import atomic_write
from torch_utils import checkpoint

PATTERN = r"state-(\d+)\.pt"


def test_failed_write_leaves_nothing(tmp_path):
    target = tmp_path / "file"
    target.write_bytes(b"old")

    def write_half():
        with atomic_write(target) as f:
            f.write(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        write_half()
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


FULL_DISK = """
import resource, sys, torch
from pathlib import Path
sys.path.insert(0, {tests!r})
from conftest import tiny_network
from torch_utils.checkpoint import save_state
from training.encoders import StandardRGBEncoder
from training.snapshot import save_network
resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))
target = Path({target!r})
try:
    if target.suffix == ".pt":
        save_state(target, {{"x": torch.zeros(100000)}})
    else:
        save_network(target, tiny_network(), StandardRGBEncoder(), {{}})
except OSError as err:
    assert err.filename == str(target), err.filename
    print("refused")
"""


@pytest.mark.parametrize("name", ["state.pt", "net.safetensors"])
def test_no_space_left(tmp_path, name):
    # A limit on the size of files stands for a full disk.
    code = FULL_DISK.format(tests=str(ROOT / "tests"), target=str(tmp_path / name))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "refused\n", done.stderr
    assert list(tmp_path.iterdir()) == []


def test_newest_state_that_loads(tmp_path):
    messages, restored = [], []

    def newest() -> bool:
        return checkpoint.restore_newest_state(
            tmp_path, PATTERN, lambda state: restored.append(state["i"]), messages.append
        )

    assert not newest()
    for i in (1, 2, 3, 10):
        checkpoint.save_state(tmp_path / f"state-{i}.pt", {"i": i, "x": torch.tensor([float(i)])})
    (tmp_path / "state-11.pt.tmp").write_bytes(b"")
    assert newest()
    (tmp_path / "state-10.pt").write_bytes((tmp_path / "state-10.pt").read_bytes()[:500])
    (tmp_path / "state-3.pt").write_bytes(b"")
    checkpoint.save_state(tmp_path / "state-2.pt", {"bogus": 1})  # loads, but cannot be restored
    assert newest()
    assert restored == [10, 1]
    assert [next(i for i in (10, 3, 2) if f"state-{i}.pt is damaged" in m) for m in messages] == [10, 3, 2]
    (tmp_path / "state-1.pt").unlink()
    with pytest.raises(UserError, match="no training state can be read"):
        newest()


class Hostile:
    def __reduce__(self):
        return (print, ("executed",))


def test_states_run_no_code(tmp_path, capsys):
    torch.save({"x": Hostile()}, tmp_path / "state-1.pt")
    with pytest.raises(UserError, match="no training state can be read"):
        checkpoint.restore_newest_state(tmp_path, PATTERN, lambda state: None, print)
    output = capsys.readouterr().out
    assert "is damaged and skipped" in output
    assert "executed\n" not in output


def test_no_flipped_bit_goes_unnoticed(tmp_path):
    state = {"x": torch.arange(2000.0), "nimg": 5, "config": {"name": "text"}}
    path = tmp_path / "state-1.pt"
    checkpoint.save_state(path, state)
    data = path.read_bytes()
    tensor = data.index(state["x"].numpy().tobytes())
    rng = random.Random(0)
    noticed = 0
    for position in [*range(tensor, tensor + 8000, 400), *(rng.randrange(len(data)) for _ in range(200))]:
        flipped = bytearray(data)
        flipped[position] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        restored, messages = [], []
        try:
            checkpoint.restore_newest_state(tmp_path, PATTERN, restored.append, messages.append)
            assert torch.equal(restored[0]["x"], state["x"])  # the flipped bit was in padding
            assert {key: restored[0][key] for key in ("nimg", "config")} == {"nimg": 5, "config": {"name": "text"}}
        except UserError:
            assert "state-1.pt is damaged and skipped" in messages[0]
            noticed += 1
        assert noticed > 0  # the first is in the tensor
    assert noticed >= 20
