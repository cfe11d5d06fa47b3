"""Conversions: order, workers, interruptions, images that do not fit."""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator

import numpy as np
import psutil
import pytest
from conftest import DIGITS, ROOT, fails_with, make_dataset, png, run_cli
from sources import convert, encoded, folder_of_classes, image, labels_of

from dataset_tool import main as dataset_tool
from training.conversion.writer import encode_png
from training.dataset.images import ImageFolderDataset


@pytest.mark.parametrize("name", ["source.zip", "source"])
def test_class_folders(name, tmp_path):
    dataset = convert(tmp_path, folder_of_classes(tmp_path / name))
    assert labels_of(dataset) == [0, 0, 0, 1, 1, 1]
    np.testing.assert_array_equal(dataset[0][0], image(8, 8, seed=0).transpose(2, 0, 1))
    assert [dataset.name(i) for i in (0, 5)] == ["00000/img00000000.png", "00000/img00000005.png"]
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        assert json.loads(archive.read("report.json"))["classes"] == ["cat", "dog"]
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}


def test_digits_come_out_as_they_are(tmp_path):
    dataset, digits = convert(tmp_path, DIGITS, options=["--channels=1", "--workers=2"]), ImageFolderDataset(DIGITS)
    assert len(dataset) == len(digits) and labels_of(dataset) == labels_of(digits)
    for i in range(0, len(digits), 100):
        np.testing.assert_array_equal(dataset[i][0], digits[i][0])


def test_folder_as_destination(tmp_path):
    dataset = convert(tmp_path, folder_of_classes(tmp_path / "source"), dest="out")
    assert labels_of(dataset) == [0, 0, 0, 1, 1, 1]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["00000", "dataset.json", "report.json"]


def test_several_sources_and_a_limit(tmp_path):
    a = make_dataset(tmp_path / "a", {"cat/0.png": png(image(8, 8)), "dog/0.png": png(image(8, 8))})
    b = make_dataset(tmp_path / "b.zip", {"ant/0.png": png(image(8, 8)), "cat/1.png": png(image(8, 8))})
    assert labels_of(convert(tmp_path, a, b)) == [1, 2, 0, 1]
    assert len(convert(tmp_path, a, b, dest="few.zip", options=["--max-images=3", "--workers=1"])) == 3


def test_any_number_of_workers_makes_the_same_file(tmp_path):
    source = make_dataset(
        tmp_path / "src", {f"{i:03d}.png": encoded(image(20 + i % 7, 30, seed=i)) for i in range(100)}
    )
    options = ["--resolution=16x16", "--transform=center-crop"]
    for workers in (1, 2, 3):
        convert(tmp_path, source, dest=f"{workers}.zip", options=[*options, f"--workers={workers}"])
    assert (tmp_path / "1.zip").read_bytes() == (tmp_path / "2.zip").read_bytes() == (tmp_path / "3.zip").read_bytes()


@pytest.mark.parametrize("dest", ["out.zip", "out"])
def test_resume(dest, tmp_path):
    source = folder_of_classes(tmp_path / "src", count=40)
    broken = tmp_path / "src" / "dog" / "7.png"
    whole = broken.read_bytes()
    convert(tmp_path, source, dest=f"whole{dest}")
    broken.write_bytes(whole[:50])
    fails_with(convert(tmp_path, source, dest=dest, ok=False), "dog/7.png: cannot be read", "--on-error=skip")
    assert not (tmp_path / dest).exists() and (tmp_path / f"{dest}.partial").exists()
    fails_with(convert(tmp_path, source, dest=dest, ok=False), "an interrupted run left this: continue with --resume")
    result = convert(tmp_path, source, dest=dest, ok=False, options=["--resume", "--max-images=50"])
    fails_with(result, "started with different max_images")
    broken.write_bytes(whole)
    if dest == "out.zip":
        with open(tmp_path / "out.zip.partial", "ab") as f:
            f.write(b"PK\3\4" + b"half an entry")
    dataset = convert(tmp_path, source, dest=dest, options=["--resume", "--workers=1"])
    assert dataset.info() == ImageFolderDataset(tmp_path / f"whole{dest}").info()
    assert not list(tmp_path.glob("*.partial*"))
    if dest == "out.zip":
        assert (tmp_path / "out.zip").read_bytes() == (tmp_path / "wholeout.zip").read_bytes()


@pytest.mark.parametrize(
    "change", ["an image more", "an image less", "another image", "other size", "end gone", "image broken"]
)
def test_resume_with_another_source(change, tmp_path):
    source = make_dataset(tmp_path / "src", {f"{i:02d}.png": encoded(image(8, 8, seed=i)) for i in range(40)})
    (source / "30.png").write_bytes(b"broken")
    fails_with(convert(tmp_path, source, ok=False), "30.png: cannot be read")
    (source / "30.png").write_bytes(encoded(image(9, 9) if change == "other size" else image(8, 8, seed=30)))
    if change == "an image more":
        (source / "10a.png").write_bytes(encoded(image(8, 8, seed=99)))
    elif change == "an image less":
        (source / "10.png").unlink()
    elif change == "end gone":
        for i in range(20, 40):
            (source / f"{i}.png").unlink()
    elif change == "image broken":
        (source / "10.png").write_bytes(b"broken")
    elif change == "another image":
        (source / "10.png").write_bytes(encoded(image(8, 8, seed=99)))
    result = convert(tmp_path, source, ok=False, options=["--resume", "--workers=1"])
    if change == "other size":
        fails_with(result, "30.png is 9x9, but 00.png 8x8")
    else:
        fails_with(result, "has changed since", "delete that to start over")


def test_resume_that_leaves_out_what_stopped_it(tmp_path):
    source = folder_of_classes(tmp_path / "src", count=20)
    (source / "cat" / "0.png").write_bytes(b"broken")
    (source / "dog" / "5.png").write_bytes(b"broken")
    convert(tmp_path, source, ok=False)
    result = convert(tmp_path, source, ok=False, options=["--resume", "--on-error=skip", "--workers=1"])
    assert result.exit_code == 0 and "38 images" in result.output


def test_killed_and_resumed(tmp_path):
    source = make_dataset(tmp_path / "src", {f"{i:04d}.png": encoded(image(150, 150, seed=i % 5)) for i in range(400)})
    options = [f"--source={source}", "--resolution=64x64", "--workers=2"]
    command = [sys.executable, "dataset_tool.py", "convert", *options, f"--dest={tmp_path / 'out.zip'}"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    partial = tmp_path / "out.zip.partial"
    deadline = time.monotonic() + 60
    while not (partial.exists() and partial.stat().st_size > 200_000) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert partial.exists() and not (tmp_path / "out.zip").exists()
    while any(str(tmp_path) in " ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.1)
    for dest, extra in (("out.zip", ["--resume"]), ("other.zip", [])):
        assert run_cli(dataset_tool, "convert", *options, f"--dest={tmp_path / dest}", *extra).exit_code == 0
    assert (tmp_path / "out.zip").read_bytes() == (tmp_path / "other.zip").read_bytes()


def test_broken_images_left_out(tmp_path):
    source = folder_of_classes(tmp_path / "src")
    (source / "cat" / "1.png").write_bytes(b"nothing")
    result = convert(tmp_path, source, ok=False, options=["--on-error=skip", "--workers=1"])
    assert result.exit_code == 0
    assert "5 images" in result.output and "left out: cat/1.png: cannot be read: damaged" in result.output
    dataset = ImageFolderDataset(tmp_path / "out.zip")
    assert labels_of(dataset) == [0, 0, 1, 1, 1]
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        assert [name for name, _ in json.loads(archive.read("report.json"))["skipped"]] == ["cat/1.png"]


def test_sizes(tmp_path):
    mixed = make_dataset(tmp_path / "mixed", {"a.png": png(image(8, 8)), "b.png": png(image(9, 9))})
    fails_with(convert(tmp_path, mixed, ok=False), "b.png is 9x9, but a.png 8x8", "--resolution")
    assert not list(tmp_path.glob("out.zip*"))  # so that the corrected command works
    wide = make_dataset(tmp_path / "wide", {"a.png": png(image(8, 9))})
    fails_with(convert(tmp_path, wide, dest="b.zip", ok=False), "a.png is 9x8, not square", "--transform")
    options = ["--transform=center-crop-wide", "--resolution=64x32"]
    fails_with(convert(tmp_path, wide, dest="c.zip", ok=False, options=options), "all 1 images are too small")
    assert not list(tmp_path.glob("b.zip*")) and not list(tmp_path.glob("c.zip*"))


def test_errors_of_workers_are_one_line(tmp_path, capfd):
    source = folder_of_classes(tmp_path / "src", count=50)
    (source / "cat" / "3.png").write_bytes(b"")
    fails_with(convert(tmp_path, source, ok=False, options=["--workers=2"]), "cat/3.png: cannot be read")
    assert capfd.readouterr().err == ""  # of the workers themselves


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Stands for a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk_from_the_first_image_on(tmp_path):
    source = make_dataset(tmp_path / "src", {f"{i}.png": encoded(image(64, 64, seed=i)) for i in range(40)})
    with file_size_limit(5000):
        result = convert(tmp_path, source, dest="out", ok=False)
    first = tmp_path / "out.partial/00000/img00000000.png"
    fails_with(result, f"Error: File too large: {first}", exit_code=1)
    assert not list(tmp_path.glob("out*"))


# Small images stay in the file's buffer, so that closing it fails once more.
@pytest.mark.parametrize(("size", "limit"), [(64, 100000), (8, 10000)])
def test_full_disk(size, limit, tmp_path):
    source = make_dataset(tmp_path / "src", {f"{i}.png": encoded(image(size, size, seed=i)) for i in range(40)})
    with file_size_limit(limit):
        result = convert(tmp_path, source, ok=False)
    fails_with(result, f"Error: File too large: {tmp_path / 'out.zip.partial'}", exit_code=1)
    assert not (tmp_path / "out.zip.partial.lock").exists()
    dataset = convert(tmp_path, source, options=["--resume", "--workers=1"])
    assert len(dataset) == 40


@pytest.mark.slow
def test_a_million_images(tmp_path):
    """ZIP64, and little memory."""
    data = encode_png(np.zeros([2, 2, 3], dtype=np.uint8))
    code = f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from training.conversion.convert import ImageSettings, convert_images
from training.conversion.sources import Source, SourceImage
def images():
    for i in range(10**6):
        yield SourceImage(str(i), {data!r}, i % 1000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert_images([Source("test", Path("x"), 10**6, images)], Path({str(tmp_path / "m.zip")!r}), ImageSettings(None, None, None, 3), workers=2)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1000, "MB"
    dataset = ImageFolderDataset(tmp_path / "m.zip")
    assert len(dataset) == 10**6
    assert dataset.get_stored_label(999_999) == 999
    with zipfile.ZipFile(tmp_path / "m.zip") as archive:
        assert len(archive.namelist()) == 10**6 + 2
