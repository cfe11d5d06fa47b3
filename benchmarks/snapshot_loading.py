"""Time and memory of loading a snapshot in both formats, against torch.load of the same tensors.

Each load is a process of its own; the variants take turns. The textbook variant reads a state dict of the same float16
tensors with `torch.load` and makes float32 of them, as the published tools do with their pickles.
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import click
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from training.config.edm2 import TRAINING_PRESETS
from training.encoders import StandardRGBEncoder
from training.families import preset_network
from training.snapshot import load_network, write_snapshot
from training.snapshot.description import describe

VARIANTS = {"torch.load": "net.pt", "safetensors": "net.safetensors", "pkl": "net.pkl"}


def make_files(folder: Path, preset: str) -> None:
    """The same random weights in all three formats."""
    with torch.device("meta"):
        net = preset_network(TRAINING_PRESETS[preset])
    shapes = {name: tensor.shape for name, tensor in net.state_dict().items()}
    tensors = {name: torch.randn(shape).half() for name, shape in shapes.items()}
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, folder / VARIANTS["torch.load"])
    for variant in ("safetensors", "pkl"):
        metadata = describe(net, StandardRGBEncoder(), {})
        write_snapshot(folder / VARIANTS[variant], net, tensors.__getitem__, torch.float16, metadata)


def load(variant: str, path: Path) -> dict[str, float]:
    """Seconds, and GB of peak memory beyond what the imports take."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    if variant == "torch.load":
        tensors = {name: t.float() for name, t in torch.load(path, map_location="cpu", weights_only=True).items()}
    else:
        tensors = load_network(path).net.state_dict()
    seconds = time.perf_counter() - start
    assert all(t.dtype == torch.float32 for t in tensors.values())
    return dict(seconds=seconds, peak_gb=(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20)


@click.command()
@click.option("--preset", type=click.Choice(list(TRAINING_PRESETS)), default="edm2-img512-xxl", show_default=True)
@click.option(
    "--dir", "folder", help="Where to keep the files", type=click.Path(path_type=Path), default="out/benchmark"
)
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--only", help="Do one step in this process", type=click.Choice(["make files", *VARIANTS]))
def main(preset: str, folder: Path, repeats: int, only: str | None) -> None:
    if only == "make files":
        make_files(folder / preset, preset)
        return
    if only is not None:
        print(json.dumps(load(only, folder / preset / VARIANTS[only])))
        return

    def step(name: str) -> str:
        # All in processes of their own: the peak memory of this one would count as that of its children.
        command = [sys.executable, __file__, f"--preset={preset}", f"--dir={folder}", f"--only={name}"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    if not all((folder / preset / name).is_file() for name in VARIANTS.values()):
        step("make files")
    results: dict[str, list[dict]] = {variant: [] for variant in VARIANTS}
    for _ in range(repeats):
        for variant in VARIANTS:
            results[variant].append(json.loads(step(variant)))
    print(
        f"{preset}, torch {torch.__version__}, {torch.get_num_threads()} threads, {repeats} repeats: median (min-max)"
    )
    base = statistics.median(r["seconds"] for r in results["torch.load"])
    for variant, runs in results.items():
        seconds = [r["seconds"] for r in runs]
        median = statistics.median(seconds)
        peak = statistics.median(r["peak_gb"] for r in runs)
        print(
            f"  {variant:12s} {median:6.2f} s ({min(seconds):.2f}-{max(seconds):.2f}), "
            f"{base / median:.2f} x as fast as torch.load, peak {peak:.2f} GB"
        )


if __name__ == "__main__":
    main()
