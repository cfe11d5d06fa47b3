"""Losses on images that are not trained on."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DIGITS, TINY, fails_with, make_dataset, random_images, run_cli, torchrun

from train_edm2 import main as train_edm2
from train_nvae import main as train_nvae
from train_score_sde import main as train_score_sde
from train_uvit import main as train_uvit
from training.dataset.images import ImageFolderDataset
from training.dataset.part import Part

RUN = [
    "--duration=1024",
    "--batch=128",
    "--status=512",
    "--snapshot=1024",
    "--checkpoint=1024",
    "--preview=0",
    "--device=cpu",
]
FAMILIES = {
    "edm2": (train_edm2, TINY),
    "score_sde": (train_score_sde, ["--preset=digits-vp", "--nf=8"]),
    "uvit": (train_uvit, ["--preset=digits-uvit", "--depth=2", "--embed-dim=32"]),
    "nvae": (train_nvae, ["--preset=digits-nvae", "--num_channels_enc=4", "--num_channels_dec=4", "--num_groups_per_scale=1"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def held_out(tmp_path_factory) -> Path:
    """Some of the digits, with their classes."""
    with zipfile.ZipFile(DIGITS) as archive:
        labels = dict(json.loads(archive.read("dataset.json"))["labels"][:40])
        files = {name: archive.read(name) for name in labels}
    return make_dataset(tmp_path_factory.mktemp("held out") / "v.zip", files, labels)


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metric-val_loss.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, held_out, tmp_path):
    command, options = FAMILIES[family]
    common = [f"--outdir={tmp_path}", f"--data={DIGITS}", *options, *RUN, f"--val-data={held_out}", "--val-images=30"]
    result = run_cli(command, *common)
    assert result.exit_code == 0, result.output
    assert f"Validating on 30 images of {held_out}" in result.output
    found = records(tmp_path)
    assert {r["net"] for r in found} == {path.name for path in tmp_path.glob("network-snapshot-*")}
    assert all(r["nimg"] == 1024 and np.isfinite(r["results"]["val_loss"]) for r in found)
    errors = {name for name in found[0]["results"] if name.startswith("val_error_")}
    assert len(errors) == (0 if family == "nvae" else 8)


def test_errors_of_a_network_that_gives_nothing(held_out, tmp_path):
    """An EDM2 network begins with F = 0, so D = c_skip x, whose error has a closed form."""
    args = [f"--outdir={tmp_path}", f"--data={DIGITS}", *TINY, "--lr=1e-30", "--preview=0", f"--val-data={held_out}"]
    assert run_cli(train_edm2, *args).exit_code == 0
    pixels = np.stack([image for image, _ in ImageFolderDataset(held_out)]) / 127.5 - 1
    found = records(tmp_path)[0]["results"]
    for sigma in np.geomspace(0.02, 20, 8):
        c_skip = 0.25 / (sigma**2 + 0.25)
        expected = (1 - c_skip) ** 2 * np.mean(pixels**2) + c_skip**2 * sigma**2
        linear = sigma**2 * pixels.var() / (sigma**2 + pixels.var())
        # 2,560 draws of noise: their mean square has a standard error of 3 %.
        assert found[f"val_error_{sigma:.2g}"] == pytest.approx(expected / linear, rel=0.1), sigma


def test_validation_does_not_disturb_training(held_out, tmp_path):
    for name, options in {"plain": [], "validated": [f"--val-data={held_out}"]}.items():
        args = [f"--outdir={tmp_path / name}", f"--data={DIGITS}", *TINY, "--preview=0", *options]
        assert run_cli(train_edm2, *args).exit_code == 0
    a, b = (torch.load(tmp_path / name / "training-state-0000001.pt")["net"] for name in ("plain", "validated"))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
def test_the_same_on_two_processes(held_out, tmp_path):
    args = [f"--data={DIGITS}", *TINY, "--preview=0", f"--val-data={held_out}"]
    assert run_cli(train_edm2, f"--outdir={tmp_path / 'one'}", *args).exit_code == 0
    result = torchrun(2, "train_edm2.py", f"--outdir={tmp_path / 'two'}", *args)
    assert result.returncode == 0, result.stderr
    for one, two in zip(records(tmp_path / "one"), records(tmp_path / "two"), strict=True):
        assert one["results"] == pytest.approx(two["results"], rel=1e-3)
        assert one["num_images"] == two["num_images"] == 40


def test_other_images_are_refused(tmp_path):
    other = make_dataset(tmp_path / "other.zip", random_images(3, size=16))
    result = run_cli(train_edm2, f"--outdir={tmp_path / 'run'}", f"--data={DIGITS}", *TINY, f"--val-data={other}")
    fails_with(result, f"--val-data={other}: its resolution is 16, and that of the training images 8")
    files = random_images(3, channels=None)
    other = make_dataset(tmp_path / "other.zip", files, dict.fromkeys(files, 1))
    result = run_cli(train_edm2, f"--outdir={tmp_path / 'run'}", f"--data={DIGITS}", *TINY, f"--val-data={other}")
    fails_with(result, "its number of classes is 2, and that of the training images 10")


def test_a_held_out_fraction(tmp_path, monkeypatch):
    """A share of the training images is held out, by names and seed, and never trained on."""
    data = {held_out: ImageFolderDataset(DIGITS, part=Part(0.1, 0, held_out)) for held_out in (True, False)}
    names = {held_out: {part.name(i) for i in range(len(part))} for held_out, part in data.items()}
    assert not names[True] & names[False] and len(names[True] | names[False]) == 1797
    seen = set()

    def watch(self, indices):
        seen.update(self.name(i) for i in indices)
        return [self[i] for i in indices]

    monkeypatch.setattr(ImageFolderDataset, "__getitems__", watch)
    args = [f"--data={DIGITS}", *TINY, "--preview=0", "--val-fraction=0.1"]
    result = run_cli(train_edm2, f"--outdir={tmp_path}", *args)
    assert result.exit_code == 0, result.output
    count = len(names[True])
    assert f"Validating on {count} of {count} images of {DIGITS} that --val-fraction=0.1 holds out" in result.output
    assert f"{1797 - count} of 1797 images" in result.output
    assert len(seen) == 1024 and seen <= names[False]
    found = records(tmp_path)[0]
    assert found["num_images"] == count and found["val_fraction"] == 0.1
    fails_with(
        run_cli(train_edm2, f"--outdir={tmp_path}", *args[:-1], "--val-fraction=0.2"),
        f"{tmp_path} was trained with --val-fraction=0.1, not 0.2",
    )


def test_fractions_that_make_no_sense(tmp_path):
    args = [f"--outdir={tmp_path}", f"--data={DIGITS}", *TINY, "--preview=0", "--val-fraction=0.00001"]
    fails_with(
        run_cli(train_edm2, *args), f"--val-fraction=1e-05 holds out none of 1797 images of {DIGITS}", exit_code=2
    )
    fails_with(run_cli(train_edm2, *args, "--val-fraction=0.999999"), "--val-fraction=0.999999 holds out all of 1797")
    assert not list(tmp_path.iterdir())
    fails_with(run_cli(train_edm2, *args, f"--val-data={DIGITS}"), "--val-fraction=1e-05 and --val-data: give one")
    fails_with(run_cli(train_edm2, *args, "--val-fraction=1"), "--val-fraction must be at least 0 and less than 1")
