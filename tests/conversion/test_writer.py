"""Archives in the making, their destinations, and the PNG files in them."""

import errno
import os
import sys
import zipfile

import numpy as np
import PIL.Image
import pytest
from conftest import fails_with, run_cli
from sources import convert, folder_of_classes, image

from dataset_tool import main as dataset_tool
from training.conversion.writer import DatasetWriter, encode_png
from training.dataset.images import ImageFolderDataset


@pytest.mark.parametrize("channels", [1, 3])
def test_png_files(channels, tmp_path):
    """What we write is what Pillow reads, and so is what we read."""
    pixels = image(8, 8, channels=channels)
    (tmp_path / "a.png").write_bytes(encode_png(pixels))
    with PIL.Image.open(tmp_path / "a.png") as read:
        read.verify()
    with PIL.Image.open(tmp_path / "a.png") as read:
        np.testing.assert_array_equal(np.asarray(read).reshape(8, 8, channels), pixels)
    np.testing.assert_array_equal(ImageFolderDataset(tmp_path)[0][0], pixels.transpose(2, 0, 1))
    damaged = bytearray(encode_png(pixels))
    damaged[60] ^= 1
    (tmp_path / "a.png").write_bytes(damaged)
    with pytest.raises(ValueError, match="cannot read a.png"):
        ImageFolderDataset(tmp_path)


def test_destination_that_appears(tmp_path):
    writer = DatasetWriter(tmp_path / "out.zip", {})
    writer.write("a.png", b"x")
    (tmp_path / "out.zip").write_bytes(b"mine")
    with pytest.raises(ValueError, match="exists already"):
        writer.finish()
    writer.close()
    assert (tmp_path / "out.zip").read_bytes() == b"mine" and (tmp_path / "out.zip.partial").exists()


def test_destinations(tmp_path, monkeypatch):
    source = folder_of_classes(tmp_path / "src")
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    assert len(convert(tmp_path, source, dest="link")) == 6
    assert (tmp_path / "link").is_symlink()
    fails_with(convert(tmp_path, source, dest="src/cat/out", ok=False), "is inside --source=")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    fails_with(run_cli(dataset_tool, "convert", f"--source={source}", "--dest=."), "--dest=.: has no name")
    if sys.platform == "linux":
        result = run_cli(dataset_tool, "convert", f"--source={source}", "--dest=/proc/x.zip")
        fails_with(result, "/proc/x.zip", exit_code=1)


def test_existing_destination(tmp_path):
    (tmp_path / "out.zip").write_bytes(b"mine")
    fails_with(convert(tmp_path, folder_of_classes(tmp_path / "src"), ok=False), "out.zip: exists already")
    assert (tmp_path / "out.zip").read_bytes() == b"mine"


def test_one_run_at_a_time(tmp_path):
    writer = DatasetWriter(tmp_path / "out.zip", {})
    fails_with(
        convert(tmp_path, folder_of_classes(tmp_path / "src"), ok=False, options=["--resume"]), "another run is writing"
    )
    writer.write("a.png", b"x")
    writer.finish()
    (tmp_path / "out.zip").unlink()
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_offsets_beyond_4_gigabytes(tmp_path):
    # A sparse file stands for large images.
    writer = DatasetWriter(tmp_path / "x.zip", {})
    writer.write("a.png", b"first")
    files = writer._files
    files._f.seek(5 * 2**30)  # type: ignore[union-attr]
    writer.write("b.png", b"second")
    writer.finish()
    with zipfile.ZipFile(tmp_path / "x.zip") as archive:
        assert archive.read("a.png") == b"first"
        assert archive.read("b.png") == b"second"


def test_file_systems_without_flock(tmp_path, monkeypatch, capsys):
    """As Lustre without -o flock and some others: a file stands for the lock, which a line of ours says."""
    import fcntl

    def flock(*_args):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    writer = DatasetWriter(tmp_path / "out.zip", {})
    note = capsys.readouterr().err
    assert note.count("\n") == 1 and "out.zip.partial.lock.held stands for one" in note
    with pytest.raises(ValueError, match="another run is writing"):
        DatasetWriter(tmp_path / "out.zip", {})
    writer.write("a.png", b"x")
    writer.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["out.zip"]
