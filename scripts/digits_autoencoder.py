"""A tiny autoencoder of the digits, saved as diffusers does: pixels of 8x8 <-> latents of 4x4 with 4 channels.

Made for docs/uvit.md: `dataset_tool.py encode --encoder=DIR` takes it like any other AutoencoderKL.
"""

from pathlib import Path

import click
import numpy as np
import torch

from dnnlib.cli import CommandLine
from dnnlib.errors import UserError
from training.dataset.images import ImageFolderDataset
from training.encoders.models import import_diffusers

BATCH, RATE = 64, 3e-3
KL_WEIGHT = 1e-3  # of the divergence per latent number, against the squared error per pixel


@click.command(cls=CommandLine)
@click.option(
    "--data", help="Digits as RGB images: a ZIP file or folder", metavar="PATH", default="out/digits-rgb.zip",
    show_default=True,
)  # fmt: skip
@click.option("--outdir", help="Folder to make", metavar="DIR", type=Path, required=True)
@click.option("--steps", help="Training steps", type=click.IntRange(min=1), default=600, show_default=True)
def main(data: str, outdir: Path, steps: int) -> None:
    """Train an autoencoder of the digits in half a minute."""
    dataset = ImageFolderDataset(data)
    if dataset.num_channels != 3:
        raise UserError(f"--data={data}: has {dataset.num_channels} channels, not 3 (dataset_tool.py convert)")
    pixels = torch.from_numpy(np.stack([dataset[i][0] for i in range(len(dataset))])).float() / 255
    torch.manual_seed(0)
    vae = import_diffusers().AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[16, 32],
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=8,
    )
    optimizer = torch.optim.Adam(vae.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps + 1)
    for step in range(1, steps + 1):
        x = pixels[torch.randint(len(pixels), [BATCH])]
        latents = vae.encode(x).latent_dist
        error = (vae.decode(latents.sample()).sample - x).square().mean()
        divergence = latents.kl().sum() / latents.mean.numel()
        optimizer.zero_grad()
        (error + KL_WEIGHT * divergence).backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            print(
                f"step {step:5d}   RMS error {255 * error.item() ** 0.5:.1f} of 255   KL {divergence.item():.2f} nats"
            )
    vae.save_pretrained(outdir)
    print(f"{outdir}: encode with --encoder={outdir}")


if __name__ == "__main__":
    main()
