"""Autoguidance on images: sweep the guidance weight of two digit models, and draw what it does.

Runs the commands of docs/autoguidance.md, then measures and writes out/autoguidance/sweep.png and sweep.json.
"""

import json
import math
from pathlib import Path
from typing import Any

import click
import matplotlib
from quickstart import DATA, ROOT, SAMPLES, STEPS, Samples, newest, picture, train

from dnnlib.files import atomic_write
from dnnlib.util import code_version
from training.metrics.small_images import RealImages
from training.snapshot import load_network

matplotlib.use("Agg")
import matplotlib.pyplot as plt

WEIGHTS = (1.0, 1.25, 1.5, 2.0, 2.5, 3.0)
SHOWN = (1.0, 2.0, 3.0)


def measure(samples: Samples) -> dict[str, float]:
    """Share of samples of the class asked for, with its standard error; nearness to real digits; spread."""
    agreement = samples.figures["agreement"]
    return {
        "class_agreement": agreement,
        "class_agreement_error": math.sqrt(agreement * (1 - agreement) / len(samples.images)),
        "nn_distance_ratio": samples.figures["distance_ratio"],
        "diversity": samples.figures["diversity"],
    }


def draw(path: Path, rows: list[dict[str, Any]], real: dict[str, float], shown: dict[float, Samples]) -> None:
    fig, axes = plt.subplots(2, 3, figsize=(16, 11), layout="constrained")
    weights = [row["weight"] for row in rows]
    curves = [
        ("class_agreement", "Samples of the class asked for", "share"),
        ("nn_distance_ratio", "Distance to the nearest real digit", "over that between real digits"),
        ("diversity", "Distance between samples of a class", "pixel values"),
    ]
    for place, (key, title, unit) in zip(axes[0], curves, strict=True):
        errors = [row[f"{key}_error"] for row in rows] if f"{key}_error" in rows[0] else None
        place.errorbar(weights, [row[key] for row in rows], errors, marker="o", capsize=3)
        place.axhline(real[key], color="gray", linestyle="--", label="real digits")
        place.legend(fontsize=12)
        place.set_xlabel("guidance weight w (1 = no guidance)", fontsize=12)
        place.set_ylabel(unit, fontsize=12)
        place.set_title(title, fontsize=14)
        place.grid(alpha=0.3)
    for place, (weight, samples) in zip(axes[1], shown.items(), strict=True):
        picture(place, samples.by_class(10), f"w = {weight:g}")
    made_by = {"Description": f"scripts/autoguidance_digits.py, OpenEDM2 {code_version()}"}
    with atomic_write(path) as f:
        fig.savefig(f, format="png", dpi=100, metadata=made_by)


@click.command()
@click.option(
    "--outdir",
    help="Where to save the models, the picture and the figures  [default: out/autoguidance]",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    default=ROOT / "out" / "autoguidance",
)
def main(outdir: Path) -> None:
    out = outdir.resolve()
    train(out / "main", "--duration=64Ki")
    train(out / "guide", "--channels=8", "--duration=16Ki")
    net, gnet = (
        load_network(ROOT / newest(out / name, "network-snapshot-*-0.100.safetensors")).net
        for name in ("main", "guide")
    )
    reals = RealImages(ROOT / DATA)
    rows, shown = [], {}
    for weight in WEIGHTS:
        samples = Samples(net, reals, gnet=gnet, guidance=weight)
        rows.append({"weight": weight} | measure(samples))
        print({key: round(value, 4) for key, value in rows[-1].items()}, flush=True)
        if weight in SHOWN:
            shown[weight] = samples
    real = {"class_agreement": reals.agreement, "nn_distance_ratio": 1.0, "diversity": reals.diversity}
    facts = {
        "command": "python scripts/autoguidance_digits.py",
        "code_version": code_version(),
        "samples": SAMPLES,
        "steps": STEPS,
        "rows": rows,
        "real": real,
    }
    with atomic_write(out / "sweep.json", "w") as f:
        f.write(json.dumps(facts, indent=2) + "\n")
    draw(out / "sweep.png", rows, real, shown)
    print(f"Pictures: {out / 'sweep.png'}")


if __name__ == "__main__":
    main()
