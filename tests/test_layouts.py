"""One training, laid out over processes and accumulation rounds in different ways: the same draws, and so the same run."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DIGITS, fails_with, run_cli, tiny_network
from forked import Forks

from train_edm2 import main as train_edm2
from training.config.training import OPTIONS_NAME
from training.families import ARCHITECTURES
from training.networks.dropout import ImageMasks, LayerWithDropout, keep, mask_keys

# A tiny network of each family; with dropout, where the family has it.
SMALL = {
    "edm2": ["--preset=digits", "--channels=8", "--channel-mult=1,2", "--num-blocks=1", "--dropout=0.3"],
    "score_sde": ["--preset=digits-vp", "--nf=8", "--ch-mult=1,2", "--num-res-blocks=1", "--dropout=0.3"],
    "uvit": ["--preset=digits-uvit", "--embed-dim=16", "--depth=3", "--num-heads=2", "--cond-dropout=0.3"],
    "nvae": ["--preset=digits-nvae", "--num_channels_enc=4", "--num_channels_dec=4", "--num_groups_per_scale=1"],
    "classifier": ["--preset=digits-classifier", "--depth=10", "--width=1"],
}
QUIET = ["--status=0", "--snapshot=0", "--checkpoint=0", "--preview=0", "--device=cpu", f"--data={DIGITS}"]
def options_of(family: str, folder: Path, *more: str) -> list[str]:
    return [f"--outdir={folder / family}", *SMALL[family], *QUIET, *more]


def state(folder: Path, family: str) -> dict:
    return torch.load(max((folder / family).glob("training-state-*.pt")), weights_only=True)


def vector(state: dict, part: str) -> torch.Tensor:
    """All weights, or all of the optimiser's first moments, in a row."""
    if part == "weights":
        return torch.cat([x.double().flatten() for x in state["net"].values()])
    optimizer = state["optimizer"]
    moments = [x["exp_avg"] for x in optimizer["state"].values()] if "state" in optimizer else optimizer["exp_avg"].values()
    return torch.cat([x.double().flatten() for x in moments])


def difference(ours: dict, theirs: dict, part: str) -> float:
    a, b = vector(ours, part), vector(theirs, part)
    return ((a - b).norm() / b.norm()).item()


def test_all_families_are_here():
    trained = {a.training.family for a in ARCHITECTURES.values() if a.training is not None}
    assert trained == set(SMALL)


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    with Forks(tmp_path_factory.mktemp("forks") / "log.txt") as forks:
        yield forks


def train_all(forks: Forks, processes: int, folder: Path, *more: str, families: Iterable[str] = SMALL) -> None:
    """Train families, one after the other, by the same processes."""
    commands = [(f"train_{family}", options_of(family, folder, *more)) for family in families]
    assert forks.run(processes, commands) == [0] * processes, forks.log.read_text()


@pytest.fixture(scope="module")
def layouts(forks, tmp_path_factory) -> dict[str, Path]:
    """Three steps of 8 images: at once, in rounds of 2, and in two processes."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("whole", "rounds", "processes")}
    train_all(forks, 1, folders["whole"], "--batch=8", "--duration=24")
    train_all(forks, 1, folders["rounds"], "--batch=8", "--duration=24", "--batch-gpu=2")
    train_all(forks, 2, folders["processes"], "--batch=8", "--duration=24")
    return folders


@pytest.mark.parametrize("family", SMALL)
def test_two_processes_are_the_same_training(layouts, family):
    whole, other = (state(layouts[name], family) for name in ("whole", "processes"))
    assert vector(whole, "moments").count_nonzero() > 0.9 * len(vector(whole, "moments"))
    assert difference(other, whole, "moments") < 1e-5


@pytest.mark.parametrize("family", [family for family in SMALL if family != "nvae"])  # batch norm looks at a round
def test_accumulation_rounds_are_the_same_training(layouts, family):
    assert difference(state(layouts["rounds"], family), state(layouts["whole"], family), "moments") < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("family", SMALL)
def test_a_run_whose_number_of_processes_changes(forks, tmp_path, family, record_property):
    """1,000 steps by 1, 2, 4 and 3 processes, in rounds of different sizes, beside one process throughout."""
    sizes = [12, 6, 3, 4] if family == "nvae" else [4, 3, 1, 2]  # batch norm looks at a round of all processes
    for processes, batch_gpu, steps in zip([1, 2, 4, 3], sizes, [250, 500, 750, 1000], strict=True):
        options = ["--batch=12", f"--batch-gpu={batch_gpu}", f"--duration={12 * steps}"]
        train_all(forks, processes, tmp_path / "changing", *options, families=[family])
    train_all(forks, 1, tmp_path / "one", "--batch=12", "--duration=12000", families=[family])
    changing, one = (state(tmp_path / name, family) for name in ("changing", "one"))
    assert changing["nimg"] == one["nimg"] == 12000
    found = difference(changing, one, "weights")
    record_property("difference", found)
    print(family, found)
    assert found < 1e-5
