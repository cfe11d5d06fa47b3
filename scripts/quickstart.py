"""The quickstart: two small EDM2 models of handwritten digits, their pictures and figures, in about two minutes.

Runs the project's own commands, measures what they made, and writes out/quickstart/report.png and results.json.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import matplotlib
import numpy as np
import torch

from torch_utils.pictures import image_grid
from training.generation import generate_images
from training.metrics.small_images import RealImages
from training.snapshot import load_network

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent
DATA = "datasets/digits.zip"
GUIDANCE = 1.5
STEPS = 18
EMA_STDS = ["0.020", "0.200"]
SAMPLES = 1000  # measured per model; the standard error of a share of 98 % is then 0.4 %
CLASSES = 10


def run(*args: str) -> None:
    """Run one of the project's commands; stop where it fails."""
    print(f"\n$ python {' '.join(args)}", flush=True)
    done = subprocess.run([sys.executable, *args], cwd=ROOT)
    if done.returncode != 0:
        sys.exit(done.returncode)


def train(outdir: Path, *options: str) -> None:
    """Train on the digits into `outdir`; stop where the training was."""
    run("train_edm2.py", f"--outdir={shown(outdir)}", f"--data={DATA}", "--preset=digits", *options)
    if statistics(outdir)[-1]["nimg"] < json.loads((outdir / "training_options.json").read_text())["duration"]:
        sys.exit("The training was interrupted: repeat the command to continue.")


def statistics(outdir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (outdir / "stats.jsonl").read_text().splitlines()]


def newest(folder: Path, pattern: str) -> str:
    return shown(sorted(folder.glob(pattern))[-1])


def shown(path: Path) -> str:
    """A path as a user in the project's folder would write it."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


class Samples:
    """Samples of one model, with what their nearest real images say about them."""

    def __init__(self, net: Any, reals: RealImages, **guidance: Any):
        batches = list(
            generate_images(net, seeds=range(SAMPLES), max_batch_size=250, verbose=False, num_steps=STEPS, **guidance)
        )
        self.images = torch.cat([r.images for r in batches])
        self.classes = torch.cat([r.labels.argmax(dim=1) for r in batches])
        self.figures = reals.compare(self.images, self.classes)

    def by_class(self, columns: int) -> np.ndarray:
        """The first `columns` samples of each class as a picture, one row per class."""
        return class_rows(self.images.numpy(), self.classes, columns)


def class_rows(images: np.ndarray, classes: torch.Tensor, columns: int) -> np.ndarray:
    order = [torch.nonzero(classes == c).flatten()[:columns] for c in range(CLASSES)]
    return image_grid(images[torch.cat(order).numpy()], columns)[0]


def draw_report(
    path: Path, results: dict[str, Any], stats: list[dict], reals: np.ndarray, models: dict[str, Samples]
) -> None:
    fig, axes = plt.subplots(2, 3, figsize=(16, 12.1), layout="constrained")
    loss, *pictures = axes.flat
    loss.plot([s["nimg"] / 1000 for s in stats], [s["loss"] for s in stats], color="tab:blue")
    loss.set(xlabel="thousand images seen", ylabel="loss", title="Training loss", ylim=(0, None))
    loss.set_box_aspect(1)
    loss.grid(alpha=0.3)
    picture(pictures[0], reals, "Real digits")
    for place, (name, samples) in zip(pictures[1:], models.items(), strict=True):
        picture(place, samples.by_class(10), f"{name}: {samples.figures['agreement']:.1%}")
    fig.suptitle(
        f"EDM2 on 1,797 handwritten digits of 8x8 pixels, after {results['train_seconds']:.0f} s of training. "
        f"The samples share their seeds.\n"
        f"Percentages: samples whose nearest real image is of the class asked for ({results['samples']} per model; "
        f"real digits: {results['class_agreement_real']:.1%}).\n"
        f"Without guidance, samples lie {results['nn_distance_ratio']:.2f} times as far from real digits as those from "
        f"one another (copies: 0).",
        fontsize=15,
    )
    fig.savefig(path, dpi=100)


def picture(axes: Any, image: np.ndarray, title: str) -> None:
    axes.imshow(image, cmap="gray", vmin=0, vmax=255)
    axes.set_title(title, fontsize=14)
    axes.axis("off")


@click.command()
@click.option(
    "--outdir", help="Where everything goes", type=click.Path(path_type=Path), default=ROOT / "out" / "quickstart"
)
def main(outdir: Path) -> None:
    start = time.time()
    out = outdir.resolve()
    where = shown(out)

    # Train the model, and a smaller, less trained one that guides it.
    train(out / "main")
    train(out / "guide", "--channels=8", "--duration=16Ki")
    net_file = newest(out / "main", "network-snapshot-*-0.100.safetensors")
    gnet_file = newest(out / "guide", "network-snapshot-*-0.100.safetensors")
    ema_dir = f"{where}/ema"
    run("reconstruct_phema.py", f"--indir={where}/main", f"--outdir={ema_dir}", f"--outstd={','.join(EMA_STDS)}")
    generate = ["generate_images.py", f"--net={net_file}", "--seeds=0-99", "--batch=100", f"--steps={STEPS}"]
    run(*generate, f"--outdir={where}/images", f"--grid={where}/images.png")
    run(
        *generate,
        f"--gnet={gnet_file}",
        f"--guidance={GUIDANCE}",
        f"--outdir={where}/guided",
        f"--grid={where}/guided.png",
    )

    # Measure against the real digits.
    print(f"\nMeasuring {SAMPLES} samples per model...", flush=True)
    reals = RealImages(ROOT / DATA)
    net, gnet = load_network(ROOT / net_file).net, load_network(ROOT / gnet_file).net
    models = {
        "Samples, no guidance": Samples(net, reals),
        f"Samples, autoguidance (w = {GUIDANCE})": Samples(net, reals, gnet=gnet, guidance=GUIDANCE),
    }
    for std in EMA_STDS:
        averaged = load_network(ROOT / newest(ROOT / ema_dir, f"phema-*-{std}.safetensors")).net
        models[f"Post-hoc EMA {std}"] = Samples(averaged, reals)
    plain, guided, short_ema, long_ema = models.values()
    stats = statistics(out / "main")
    results = {
        "class_agreement": plain.figures["agreement"],
        "class_agreement_guided": guided.figures["agreement"],
        "class_agreement_real": reals.agreement,
        "nn_distance_ratio": plain.figures["distance_ratio"],
        "nn_distance_ratio_guided": guided.figures["distance_ratio"],
        f"class_agreement_ema_{EMA_STDS[0]}": short_ema.figures["agreement"],
        f"class_agreement_ema_{EMA_STDS[1]}": long_ema.figures["agreement"],
        "samples": SAMPLES,
        "train_seconds": stats[-1]["seconds"],
    }
    real_grid = class_rows(reals.images.numpy(), reals.classes, columns=10)
    draw_report(out / "report.png", results, stats, real_grid, models)
    results["total_seconds"] = time.time() - start
    text = json.dumps({name: round(value, 4) for name, value in results.items()}, indent=2)
    (out / "results.json").write_text(text + "\n")
    print(text)
    print(f"\nPictures: {where}/report.png, {where}/images.png, {where}/guided.png")
    print("To use the commands yourself: source .venv/bin/activate")


if __name__ == "__main__":
    main()
