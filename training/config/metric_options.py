"""Options that commands of calculate_metrics.py share."""

from collections.abc import Callable
from pathlib import Path

import click

from dnnlib.cli import parse_resolution, parsed_by
from training.config.data import TRANSFORMS
from training.config.metrics import DEFAULT_METRICS, METRICS, RESIZE_MODES, parse_metrics, parse_weights

REF_OPTION = click.option(
    "--ref",
    help="Reference: statistics (a file or URL), or a folder or ZIP file of images",
    metavar="PATH",
    required=True,
)
METRICS_OPTION = click.option(
    "--metrics",
    help=f"Metrics: {', '.join(METRICS)}",
    metavar="LIST",
    default=",".join(DEFAULT_METRICS),
    show_default=True,
    callback=parsed_by(parse_metrics),
)
BATCH_OPTION = click.option(
    "--batch",
    help="Images per batch and process",
    metavar="INT",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
)
WORKERS_OPTION = click.option(
    "--workers",
    help="Worker processes that load images",
    metavar="INT",
    type=click.IntRange(min=0),
    default=2,
    show_default=True,
)
DETECTOR_OPTIONS = [
    click.option(
        "--resize",
        help="How images are resized for DINOv2 and CLIP; pil = as in dgm-eval",
        type=click.Choice(RESIZE_MODES),
        default="torch",
        show_default=True,
    ),
    click.option(
        "--detector-weights",
        help="Weights of a detector: a file (inception) or folder (dinov2, clip)  [default: downloaded once]",
        metavar="NAME=PATH",
        multiple=True,
        callback=lambda _ctx, _param, values: parse_weights(values),
    ),
]


def num_option(text: str, default: int) -> Callable:
    """--num, with this help."""
    return click.option(
        "--num",
        "--num-images",
        "num_images",
        help=text,
        metavar="INT",
        type=click.IntRange(min=2),
        default=default,
        show_default=True,
    )


MEASURING_OPTIONS = [
    num_option("Number of images (torchrun takes --num for an option of its own: there, write --num-images)", 50000),
    click.option(
        "--seed",
        help="First seed (gen), or seed of the random subset if there are more images than --num (calc)",
        metavar="INT",
        type=click.IntRange(min=0),
        default=0,
        show_default=True,
    ),
    click.option(
        "--repeat",
        help="Measure several times with different seeds, and also print mean and minimum",
        metavar="INT",
        type=click.IntRange(min=1),
        default=1,
        show_default=True,
    ),
    click.option(
        "--held-out",
        help="Images of the same kind as --ref that training has not seen, for ct: statistics or images, as --ref",
        metavar="PATH",
    ),
    click.option("--error-bars", help="Standard errors of Frechet distances (jackknife)", is_flag=True),
    click.option(
        "--force", help="Compare even if another detector or resolution makes the figures incomparable", is_flag=True
    ),
    click.option(
        "--outdir",
        help="Also append the results, with all that made them, to metric-NAME.jsonl in this folder",
        metavar="DIR",
        type=click.Path(file_okay=False, path_type=Path),
    ),
    click.option("--json", "as_json", help="Also print what --outdir would get, as JSON lines", is_flag=True),
]
FIT_OPTIONS = [
    click.option(
        "--resolution",
        help="Size that images are brought to as by dataset_tool.py convert, such as 256x256 (or 256): for folders of "
        "images of all sizes  [default: they are of one size]",
        metavar="WxH",
        callback=parsed_by(parse_resolution),
    ),
    click.option(
        "--transform", help="How --resolution makes images square  [default: resize]", type=click.Choice(TRANSFORMS)
    ),
]
