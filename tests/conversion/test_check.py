"""dataset_tool.py check."""

import io
import os

import numpy as np
import PIL.Image
import pytest
from conftest import DIGITS, fails_with, make_dataset, npy, png, random_images, run_cli
from sources import (
    check,
    image,
)

from dataset_tool import main as dataset_tool
from training.dataset.images import ImageFolderDataset
from training.encoders import StabilityVAEEncoder


def test_check(tmp_path):
    facts = check(DIGITS, f"--grid={tmp_path / 'grid.png'}")
    assert facts["images"] == 1797 and facts["shapes"] == {"1x8x8 uint8": 1797} and facts["label_dim"] == 10
    assert facts["duplicates"] == 0 and facts["unreadable"] == 0 and facts["problems"] == []
    assert sum(facts["label_histogram"].values()) == 1797
    assert facts["content_hash"] == ImageFolderDataset(DIGITS).info().content_hash
    images = np.stack([image for image, _ in ImageFolderDataset(DIGITS)]).astype(np.float64)
    assert facts["mean"] == [pytest.approx(images.mean(), abs=1e-3)]
    assert facts["std"] == [pytest.approx(images.std(), abs=1e-3)]
    assert facts["sigma_data"] == pytest.approx((images / 127.5 - 1).std(), rel=0.02)
    with PIL.Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (800, 912)


def test_check_notes_resolutions_that_presets_do_not_take(tmp_path):
    facts = check(make_dataset(tmp_path / "30.zip", random_images(2, size=30)))
    assert facts["resolution_note"].startswith("30 is not divisible by 8")
    assert "resolution_note" not in check(DIGITS)


def test_check_grid_below_a_file(tmp_path, monkeypatch):
    (tmp_path / "lab.csv").write_text("")
    monkeypatch.setattr(ImageFolderDataset, "__getitem__", lambda *_args: 1 / 0)  # told before the images are read
    for name in ("lab.csv/x.png", "lab.csv/y/x.png"):
        result = run_cli(dataset_tool, "check", DIGITS, f"--grid={tmp_path / name}")
        fails_with(result, f"--grid={tmp_path / name}: {tmp_path / 'lab.csv'} is not a folder")


def test_check_grid_over_the_dataset(tmp_path):
    path = make_dataset(tmp_path / "d.zip", random_images(1))
    before = path.read_bytes()
    (tmp_path / "link.png").symlink_to(path)
    for name in ("d.zip", "link.png"):
        fails_with(run_cli(dataset_tool, "check", path, f"--grid={tmp_path / name}"), "is the same as DATA=")
    assert path.read_bytes() == before
    folder = make_dataset(tmp_path / "d", random_images(1))
    fails_with(run_cli(dataset_tool, "check", folder, f"--grid={folder / 'grid.png'}"), "is inside DATA=")
    fails_with(run_cli(dataset_tool, "check", folder, f"--grid={tmp_path / 'grid.zip'}"), "a name that ends in .png")
    assert len(list(folder.rglob("*.*"))) == 1


def test_check_finds_what_is_wrong(tmp_path):
    files = random_images(4)
    files["00000/img00000004.png"] = files["00000/img00000001.png"]
    files["00000/img00000005.png"] = b"broken"
    files["00000/img00000006.png"] = png(image(9, 9))
    path = make_dataset(tmp_path / "d", files)
    facts = check(path, exit_code=1)
    assert facts["duplicates"] == 1
    assert facts["duplicate_examples"] == [["00000/img00000001.png", "00000/img00000004.png"]]
    assert facts["unreadable"] == 2
    assert any("img00000005.png" in problem for problem in facts["problems"])
    assert any("9x9" in problem for problem in facts["problems"])
    text = run_cli(dataset_tool, "check", path)
    assert text.exit_code == 1 and "PROBLEM: " in text.output
    fails_with(run_cli(dataset_tool, "check", tmp_path / "nowhere"), "no such dataset")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "0.png").write_bytes(b"broken")
    assert "cannot read 0.png" in check(tmp_path / "bad", exit_code=1)["problems"][0]
    make_dataset(tmp_path / "links", random_images(2))
    (tmp_path / "links" / "z.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "links" / "pipe.png")
    facts = check(tmp_path / "links", exit_code=1)
    assert facts["images"] == 3 and "cannot read z.png" in facts["problems"][0]
    large = make_dataset(tmp_path / "large", {"0.npy": npy(np.full([4, 2, 2], 1e300))})
    assert "NaN or infinity, or" in check(large, exit_code=1)["problems"][0]


def test_check_latents(tmp_path):
    rng = np.random.default_rng(0)
    encoder = StabilityVAEEncoder()
    mean, std = (np.array(v).reshape(-1, 1, 1) for v in (encoder.raw_mean, encoder.raw_std))
    files = {}
    for i in range(50):
        draw = rng.standard_normal([4, 8, 8]) * std + mean
        files[f"{i:03d}.npy"] = npy(np.concatenate([draw, np.full([4, 8, 8], 1e-3)]).astype(np.float32))
    facts = check(make_dataset(tmp_path / "l.zip", files))
    assert facts["encoder"] == "StabilityVAEEncoder" and facts["channels_seen_by_the_model"] == 4
    assert facts["sigma_data"] == pytest.approx(0.5, rel=0.03)
    assert (facts["suggested_P_mean"], facts["suggested_P_std"]) == (pytest.approx(-0.4, abs=0.03), 1.0)
    assert "channels_note" not in facts
    for change, note in [
        (lambda x: x + 0.8 * std[1], "mean 0.40 and standard deviation 0.49"),
        (lambda x: mean[1] + 0.2 * (x - mean[1]), "mean -0.00 and standard deviation 0.10"),
    ]:
        changed = {name: np.load(io.BytesIO(data)) for name, data in files.items()}
        for array in changed.values():
            array[1] = change(array[1])
        path = make_dataset(tmp_path / f"{note[-4:]}.zip", {name: npy(array) for name, array in changed.items()})
        facts = check(path)
        assert facts["channels_note"].startswith(f"channel 1 of the latents, as the model sees them, has {note}")
        assert "sigma_data_note" not in facts  # in all channels together it is small
    files["x.npy"] = npy(np.full([8, 8, 8], np.inf, np.float32))
    facts = check(make_dataset(tmp_path / "bad", files), exit_code=1)
    assert "NaN or infinity, or" in facts["problems"][0]
    constant = {f"{i}.npy": npy(np.stack([np.ones([4, 4]), image(4, 4, i, None)]).astype(np.float32)) for i in range(3)}
    facts = check(make_dataset(tmp_path / "constant", constant), exit_code=1)
    assert facts["problems"] == [f"{tmp_path / 'constant'}: channel 0 of the latents is constant"]
