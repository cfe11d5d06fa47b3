"""Calculate metrics of images and networks: FID, FD-DINOv2, CMMD, precision and recall, memorisation and more.

`calc` measures images in files, `gen` a network, and `ref` makes reference statistics: --help shows examples. Python
callers find the published functions here.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dnnlib.cli import (
    CommandGroup,
    device_option,
    given_options,
    imported_when_used,
    offline_option,
    parse_bytes,
    parsed_by,
    with_options,
)
from dnnlib.errors import UserError
from dnnlib.files import check_not_input
from training.config.edm2 import GENERATION_PRESETS, files_for
from training.config.fields import click_options
from training.config.generation import KEPT_NETWORKS, GenerationConfig, NetworksConfig, SamplingConfig, check_seed
from training.config.metric_options import (
    BATCH_OPTION,
    DETECTOR_OPTIONS,
    FIT_OPTIONS,
    MEASURING_OPTIONS,
    METRICS_OPTION,
    REF_OPTION,
    WORKERS_OPTION,
    num_option,
)
from training.config.metrics import METRICS

if TYPE_CHECKING:
    from training.conversion.transforms import Fit
    from training.metrics import (
        calculate_metrics_from_stats,
        calculate_stats_for_files,
        calculate_stats_for_iterable,
        load_stats,
    )
    from training.release import get_detector, metric_specs, parse_metric_list, save_stats

# For Python callers, as in the published script.
OF_RELEASE = ["get_detector", "metric_specs", "parse_metric_list", "save_stats"]
__all__ = [
    "calculate_metrics_from_stats",
    "calculate_stats_for_files",
    "calculate_stats_for_iterable",
    "get_detector",
    "load_stats",
    "metric_specs",
    "parse_metric_list",
    "save_stats",
]

__getattr__ = imported_when_used(
    dict.fromkeys(__all__, "training.metrics") | dict.fromkeys(OF_RELEASE, "training.release")
)


@click.group(cls=CommandGroup)
def main() -> None:
    """Calculate metrics of images and networks: distances, precision and recall, diversity, memorisation.

    fid, fd_dinov2, fd_clip, fd_pixels: Frechet distance of features of Inception-v3, DINOv2, CLIP, or pixels averaged
    to 8x8. kid, kd_dinov2, kd_pixels: kernel distance; cmmd: that of CLIP with a Gaussian kernel. is: inception score.

    Of the features of Inception-v3, or with _dinov2, _clip or _pixels after the name: prdc: precision, recall, density
    and coverage. vendi: effective number of different images. memorisation: share of copies of the images of --ref.
    ct: whether images are nearer to --ref than those of --held-out are. balance: shares of classes, as far as --ref
    has classes. Those of pixels need no weights; they compare runs on small data, not with the literature.

    Under torchrun, the processes share the work.
    """


@main.command()
@click.option("--images", help="Images: a folder, a ZIP file, or an .npz file of ADM", metavar="PATH", required=True)
@REF_OPTION
@METRICS_OPTION
@with_options(MEASURING_OPTIONS)
@with_options(FIT_OPTIONS)
@BATCH_OPTION
@WORKERS_OPTION
@with_options(DETECTOR_OPTIONS)
@device_option
@offline_option
def calc(images: str, seed: int, num_images: int, repeat: int, batch: int, workers: int, **opts: Any) -> None:
    """Metrics of images in files.

    \b
    Examples:
      python calculate_metrics.py calc --images=out --ref=datasets/img512.safetensors --num=50000
      # Two folders of photos of all sizes
      python calculate_metrics.py calc --images=mine --ref=theirs --resolution=256 --transform=center-crop --num=1000
    """
    from torch_utils import distributed
    from training.metrics.images import FileBatches, content_hash, open_images
    from training.metrics.session import begin, finish, keep, show_summary

    distributed.init()
    with distributed.fail_together():
        fit = chosen_fit(opts)
        # Before anything is fetched.
        if repeat > 1 and len(open_images(images, fit=fit)) <= num_images:
            raise UserError(f"--repeat={repeat} needs more than --num={num_images} images; {images} has no more")
        datasets = [open_images(images, num_images, i, fit) for i in range(seed, seed + repeat)]
    evaluation = begin(opts, fit, workers)
    show_summary(datasets[0])
    evaluation.check(num_images, datasets[0].resolution)
    runs = []
    for i, dataset in enumerate(datasets, seed):
        facts = {"images": images, "images_hash": content_hash(dataset), "images_found": dataset.summary()}
        if fit is not None:
            facts["transform"] = fit.describe()
        provenance = {**facts, "seed": i}
        runs.append(keep(evaluation(FileBatches(dataset, batch, workers), provenance), opts))
    finish(runs, opts)


@main.command()
@with_options(click_options(NetworksConfig))
@click.option(
    "--ref",
    help="Reference: statistics (a file or URL), or a folder or ZIP file of images  [default: the published ones of "
    "--preset]",
    metavar="PATH",
)
@METRICS_OPTION
@with_options(MEASURING_OPTIONS)
@BATCH_OPTION
@with_options(click_options(SamplingConfig))
@offline_option
@with_options(DETECTOR_OPTIONS)
@click.option(
    "--save-images",
    help="Also save the images",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
)
def gen(
    ref: str | None, num_images: int, seed: int, repeat: int, batch: int, save_images: Path | None, **opts: Any
) -> None:
    """Metrics of a network, on images that it generates.

    \b
    Examples:
      python calculate_metrics.py gen --net=out/digits/network-snapshot-0000147-0.100.safetensors \\
          --ref=out/digits-ref.safetensors --metrics=fd_pixels --num=1797
      # A published result
      torchrun --standalone --nproc_per_node=8 calculate_metrics.py gen --preset=edm2-img512-s-guid-fid --repeat=3
    """
    preset = opts["preset"]
    config = GenerationConfig.take(opts)
    if ref is None and preset is None:
        raise UserError("which reference? Give --ref, or a --preset that has one")
    check_seed(seed + repeat * num_images - 1)
    opts.update(device=config.sampling.device, ref=ref if ref is not None else files_for(preset)[-1])

    from torch_utils import distributed
    from training.generation import fetch, load
    from training.metrics.session import begin, finish, keep
    from training.provenance import ImageRecord

    distributed.init()
    fetch(config.networks)
    with distributed.fail_together():
        generator = load(config)
        if generator.suffix != ".png":
            raise UserError(f"{config.networks.net}: makes latents, not images; metrics need pixels")
        if save_images is not None:
            save_images.mkdir(parents=True, exist_ok=True)
        resolution = generator.resolution
    evaluation = begin(opts)
    evaluation.check(num_images, resolution)
    runs = []
    for i in range(repeat):
        seeds = range(seed + i * num_images, seed + (i + 1) * num_images)
        with distributed.fail_together():
            facts = generator.describe(seeds)
            record = None if save_images is None else ImageRecord(save_images, facts)
            saving = None if record is None else lambda _generator, record=record: record
            images = generator.images(seeds, record=saving, subdirs=True, max_batch_size=batch, verbose=False)
        runs.append(keep(evaluation(images, facts), opts))
    finish(runs, opts)
    published = GENERATION_PRESETS.get(preset)
    if published is not None and published.metric in opts["metrics"]:
        distributed.print0(
            f"published: {published.metric} {published.value:.2f} (with the preset's options, the minimum of 3 x 50000 "
            f"images)"
        )


@main.command(after_interrupt="what has been measured is kept; repeat the command to continue")
@click.option(
    "--vary",
    help="What is varied, and its values: ema-std, guide-std (EMA widths, made of the runs --net and --gnet), kimg "
    "(their time), or any option of generate_images.py, such as guidance=1,1.5,2 or "
    "guidance-interval='0.2,1;0.2,3'; may be repeated",
    metavar="NAME=LIST",
    multiple=True,
    required=True,
)
@click.option(
    "--search",
    help="grid = all settings; coordinate = one axis after the other from the middle of all, until none improves; "
    "golden = likewise, by golden sections of ranges, whose ends are two EMA widths or two values of a real number",
    type=click.Choice(["grid", "coordinate", "golden"]),
    default="grid",
    show_default=True,
)
@click.option(
    "--tolerance",
    help="Share of a range within which --search=golden finds a value  [default: 0.05]",
    metavar="FLOAT",
    type=click.FloatRange(min=0.001, max=0.5),
)
@click.option("--budget", help="Stop before more images than this are made", metavar="INT", type=click.IntRange(min=1))
@click.option(
    "--outdir",
    help="Where results (sweep.jsonl), the picture and reconstructed networks go",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
)
@click.option(
    "--keep-memory",
    help="Networks that stay in memory, for settings that share them, as far as they are no more than this",
    metavar="SIZE",
    default=f"{KEPT_NETWORKS >> 30}GiB",
    show_default=True,
    callback=parsed_by(parse_bytes),
)
@click.option(
    "--keep-disk",
    help="Reconstructed networks that stay in --outdir, as far as they are no more than this; others are made again "
    "when they are needed  [default: all]",
    metavar="SIZE",
    callback=parsed_by(parse_bytes),
)
@REF_OPTION
@METRICS_OPTION
@num_option("Number of images of each setting", 5000)
@click.option("--seed", help="First seed", metavar="INT", type=click.IntRange(min=0), default=0, show_default=True)
@BATCH_OPTION
@with_options(click_options(NetworksConfig))
@with_options(click_options(SamplingConfig))
@offline_option
@with_options(DETECTOR_OPTIONS)
@click.pass_context
def sweep(
    ctx: click.Context,
    vary: tuple[str, ...],
    search: str,
    tolerance: float | None,
    budget: int | None,
    outdir: Path,
    keep_memory: int,
    keep_disk: int | None,
    ref: str,
    metrics: list[str],
    num_images: int,
    seed: int,
    batch: int,
    resize: str,
    detector_weights: Mapping[str, str],
    **opts: Any,
) -> None:
    """Metrics of a run at many settings, the best of them, and a picture.

    \b
    Examples:
      python calculate_metrics.py sweep --net=out/digits --vary=ema-std=0.03,0.05,0.10 --vary=guidance=1,1.25,1.5 \\
          --ref=datasets/digits.zip --metrics=fd_pixels --num=1000 --steps=12 --outdir=out/sweep
      # The best width between two, in about ten trials
      python calculate_metrics.py sweep --net=out/digits --vary=ema-std=0.02,0.25 --search=golden \\
          --ref=datasets/digits.zip --metrics=fd_pixels --num=1000 --steps=12 --outdir=out/golden
    """
    from training.metrics.session import begin
    from training.sweep import TOLERANCE, Axis, Room, Sweep, run

    check_seed(seed + num_images - 1)
    axes = [Axis.parse(text) for text in vary]
    if len({axis.name for axis in axes}) < len(axes):
        raise UserError("--vary: the same name twice")
    if tolerance is not None and search != "golden":
        raise UserError(f"--tolerance has no effect with --search={search}: leave it out")
    generation = [param.name for param in ctx.command.params if param.name in opts]
    fixed = [word for text in given_options(ctx, set(ctx.params) - set(generation)) for word in shlex.split(text)]
    settings = {"metrics": metrics, "ref": ref, "resize": resize, "detector_weights": detector_weights}
    rest = {"device": opts["device"] or "auto", "outdir": outdir, "error_bars": False, "force": False, "held_out": None}
    evaluation = begin({**settings, **rest})
    facts = {"ref": ref, "metrics": metrics, "resize": resize}
    room = Room(keep_memory, keep_disk)
    task = Sweep(axes, fixed, evaluation, num_images, seed, batch, outdir, facts, room)
    run(task, search, budget, TOLERANCE if tolerance is None else tolerance)


@main.command()
@click.option("--data", help="Images: a folder, a ZIP file, or an .npz file of ADM", metavar="PATH", required=True)
@click.option(
    "--dest",
    help="Where to save: .safetensors or .npz, or .pkl for the published tools",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
)
@METRICS_OPTION
@with_options(FIT_OPTIONS)
@BATCH_OPTION
@WORKERS_OPTION
@with_options(DETECTOR_OPTIONS)
@device_option
@offline_option
def ref(data: str, dest: Path, metrics: list[str], batch: int, workers: int, **opts: Any) -> None:
    """Reference statistics of a dataset, of all its images.

    \b
    Example:
      python calculate_metrics.py ref --data=datasets/img512.zip --dest=datasets/img512.safetensors
    """
    from torch_utils import distributed
    from training.metrics.detectors import load_detectors
    from training.metrics.files import check_destination, save_stats
    from training.metrics.images import FileBatches, open_images
    from training.metrics.session import set_up, show_summary
    from training.metrics.statistics import calculate_stats_for_iterable, last_stats
    from training.metrics.values import small_sample_note

    distributed.init()
    with distributed.fail_together():
        check_not_input("--dest", dest, {"--data": data if Path(data).is_file() else None})
        check_destination(dest, with_features=any(METRICS[metric].array == "features" for metric in metrics))
        fit = chosen_fit(opts)
        with_classes = any(METRICS[metric].needs_classes for metric in metrics)
        images = open_images(data, fit=fit, classes=with_classes)  # before anything is fetched
        dest.parent.mkdir(parents=True, exist_ok=True)
        detectors = load_detectors(metrics, set_up(opts), opts["detector_weights"], opts["resize"])
    show_summary(images)
    stats = last_stats(calculate_stats_for_iterable(FileBatches(images, batch, workers), metrics, detectors=detectors))
    with distributed.fail_together():
        if distributed.get_rank() == 0:
            stats.facts = {"data": data, "data_found": images.summary()}
            if fit is not None:
                stats.facts["transform"] = fit.describe()
            save_stats(dest, stats)
    distributed.print0(f"{dest}: {', '.join(metrics)} of {stats.num_images} images")
    for note in filter(None, (small_sample_note(metric, ref=stats) for metric in metrics)):
        distributed.print0(f"Note: {note}")
    distributed.shutdown()


def chosen_fit(opts: Mapping[str, Any]) -> Fit | None:
    """What --resolution and --transform do to images; None = nothing.

    Raises:
        UserError: they do not go together.
    """
    from training.conversion.transforms import Fit

    if opts["resolution"] is None and opts["transform"] is None:
        return None
    if opts["resolution"] is None:
        raise UserError(f"--transform={opts['transform']} needs --resolution=WxH")
    return Fit(opts["transform"], *opts["resolution"])


if __name__ == "__main__":
    main()
