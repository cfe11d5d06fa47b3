"""Calculate the likelihood of images under a network: bits per dimension, and what they consist of."""

import json
from pathlib import Path
from typing import Any

import click

from dnnlib.cli import CommandLine, offline_option, with_options
from dnnlib.files import check_not_input
from training.config.fields import click_options
from training.config.generation import check_seed
from training.config.likelihood import LikelihoodConfig


@click.command(cls=CommandLine, after_interrupt="repeat the command to continue")
@click.option(
    "--net",
    help="Network snapshot: a file, the folder of a training run (its newest snapshot), a Hugging Face folder, or a "
    "URL (http, file, hf)",
    metavar="FILE",
    required=True,
)
@click.option(
    "--arch", help="Training preset that names the architecture of published files that do not say it", metavar="PRESET"
)
@click.option("--data", help="Images: a folder or ZIP file", metavar="ZIP|DIR", required=True)
@click.option(
    "--out",
    help="Where to save the figures of all images, as JSON lines; what is there is not computed again",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
)
@click.option(
    "--latents",
    help="Also save the noise that the probability flow carries each image to, as {index}.npy, float32 [C, H, W] of "
    "unit variance (of the first of --repeats)",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
)
@click.option("--num", help="Only the first images, so many  [default: all]", metavar="INT", type=click.IntRange(min=1))
@click.option(
    "--seed", help="Seed of the draws", metavar="INT", type=click.IntRange(min=0), default=0, show_default=True
)
@click.option(
    "--batch",
    help="Images at a time in each process",
    metavar="INT",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
)
@with_options(click_options(LikelihoodConfig))
@offline_option
def main(
    net: str,
    arch: str | None,
    data: str,
    out: Path,
    latents: Path | None,
    num: int | None,
    seed: int,
    batch: int,
    **opts: Any,
) -> None:
    """Bits per dimension of images under a network.

    Denoisers (EDM2, score-SDE models, U-ViT): by the probability flow, with the labels of the images where the network
    knows classes, and with the first caption of each (dataset_tool.py captions) where it follows texts. NVAE: the
    negative evidence lower bound, the importance-weighted bound, reconstruction and KL of each group. The figures of an
    image depend on itself and the seed alone, whatever the batch and processes. Repeating a command continues where it
    stopped.

    \b
    Examples:
      python calculate_likelihood.py --net=out/digits-nvae/network-snapshot-0000051.safetensors \\
          --data=datasets/digits.zip --samples=100 --out=out/digits-nvae/likelihood.jsonl
      python calculate_likelihood.py --net=out/vp/network-snapshot-0000114-ema.safetensors \\
          --data=datasets/digits.zip --levels=17 --num=200 --out=out/vp/likelihood.jsonl --latents=out/vp/latents
      torchrun --standalone --nproc_per_node=8 calculate_likelihood.py --net=checkpoint.pt \\
          --data=cifar10-test.zip --samples=1000 --max-batch=500 --out=cifar10-test.jsonl
    """
    given = {name: value for name, value in opts.items() if value is not None}
    config = LikelihoodConfig.from_flat(given)
    check_seed(seed)

    from torch_utils import distributed
    from training.dataset_likelihood import evaluate, prepare

    distributed.init()
    with distributed.fail_together():
        check_not_input("--out", out, {"--net": net if Path(net).is_file() else None, "--data": data})
        task = prepare(net, data, config, num, seed, arch, given, latents)
        task.check_batch(batch)
        check_seed(seed + len(task.indices) - 1)
    summary = evaluate(task, out, batch)
    if summary is not None:
        print(json.dumps(summary))
    distributed.shutdown()


if __name__ == "__main__":
    main()
