"""Make, encode, decode and check datasets."""

import json
import math
import re
from pathlib import Path
from typing import Any

import click

from dnnlib.cli import CommandGroup, device_option, offline_option, parsed_by, with_options
from dnnlib.errors import UserError
from training.config.data import TRANSFORMS
from training.config.metrics import PRECISIONS, SPLITS

MAX_RESOLUTION = 8192


def parse_resolution(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9][0-9]*)x([1-9][0-9]*)", text)
    if match is None or max(len(match[1]), len(match[2])) > 9:
        raise UserError(f"{text!r} is not of the form WxH, such as 512x512")
    width, height = int(match[1]), int(match[2])
    if max(width, height) > MAX_RESOLUTION:
        raise UserError(f"{text!r} is above {MAX_RESOLUTION}x{MAX_RESOLUTION}")
    return width, height


def parse_range(text: str) -> tuple[float, float] | str:
    if text == "auto":
        return text
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"{text!r} is not of the form LO,HI, such as 0,4095, nor auto") from None
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UserError(f"{text!r}: the first number must be below the second, both finite")
    return low, high


@click.group(cls=CommandGroup)
def main() -> None:
    """Make, encode, decode and check datasets."""


max_images_option = click.option(
    "--max-images", help="Use only the first images", metavar="INT", type=click.IntRange(min=1)
)
dest_option = click.option(
    "--dest", help="ZIP file or folder to make", metavar="PATH", type=click.Path(path_type=Path), required=True
)
resume_option = click.option("--resume", help="Continue what an interrupted run has left", is_flag=True)


@main.command()
@click.option(
    "--source",
    "sources",
    help="Images: a folder, or a ZIP, tar, Parquet, IDX or LMDB source; may be repeated",
    metavar="PATH",
    type=click.Path(path_type=Path),
    multiple=True,
    required=True,
)
@dest_option
@max_images_option
@click.option("--transform", help="How to make images square  [default: resize]", type=click.Choice(TRANSFORMS))
@click.option(
    "--resolution", help="Size of the images, such as 512x512", metavar="WxH", callback=parsed_by(parse_resolution)
)
@click.option(
    "--channels", help="3 = RGB, 1 = grayscale", type=click.Choice(["1", "3"]), default="3", show_default=True
)
@click.option(
    "--range",
    "value_range",
    help="Black and white of images of more than 8 bits, such as 0,4095; auto = the lowest and highest pixel of all",
    metavar="LO,HI|auto",
    callback=parsed_by(parse_range),
)
@click.option(
    "--labels",
    help="Labels: a table of filename,label, or a dataset.json  [default: those of the source]",
    metavar="FILE",
    type=click.Path(path_type=Path),
)
@click.option(
    "--image-key",
    "--image-column",
    "image_key",
    help="Image to take: a column, or a file type of a WebDataset sample",
    metavar="NAME",
)
@click.option(
    "--label-key",
    "--label-column",
    "label_key",
    help="Label to take: a column, or a file type or JSON key of a WebDataset sample",
    metavar="NAME",
)
@click.option(
    "--split",
    help="Part of the dataset, where names of files or folders say the part",
    type=click.Choice([*SPLITS, "all"]),
    default="train",
    show_default=True,
)
@click.option("--workers", help="Worker processes  [default: all cores]", metavar="INT", type=click.IntRange(min=1))
@click.option(
    "--on-error",
    help="What to do with broken images",
    type=click.Choice(["fail", "skip"]),
    default="fail",
    show_default=True,
)
@resume_option
def convert(
    sources: tuple[Path, ...],
    dest: Path,
    max_images: int | None,
    transform: str | None,
    resolution: tuple[int, int] | None,
    channels: str,
    value_range: tuple[float, float] | str | None,
    labels: Path | None,
    image_key: str | None,
    label_key: str | None,
    split: str,
    workers: int | None,
    on_error: str,
    resume: bool,
) -> None:
    """Convert images into a dataset of uncompressed PNG files with labels.

    Images are turned upright (EXIF) and become 8-bit RGB (or grayscale): of 16 bits the upper 8 are kept (or --range
    says which values are black and white), and transparent parts become white. Labels come from dataset.json, class
    folders or the format's own labels.

    \b
    Examples:
      # ImageNet at 512x512
      python dataset_tool.py convert --source=imagenet/train --dest=img512.zip \\
          --resolution=512x512 --transform=center-crop-dhariwal
      # CIFAR-10 as published
      python dataset_tool.py convert --source=cifar-10-python.tar.gz --dest=cifar10.zip
    """
    from training.conversion.convert import ImageSettings, convert_images
    from training.conversion.depth import measure_range
    from training.conversion.opening import open_sources
    from training.conversion.sources import Choice
    from training.conversion.workers import default_workers
    from training.dataset.labels import describe_classes
    from training.dataset.listing import many

    opened, table = open_sources(sources, Choice(split, image_key, label_key), labels)
    for source in opened:
        print("\n  ".join(source.summary()))
    if table is not None:
        print(f"--labels={labels}: {many(len(table), 'row')}")
    workers = workers if workers is not None else default_workers()
    if isinstance(value_range, str):
        value_range = measure_range(opened, max_images, workers)
        print("--range=auto: " + (f"{value_range[0]:g},{value_range[1]:g}" if value_range else "no use for it"))
    width, height = resolution or (None, None)
    settings = ImageSettings(transform, width, height, int(channels), value_range)
    report = convert_images(opened, dest, settings, table, max_images, workers, on_error, resume)
    classes = describe_classes(report.class_counts, report.classes) if report.class_counts else "no classes"
    print(f"{dest}: {many(report.written, 'image')}, {classes}")
    for note in report.notes:
        print(f"  {note}")
    if report.too_small:
        print(f"  left out: {report.too_small} that are too small")
    for name, reason in report.skipped[:10]:
        print(f"  left out: {name}: {reason}")
    if len(report.skipped) > 10:
        print(f"  and {len(report.skipped) - 10} more; report.json in {dest} lists them")


LATENT_OPTIONS = [
    click.option("--source", help="Dataset: a ZIP file or folder", metavar="PATH", required=True),
    dest_option,
    max_images_option,
    click.option(
        "--model-url",
        help="VAE: a name on the Hugging Face hub, a local folder or a .safetensors file",
        metavar="NAME",
        default="stabilityai/sd-vae-ft-mse",
        show_default=True,
    ),
    click.option("--batch", help="Images at a time", type=click.IntRange(min=1), default=8, show_default=True),
    click.option(
        "--precision",
        help="What the VAE computes in",
        type=click.Choice(PRECISIONS),
        default="fp32",
        show_default=True,
    ),
    device_option,
    resume_option,
    offline_option,
]


def run_vae(function: Any, source: str, dest: Path, model_url: str, precision: str, device: str, **opts: Any) -> None:
    from torch_utils import distributed
    from torch_utils.device import select_device, set_up_device
    from training.dataset.images import COMPRESSED, ImageFolderDataset
    from training.encoders import StabilityVAEEncoder
    from training.preconditioning import PRECISIONS

    distributed.init()
    with distributed.fail_together():
        target = select_device(device)
        set_up_device(target)
        dataset = ImageFolderDataset(source)
        encoder = StabilityVAEEncoder(vae_name=model_url, batch_size=opts["batch"])
        encoder.prepare(target)
    if dataset.compressed:
        distributed.print0(f"Note: --source={source} is compressed: {COMPRESSED}")
    count = function(dataset, dest, encoder, target, PRECISIONS[precision], **opts)
    distributed.print0(f"{dest}: {count} items")
    distributed.shutdown()


@main.command()
@with_options(LATENT_OPTIONS)
def encode(**opts: Any) -> None:
    """Encode images as latents of Stability AI's VAE, on which the 512x512 models are trained.

    Under torchrun the processes share the work.

    \b
    Example:
      python dataset_tool.py encode --source=img512.zip --dest=img512-sd.zip
    """
    from training.conversion.latents import encode_images

    run_vae(encode_images, **opts)


@main.command()
@with_options(LATENT_OPTIONS)
def decode(**opts: Any) -> None:
    """Decode latents into images, to look at them or to measure the VAE. Of a distribution, the mean is decoded."""
    from training.conversion.latents import decode_latents

    run_vae(decode_latents, **opts)


@main.command()
@click.argument("data", metavar="DATA")
@click.option(
    "--grid", help="Save a contact sheet with labels", metavar="FILE", type=click.Path(dir_okay=False, path_type=Path)
)
@click.option("--json", "as_json", help="Print JSON", is_flag=True)
def check(data: str, grid: Path | None, as_json: bool) -> None:
    """Inspect a dataset: sizes, labels, duplicates, statistics. Exit code 1 if training would fail on it."""
    from training.conversion.check import check_dataset

    facts, problems = check_dataset(data, grid)
    if as_json:
        print(json.dumps({**facts, "problems": problems}))
    else:
        for key, value in facts.items():
            print(f"{key + ':':28s}{value if isinstance(value, str) else json.dumps(value)}")
        for problem in problems:
            print(f"PROBLEM: {problem}")
    if problems:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
