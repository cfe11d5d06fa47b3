"""Train an EDM2 diffusion model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dnnlib.cli import CommandLine, device_option, parse_int_list, parse_nimg, parsed_by
from dnnlib.errors import UserError
from training.config.edm2 import TRAINING_PRESETS, unknown_preset
from training.config.metrics import PRECISIONS, parse_metrics

if TYPE_CHECKING:
    from training.config.training import TrainConfig
    from training.dataset.images import ImageFolderDataset

MIN_INTERVAL = 1000  # snapshot and state file names count thousands of images


def parse_ints(text: str) -> tuple[int, ...]:
    return () if text.strip().lower() in ("", "none") else tuple(parse_int_list(text))


def parse_stds(text: str) -> tuple[float, ...]:
    from training.phema import parse_std_list

    stds = tuple(parse_std_list(text))
    if len({f"{std:.3f}" for std in stds}) < len(stds):
        raise UserError(f"{text!r}: two widths share a file name (three decimals count)")
    return stds


def make_config(opts: dict[str, Any]) -> tuple[TrainConfig, ImageFolderDataset]:
    """Preset and explicit options -> a checked configuration, and its data.

    Raises:
        UserError: an option or the data does not fit; the message names it.
    """
    from torch_utils.device import select_device
    from training.config.training import TrainConfig
    from training.dataset.images import ImageFolderDataset

    preset = opts["preset"]
    if preset not in TRAINING_PRESETS:
        raise unknown_preset("--preset", preset, TRAINING_PRESETS)
    explicit = {key: value for key, value in opts.items() if value is not None}
    if explicit.pop("fp16") is False:
        if explicit["precision"] not in ("auto", "fp32"):
            raise UserError(f"--fp16=0 contradicts --precision={explicit['precision']}: give one of them")
        explicit["precision"] = "fp32"
    explicit.setdefault("workers", 2 if select_device(explicit["device"]).type == "cuda" else 0)

    dataset = ImageFolderDataset(explicit["data"], use_labels=explicit["cond"], xflip=explicit["xflip"])
    if explicit["cache"]:
        check_memory(dataset, explicit["workers"])
    if explicit["cond"] and not dataset.has_labels:
        raise UserError(f"--cond=1 needs labels, and {explicit['data']} has none: use --cond=0, or add dataset.json")
    if (not explicit.get("metrics")) != (not explicit.get("metrics_ref")):
        raise UserError("--metrics and --metrics-ref belong together: give both")
    config = TrainConfig(**{**TRAINING_PRESETS[preset], **explicit}, dataset=dataset.info())
    check_numbers(config)
    dataset.verify()
    return config, dataset


def check_memory(dataset: ImageFolderDataset, workers: int) -> None:
    """
    Raises:
        UserError: the decoded images do not fit into memory, once per process that reads them.
    """
    import psutil

    from torch_utils import distributed

    copies = max(workers, 1) * distributed.get_world_size()
    needed, available = copies * dataset.decoded_bytes() / 1e9, psutil.virtual_memory().available / 1e9
    if needed > 0.8 * available:
        raise UserError(
            f"--cache needs {needed:.1f} GB in {copies} processes, and {available:.1f} GB are free: "
            f"leave it out, or use fewer --workers"
        )


def check_numbers(config: TrainConfig) -> None:
    """
    Raises:
        UserError: sizes that do not fit one another, the number of processes or the resolution.
    """
    from torch_utils import distributed

    for name in ("batch", "duration", "channels", "num_blocks"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(config, name)}")
    if not 0 <= config.dropout < 1:
        raise UserError(f"--dropout must be at least 0 and less than 1, not {config.dropout}")
    for name in ("lr", "P_std", "ls"):
        if not getattr(config, name) > 0:
            raise UserError(f"--{name} must be positive, not {getattr(config, name)}")
    if not config.channel_mult or min(config.channel_mult) < 1:
        raise UserError("--channel-mult needs one positive number per level, such as 1,2,3,4")
    processes = distributed.get_world_size()
    batch_gpu = min(config.batch_gpu or config.batch, config.batch // processes)
    if batch_gpu == 0 or config.batch % (processes * batch_gpu) != 0:
        raise UserError(
            f"--batch={config.batch} is not divisible by processes x --batch-gpu = {processes} x {batch_gpu}: "
            f"change one of them"
        )
    intervals = {name: getattr(config, name) for name in ("status", "snapshot", "checkpoint")}
    uneven = [f"--{name}={interval}" for name, interval in intervals.items() if interval % config.batch != 0]
    if uneven:
        raise UserError(
            f"{', '.join(uneven)} must be multiples of --batch={config.batch} (or 0 = only at the end); "
            f"what is not given comes from the preset"
        )
    for name in ("snapshot", "checkpoint"):
        if 0 < intervals[name] < MIN_INTERVAL:
            raise UserError(
                f"--{name} must be at least {MIN_INTERVAL} images (names count thousands), or 0 = only at the end"
            )
    resolution, levels = config.dataset.resolution, len(config.channel_mult)
    if resolution % 2 ** (levels - 1) != 0:
        raise UserError(
            f"{config.data}: resolution {resolution} is not divisible by {2 ** (levels - 1)}, as a network of {levels} "
            f"levels needs: give fewer levels with --channel-mult, or convert the images to another resolution"
        )


def print_config(config: TrainConfig, outdir: Path, dataset: ImageFolderDataset) -> None:
    import torch

    from torch_utils import distributed
    from torch_utils.device import select_device
    from training.encoders import final_channels
    from training.training_loop import build_network

    with torch.device("meta"):  # only counted
        net = build_network(config, final_channels(dataset))
    options = {key: value for key, value in config.to_json().items() if key != "dataset"}
    data = config.dataset
    for key, value in {"outdir": str(outdir), **options}.items():
        distributed.print0(f"{key + ':':<18s}{json.dumps(value)}")
    distributed.print0(f"Dataset:          {data.count} images, {data.resolution}x{data.resolution}x{data.channels}")
    distributed.print0(f"Classes:          {data.label_dim}")
    distributed.print0(f"Network:          {sum(p.numel() for p in net.parameters())} parameters")
    distributed.print0(f"Processes:        {distributed.get_world_size()} on {select_device(config.device).type}")


def note_missing_attention(config: TrainConfig) -> None:
    from torch_utils import distributed

    resolutions = [config.dataset.resolution >> level for level in range(len(config.channel_mult))]
    if config.attn_resolutions and not set(resolutions) & set(config.attn_resolutions):
        distributed.print0(
            f"Note: no level has a resolution of --attn-resolutions={','.join(map(str, config.attn_resolutions))} "
            f"(levels: {', '.join(map(str, resolutions))}); only the coarsest block has attention"
        )


@click.command(cls=CommandLine)
@click.option(
    "--outdir",
    help="Where to save the run",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
)
@click.option("--data", help="Training images: folder or ZIP file", metavar="ZIP|DIR", required=True)
@click.option(
    "--cond", help="Train a class-conditional model", metavar="BOOL", type=bool, default=True, show_default=True
)
@click.option("--preset", help="Configuration preset", metavar="STR", default="edm2-img512-s", show_default=True)
@click.option(
    "--duration", help="Training duration  [default: from preset]", metavar="NIMG", callback=parsed_by(parse_nimg)
)
@click.option(
    "--batch",
    help="Images per optimiser step, over all processes  [default: from preset]",
    metavar="NIMG",
    callback=parsed_by(parse_nimg),
)
@click.option("--channels", help="Base number of channels  [default: from preset]", metavar="INT", type=int)
@click.option("--dropout", help="Dropout probability  [default: from preset]", metavar="FLOAT", type=float)
@click.option(
    "--P_mean", "P_mean", help="Mean of ln(sigma) in training  [default: from preset]", metavar="FLOAT", type=float
)
@click.option(
    "--P_std", "P_std", help="Standard deviation of ln(sigma)  [default: from preset]", metavar="FLOAT", type=float
)
@click.option("--lr", help="Reference learning rate  [default: from preset]", metavar="FLOAT", type=float)
@click.option(
    "--decay",
    help="Batches before the learning rate decays, 0 = never  [default: from preset]",
    metavar="BATCHES",
    type=click.FloatRange(min=0),
)
@click.option(
    "--channel-mult",
    help="Channel multiple per level, finest first  [default: from preset]",
    metavar="LIST",
    callback=parsed_by(parse_ints),
)
@click.option("--num-blocks", help="Residual blocks per level  [default: from preset]", metavar="INT", type=int)
@click.option(
    "--attn-resolutions",
    help="Resolutions with self-attention, or 'none'  [default: from preset]",
    metavar="LIST",
    callback=parsed_by(parse_ints),
)
@click.option(
    "--ema-std",
    help="Widths of the tracked EMA profiles  [default: 0.05,0.10]",
    metavar="LIST",
    callback=parsed_by(parse_stds),
)
@click.option(
    "--batch-gpu",
    help="Limit of images per process and round, 0 = none",
    metavar="NIMG",
    callback=parsed_by(parse_nimg),
    default="0",
    show_default=True,
)
@click.option(
    "--precision",
    help="What the network computes in; auto = fp16 on GPUs, fp32 on CPUs",
    type=click.Choice(["auto", *PRECISIONS]),
    default="auto",
    show_default=True,
)
@click.option(
    "--fp16", help="Published alias: 0 = --precision=fp32", metavar="BOOL", type=bool, default=True, show_default=True
)
@click.option("--ls", help="Loss scaling", metavar="FLOAT", type=float, default=1, show_default=True)
@click.option(
    "--bench", help="Let cuDNN choose its fastest kernels", metavar="BOOL", type=bool, default=True, show_default=True
)
@click.option(
    "--compile",
    help="Let torch.compile make the network's kernels",
    metavar="BOOL",
    type=bool,
    default=False,
    show_default=True,
)
@click.option(
    "--checkpoint-activations",
    help="Compute activations twice instead of keeping them: less memory, more time",
    metavar="BOOL",
    type=bool,
    default=False,
    show_default=True,
)
@device_option
@click.option(
    "--workers",
    help="Loader processes per training process  [default: 2 on CUDA, else 0]",
    metavar="INT",
    type=click.IntRange(min=0),
)
@click.option(
    "--xflip", help="Train on mirrored images, too", metavar="BOOL", type=bool, default=False, show_default=True
)
@click.option(
    "--cache",
    help="Keep decoded images in memory (small datasets always are)",
    metavar="BOOL",
    type=bool,
    default=False,
    show_default=True,
)
@click.option(
    "--status",
    help="Interval of status lines, 0 = only at the end  [default: 128Ki; digits: 4Ki]",
    metavar="NIMG",
    callback=parsed_by(parse_nimg),
)
@click.option(
    "--snapshot",
    help="Interval of network snapshots  [default: 8Mi; digits: 16Ki]",
    metavar="NIMG",
    callback=parsed_by(parse_nimg),
)
@click.option(
    "--checkpoint",
    help="Interval of training states  [default: 128Mi; digits: 48Ki]",
    metavar="NIMG",
    callback=parsed_by(parse_nimg),
)
@click.option(
    "--metrics",
    help="Metrics of every snapshot, such as fid,fd_dinov2 (see calculate_metrics.py)",
    metavar="LIST",
    callback=parsed_by(lambda text: tuple(parse_metrics(text))),
)
@click.option("--metrics-ref", help="Reference statistics for --metrics: a file or URL", metavar="FILE")
@click.option(
    "--metrics-num",
    help="Images to generate for --metrics",
    metavar="INT",
    type=click.IntRange(min=2),
    default=50000,
    show_default=True,
)
@click.option(
    "--seed", help="Random seed", metavar="INT", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True
)
@click.option(
    "--resume/--no-resume", help="Continue the run in --outdir, or refuse to", default=True, show_default=True
)
@click.option("-n", "--dry-run", help="Print the configuration and exit", is_flag=True)
def main(outdir: Path, resume: bool, dry_run: bool, **opts: Any) -> None:
    """Train an EDM2 model on a folder or ZIP file of images.

    Repeating a command continues its run where it stopped. NIMG values may end in Ki, Mi or Gi (powers of 1024).

    \b
    Examples:
      # A class-conditional model of handwritten digits, on any laptop
      python train_edm2.py --outdir=out/digits --data=datasets/digits.zip --preset=digits
      # EDM2-S on ImageNet latents with 8 GPUs
      torchrun --standalone --nproc_per_node=8 train_edm2.py \\
          --outdir=training-runs/img512-s --data=datasets/img512-sd.zip --preset=edm2-img512-s --batch-gpu=32
    """
    from torch_utils import distributed
    from training.dataset.images import COMPRESSED
    from training.training_loop import training_loop

    distributed.init()
    with distributed.fail_together():
        config, dataset = make_config(opts)
    note_missing_attention(config)
    if dataset.compressed:
        distributed.print0(f"Note: --data={config.data} is compressed: {COMPRESSED}")
    if dry_run:
        print_config(config, outdir, dataset)
        distributed.print0("Dry run; exiting.")
    else:
        training_loop(config, dataset, outdir, resume)
    distributed.shutdown()


if __name__ == "__main__":
    main()
