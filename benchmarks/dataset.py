"""Batches from stored ZIP files, stacked into tensors, in random order.

As a program, it measures the start-up with an archive of a million entries.
"""

import functools
import io
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import filelock
import numpy as np
import PIL.Image
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.harness import Job
from benchmarks.textbook import PlainDataset
from training.conversion.writer import DatasetWriter, encode_png, image_name
from training.dataset import decoding
from training.dataset.images import ImageFolderDataset
from training.dataset.order import collate

BATCH = 32
COUNT = 4096
FOLDER = Path("out/benchmark/dataset")
PILLOW, COMPRESSED = "PNG 64x64x3 as Pillow writes it", "PNG 64x64x3 as Pillow compresses it"
PLAIN, LATENTS = "PNG 64x64x3, plain rows", "latents 8x64x64"


def make_files(folder: Path, count: int) -> dict[str, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    names = {PILLOW: "pixels", COMPRESSED: "compressed", PLAIN: "plain", LATENTS: "latents"}
    paths = {kind: folder / f"{name}-{count}.zip" for kind, name in names.items()}
    for kind, path in paths.items():
        if path.is_file():
            continue
        writer = DatasetWriter(path, {})
        for i in range(count):
            if kind != LATENTS:
                small = rng.integers(0, 256, [9, 9, 3], dtype=np.uint8)
                image = PIL.Image.fromarray(small).resize((64, 64), PIL.Image.Resampling.BICUBIC)
                f = io.BytesIO()
                image.save(f, format="png", compress_level=6 if kind == COMPRESSED else 0)
                writer.write(image_name(i), encode_png(np.asarray(image)) if kind == PLAIN else f.getvalue())
            else:
                f = io.BytesIO()
                np.save(f, rng.standard_normal([8, 64, 64], dtype=np.float32))
                writer.write(image_name(i, "img-mean-std-{}.npy"), f.getvalue())
        writer.finish()
    return paths


def batches(variant: str, kind: str) -> Callable[[], np.ndarray]:
    """All items once, in random order, in batches; gives the last of them."""
    torch.set_num_threads(1)
    if variant == "ours without pyspng":
        decoding.pyspng = None
    FOLDER.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(FOLDER / "lock"):  # the other variant may be making them
        path = make_files(FOLDER, COUNT)[kind]
    order = np.random.default_rng(1).permutation(COUNT).reshape(-1, BATCH).tolist()
    plain, ours = PlainDataset(path), ImageFolderDataset(path)

    def run() -> np.ndarray:
        images = torch.empty(0)
        for indices in order:
            items = [plain[idx] for idx in indices] if variant == "textbook" else ours.__getitems__(indices)
            images, _ = collate(items)
        return images.numpy()

    return run


JOBS = [
    Job(
        f"reading {kind}, batches of {BATCH}",
        functools.partial(batches, "textbook", kind),
        functools.partial(batches, "ours", kind),
        bar,
        tolerance=0,
    )
    for kind, bar in [(PILLOW, None), (PLAIN, 5), (LATENTS, 6)]
] + [
    Job(
        f"pyspng, reading {kind}",
        functools.partial(batches, "ours without pyspng", kind),
        functools.partial(batches, "ours", kind),
        bar=None,
        tolerance=0,
    )
    for kind in (PILLOW, COMPRESSED, PLAIN)
]


class Probe(ImageFolderDataset):
    """Tells the private memory of the process that reads it."""

    def __getitems__(self, indices: list[int]) -> list[float]:
        super().__getitems__(indices)
        return [private_mb()]


def private_mb() -> float:
    with open("/proc/self/smaps_rollup") as f:
        return sum(int(line.split()[1]) for line in f if line.startswith("Private")) / 1024


def measure_million(folder: Path, small: Path) -> None:
    """Time and memory of making, opening and sharing an archive of a million tiny images."""
    path = folder / "million.zip"
    if not path.is_file():
        writer = DatasetWriter(path, {})
        image = encode_png(np.zeros([2, 2, 3], dtype=np.uint8))
        start = time.perf_counter()
        for i in range(10**6):
            writer.write(image_name(i), image)
        writer.finish()
        print(
            f"a million entries: written in {time.perf_counter() - start:.0f} s, {os.path.getsize(path) / 1e6:.0f} MB"
        )
    before = private_mb()
    start = time.perf_counter()
    million = Probe(path)
    print(f"  opened in {time.perf_counter() - start:.1f} s, {private_mb() - before:.0f} MB")
    for context in ("fork", "spawn"):
        seconds, memory = [], []
        for dataset in (Probe(small), million):
            start = time.perf_counter()
            loader = torch.utils.data.DataLoader(
                dataset, batch_size=32, num_workers=2, multiprocessing_context=context, collate_fn=list
            )
            memory.append(next(iter(loader))[0])
            seconds.append(time.perf_counter() - start)
        more = memory[1] - memory[0]
        print(f"  2 workers ({context}): first batch after {seconds[1]:.2f} s, of a small archive {seconds[0]:.2f} s")
        print(f"    {more:.0f} MB more per worker than with the small archive")


if __name__ == "__main__":
    measure_million(FOLDER, make_files(FOLDER, COUNT)[PLAIN])
