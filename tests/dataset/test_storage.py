"""Folders and ZIP files, whole, compressed and damaged."""

import contextlib
import zipfile

import numpy as np
import pytest
from conftest import DIGITS, make_dataset, random_images

from dnnlib.errors import UserError
from training.dataset.images import ImageFolderDataset


def test_compressed_zip_works(tmp_path):
    path = make_dataset(tmp_path / "data.zip", random_images(3), compression=zipfile.ZIP_DEFLATED)
    stored = make_dataset(tmp_path / "stored.zip", random_images(3))
    np.testing.assert_array_equal(ImageFolderDataset(path)[2][0], ImageFolderDataset(stored)[2][0])
    assert ImageFolderDataset(path).compressed and not ImageFolderDataset(stored).compressed
    assert not ImageFolderDataset(make_dataset(tmp_path / "folder", random_images(3))).compressed
    with zipfile.ZipFile(stored, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("dataset.json", '{"labels": null}')
    assert not ImageFolderDataset(stored).compressed  # only the images count


def test_unsupported_compression(tmp_path):
    path = make_dataset(tmp_path / "data.zip", random_images(1), compression=zipfile.ZIP_LZMA)
    with pytest.raises(UserError, match="cannot read 00000/img00000000.png: ZIP compression method 14"):
        ImageFolderDataset(path)


def test_damaged_directory(tmp_path):
    data = make_dataset(tmp_path / "whole.zip", random_images(3)).read_bytes()
    rng = np.random.default_rng(0)
    start = data.index(b"PK\1\2")
    for _ in range(500):
        changed = bytearray(data)
        for position in rng.integers(start, len(data), size=3):
            changed[position] = rng.integers(256)
        (tmp_path / "a.zip").write_bytes(changed)
        with contextlib.suppress(UserError):
            ImageFolderDataset(tmp_path / "a.zip")


def test_truncated_zip(tmp_path):
    path = tmp_path / "cut.zip"
    path.write_bytes(DIGITS.read_bytes()[:100000])
    with pytest.raises(UserError, match="cut.zip: not a complete ZIP file"):
        ImageFolderDataset(path)


def test_damaged_compressed_entry(tmp_path):
    path = make_dataset(tmp_path / "data.zip", random_images(2), compression=zipfile.ZIP_DEFLATED)
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        offset = archive.infolist()[1].header_offset
    data[offset + 60 : offset + 90] = b"\xff" * 30
    path.write_bytes(data)
    with pytest.raises(UserError, match="cannot read 00000/img00000001.png"):
        ImageFolderDataset(path).verify()
