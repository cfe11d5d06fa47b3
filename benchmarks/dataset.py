"""Items per second from stored ZIP files: ImageFolderDataset against zipfile with np.load and Pillow.

The textbook variant reads an item as the published dataset does: through one zipfile object, decoded by np.load or
Pillow. Both give equal arrays and take turns; a batch is 32 items stacked into one tensor, in random order.
"""

import io
import os
import statistics
import sys
import time
import zipfile
from pathlib import Path

import click
import numpy as np
import PIL.Image
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from training.archives import DatasetWriter
from training.conversion import encode_png, image_name
from training.dataset import ImageFolderDataset, collate

BATCH = 32


class Textbook(torch.utils.data.Dataset):
    def __init__(self, path: Path):
        self.path = path
        self.archive: zipfile.ZipFile | None = None
        with zipfile.ZipFile(path) as archive:
            self.names = sorted(name for name in archive.namelist() if name.endswith((".png", ".npy")))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, idx: int) -> tuple[np.ndarray, np.ndarray]:
        if self.archive is None:
            self.archive = zipfile.ZipFile(self.path)
        name = self.names[idx]
        with self.archive.open(name) as f:
            if name.endswith(".npy"):
                image = np.load(f)
            else:
                image = np.array(PIL.Image.open(f)).transpose(2, 0, 1)
        return image.copy(), np.zeros([0], dtype=np.float32)


def make_files(folder: Path, count: int) -> dict[str, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    paths = {
        "PNG 64x64x3 as Pillow writes it": folder / f"pixels-{count}.zip",
        "PNG 64x64x3, plain rows": folder / f"plain-{count}.zip",
        "latents 8x64x64": folder / f"latents-{count}.zip",
    }
    for kind, path in paths.items():
        if path.is_file():
            continue
        writer = DatasetWriter(path, {})
        for i in range(count):
            if kind.startswith("PNG"):
                small = rng.integers(0, 256, [9, 9, 3], dtype=np.uint8)
                image = PIL.Image.fromarray(small).resize((64, 64), PIL.Image.Resampling.BICUBIC)
                f = io.BytesIO()
                image.save(f, format="png", compress_level=0)
                writer.write(image_name(i), encode_png(np.asarray(image)) if "plain" in kind else f.getvalue())
            else:
                f = io.BytesIO()
                np.save(f, rng.standard_normal([8, 64, 64], dtype=np.float32))
                writer.write(image_name(i, "img-mean-std-{}.npy"), f.getvalue())
        writer.finish()
    return paths


def items_per_second(dataset: torch.utils.data.Dataset, order: list[int], workers: int) -> dict[str, float]:
    """Rates of single items, and of batches (in this process, or through a DataLoader with worker processes)."""
    rates = {}
    if workers == 0:
        start = time.perf_counter()
        for idx in order:
            dataset[idx]
        rates["items"] = len(order) / (time.perf_counter() - start)
    if isinstance(dataset, Textbook):
        dataset.archive = None  # forked processes must not share its position in the file
    batches = [order[i : i + BATCH] for i in range(0, len(order) - BATCH + 1, BATCH)]
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
    )
    iterator = iter(loader)
    next(iterator)  # the workers are up
    start = time.perf_counter()
    count = sum(len(images) for images, _labels in iterator)
    rates[f"batches, {workers} workers" if workers else "batches"] = count / (time.perf_counter() - start)
    return rates


@click.command()
@click.option("--dir", "folder", type=click.Path(path_type=Path), default="out/benchmark/dataset", show_default=True)
@click.option("--count", help="Items per dataset", type=click.IntRange(min=64), default=4096, show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--million", help="Measure only the start-up with an archive of a million entries", is_flag=True)
def main(folder: Path, count: int, repeats: int, million: bool) -> None:
    torch.set_num_threads(1)
    if million:
        measure_million(folder, make_files(folder, count)["PNG 64x64x3, plain rows"])
        return
    for kind, path in make_files(folder, count).items():
        variants = {"textbook": Textbook(path), "ours": ImageFolderDataset(path)}
        order = np.random.default_rng(1).permutation(count).tolist()
        for idx in order[:20]:
            assert np.array_equal(variants["textbook"][idx][0], variants["ours"][idx][0])
        rates: dict[str, dict[str, list[float]]] = {}
        for _ in range(repeats):
            for workers in (0, 2):
                for name, dataset in variants.items():
                    for what, rate in items_per_second(dataset, order, workers).items():
                        rates.setdefault(what, {}).setdefault(name, []).append(rate)
        print(f"{kind}: items per second, median of {repeats} (min-max)")
        for what, by_name in rates.items():
            medians = {name: statistics.median(values) for name, values in by_name.items()}
            spread = {name: f"{medians[name]:9.0f} ({min(v):.0f}-{max(v):.0f})" for name, v in by_name.items()}
            ratio = medians["ours"] / medians["textbook"]
            print(f"  {what:20s} textbook {spread['textbook']}  ours {spread['ours']}  ratio {ratio:.1f}")


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
    main()
