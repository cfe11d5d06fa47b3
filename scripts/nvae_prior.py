"""What a diffusion prior on the latents of an NVAE is worth: the table of docs/nvae.md.

Beside it stand the NVAE's own prior at several temperatures, a Gaussian of the latents' mean and covariance, and what
decoding posteriors gives, which no prior can beat by much. Also a plot of quality against temperature:
docs/images/nvae-quality.png.
"""

import json
from pathlib import Path
from typing import Any

import click
import matplotlib
import torch

from training.dataset.order import evenly_spaced
from training.generation import generate_images
from training.metrics.small_images import RealImages, everything
from training.networks.nvae import NVAE
from training.snapshot import load_network

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TEMPERATURES = (1.0, 0.9, 0.8, 0.7)
STEPS = 18


def samples(net: Any, num: int, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Images of the seeds 0, 1, ... and their classes."""
    batches = list(generate_images(net, seeds=range(num), max_batch_size=250, verbose=False, **kwargs))
    labels = None if batches[0].labels is None else torch.cat([r.labels for r in batches]).argmax(dim=1)
    return torch.cat([r.images for r in batches]), labels


def gaussian(latents: torch.Tensor, num: int) -> torch.Tensor:
    """Draws from the normal distribution with the mean and covariance of latents, in float32."""
    rows = latents.flatten(1).double()
    mean, values, vectors = rows.mean(dim=0), *torch.linalg.eigh(rows.T.cov())
    noise = torch.randn(num, rows.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (mean + noise * values.clamp(min=0).sqrt() @ vectors.T).float().reshape(num, *latents.shape[1:])


@click.command()
@click.option("--data", help="Images", type=click.Path(path_type=Path), default=Path("datasets/digits.zip"))
@click.option("--latents", help="What dataset_tool.py encode made of them", type=click.Path(path_type=Path))
@click.option("--net", help="Snapshot of the diffusion prior", required=True)
@click.option("--num", help="Images of each kind", default=2000)
@click.option("--figure", help="Where to draw the plot", type=click.Path(path_type=Path))
def main(data: Path, latents: Path, net: str, num: int, figure: Path | None) -> None:
    reals, prior = RealImages(data), load_network(net)
    nvae: Any = load_network(prior.encoder.vae_name).net
    assert isinstance(nvae, NVAE), "the network of --net has been trained on the latents of an NVAE"
    stored, classes = everything(latents)
    final = prior.encoder.encode_latents(stored)
    chosen = torch.from_numpy(evenly_spaced(len(final), num))
    found: dict[str, dict[str, float]] = {}

    def show(name: str, figures: dict[str, float]) -> None:
        found[name] = figures
        print(json.dumps({"images": name} | {key: round(value, 3) for key, value in figures.items()}), flush=True)

    for temperature in TEMPERATURES:
        images, _ = samples(nvae, num, temperature=temperature)
        show(own_prior(temperature), reals.compare(images))
    show("Gaussian of the latents", reals.compare(prior.encoder.decode(gaussian(final, num))))
    images, labels = samples(prior.net, num, encoder=prior.encoder, num_steps=STEPS)
    show("diffusion prior", reals.compare(images, labels))
    show("decoded posteriors", reals.compare(prior.encoder.decode(final[chosen]), classes[chosen]))
    if figure is not None:
        draw(figure, found)


def own_prior(temperature: float) -> str:
    return f"prior of the NVAE, T = {temperature:g}"


def draw(path: Path, found: dict[str, dict[str, float]]) -> None:
    """fd_pixels against the temperature of the NVAE's prior, and what the others reach."""
    fig, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    own = [found[own_prior(temperature)]["fd_pixels"] for temperature in TEMPERATURES]
    axes.plot(TEMPERATURES, own, "o-", label="prior of the NVAE")
    others = [name for name in found if name not in map(own_prior, TEMPERATURES)]
    for name, style in zip(others, (":", "-.", "--"), strict=True):
        axes.axhline(found[name]["fd_pixels"], color="black", linestyle=style, label=name)
    axes.set(xlabel="temperature", ylabel="fd_pixels (lower is better)", ylim=(0, None))
    axes.legend()
    fig.savefig(path, dpi=100)
    plt.close(fig)


if __name__ == "__main__":
    main()
