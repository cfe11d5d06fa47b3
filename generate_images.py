"""Generate images with a trained network."""

import math
import shlex
from pathlib import Path
from typing import Any

import click
import numpy as np
import PIL.Image

from dnnlib.util import (
    CommandLine,
    UserError,
    device_option,
    given_options,
    is_url,
    offline_option,
    parse_int_list,
    parsed_by,
)
from torch_utils import distributed, misc
from training.generation import generate_images, image_path, load_image_network
from training.presets import GENERATION_PRESETS, generation_table, unknown_preset
from training.snapshot import open_snapshot

MAX_GRID = 10_000


def parse_seeds(text: str) -> list[int]:
    seeds = parse_int_list(text)
    if len(set(seeds)) != len(seeds):
        raise UserError(f"{text!r} names a seed twice")
    return seeds


def parse_interval(text: str) -> tuple[float, float]:
    try:
        lo, hi = (float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"{text!r} is not of the form LO,HI") from None
    if not 0 <= lo < hi:
        raise UserError(f"{text!r}: LO must be less than HI, and not negative")
    return lo, hi


def draw_grid(path: Path, files: list[Path]) -> None:
    """Contact sheet of saved images, nearly square."""
    images = [_read(file) for file in files]
    odd = next((file for file, image in zip(files, images, strict=True) if image.shape != images[0].shape), None)
    if odd is not None:
        raise UserError(f"--grid: {odd} differs in size from {files[0]}: generate both with one network")
    misc.save_image(path, misc.image_grid(np.stack(images), columns=math.ceil(math.sqrt(len(images)))))


def _is_there(file: Path) -> bool:
    return file.is_file() and file.stat().st_size > 0


def _read(file: Path) -> np.ndarray:
    with PIL.Image.open(file) as image:
        pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def list_presets(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value:
        print(generation_table())
        ctx.exit()


def print_command(ctx: click.Context, net: str, gnet: str | None, guidance: float) -> None:
    """The command line without presets."""
    options = [f"--net={shlex.quote(net)}"]
    if gnet is not None:
        options += [f"--gnet={shlex.quote(gnet)}", f"--guidance={guidance:g}"]
    options += given_options(ctx, leave_out=["preset", "print_config", "net", "gnet", "guidance"])
    print(" \\\n    ".join(["python generate_images.py", *options]))


PRESETS_HELP = "\b\nPresets, with their published results:\n" + "\n".join(
    f"  {name:32s} {preset.metric} {preset.value:.2f}" for name, preset in GENERATION_PRESETS.items()
)


@click.command(cls=CommandLine, epilog=PRESETS_HELP)
@click.option("--preset", help="Published networks and guidance; options that are given win", metavar="NAME")
@click.option(
    "--net", help="Network snapshot: a file, a Hugging Face folder, or a URL (http, file, hf)", metavar="FILE"
)
@click.option("--gnet", help="Guiding network snapshot", metavar="FILE")
@click.option(
    "--outdir",
    help="Where to save the images",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
)
@click.option("--subdirs", help="Save in a folder per 1000 seeds", is_flag=True)
@click.option(
    "--seeds",
    help="Random seeds, such as 1,2,5-10",
    metavar="LIST",
    default="16-19",
    show_default=True,
    callback=parsed_by(parse_seeds),
)
@click.option(
    "--class", "class_idx", help="Class of all images  [default: drawn from the seed]", metavar="INT", type=int
)
@click.option(
    "--batch",
    "max_batch_size",
    help="Images per batch and process",
    metavar="INT",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
)
@click.option(
    "--steps",
    "num_steps",
    help="Sampling steps",
    metavar="INT",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
)
@click.option(
    "--sigma_min",
    help="Lowest noise level",
    metavar="FLOAT",
    type=click.FloatRange(min=0, min_open=True),
    default=0.002,
    show_default=True,
)
@click.option(
    "--sigma_max",
    help="Highest noise level",
    metavar="FLOAT",
    type=click.FloatRange(min=0, min_open=True),
    default=80,
    show_default=True,
)
@click.option(
    "--rho",
    help="Exponent of the time steps",
    metavar="FLOAT",
    type=click.FloatRange(min=0, min_open=True),
    default=7,
    show_default=True,
)
@click.option("--guidance", help="Guidance weight  [default: 1, no guidance]", metavar="FLOAT", type=float)
@click.option(
    "--guidance-interval",
    help="Noise levels at which guidance acts  [default: all]",
    metavar="LO,HI",
    callback=parsed_by(parse_interval),
)
@click.option(
    "--S_churn",
    "S_churn",
    help="Strength of added noise",
    metavar="FLOAT",
    type=click.FloatRange(min=0),
    default=0,
    show_default=True,
)
@click.option(
    "--S_min",
    "S_min",
    help="Lowest noise level at which noise is added",
    metavar="FLOAT",
    type=click.FloatRange(min=0),
    default=0,
    show_default=True,
)
@click.option(
    "--S_max",
    "S_max",
    help="Highest noise level at which noise is added",
    metavar="FLOAT",
    type=click.FloatRange(min=0),
    default="inf",
    show_default=True,
)
@click.option(
    "--S_noise",
    "S_noise",
    help="Scale of added noise",
    metavar="FLOAT",
    type=click.FloatRange(min=0),
    default=1,
    show_default=True,
)
@click.option(
    "--precision",
    help="What the networks compute in; auto = fp16 on GPUs, fp32 on CPUs",
    type=click.Choice(["auto", "fp32", "bf16", "fp16"]),
    default="auto",
    show_default=True,
)
@device_option
@click.option("--skip-existing", help="Skip seeds whose image is there", is_flag=True)
@click.option(
    "--grid",
    help="Also save all images as one contact sheet",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
)
@offline_option
@click.option("--print-config", help="Print the command line that a preset stands for, and exit", is_flag=True)
@click.option(
    "--list-presets",
    help="Print all presets with their networks and results, and exit",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=list_presets,
)
@click.pass_context
def main(
    ctx: click.Context,
    preset: str | None,
    net: str | None,
    gnet: str | None,
    outdir: Path,
    subdirs: bool,
    seeds: list[int],
    device: str,
    precision: str,
    guidance: float | None,
    guidance_interval: tuple[float, float] | None,
    print_config: bool,
    skip_existing: bool,
    grid: Path | None,
    **opts: Any,
) -> None:
    """Generate one image per seed. An image depends on its seed alone, whatever the batch size and processes.

    \b
    Examples:
      # 100 images as files and as one sheet
      python generate_images.py --net=out/digits/network-snapshot-0000147-0.100.safetensors \\
          --outdir=out/images --seeds=0-99 --grid=out/images.png
      # Published networks, fetched once
      python generate_images.py --preset=edm2-img512-s-guid-dino --outdir=out
      # Autoguidance, on two GPUs
      torchrun --standalone --nproc_per_node=2 generate_images.py --net=main.safetensors \\
          --gnet=guide.safetensors --guidance=2 --outdir=out --seeds=0-49999 --subdirs
    """
    if preset is not None:
        chosen = GENERATION_PRESETS.get(preset)
        if chosen is None:
            raise unknown_preset("--preset", preset, GENERATION_PRESETS)
        net, guidance = net or chosen.net, chosen.guidance if guidance is None else guidance
        if guidance != 1:
            gnet = gnet or chosen.gnet
    if net is None:
        raise UserError("which network? Give --net or --preset (see --list-presets)")
    guidance = 1.0 if guidance is None else guidance
    if guidance != 1 and gnet is None:
        raise UserError(f"--guidance={guidance:g} needs a guiding network: give --gnet")
    if print_config:
        print_command(ctx, net, gnet, guidance)
        return
    if opts["sigma_min"] > opts["sigma_max"]:
        raise UserError(f"--sigma_min={opts['sigma_min']:g} is above --sigma_max={opts['sigma_max']:g}")
    if guidance_interval is not None:
        opts["guidance_interval"] = guidance_interval
    distributed.init()
    with distributed.fail_together():
        if distributed.get_local_rank() == 0:
            for network in (net, gnet):  # fetched once, and failing once, for all processes of a machine
                if network is not None and is_url(network):
                    open_snapshot(network)
    with distributed.fail_together():
        target = misc.select_device(device)
        misc.set_up_device(target)
        snapshot = load_image_network(net, target)
        guide = load_image_network(gnet, target) if gnet is not None else None
        snapshot.net.precision = misc.resolve_precision(precision, target)
        if guide is not None:
            guide.net.precision = snapshot.net.precision
            if guide.metadata["encoder"] != snapshot.metadata["encoder"]:
                raise UserError(f"--gnet={gnet} works on other latents than --net={net}: they must share an encoder")
        snapshot.encoder.prepare(target)
        suffix = snapshot.encoder.output_suffix(snapshot.net.img_channels)
        if grid is not None and suffix != ".png":
            raise UserError("--grid needs a network that makes pixels; this one makes latents")
        if grid is not None and len(seeds) > MAX_GRID:
            raise UserError(f"--grid shows at most {MAX_GRID} images, not {len(seeds)}")
        files = [image_path(outdir, seed, subdirs, suffix) for seed in seeds]
        todo = [seed for seed, file in zip(seeds, files, strict=True) if not (skip_existing and _is_there(file))]
        guide_net = guide.net if guide is not None else None
        images = generate_images(
            snapshot.net, guide_net, snapshot.encoder, outdir, subdirs, todo, device=target, guidance=guidance, **opts
        )
    there = f" ({len(seeds) - len(todo)} are there)" if skip_existing else ""
    distributed.print0(f"Generating {len(todo)} images to {outdir}{there}")
    for _batch in images:
        pass
    distributed.barrier()
    if grid is not None and distributed.get_rank() == 0:
        draw_grid(grid, files)
        print(f"Contact sheet: {grid}")
    distributed.shutdown()


if __name__ == "__main__":
    main()
