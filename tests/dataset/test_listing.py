"""Which files are images: the same in training, check, metrics and convert."""

import numpy as np
import pytest
from conftest import fails_with, make_dataset, npy, png, random_images
from sources import check, convert, image, labels_of

from training.dataset.images import ImageFolderDataset
from training.dataset.listing import image_suffixes, list_files

CLASSES = {f"{c}/{k}.png": png(image(8, 8, seed=k)) for c in ("cat", "dog") for k in range(2)}


@pytest.mark.parametrize("kind", ["data", "data.zip"])
@pytest.mark.parametrize(
    "name",
    [
        ".ipynb_checkpoints/0-checkpoint.png",
        "cat/.ipynb_checkpoints/0-checkpoint.png",
        "cat/@eaDir/0.png/SYNOFILE_THUMB_M.png",
        "__MACOSX/cat/._0.png",
        "cat/._0.png",
        "#recycle/0.png",
        "$RECYCLE.BIN/0.png",
        ".Trash-1000/files/0.png",
        "#snapshot/GMT-2026.01.01/cat/0.png",
        "System Volume Information/0.png",
    ],
)
def test_hidden_and_system_folders(kind, name, tmp_path):
    """What Jupyter, NAS systems, macOS and Windows leave behind changes neither images nor classes."""
    clean = ImageFolderDataset(make_dataset(tmp_path / f"clean-{kind}", CLASSES))
    path = make_dataset(tmp_path / kind, {**CLASSES, name: png(image(8, 8, seed=9))})
    dataset = ImageFolderDataset(path)
    assert dataset.info() == clean.info() and dataset.class_names == ["cat", "dog"]
    assert dataset.notes[0].startswith("left out: 1 hidden image (1 ")
    assert check(path)["images"] == 4
    converted = convert(tmp_path, path)
    assert labels_of(converted) == [0, 0, 1, 1]


def test_folders_beside_hidden_ones_are_not_hidden():
    names = ["./a.png", "../b.png", "a.b/c.PNG", "lost+found.png", "x/__MACOSX.png"]
    assert list_files(names).images == names


def test_pictures_that_cannot_be_read(tmp_path):
    """They are counted and named, and so are files of other kinds."""
    files = {"0.png": png(image(8, 8))} | {n: b"x" for n in ("1.NEF", "2.jxl", "3.jpg_large", "4", "5.cr2", "6.jxl")}
    path = make_dataset(tmp_path / "phone", files)
    lines = [
        "left out: 4 pictures of unreadable kinds (2 .jxl, 1 .nef, 1 .cr2): convert to PNG or JPEG",
        "left out: 2 other files (1 .jpg_large, 1 without a suffix)",
    ]
    assert ImageFolderDataset(path).notes == lines == check(path)["notes"]
    result = convert(tmp_path, path, ok=False)
    assert "1 image, no classes" in result.output and all(line in result.output for line in lines)


def test_only_pictures_that_cannot_be_read(tmp_path):
    path = make_dataset(tmp_path / "raw", {"0.cr2": b"x"})
    message = "1 picture of unreadable kinds (1 .cr2): convert to PNG or JPEG"
    fails_with(convert(tmp_path, path, ok=False), message)
    assert message in check(path, exit_code=1)["problems"][0]


@pytest.mark.parametrize("suffix", [".mpg", ".h5", ".grib", ".bufr", ".wmf", ".eps"])
def test_what_pillow_only_recognises_is_no_image(suffix, tmp_path):
    assert suffix not in image_suffixes()
    path = make_dataset(
        tmp_path / "mixed", {"0.png": png(image(8, 8)), f"clip{suffix}": b"\x89HDF\r\n\x1a\n" + bytes(64)}
    )
    assert len(ImageFolderDataset(path)) == len(convert(tmp_path, path)) == 1


def test_arrays_count_where_they_are_read(tmp_path):
    path = make_dataset(tmp_path / "data", {**random_images(1), "a.npy": npy(np.zeros([3, 8, 8], np.uint8))})
    assert len(ImageFolderDataset(path)) == 2
    result = convert(tmp_path, path, ok=False)
    assert "1 other file (1 .npy)" in result.output


@pytest.mark.skipif(".heic" in image_suffixes(), reason="pillow-heif is installed")
def test_heif_needs_a_package():
    line = list_files(["1.HEIC"]).left_out()[0]
    assert line.startswith("left out: 1 picture of unreadable kinds (1 .heic): for HEIF, pip install pillow-heif; else")


def test_heif(tmp_path):
    """Photos of phones, where pillow-heif is installed."""
    pillow_heif = pytest.importorskip("pillow_heif")
    assert ".heic" in image_suffixes()
    pixels = np.full([64, 64, 3], [200, 30, 90], np.uint8)
    heif = pillow_heif.from_bytes("RGB", (64, 64), pixels.tobytes())
    (tmp_path / "photos").mkdir()
    heif.save(tmp_path / "photos" / "0.heic", quality=95)
    dataset = ImageFolderDataset(tmp_path / "photos")
    assert np.abs(dataset[0][0].astype(int) - pixels.transpose(2, 0, 1)).max() <= 8
    np.testing.assert_array_equal(convert(tmp_path, tmp_path / "photos")[0][0], dataset[0][0])
