"""One training, laid out over processes and accumulation rounds in different ways: the same draws, and so the same run."""

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from conftest import DIGITS, fails_with, run_cli
from forked import Forks

from train_edm2 import main as train_edm2
from training.config.training import OPTIONS_NAME
from training.families import ARCHITECTURES

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
    moments = (
        [x["exp_avg"] for x in optimizer["state"].values()] if "state" in optimizer else optimizer["exp_avg"].values()
    )
    return torch.cat([x.double().flatten() for x in moments])


def difference(ours: dict, theirs: dict, part: str) -> float:
    a, b = vector(ours, part), vector(theirs, part)
    return ((a - b).norm() / b.norm()).item()


def test_all_families_are_here():
    trained = {a.training.family for a in ARCHITECTURES.values() if a.training is not None}
    assert trained == set(SMALL)


def train_all(forks: Forks, processes: int, folder: Path, *more: str, families: Iterable[str] = SMALL, **job) -> None:
    """Train families, one after the other, by the same processes."""
    commands = [(f"train_{family}", options_of(family, folder, *more)) for family in families]
    assert forks.run(processes, commands, **job) == [0] * processes, forks.log.read_text()


def train_noting(forks: Forks, processes: int, folder: Path, *more: str) -> None:
    """Three steps of all families, with what they draw, and what is summed over the processes."""
    draws = folder / "draws"
    draws.mkdir()
    options = ["--batch=8", "--duration=24", *more]
    train_all(forks, processes, folder, *options, draws=str(draws), count=str(folder / "sums") if processes > 1 else "")


@pytest.fixture(scope="module")
def layouts(forks, tmp_path_factory) -> dict[str, Path]:
    """Three steps of 8 images: at once, in rounds of 2, and in rounds of 2 in each of two processes."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("whole", "rounds", "processes")}
    train_noting(forks, 1, folders["whole"])
    train_noting(forks, 1, folders["rounds"], "--batch-gpu=2")
    train_noting(forks, 2, folders["processes"], "--batch-gpu=2")
    return folders


NETWORK = {
    "edm2": "Precond",
    "score_sde": "ScoreSDE",
    "uvit": "UViTDenoiser",
    "nvae": "NVAE",
    "classifier": "NoisyClassifier",
}


def draws(folder: Path, family: str) -> list[list[int]]:
    """Number of each image of the run, how many tensors it met, and a digest of them."""
    lines = [line for path in (folder / "draws").glob(f"{NETWORK[family]}-*") for line in path.read_text().splitlines()]
    return sorted([int(word) for word in line.split()] for line in lines)


@pytest.mark.parametrize("family", SMALL)
@pytest.mark.parametrize("layout", ["rounds", "processes"])
def test_draws_depend_on_the_image_alone(layouts, family, layout):
    """Order, mirroring, noise, noise levels, labels, dropped labels and dropout masks, bit by bit."""
    whole = draws(layouts["whole"], family)
    assert [number for number, _, _ in whole] == list(range(24))
    assert len({digest for _, _, digest in whole}) == 24
    assert all(count >= (6 if "--dropout=0.3" in SMALL[family] else 2) for _, count, _ in whole)  # there are masks
    assert draws(layouts[layout], family) == whole


LIKE_ROUNDS = [family for family in SMALL if family != "nvae"]  # its batch norms look at a round of all processes


@pytest.mark.parametrize("family", LIKE_ROUNDS)
@pytest.mark.parametrize("layout", ["rounds", "processes"])
def test_layouts_are_the_same_training(layouts, family, layout):
    whole = state(layouts["whole"], family)
    assert vector(whole, "moments").count_nonzero() > 0.9 * len(vector(whole, "moments"))
    assert difference(state(layouts[layout], family), whole, "moments") < 1e-5


def test_gradients_are_summed_once_in_a_step(layouts):
    """Not in each round; NVAE's batch norms have sums of their own."""
    lines = [line.split(" ", 1) for line in (layouts["processes"] / "sums").read_text().splitlines()]
    for family in LIKE_ROUNDS:
        sizes = [json.loads(found) for name, found in lines if name == NETWORK[family]]
        assert len(sizes) == 3 and all(len(found) == 1 for found in sizes), (family, sizes)
        assert sizes[0][0] > 10_000


def edm2(folder: Path, *more: str):
    return run_cli(train_edm2, *options_of("edm2", folder, "--batch=8", *more))


def test_a_run_of_an_earlier_version_keeps_its_masks(tmp_path):
    """They depend on the rounds, and its options do not say so."""
    for name, durations in [("whole", [32]), ("parts", [16, 32])]:
        for duration in durations:
            masks = ["--dropout-masks=round"] * (duration == durations[0])
            result = edm2(tmp_path / name, f"--duration={duration}", *masks)
            assert result.exit_code == 0, result.output
            path = tmp_path / name / "edm2" / OPTIONS_NAME
            options = json.loads(path.read_text())
            assert options.pop("dropout_masks") == "round"
            path.write_text(json.dumps(options))
    whole, parts = (state(tmp_path / name, "edm2") for name in ("whole", "parts"))
    assert difference(parts, whole, "weights") == 0 and parts["nimg"] == 32
    edm2(tmp_path / "rounds", "--duration=32", "--dropout-masks=round", "--batch-gpu=2")
    edm2(tmp_path / "by image", "--duration=32")
    for name in ("rounds", "by image"):
        assert difference(state(tmp_path / name, "edm2"), whole, "moments") > 1e-3, name
    fails_with(
        edm2(tmp_path / "parts", "--duration=48", "--dropout-masks=image"),
        "was trained with --dropout-masks=round, not image",
    )


# Learning rates at which steps are larger than what differs between sums of float32 numbers in another order.
GENTLE = {
    "edm2": ["--lr=1e-3"],
    "score_sde": ["--lr=1e-3"],
    "uvit": ["--lr=1e-4"],
    "nvae": ["--lr=1e-5", "--learning_rate_min=1e-5"],
    "classifier": ["--lr=1e-5"],
}


@pytest.mark.slow
@pytest.mark.parametrize("family", SMALL)
def test_a_run_whose_number_of_processes_changes(forks, tmp_path, family, record_property):
    """1,000 steps by 1, 2, 4 and 3 processes, in rounds of different sizes, beside one process throughout."""
    sizes = [12, 6, 3, 4] if family == "nvae" else [4, 3, 1, 2]  # batch norm looks at a round of all processes
    for processes, batch_gpu, steps in zip([1, 2, 4, 3], sizes, [700, 800, 900, 1000], strict=True):
        options = ["--batch=12", f"--batch-gpu={batch_gpu}", f"--duration={12 * steps}", *GENTLE[family]]
        train_all(forks, processes, tmp_path / "changing", *options, families=[family])
    train_all(forks, 1, tmp_path / "one", "--batch=12", "--duration=12000", *GENTLE[family], families=[family])
    changing, one = (state(tmp_path / name, family) for name in ("changing", "one"))
    assert changing["nimg"] == one["nimg"] == 12000
    found = difference(changing, one, "weights")
    record_property("difference", found)
    print(family, found)
    assert found < 1e-5
