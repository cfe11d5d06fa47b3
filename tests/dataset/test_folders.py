"""What folders mean: classes, parts of a dataset, or only places; the same in convert, check and training."""

import json
import os
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import fails_with, make_dataset, png, run_cli
from sources import check, convert, image, labels_of, make_tar

from dataset_tool import main as dataset_tool
from dnnlib.errors import UserError
from training.dataset.images import ImageFolderDataset


def pictures(*names: str) -> dict[str, bytes]:
    return {name: png(image(8, 8, seed=i)) for i, name in enumerate(names)}


def afhq(root: str = "", parts=("train", "val")) -> dict[str, bytes]:
    return pictures(*(f"{root}{part}/{c}/{k}.png" for part in parts for c in ("cat", "dog") for k in range(2)))


def in_all_forms(tmp_path: Path, files: dict[str, bytes]) -> list[Path]:
    """As a folder, a ZIP file and a tar file."""
    forms = tmp_path / "forms"
    forms.mkdir()
    return [
        make_dataset(forms / "data", files),
        make_dataset(forms / "data.zip", files),
        make_tar(forms / "data.tar", files),
    ]


@pytest.mark.parametrize("root", ["", "afhq/", "data/afhq/"])
def test_parts_of_a_dataset(root, tmp_path):
    """train/cat, train/dog, val/cat, ...: --split chooses the part, and the classes are the folders below."""
    for path in in_all_forms(tmp_path, afhq(root)):
        for split, count in (("train", 4), ("validation", 4), ("all", 8)):
            dest = f"{path.name}-{split}.zip"
            dataset = convert(tmp_path, path, dest=dest, options=[f"--split={split}", "--workers=1"])
            assert labels_of(dataset) == [0, 0, 1, 1] * (count // 4) and dataset.class_names == ["cat", "dog"]
        result = convert(tmp_path, path, dest=f"{path.name}.zip", ok=False)
        assert "folders train, val are parts: --split=train takes 4 of 8 images\n" in result.output
        result = convert(tmp_path, path, dest="x.zip", ok=False, options=["--split=test"])
        fails_with(result, "no test data in it: choose --split=train or validation or all")


def test_parts_in_training(tmp_path):
    path = make_dataset(tmp_path / "afhq", afhq())
    with pytest.raises(
        UserError, match="the folders train, val are parts of a dataset, not classes: give the folder of"
    ):
        ImageFolderDataset(path)
    assert labels_of(ImageFolderDataset(path / "train")) == [0, 0, 1, 1]
    assert ImageFolderDataset(path, use_labels=False).notes == ["images of several parts of a dataset: train, val"]
    assert "parts of a dataset" in check(path, exit_code=1)["problems"][0]


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (("Train/cat/0.png", "TEST/cat/0.png"), True),
        (("training/0.png", "validation/0.png"), True),
        (("train/0.png", "test/0.png", "extra/0.png"), True),
        (("training_set/0.png", "test_set/0.png"), True),
        (("seg_train/0.png", "seg_test/0.png"), True),
        (("train images/0.png", "valid images/0.png"), True),
        (("train/0.png", "bus/0.png"), False),  # vehicles
        (("test_strip/0.png", "train_station/0.png"), False),
        (("train/0.png", "training/0.png"), False),
        (("contest/0.png", "valley/0.png"), False),
    ],
)
def test_names_of_parts(names, parts, tmp_path):
    result = convert(tmp_path, make_dataset(tmp_path / "src", pictures(*names)), ok=False)
    assert result.exit_code == 0 and (" are parts: --split=train takes 1 of" in result.output) == parts


def test_labels_of_dataset_json_go_before_folders(tmp_path):
    files = afhq()
    path = make_dataset(tmp_path / "src", files, {name: i for i, name in enumerate(files)})
    assert labels_of(convert(tmp_path, path)) == labels_of(ImageFolderDataset(path)) == list(range(8))


def test_a_zipped_folder_of_class_folders(tmp_path):
    """What all images share is no class."""
    for path in in_all_forms(tmp_path, pictures("pets/dog/0.png", "pets/cat/0.png", "pets/cat/1.png")):
        dataset = convert(tmp_path, path, dest=f"{path.name}.zip")
        assert sorted(labels_of(dataset)) == [0, 0, 1] and dataset.class_names == ["cat", "dog"]
        if path.suffix != ".tar":
            assert labels_of(ImageFolderDataset(path)) == [0, 0, 1]
    assert not ImageFolderDataset(make_dataset(tmp_path / "one", pictures("cat/0.png", "cat/1.png"))).has_labels


def test_numbers_are_sorted_as_text(tmp_path):
    """As in the published tools; but it is said."""
    files = pictures(*(f"{c}/{k}.png" for c in range(12) for k in range(2)))
    for path in in_all_forms(tmp_path, files):
        result = convert(tmp_path, path, dest=f"{path.name}.zip", ok=False)
        assert "class folders are sorted as text (0, 1, 10, 11, 2, ...): folder 10 is class 2; " in result.output
    dataset = ImageFolderDataset(tmp_path / "forms" / "data")
    assert dataset.class_names == ["0", "1", "10", "11", *map(str, range(2, 10))]
    assert labels_of(dataset) == [i // 2 for i in range(24)]
    assert "folder 10 is class 2" in dataset.notes[0]
    padded = make_dataset(tmp_path / "padded", pictures(*(f"{c:02d}/{k}.png" for c in range(12) for k in range(2))))
    assert ImageFolderDataset(padded).notes == []


@pytest.mark.parametrize("pattern", ["{0:05d}/img{1:08d}.png", "{2:05d}/{1:05d}.png", "faces/{2:06d}/seed{1:06d}.png"])
def test_folders_of_thousands(pattern, tmp_path):
    """As FFHQ has them, as our own --subdirs and conversions make them: no classes."""
    names = [pattern.format(i // 1000, i, i // 1000 * 1000) for i in (0, 7, 999, 1000, 1001, 2500)]
    for path in in_all_forms(tmp_path, pictures(*names)):
        result = convert(tmp_path, path, dest=f"{path.name}.zip", ok=False)
        assert result.exit_code == 0 and "hold a thousand images each, no classes\n" in result.output
        assert not ImageFolderDataset(tmp_path / f"{path.name}.zip").has_labels
    assert not ImageFolderDataset(tmp_path / "forms" / "data").has_labels
    digits = make_dataset(tmp_path / "digits", pictures("0/0.png", "0/1.png", "1/0.png", "1/1.png"))
    assert labels_of(ImageFolderDataset(digits)) == [0, 0, 1, 1]


def test_folders_of_cameras(tmp_path):
    """Phones and cameras begin another one now and then: no classes."""
    dataset = ImageFolderDataset(make_dataset(tmp_path / "DCIM", pictures("100APPLE/0.png", "101APPLE/1.png")))
    note = "no labels: the folders 100APPLE, 101APPLE are those of a camera, no classes"
    assert not dataset.has_labels and dataset.notes == [note]
    mixed = make_dataset(tmp_path / "mixed", pictures("100APPLE/0.png", "cat/1.png"))
    assert labels_of(ImageFolderDataset(mixed)) == [0, 1]


@pytest.mark.parametrize("companion", ["masks", "Segmentation", "gt"])
def test_pictures_and_masks(companion, tmp_path):
    message = f"the folders Images and {companion} look like pictures and what belongs to them, not like classes"
    for path in in_all_forms(tmp_path, pictures("Images/0.png", f"{companion}/0.png")):
        fails_with(convert(tmp_path, path, ok=False), f"{path}: {message}: give the folder Images alone")
    with pytest.raises(UserError, match=message):
        ImageFolderDataset(tmp_path / "forms" / "data")


def test_images_beside_class_folders(tmp_path):
    """One stray image, and nothing has a label: that is said."""
    note = "no labels: 1 image outside the folders cat, dog (such as preview.png)"
    for path in in_all_forms(tmp_path, pictures("cat/0.png", "dog/0.png", "preview.png")):
        result = convert(tmp_path, path, dest=f"{path.name}.zip", ok=False)
        assert result.exit_code == 0 and note in result.output
    dataset = ImageFolderDataset(tmp_path / "forms" / "data")
    assert not dataset.has_labels and note in dataset.notes[0]


def test_classes_that_are_easily_mixed_up_or_lost(tmp_path):
    files = pictures("Cat/0.png", "cat/0.png", "emu/0.png") | {"dog/0.cr2": b"x"}
    notes = ImageFolderDataset(make_dataset(tmp_path / "src.zip", files)).notes
    assert notes[0] == "two class folders differ only in capital letters: Cat, cat"
    assert notes[1] == "not among the classes: dog, which hold only pictures of unreadable kinds"


@pytest.mark.skipif(sys.platform != "linux", reason="file names are text there")
def test_names_that_are_not_utf8(tmp_path):
    """As old archives leave them."""
    for folder in (b"plain", b"classes/caf\xe9", b"classes/dog"):
        (tmp_path / os.fsdecode(folder)).mkdir(parents=True)
        for name in (b"caf\xe9.png", b"b.png"):
            Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + folder + b"/" + name)).write_bytes(png(image(8, 8)))
    assert check(tmp_path / "plain")["duplicate_examples"] == [["b.png", "caf\\xe9.png"]]
    facts = check(tmp_path / "classes")
    assert facts["class_names"] == ["caf\\xe9", "dog"]
    result = run_cli(dataset_tool, "check", tmp_path / "classes")
    assert "caf" in result.output and result.exit_code == 0
    dataset = convert(tmp_path, tmp_path / "classes")
    assert (labels_of(dataset), dataset.class_names) == ([0, 0, 1, 1], ["caf\\xe9", "dog"])
    (tmp_path / "plain" / os.fsdecode(b"bad\xff.png")).write_bytes(b"broken")
    with pytest.raises(UserError, match=r"cannot read bad\\xff.png"):
        ImageFolderDataset(tmp_path / "plain")[1]


def test_what_was_understood_is_told(tmp_path):
    """In the summary, in what convert prints and in report.json."""
    files = pictures("cat/0.png", "cat/1.png", "dog/0.png") | {"dog/1.cr2": b"x", "notes.txt": b"x"}
    path = make_dataset(tmp_path / "src", files)
    summary = ImageFolderDataset(path).summary()
    assert summary == [
        f"{path}: 3 images (3 .png), pixels of 8x8 with 3 channels",
        "labels: class folders, 2 classes: cat (2), dog (1)",
        "left out: 1 picture of unreadable kinds (1 .cr2): convert to PNG or JPEG",
        "left out: 1 other file (1 .txt)",
    ]
    result = convert(tmp_path, path, ok=False)
    found = [f"{path}: folder (3 .png), 3 images; labels: class folders", *summary[2:]]
    assert result.output.startswith("\n  ".join(found))
    assert f"{tmp_path / 'out.zip'}: 3 images, 2 classes: cat (2), dog (1)\n" in result.output
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        report = json.loads(archive.read("report.json"))
    assert report["sources"] == [found] and report["class_counts"] == {"0": 2, "1": 1}
    facts = check(path)
    assert facts["notes"] == summary[2:] and facts["label_source"] == "class folders"
    assert facts["class_names"] == ["cat", "dog"]


def test_missing_images_of_dataset_json(tmp_path):
    files = pictures("0.png", "1.png")
    path = make_dataset(tmp_path / "src", files, {"0.png": 0, "1.png": 1, "2.png": 2})
    assert ImageFolderDataset(path).notes == ["missing: 1 image that dataset.json lists, such as 2.png"]
    np.testing.assert_array_equal(labels_of(ImageFolderDataset(path)), [0, 1])
