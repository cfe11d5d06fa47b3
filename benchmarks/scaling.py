"""How cost grows with batch, resolution, channels, entries of a dataset, and what several processes bring.

Each panel of the figure shows a cost that is flat where growth is linear: in images, pixels, operations, entries.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.run import machine_facts
from dnnlib.files import atomic_write
from dnnlib.util import code_version
from training.conversion.writer import DatasetWriter, encode_png, image_name
from training.dataset.images import ImageFolderDataset
from training.families import denoiser_inputs
from training.flops import count_operations
from training.networks.edm2 import Precond
from training.networks.edm2_layers import effective_weights

ROOT = Path(__file__).parent.parent
BATCHES = (1, 2, 4, 8, 16, 32, 64)
RESOLUTIONS = (8, 16, 32, 64, 128)
CHANNELS = (16, 32, 64, 96, 128)
ENTRIES = (1_000, 10_000, 100_000)
READS = 1000
# Trainings of the digits: family, options, images.
TRAINED = {
    "EDM2, 16 channels": ("edm2", ["--preset=digits"], 24 * 1024),
    "EDM2, 64 channels": ("edm2", ["--preset=digits", "--channels=64"], 6 * 1024),
    "score-SDE": ("score_sde", ["--preset=digits-vp", "--batch=128"], 6 * 1024),
    "U-ViT": ("uvit", ["--preset=digits-uvit", "--batch=128"], 12 * 1024),
    "NVAE": ("nvae", ["--preset=digits-nvae", "--batch=128"], 6 * 1024),
}


class Curve(NamedTuple):
    """Costs at some sizes.

    Args:
        cost: what `costs` are.
    """

    title: str
    size: str
    sizes: list[float]
    cost: str
    costs: dict[str, list[float]]


def median_seconds(run: Callable[[], Any], repeats: int) -> float:
    run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def network(resolution: int, channels: int) -> Precond:
    return Precond(
        img_resolution=resolution,
        img_channels=4,
        label_dim=10,
        model_channels=channels,
        channel_mult=[1, 2, 3, 4],
        num_blocks=1,
        attn_resolutions=[16, 8],
        precision="fp32",
    ).eval()


def forward_seconds(resolution: int, channels: int, batch: int, repeats: int) -> float:
    """Of one evaluation."""
    torch.manual_seed(0)
    net = network(resolution, channels)
    x, labels = torch.randn(batch, 4, resolution, resolution), torch.eye(10)[torch.arange(batch) % 10]
    with torch.inference_mode(), effective_weights(net):
        return median_seconds(lambda: net(x, torch.ones([]), labels), repeats)


def operations(resolution: int, channels: int) -> float:
    """Of one evaluation of one sample, without weight normalisation, which is not done in each."""
    with torch.device("meta"):
        counts = count_operations(net := network(resolution, channels), denoiser_inputs(net, 1, "meta"))
    return sum(count for kind, count in counts.items() if kind != "weight normalization")


def make_archive(path: Path, entries: int) -> None:
    writer = DatasetWriter(path, {})
    image = encode_png(np.zeros([8, 8, 3], dtype=np.uint8))
    for i in range(entries):
        writer.write(image_name(i), image)
    writer.finish()


def dataset_curve(folder: Path, repeats: int) -> Curve:
    opening, reading = [], []
    for entries in ENTRIES:
        path = folder / f"entries-{entries}.zip"
        if not path.is_file():
            make_archive(path, entries)
        opening.append(median_seconds(lambda path=path: ImageFolderDataset(path), repeats) / entries * 1e6)
        dataset = ImageFolderDataset(path)
        chosen = np.random.default_rng(0).integers(entries, size=READS).tolist()
        reading.append(median_seconds(lambda d=dataset, c=chosen: [d[i] for i in c], repeats) / READS * 1e6)
    costs = {"opening, per entry": opening, "reading an item at random": reading}
    return Curve("entries of a dataset (ZIP)", "entries", list(ENTRIES), "microseconds", costs)


def training_speed(folder: Path, name: str, processes: int, threads: int) -> float:
    """Images per second of one of TRAINED: the median of the status intervals after the first."""
    family, options, images = TRAINED[name]
    out = folder / f"training-{name.replace(', ', '-').replace(' ', '-')}-{processes}-{threads}"
    data = ROOT / "datasets" / "digits.zip"
    for old in out.glob("*"):
        old.unlink()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [f"train_{family}.py", f"--outdir={out.resolve()}", f"--data={data}", *options, "--device=cpu"]
    command += [f"--duration={images}", "--status=1Ki", "--snapshot=0", "--preview=0", "--checkpoint=0"]
    env = os.environ | {"OMP_NUM_THREADS": str(threads)}
    subprocess.run(command, cwd=ROOT, env=env, check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (out / "stats.jsonl").read_text().splitlines()]
    return statistics.median(line["images_per_second"] for line in lines[1:])


def measure(folder: Path, repeats: int) -> tuple[list[Curve], dict[str, dict[str, float]]]:
    batch = [forward_seconds(32, 32, n, repeats) / n * 1e3 for n in BATCHES]
    resolution = [forward_seconds(r, 32, 4, repeats) / 4 / r**2 * 1e6 for r in RESOLUTIONS]
    channels = [forward_seconds(32, c, 4, repeats) / 4 / operations(32, c) * 1e12 for c in CHANNELS]
    curves = [
        Curve("batch (32x32, 32 channels)", "images", list(BATCHES), "ms per image", {"forward": batch}),
        Curve(
            "resolution (32 channels, batch 4)",
            "pixels along a side",
            list(RESOLUTIONS),
            "microseconds per pixel",
            {"forward": resolution},
        ),
        Curve(
            "channels (32x32, batch 4)",
            "base channels",
            list(CHANNELS),
            "ms per billion operations",
            {"forward": channels},
        ),
        dataset_curve(folder, repeats),
    ]
    speeds = {
        f"training of digits, batch 128, {name}": {
            f"{processes} x {threads}": training_speed(folder, name, processes, threads)
            for processes, threads in [(1, 1), (1, 2), (2, 1)]
        }
        for name in TRAINED
    }
    return curves, speeds


def draw(path: Path, curves: list[Curve], speeds: dict[str, dict[str, float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(3, 3, figsize=(16, 14.4), layout="constrained")
    for place, curve in zip(axes.flat, curves, strict=False):
        for name, costs in curve.costs.items():
            place.plot(curve.sizes, costs, "o-", label=name)
        place.set_xscale("log")
        place.set_xticks(curve.sizes, [f"{size:,}" for size in curve.sizes])
        place.set_xticks([], minor=True)
        place.set_xlabel(curve.size, fontsize=13)
        place.set_ylabel(curve.cost, fontsize=13)
        place.set_title(curve.title, fontsize=14)
        place.set_ylim(0, None)
        place.grid(alpha=0.3)
        place.tick_params(labelsize=11)
        if len(curve.costs) > 1:
            place.legend(fontsize=12, loc="lower left")
    for place, (title, by_processes) in zip(axes.flat[len(curves) :], speeds.items(), strict=True):
        place.bar(list(by_processes), list(by_processes.values()), color="tab:blue", width=0.5)
        place.set_title(title, fontsize=14)
        place.set_xlabel("processes x threads", fontsize=13)
        place.set_ylabel("images per second", fontsize=13)
        place.tick_params(labelsize=11)
    fig.savefig(path, dpi=100, metadata={"Description": f"benchmarks/scaling.py, OpenEDM2 {code_version()}"})


@click.command()
@click.option("--dir", "folder", type=click.Path(path_type=Path), default="out/benchmark/scaling", show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True)
def main(folder: Path, repeats: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    curves, speeds = measure(folder, repeats)
    for curve in curves:
        print(f"{curve.title}, {curve.cost}")
        print("  " + "".join(f"{size:>12,}" for size in curve.sizes))
        for name, costs in curve.costs.items():
            print("  " + "".join(f"{cost:12.2f}" for cost in costs) + f"  {name}")
    for title, by_processes in speeds.items():
        print(f"{title}, images per second by processes x threads")
        print("  " + ", ".join(f"{name}: {speed:.0f}" for name, speed in by_processes.items()))
    draw(folder / "scaling.png", curves, speeds)
    facts = {"machine": machine_facts(), "curves": [curve._asdict() for curve in curves], "training": speeds}
    with atomic_write(folder / "scaling.json", "w") as f:
        f.write(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
