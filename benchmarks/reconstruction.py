"""Post-hoc reconstruction: 1 and 8 EMA profiles from 32 float16 snapshots of a network of 30 million parameters.

As a program, it tells the peak memory of both variants. The files are in the page cache.
"""

import functools
import pickle
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import filelock
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import textbook
from benchmarks.harness import Job
from training.encoders import StandardRGBEncoder
from training.networks.edm2 import Precond
from training.phema import solve_posthoc_coefficients
from training.snapshot import open_snapshot, save_network
from training.snapshot.reconstruction import list_averages, reconstruct_phema

FOLDER = Path("out/benchmark/reconstruction")
TIMES = [i << 20 for i in range(1, 17)]
WIDTHS = [0.05, 0.10]
RESULTS = {1: [0.08], 8: [0.02, 0.04, 0.06, 0.08, 0.10, 0.12, 0.14, 0.16]}
TENSOR = "unet.enc.8x8_block0.conv_res1.weight"  # that the results of both variants are compared by
VARIANTS = ("textbook", "ours")


def make_files() -> None:
    """The snapshots in both formats, unless they are there."""
    for i, nimg in enumerate(TIMES):
        for j, std in enumerate(WIDTHS):
            native = FOLDER / f"network-snapshot-{nimg // 1000:07d}-{std:.3f}.safetensors"
            if not native.is_file():
                torch.manual_seed(2 * i + j)
                net = Precond(32, 3, 10, precision="fp32", model_channels=64).eval().requires_grad_(False).half()
                FOLDER.mkdir(parents=True, exist_ok=True)
                (FOLDER / "pickles").mkdir(exist_ok=True)
                with open(FOLDER / "pickles" / f"{native.stem}.pkl", "wb") as f:
                    pickle.dump({"ema": net}, f)
                save_network(native, net, StandardRGBEncoder(), {"nimg": nimg, "ema_std": std})


def reconstruction(variant: str, count: int) -> Callable[[], np.ndarray]:
    FOLDER.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(FOLDER / "lock"):  # the other variant may be about to make them
        make_files()
    stds = RESULTS[count]

    def plainly() -> np.ndarray:
        averages = [(nimg, std) for nimg in TIMES for std in WIDTHS]
        inputs = [FOLDER / "pickles" / f"network-snapshot-{n // 1000:07d}-{std:.3f}.pkl" for n, std in averages]
        coefs = solve_posthoc_coefficients(*map(list, zip(*averages, strict=True)), TIMES[-1], stds)
        outputs = [FOLDER / "pickles" / f"phema-{std:.3f}.pkl" for std in stds]
        return textbook.reconstruct_pickles(inputs, coefs.T.tolist(), outputs)[-1].get_parameter(TENSOR).numpy()

    def ours() -> np.ndarray:
        paths = reconstruct_phema(list_averages(FOLDER, "network-snapshot"), FOLDER, "phema", stds)
        return open_snapshot(paths[-1]).get_tensor(TENSOR).numpy()

    return plainly if variant == "textbook" else ours


JOBS = [
    Job(
        f"reconstruction, {count} of 32 snapshots",
        *(functools.partial(reconstruction, variant, count) for variant in VARIANTS),
        bar=5,
        tolerance=1e-3,
    )
    for count in RESULTS
]


@click.command()
@click.option("--only", help="Measure in this process", nargs=2, type=(click.Choice(VARIANTS), int))
def main(only: tuple[str, int] | None) -> None:
    """Tell the peak memory beyond the imports."""
    if only is not None:
        run = reconstruction(*only)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        run()
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
        return
    make_files()
    for count in RESULTS:
        for variant in VARIANTS:
            command = [sys.executable, __file__, "--only", variant, str(count)]
            peak = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            print(f"{count} of 32 snapshots, {variant}: {peak:.0f} MB above the imports' memory")


if __name__ == "__main__":
    main()
