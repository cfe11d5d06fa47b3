"""`dataset_tool.py convert` of JPEG files, with two workers, against one image after another."""

import functools
import io
import sys
from collections.abc import Callable
from pathlib import Path

import filelock
import numpy as np
import PIL.Image

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.harness import Job
from benchmarks.textbook import convert_one_by_one
from training.conversion.convert import ImageSettings, convert_images
from training.conversion.opening import open_source
from training.dataset.images import ImageFolderDataset

COUNT, RESOLUTION, WORKERS = 500, 64, 2
FOLDER = Path("out/benchmark/conversion")


def make_photos() -> Path:
    """JPEG files of 320x256 pixels with detail at all scales."""
    folder = FOLDER / f"jpeg-{COUNT}"
    rng = np.random.default_rng(0)
    with filelock.FileLock(FOLDER / "lock"):  # the other variant may be making them
        if not folder.is_dir():
            folder.mkdir()
            for i in range(COUNT):
                image = np.zeros([256, 320, 3])
                for size in (4, 16, 64, 256):
                    noise = rng.integers(0, 256, [size, size, 3], dtype=np.uint8)
                    image += np.asarray(PIL.Image.fromarray(noise).resize((320, 256), PIL.Image.Resampling.BICUBIC)) / 4
                f = io.BytesIO()
                PIL.Image.fromarray(image.astype(np.uint8)).save(f, format="jpeg", quality=90)
                (folder / f"{i:04d}.jpg").write_bytes(f.getvalue())
    return folder


def convert(variant: str) -> Callable[[], np.ndarray]:
    FOLDER.mkdir(parents=True, exist_ok=True)
    source, dest = make_photos(), FOLDER / f"{variant}.zip"

    def run() -> np.ndarray:
        dest.unlink(missing_ok=True)
        if variant == "textbook":
            convert_one_by_one(source, dest, RESOLUTION)
        else:
            settings = ImageSettings("center-crop", RESOLUTION, RESOLUTION, channels=3)
            convert_images([open_source(source)], dest, settings, workers=WORKERS)
        dataset = ImageFolderDataset(dest)
        return np.stack([dataset[i][0] for i in range(0, COUNT, 50)])

    return run


JOBS = [
    Job(
        f"convert, {COUNT} JPEG files to {RESOLUTION}x{RESOLUTION}, {WORKERS} workers",
        functools.partial(convert, "textbook"),
        functools.partial(convert, "ours"),
        bar=1.9,
        tolerance=0,
    )
]
