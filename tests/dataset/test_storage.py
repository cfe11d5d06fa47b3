"""Folders and ZIP files, whole, compressed and damaged."""

import contextlib
import io
import os
import pickle
import resource
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import DIGITS, fails_with, make_dataset, npy, png, random_images, run_cli
from sources import check

from dataset_tool import main as dataset_tool
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


# ---------------------------------------------------------------------------------------------------------
# Damaged data that nothing else would notice


def latents(count: int = 4, seed: int = 0) -> dict[str, bytes]:
    rng = np.random.default_rng(seed)
    return {f"{i}.npy": npy(rng.standard_normal([4, 8, 8]).astype(np.float32)) for i in range(count)}


def flipped(path: Path, after: bytes) -> None:
    """Flip a bit in the middle of the data that follow some bytes."""
    data = bytearray(path.read_bytes())
    data[data.index(after) + len(after) + 300] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_checksums_of_entries(compression, tmp_path):
    path = make_dataset(tmp_path / "l.zip", latents(), compression=compression)
    flipped(path, b"2.npy")
    dataset = ImageFolderDataset(path)
    for _ in range(2):  # not only the first time
        with pytest.raises(UserError, match=r"l.zip: cannot read 2.npy: "):
            dataset[2]
    dataset[1]
    assert "cannot read 2.npy" in check(path, exit_code=1)["problems"][0]
    if compression == zipfile.ZIP_STORED:
        with pytest.raises(UserError, match=r"2.npy: damaged \(checksum mismatch\): copy or convert the dataset again"):
            dataset[2]


@pytest.mark.parametrize(("name", "wrong"), [(b"dataset.json", b"data\xa0et.json"), (b"2.png", b"2.pog")])
def test_damaged_names_of_entries(name, wrong, tmp_path):
    """Labels or images are not missed because the directory calls them otherwise."""
    files = {f"{i}.png": png(np.full([8, 8], i, np.uint8)) for i in range(4)}
    path = make_dataset(tmp_path / "d.zip", files, labels={name: 0 for name in files})
    data = path.read_bytes()
    position = data.rindex(name)  # in the directory
    path.write_bytes(data[:position] + wrong + data[position + len(name) :])
    with pytest.raises(
        UserError, match=r"d\.zip: cannot read .*: damaged \(it is also called (dataset\.json|2\.png)\)"
    ):
        ImageFolderDataset(path)
    result = run_cli(dataset_tool, "convert", f"--source={path}", f"--dest={tmp_path / 'o.zip'}", "--workers=1")
    fails_with(result, f"--source={path}: damaged (File name in directory")


def test_names_as_other_tools_write_them(tmp_path):
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as archive:
        for name in ("a.png", "caf\xe9.txt", "b.\u20ac", "notes.md"):
            archive.writestr(name, png(np.zeros([8, 8], np.uint8)))
    data = (
        (tmp_path / "d.zip")
        .read_bytes()
        .replace(b"notes.md", b"n\\tes.md")
        .replace(b"b.\xe2\x82\xac", b"b.\xe2\x82\xac")
    )
    (tmp_path / "d.zip").write_bytes(data)
    assert ImageFolderDataset(tmp_path / "d.zip").notes == ["left out: 3 other files (1 .€, 1 .txt, 1 .md)"]


def test_checksums_can_be_left_out(tmp_path):
    path = make_dataset(tmp_path / "l.zip", latents())
    flipped(path, b"2.npy")
    changed = ImageFolderDataset(path, checksums=False)[2][0] != np.load(io.BytesIO(latents()["2.npy"]))
    assert changed.sum() == 1


@pytest.mark.parametrize("number", [np.nan, -np.inf, 1.5e38, -2e12])
def test_impossible_latents_are_found_each_time(number, tmp_path):
    """Those that snapshots cannot hold the statistics of: case 16."""
    array = np.ones([4, 8, 8], np.float32)
    array[1, 2, 3] = number
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        path = make_dataset(tmp_path / "l.zip", {**latents(), "2.npy": npy(array)}, compression=compression)
        dataset = ImageFolderDataset(path)
        for _ in range(2):
            with pytest.raises(UserError, match="2.npy: the latents hold NaN or infinity, or numbers beyond 1e"):
                dataset[2]


@pytest.mark.parametrize("form", ["l", "l.zip"])
def test_truncated_and_damaged_arrays(form, tmp_path):
    """One line that names the file: wherever it is cut, and whatever stands in its header."""
    whole = latents()["2.npy"]
    brace = whole.index(b"}")
    headless = whole[:brace] + b" " + whole[brace + 1 :]
    for i, data in enumerate([whole[:-30], whole[:-32], whole[:140], whole[:20], headless]):
        path = make_dataset(tmp_path / f"{i}{form}", {**latents(), "2.npy": data})
        with pytest.raises(UserError, match=r": cannot read 2.npy: "):
            ImageFolderDataset(path)[2]
        assert "cannot read 2.npy" in check(path, exit_code=1)["problems"][0]
    with pytest.raises(UserError, match=r": cannot read 2.npy: "):
        ImageFolderDataset(path).verify()  # the last one


def test_bombs(tmp_path):
    """Data that unpack to more than they say are not unpacked."""
    zeros = zlib.compress(bytes(10**8), 9)
    chunks = [(b"IHDR", struct.pack(">2I5B", 8, 8, 8, 0, 0, 0, 0)), (b"IDAT", zeros), (b"IEND", b"")]
    bomb = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    path = make_dataset(tmp_path / "p.zip", {"0.png": bomb})
    entry = bytearray(
        make_dataset(tmp_path / "e.zip", {"0.png": bytes(10**8)}, compression=zipfile.ZIP_DEFLATED).read_bytes()
    )
    for size, sizes in ((1000, "1000"), (3 * 10**9, "3000000000")):
        position = entry.index(b"PK\1\2") + 24  # the size that the directory declares
        entry[position : position + 4] = struct.pack("<I", size)
        (tmp_path / "e.zip").write_bytes(entry)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(UserError, match=f"cannot read 0.png: .*{sizes}"):
            ImageFolderDataset(tmp_path / "e.zip")
        result = run_cli(
            dataset_tool, "convert", f"--source={tmp_path / 'e.zip'}", f"--dest={tmp_path / 'o'}", "--workers=1"
        )
        fails_with(result, "0.png: cannot be read: ")
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000, "KiB"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="cannot read 0.png: truncated or damaged: it should unpack to 72 bytes"):
        ImageFolderDataset(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000, "KiB"


def test_folders_that_change(tmp_path):
    """A file truncated, overwritten or replaced during a run: one line at the next read."""
    path = make_dataset(tmp_path / "l", latents())
    dataset = ImageFolderDataset(path)
    dataset.verify()  # as at the start of a run
    worker = pickle.loads(pickle.dumps(dataset))
    whole, other = (path / "2.npy").read_bytes(), latents(seed=1)["2.npy"]
    for data in (whole[:-4], other):
        (path / "2.npy").write_bytes(data)
        os.utime(path / "2.npy", ns=(10**18, 10**18))  # the clock of some file systems is slow
        for each in (dataset, worker):
            with pytest.raises(UserError, match="cannot read 2.npy: it has changed since it was first read"):
                each[2]
            each[1]
    os.remove(path / "1.npy")
    with pytest.raises(UserError, match="cannot read 1.npy: .*No such file"):
        dataset[1]


def test_archives_that_change(tmp_path):
    """Truncated or overwritten while they are read: one line, no signal, and nothing of the new contents."""
    path = make_dataset(tmp_path / "l.zip", latents(40))
    whole = path.read_bytes()
    dataset, cached = ImageFolderDataset(path), ImageFolderDataset(path, cache=True)
    expected = dataset[0][0], cached[39][0]
    os.truncate(path, len(whole) // 3)
    for idx in (0, 39):
        with pytest.raises(UserError, match=f"cannot read {dataset.name(idx)}: the ZIP file has changed since"):
            dataset[idx]
    np.testing.assert_array_equal(cached[39][0], expected[1])
    path.write_bytes(make_dataset(tmp_path / "other.zip", latents(40, seed=1)).read_bytes())
    with pytest.raises(UserError, match="the ZIP file has changed since"):
        dataset[0]
    path = make_dataset(tmp_path / "m.zip", latents(40))
    dataset = ImageFolderDataset(path)
    os.replace(tmp_path / "other.zip", path)  # the old file lives on
    np.testing.assert_array_equal(dataset[0][0], expected[0])
    with pytest.raises(UserError, match="the ZIP file has changed since"):
        pickle.loads(pickle.dumps(dataset))[0]  # as a loader process opens it
