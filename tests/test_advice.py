"""The commands that `dataset_tool.py check` ends with: each runs."""

import importlib
import json
import math
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from conftest import DIGITS, make_dataset, npy, random_images, run_cli
from sources import check

from dataset_tool import main as dataset_tool
from training.config.advice import FAMILIES, MACHINES
from training.config.score_sde_presets import SCORE_PRESETS
from training.config.training import Ki
from training.dataset.images import ImageFolderDataset
from training.monitoring.outdir import next_steps


def commands(text: str) -> list[list[str]]:
    """The commands among lines of output, in words."""
    found = [line[line.index("python ") :] for line in text.splitlines() if re.match(r"(\w+: )?python \w+\.py ", line)]
    return [shlex.split(line) for line in found]


def run(words: list[str], *options: str):
    """Run a command of this project in this process, with some options more."""
    start = next(i for i, word in enumerate(words) if word.endswith(".py"))
    return run_cli(importlib.import_module(words[start].removesuffix(".py")).main, *words[start + 1 :], *options)


def classes_of(files: dict[str, bytes], count: int = 2) -> dict[str, int]:
    return {name: i % count for i, name in enumerate(files)}


def latents(channels: int, size: int, count: int = 6) -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    return {f"{i}.npy": npy(rng.standard_normal([channels, size, size]).astype(np.float32)) for i in range(count)}


def captioned(folder: Path) -> Path:
    source = make_dataset(folder / "plain", files := random_images(6, size=16), classes_of(files))
    options = ["--template=a {}", "--class-names=cat,dog", "--text-encoder=words"]
    assert run_cli(dataset_tool, "captions", f"--source={source}", f"--dest={folder / 'd'}", *options).exit_code == 0
    return folder / "d"


KINDS = {
    "digits": lambda folder: DIGITS,
    "gray": lambda folder: make_dataset(folder / "d", random_images(6, size=28, channels=None)),
    "gray with classes": lambda folder: make_dataset(
        folder / "my data.zip", files := random_images(6, size=32, channels=None), classes_of(files)
    ),
    "RGB": lambda folder: make_dataset(folder / "d", random_images(6, size=48)),
    "RGB with classes": lambda folder: make_dataset(
        folder / "d", files := random_images(6, size=64), classes_of(files)
    ),
    "odd": lambda folder: make_dataset(folder / "d", random_images(6, size=33)),
    "vectors": lambda folder: make_dataset(
        folder / "d", files := random_images(6, size=16), {key: [0.5, 0.25, 1.0] for key in files}
    ),
    "RGBA": lambda folder: make_dataset(folder / "d", random_images(6, size=32, channels=4)),
    "latents": lambda folder: make_dataset(folder / "d", latents(8, 32)),
    "latents with classes": lambda folder: make_dataset(folder / "d", files := latents(4, 16), classes_of(files)),
    "captions": captioned,
}
# Families that have no networks for a kind of data.
NONE = {("RGBA", "nvae"): "use normal", ("latents", "nvae"): "", ("latents with classes", "nvae"): ""}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_command_runs(kind, family, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = KINDS[kind](tmp_path)
    result = run_cli(dataset_tool, "check", data, f"--family={family}", "--timing=0", "--machine=cpu")
    assert result.exit_code == 0, result.output
    if (kind, family) in NONE:
        assert f"--family={family}: no command for {data}: " in result.output
        assert NONE[kind, family] in result.output and not commands(result.output)
        return
    (command,) = commands(result.output)
    assert command[1] == f"train_{family}.py" and f"--data={data}" in command
    reasons = result.output.splitlines()
    for option in command[4:]:
        assert [line for line in reasons if line.startswith(f"  {option} ")], option
    dry = run(command, "-n")
    assert dry.exit_code == 0 and "Dry run; exiting." in dry.output, dry.output
    dataset = ImageFolderDataset(data)
    if family == "edm2":
        flags = [option.split("=")[0] for option in command[4:]]
        wanted = "--preset --cond --channels --attn-resolutions --P_mean --P_std --batch --duration"
        assert [flag for flag in flags if flag in wanted.split()] == wanted.split()
        assert f"--cond={int(dataset.has_labels)}" in command
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("family", "machine"),
    [
        ("edm2", "gpu"),
        ("edm2", "8gpus"),
        ("score_sde", "gpu"),
        ("uvit", "8gpus"),
        pytest.param("nvae", "gpu", marks=pytest.mark.slow),  # a network of hundreds of layers
    ],
)
def test_commands_for_other_machines(machine, family, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(MACHINES, "gpu", 4)
    monkeypatch.setitem(MACHINES, "8gpus", 6)
    data = make_dataset(tmp_path / "d", files := random_images(6, size=32), classes_of(files))
    advice = check(data, f"--family={family}", f"--machine={machine}")["training"]
    words = shlex.split(advice["command"])
    assert (words[0] == "torchrun") == (machine == "8gpus") and not any(word.endswith("-cpu") for word in words)
    dry = run(words, "-n", "--device=cpu")
    assert dry.exit_code == 0, dry.output
    assert json.loads(re.search(r"^duration: +(\d+)", dry.output, re.MULTILINE)[1]) >= 2000 * 6


def test_few_images_get_small_networks_and_short_trainings(tmp_path):
    data = make_dataset(tmp_path / "d", random_images(6, size=32))
    advice = check(data, "--machine=8gpus")["training"]
    preset = "--preset=pixels32-cpu"
    assert preset in advice["command"] and advice["command"].startswith("python ")
    assert "fewer than 10000 images are soon learned by heart" in advice["because"][preset]
    assert advice["because"]["--duration=12032"].startswith("2005 passes over 6 images")
    assert "--decay=37" in advice["command"].split()  # a fifth of the 188 steps, as in the preset
    assert advice["seconds"] is None and "not timed" in advice["note"]


@pytest.mark.parametrize(
    ("family", "follows"),
    [
        ("edm2", ["--decay=25"]),
        ("score_sde", ["--decay-from=5324", "--decay-to=8Ki", "--warmup=819", "--ema-rate=0.936"]),
        ("uvit", ["--decay-to=8Ki", "--warmup=819", "--ema-rate=0.952"]),
        ("nvae", []),
    ],
)
def test_a_short_training_has_a_schedule_of_its_length(family, follows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = make_dataset(tmp_path / "d", random_images(6, size=32))
    result = run_cli(dataset_tool, "check", data, f"--family={family}", "--duration=8Ki", "--timing=0", "--machine=cpu")
    (command,) = commands(result.output)
    assert command[command.index("--duration=8Ki") + 1 :] == follows
    assert run(command, "-n").exit_code == 0
    refused = run_cli(dataset_tool, "check", data, "--duration=0")
    assert refused.exit_code == 2 and "--duration must be at least 1" in refused.output


def test_from_images_to_a_figure_by_printed_commands(tmp_path, monkeypatch):
    """A folder of photos of all sizes -> check -> convert -> check -> train -> images and their quality."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("training.planning.timing.SECONDS", 0)
    monkeypatch.setattr("training.planning.timing.STEPS", 1)
    files = random_images(12, size=40) | {"00000/z.png": random_images(1, size=36, seed=1).popitem()[1]}
    make_dataset(tmp_path / "photos", files)
    result = run_cli(dataset_tool, "check", "photos")
    assert result.exit_code == 1
    (convert,) = commands(result.output)
    result = run(convert, "--workers=1")
    assert result.exit_code == 0, result.output
    ((*check_command,),) = commands(result.output)
    assert check_command == ["python", "dataset_tool.py", "check", "photos-32x32.zip"]
    result = run(check_command)
    assert re.search(
        r"^Time: about .* here, without previews: [\d.]+ images per second in \d+ timed steps", result.output, re.M
    )
    (train,) = commands(result.output)
    short = ["--duration=128", "--channels=4", "--preview=0"]
    result = run(train, *short)
    assert result.exit_code == 0, result.output
    images, quality = commands(result.output)
    assert run(images, "--steps=2", "--seeds=0-3").exit_code == 0
    assert len(list(Path("out/photos-32x32-edm2-images").glob("*.png"))) == 4
    assert Path("out/photos-32x32-edm2-images.png").is_file()
    result = run(quality, "--steps=2", "--num=8")
    assert result.exit_code == 0 and "fd_pixels" in result.output, result.output
    assert "Nothing to do" in run(train, *short).output


def test_the_time_is_that_of_the_duration(tmp_path, monkeypatch):
    monkeypatch.setattr("training.planning.timing.SECONDS", 0)
    monkeypatch.setattr("training.planning.timing.STEPS", 1)
    result = run_cli(dataset_tool, "check", make_dataset(tmp_path / "d", random_images(300)), "--json")
    advice = json.loads(result.output)["training"]
    speed = float(re.search(r"([\d.e+]+) images per second in (\d+) timed steps of 32 images", advice["note"])[1])
    assert advice["seconds"] == pytest.approx(512 * Ki / speed, rel=1e-3) and math.isfinite(speed)


def test_a_finished_run_is_sampled_as_its_preset_says():
    dataset = ImageFolderDataset(DIGITS)
    for preset, options in [(SCORE_PRESETS["pixels32-vp-cpu"], ["--sampler=pc", "--steps=100"]), (None, [])]:
        images, quality = commands("\n".join(next_steps(Path("out/my run"), dataset, preset)))
        assert images[2:] == [
            "--net=out/my run",
            "--outdir=out/my run-images",
            "--seeds=0-63",
            "--grid=out/my run-images.png",
            *options,
        ]
        assert (
            quality[2] == "gen" and f"--ref={DIGITS}" in quality and quality[-len(options) or len(quality) :] == options
        )
