"""Make, encode, decode and check datasets."""

import json
import shlex
from pathlib import Path
from typing import Any

import click

from dnnlib.cli import CommandGroup, device_option, offline_option, parse_resolution, parsed_by, with_options
from dnnlib.errors import UserError
from training.config.advice import AdviceConfig
from training.config.conversion import parse_range, parse_scale
from training.config.data import TRANSFORMS
from training.config.fields import click_options
from training.config.metrics import PRECISIONS, SPLITS


@click.group(cls=CommandGroup)
def main() -> None:
    """Make, encode, decode and check datasets."""


RESUMED = "repeat the command with --resume to continue"  # after Ctrl-C
max_images_option = click.option(
    "--max-images", help="Use only the first images", metavar="INT", type=click.IntRange(min=1)
)
dest_option = click.option(
    "--dest", help="ZIP file or folder to make", metavar="PATH", type=click.Path(path_type=Path), required=True
)
resume_option = click.option("--resume", help="Continue what an interrupted run has left", is_flag=True)


@main.command(after_interrupt=RESUMED)
@click.option(
    "--source",
    "sources",
    help="Images: a folder, or a ZIP, tar, Parquet, TFRecord, IDX, SVHN or LMDB source; may be repeated",
    metavar="PATH",
    type=click.Path(path_type=Path),
    multiple=True,
    required=True,
)
@dest_option
@max_images_option
@click.option("--transform", help="How to make images square  [default: resize]", type=click.Choice(TRANSFORMS))
@click.option(
    "--resolution",
    help="Size of the images, such as 512x512 (or 512)",
    metavar="WxH",
    callback=parsed_by(parse_resolution),
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
@click.option(
    "--validation",
    help="Images that are set aside, always the same ones, where a source has no parts: --split=train has the others, "
    "--split=validation these (published NVAE: 7000 of FFHQ)",
    metavar="INT",
    type=click.IntRange(min=1),
)
@click.option("--keep-names", help="Write what images were called into names.json, for captions", is_flag=True)
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
    validation: int | None,
    keep_names: bool,
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
    from training.conversion.nvae_data import part_of_source
    from training.conversion.opening import open_sources
    from training.conversion.sources import Choice
    from training.conversion.workers import default_workers
    from training.dataset.listing import many

    parts = split if validation is None else "all"
    opened, table = open_sources(sources, Choice(parts, image_key, label_key), labels)
    if validation is not None:
        opened = [part_of_source(source, validation, split) for source in opened]
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
    report = convert_images(opened, dest, settings, table, max_images, workers, on_error, resume, keep_names)
    for line in report.lines(dest):
        print(line)
    look_at(dest)


def look_at(dest: Path) -> None:
    """Print what to do with a dataset that has been made."""
    print(f"Next: python dataset_tool.py check {shlex.quote(str(dest))}")


def encoder_option(default: str) -> Any:
    return click.option(
        "--encoder",
        "--model-url",
        "encoder",
        help="VAE: owner/repo[@revision][/folder] on the Hugging Face hub, a local folder, a .safetensors file, "
        f"U-ViT's autoencoder_kl.pth, or a snapshot of an NVAE  [default: {default}]",
        metavar="NAME",
    )


LATENT_OPTIONS = [
    click.option("--source", help="Dataset: a ZIP file or folder", metavar="PATH", required=True),
    dest_option,
    max_images_option,
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


def run_vae(
    function: Any, choose_encoder: Any, source: str, dest: Path, precision: str, device: str, **opts: Any
) -> None:
    """Encode or decode a dataset.

    Args:
        choose_encoder: dataset -> the encoder, and a line for the user.
    """
    import training.snapshot  # noqa: F401 (which reads the network of an NVAE)
    from torch_utils import distributed
    from torch_utils.device import select_device, set_up_device
    from training.dataset.images import COMPRESSED, ImageFolderDataset
    from training.dataset.labels import only_the_first
    from training.dataset.listing import many
    from training.preconditioning import PRECISIONS

    distributed.init()
    with distributed.fail_together():
        target = select_device(device)
        set_up_device(target)
        dataset = ImageFolderDataset(source)
        encoder, line = choose_encoder(dataset)
        encoder.batch_size = opts["batch"]
        encoder.prepare(target)
    for text in (*dataset.summary(), line):
        distributed.print0(text)
    if dataset.compressed:
        distributed.print0(f"Note: --source={source} is compressed: {COMPRESSED}")
    count = function(dataset, dest, encoder, target, PRECISIONS[precision], **opts)
    distributed.print0(f"{dest}: {many(count, 'item')}")
    taken = len(dataset) if opts["max_images"] is None else min(opts["max_images"], len(dataset))
    if taken < len(dataset):
        labels = [dataset.get_stored_label(i) for i in range(len(dataset))] if dataset.has_labels else []
        classes = [len({label for label in part if isinstance(label, int)}) for part in (labels[:taken], labels)]
        for note in only_the_first(taken, len(dataset), *classes):
            distributed.print0(f"Note: {note}")
    if distributed.get_rank() == 0:
        look_at(dest)
    distributed.shutdown()


@main.command(after_interrupt=RESUMED)
@encoder_option("stabilityai/sd-vae-ft-mse")
@click.option(
    "--scale",
    help="What training does to latents: a factor such as 0.18215; config = that of the VAE's configuration; "
    "published or measured = brings each channel to mean 0 and standard deviation 0.5, by the numbers of the published "
    "models or of these latents  [default: published for the default VAE, config for U-ViT's, else measured]",
    metavar="FLOAT|NAME",
    callback=parsed_by(parse_scale),
)
@click.option(
    "--pixel-range",
    help="What the VAE sees as black and white  [default: 0,1 as published; deep compression autoencoders: -1,1]",
    type=click.Choice(["0,1", "-1,1"]),
)
@click.option(
    "--draws",
    help="Draws of an NVAE's latents per image: training sees one of them at a visit",
    metavar="INT",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
)
@with_options(LATENT_OPTIONS)
def encode(encoder: str | None, scale: float | str | None, pixel_range: str | None, **opts: Any) -> None:
    """Encode images as latents of a VAE, by default Stability AI's, on which the 512x512 models are trained.

    Any AutoencoderKL or AutoencoderDC of diffusers will do, and any NVAE of this project, whose latents are draws of
    all its groups (docs/nvae.md). dataset.json records which it was and what training does to its latents; snapshots
    carry that on, and images are decoded with the same VAE. Under torchrun the processes share the work.

    \b
    Examples:
      python dataset_tool.py encode --source=img512.zip --dest=img512-sd.zip
      # As U-ViT has them
      python dataset_tool.py encode --source=img256.zip --dest=img256-uvit.zip --scale=0.18215 --pixel-range=-1,1
      # Of an NVAE, on whose latents a diffusion model becomes its prior
      python dataset_tool.py encode --source=datasets/digits.zip --dest=out/digits-nvae-latents.zip --draws=8 \\
          --encoder=out/digits-nvae/network-snapshot-0000051.safetensors --batch=256
    """
    from training.conversion.latents import encode_images
    from training.encoders import encoder_to_encode

    values = None if pixel_range is None else [float(value) for value in pixel_range.split(",")]
    run_vae(encode_images, lambda _dataset: encoder_to_encode(encoder, scale, values), **opts)


@main.command(after_interrupt=RESUMED)
@encoder_option("the one that dataset.json records, or stabilityai/sd-vae-ft-mse")
@click.option("--trust-encoder", help="Fetch whatever VAE dataset.json names on the hub", type=bool, default=False)
@with_options(LATENT_OPTIONS)
def decode(encoder: str | None, trust_encoder: bool, **opts: Any) -> None:
    """Decode latents into images, to look at them or to measure the VAE. Of a distribution, the mean is decoded."""
    from training.conversion.latents import decode_latents
    from training.encoders import encoder_to_decode

    run_vae(decode_latents, lambda dataset: encoder_to_decode(dataset, encoder or "", trust_encoder), **opts)


@main.command(after_interrupt=RESUMED)
@click.option("--source", help="Dataset: a ZIP file or folder", metavar="PATH", required=True)
@dest_option
@click.option(
    "--captions",
    help="Annotations of MS-COCO (.json), a table of filename,caption (.csv, .tsv), or a line per image (.txt)  "
    "[default: text files beside the images]",
    metavar="FILE",
    type=click.Path(path_type=Path),
)
@click.option("--template", help="Make captions of the classes: 'a photo of a {}'", metavar="TEXT")
@click.option("--class-names", help="Names of the classes for --template  [default: the dataset's]", metavar="LIST")
@click.option(
    "--text-encoder",
    help="Text model of CLIP: owner/repo on the Hugging Face hub, or a folder; 'words' = random vectors of words, for "
    "small experiments",
    metavar="NAME",
    default="openai/clip-vit-large-patch14",
    show_default=True,
)
@click.option("--tokens", help="Tokens per caption  [default: 77, or 8 of words]", type=click.IntRange(1, 4096))
@device_option
@resume_option
@offline_option
def captions(
    source: str,
    dest: Path,
    captions: Path | None,
    template: str | None,
    class_names: str | None,
    text_encoder: str,
    tokens: int | None,
    device: str,
    resume: bool,
) -> None:
    """Add captions to a dataset of images or latents, and the contexts that a text encoder makes of them.

    Training (train_uvit.py --captions=1) shows an image with one of its captions at a time.

    \b
    Examples:
      python dataset_tool.py captions --source=coco256-sd.zip --captions=captions_train2014.json --dest=coco.zip
      # 'a seven' and so on
      python dataset_tool.py captions --source=datasets/digits.zip --dest=out/digits-text.zip --text-encoder=words \\
          --template="a {}" --class-names=zero,one,two,three,four,five,six,seven,eight,nine
    """
    from torch_utils.device import select_device, set_up_device
    from training.conversion.captions import add_captions, captions_of_classes, read_captions
    from training.dataset.images import ImageFolderDataset
    from training.encoders import TextEncoder, WordEncoder

    if template is not None and captions is not None:
        raise UserError("--captions and --template exclude each other: give one of them")
    dataset = ImageFolderDataset(source)
    names = None if class_names is None else [name.strip() for name in class_names.split(",")]
    texts = read_captions(dataset, captions) if template is None else captions_of_classes(dataset, template, names)
    if text_encoder == "words":
        encoder = WordEncoder() if tokens is None else WordEncoder(tokens)
    else:
        target = select_device(device)
        set_up_device(target)
        encoder = (TextEncoder(text_encoder) if tokens is None else TextEncoder(text_encoder, tokens)).to(target)
    count = add_captions(dataset, dest, texts, encoder, resume)
    print(f"{dest}: {len(dataset)} images, {count} captions as {encoder.tokens} tokens of width {encoder.width}")


@main.command(after_interrupt=RESUMED)
@click.option(
    "--source",
    help="Folder of 0.npy, 1.npy, ...",
    metavar="DIR",
    type=click.Path(path_type=Path),
    required=True,
)
@dest_option
@click.option(
    "--scale",
    help="Factor of the latents  [default: 0.18215, or 0.2301 where there are captions; x>0]",
    type=click.FloatRange(min=0, min_open=True),
    metavar="FLOAT",
)
@resume_option
def features(source: Path, dest: Path, scale: float | None, resume: bool) -> None:
    """Convert features that the published U-ViT code has extracted: ImageNet's, or MS-COCO's with captions.

    Nothing in the files is executed.

    \b
    Example:
      python dataset_tool.py features --source=assets/datasets/coco256_features/train --dest=coco256.zip
    """
    from training.conversion.features import import_features

    images, contexts = import_features(source, dest, scale, resume)
    print(f"{dest}: {images} latents" + (f", {contexts} contexts of captions" if contexts else ""))


@main.command()
@click.argument("data", metavar="DATA")
@click.option(
    "--grid", help="Save a contact sheet with labels", metavar="FILE", type=click.Path(dir_okay=False, path_type=Path)
)
@click.option("--json", "as_json", help="Print JSON", is_flag=True)
@with_options(click_options(AdviceConfig))
def check(data: str, grid: Path | None, as_json: bool, **opts: Any) -> None:
    """Inspect a dataset: sizes, labels, duplicates, statistics. Exit code 1 if training would fail on it.

    Ends with a command that trains on it, and the reason for each of its options.

    \b
    Examples:
      python dataset_tool.py check datasets/digits.zip --grid=out/sheet.png
      # A command for a short training of a U-ViT
      python dataset_tool.py check datasets/digits.zip --family=uvit --duration=16Ki
    """
    wanted = AdviceConfig.from_flat({name: value for name, value in opts.items() if value is not None})

    from training.advice import advice_on
    from training.conversion.check import check_dataset
    from training.dataset.advice import BY

    facts, problems = check_dataset(data, grid)
    advice = advice_on(data, facts, wanted) if not problems else None
    if as_json:
        print(json.dumps({**facts, "problems": problems, "training": None if advice is None else advice.to_json()}))
    else:
        for key, value in facts.items():
            print(f"{key + ':':28s}{value if isinstance(value, str) else json.dumps(value)}")
        for problem in problems:
            text, _, command = problem.partition(f"; {BY}")
            print(f"PROBLEM: {text}" + (f"\nNext: {command}" if command else ""))
        for line in advice.lines() if advice is not None else []:
            print(line)
    if problems:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
