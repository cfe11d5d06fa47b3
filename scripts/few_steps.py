"""Digits by few evaluations: a denoiser by its solvers beside what consistency tuning makes of it.

Measures both against the real digits, prints a table and draws the images (docs/few_steps.md).
"""

from pathlib import Path
from typing import NamedTuple

import click
import matplotlib
import torch
from quickstart import DATA, ROOT, class_rows, picture

from dnnlib.files import atomic_write
from dnnlib.util import code_version
from training.config.generation import GenerationConfig, NetworksConfig, SamplingConfig
from training.config.samplers import GridConfig, SamplerConfig
from training.generation import load
from training.metrics.small_images import RealImages

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BATCH = 600


def multistep(steps: int, sigma_min: float) -> SamplerConfig:
    return SamplerConfig(solver="sqrt-3m", grid=GridConfig(num_steps=steps, sigma_max=20.0, sigma_min=sigma_min))


def consistency(*levels: float) -> SamplerConfig:
    return SamplerConfig(solver="consistency", grid=GridConfig(sigmas=levels))


OF_DENOISER = {
    "heun, 63 evaluations": SamplerConfig(),
    "sqrt-3m, 6 evaluations": multistep(6, 0.1),
    "sqrt-3m, 2 evaluations": multistep(2, 0.8),
}
OF_TUNED = {"consistency, 1 evaluation": consistency(20.0), "consistency, 2 evaluations": consistency(20.0, 0.8)}


class Digits(NamedTuple):
    """Images, uint8 [N, 1, 8, 8], and their classes [N]."""

    images: torch.Tensor
    classes: torch.Tensor


def samples(net: str, sampler: SamplerConfig, count: int) -> Digits:
    """As many of each class, of seeds from 0."""
    sampling = SamplingConfig(sampler=sampler, class_policy="balanced")
    generator = load(GenerationConfig(networks=NetworksConfig(net=net), sampling=sampling))
    batches = list(generator.images(range(count), max_batch_size=BATCH, verbose=False))
    return Digits(torch.cat([r.images for r in batches]), torch.cat([r.labels.argmax(dim=1) for r in batches]))


@click.command()
@click.option("--net", help="EDM2 network of the digits", metavar="FILE", required=True)
@click.option("--tuned", help="What train_consistency.py made of it; may be repeated", metavar="FILE", multiple=True)
@click.option("--num", help="Images of each", metavar="INT", type=int, default=1797, show_default=True)
@click.option("--out", help="Picture to write, of the first of --tuned", metavar="FILE", type=Path)
def main(net: str, tuned: tuple[str, ...], num: int, out: Path | None) -> None:
    reals = RealImages(ROOT / DATA)
    shown = {"real digits": Digits(reals.images, reals.classes)}
    print(f"{'':32s} fd_pixels  agreement  ratio  diversity")
    print(f"{'real digits':32s} {0:9.3f}  {reals.agreement:9.3f}  {1:5.3f}  {reals.diversity:9.0f}", flush=True)
    drawn = reals.images[torch.randint(len(reals.images), [num], generator=torch.Generator().manual_seed(0))]
    print(f"{f'{num} of them drawn at random':32s} {reals.compare(drawn)['fd_pixels']:9.3f}", flush=True)
    runs = [(name, net, sampler) for name, sampler in OF_DENOISER.items()]
    runs += [(name, network, sampler) for network in tuned for name, sampler in OF_TUNED.items()]
    for name, network, sampler in runs:
        found = samples(network, sampler, num)
        row = reals.compare(found.images, found.classes)
        print(
            f"{name:32s} {row['fd_pixels']:9.3f}  {row['agreement']:9.3f}  {row['distance_ratio']:5.3f}  "
            f"{row['diversity']:9.0f}",
            flush=True,
        )
        shown.setdefault(name, found)
    if out is not None:
        draw(out, shown)


def draw(path: Path, shown: dict[str, Digits]) -> None:
    """A panel for each, a class per row."""
    fig, axes = plt.subplots(2, 3, figsize=(14, 10.2), layout="constrained")
    for place in axes.flat:
        place.axis("off")
    for place, (name, found) in zip(axes.flat, shown.items(), strict=False):
        picture(place, class_rows(found.images.numpy(), found.classes, 10), name)
    made_by = {"Description": f"scripts/few_steps.py, OpenEDM2 {code_version()}"}
    with atomic_write(path) as f:
        fig.savefig(f, format="png", dpi=70, metadata=made_by)


if __name__ == "__main__":
    main()
