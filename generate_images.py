"""Generate images with a trained network."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import PIL.Image

from dnnlib.cli import CommandLine, imported_when_used, offline_option, parse_int_list, parsed_by, with_options
from dnnlib.errors import UserError, one_line
from training.config.edm2 import GENERATION_PRESETS, generation_table
from training.config.fields import click_options
from training.config.generation import GenerationConfig, NetworksConfig, SamplingConfig, check_seed

if TYPE_CHECKING:
    from training.generation import generate_images
    from training.release import generation_presets as config_presets
    from training.samplers import StackedRandomGenerator, edm_sampler

__all__ = ["StackedRandomGenerator", "config_presets", "edm_sampler", "generate_images"]  # for Python callers

MAX_GRID = 10_000
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
__getattr__ = imported_when_used(
    {
        "generate_images": "training.generation",
        "edm_sampler": "training.samplers",
        "StackedRandomGenerator": "training.samplers",
        "config_presets": "training.release:generation_presets",
    }
)


def parse_seeds(text: str) -> list[int]:
    """Seeds, each once.

    Raises:
        UserError: one is named twice, or is too large to differ from a smaller one.
    """
    seeds = parse_int_list(text)
    check_seed(max(seeds))
    if len(set(seeds)) != len(seeds):
        raise UserError(f"{text!r} names a seed twice")
    return seeds


def draw_grid(path: Path, files: list[Path]) -> None:
    """Contact sheet of saved images, nearly square, with the names of their classes where the files say them."""
    from torch_utils import pictures
    from training.provenance import read_png_text

    images = [_read(file) for file in files]
    odd = next((file for file, image in zip(files, images, strict=True) if image.shape != images[0].shape), None)
    if odd is not None:
        raise UserError(f"--grid: {odd} differs in size from {files[0]}: generate both with one network")
    names = [str((read_png_text(file) or {}).get("class_name", "")) for file in files]
    columns = math.ceil(math.sqrt(len(images)))
    pictures.save_image(path, pictures.image_grid(np.stack(images), columns, names if any(names) else None))


def _is_there(file: Path) -> bool:
    """Whether a file was written to its end, which may not have reached the disk when the power failed."""
    if not file.is_file() or file.suffix != ".png":
        return file.is_file() and file.stat().st_size > 0
    with open(file, "rb") as f:
        f.seek(max(file.stat().st_size - len(PNG_END), 0))
        return f.read() == PNG_END


def _read(file: Path) -> np.ndarray:
    try:
        with PIL.Image.open(file) as image:
            pixels = np.asarray(image)
    except Exception as err:  # a damaged file can fail in any way
        raise UserError(f"--grid: {file}: damaged ({one_line(err)}): delete it, and repeat the command") from None
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def list_presets(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value:
        print(generation_table())
        ctx.exit()


PRESETS_HELP = "\b\nPresets, with their published results:\n" + "\n".join(
    f"  {name:32s} {preset.metric} {preset.value:.2f}" for name, preset in GENERATION_PRESETS.items()
)


@click.command(
    cls=CommandLine,
    epilog=PRESETS_HELP,
    after_interrupt="the saved images are complete; repeat the command with --skip-existing to make the others",
)
@with_options(click_options(NetworksConfig))
@click.option(
    "--outdir",
    help="Where to save the images  [required, but for --print-config]",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
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
    "--batch",
    "max_batch_size",
    help="Images per batch and process",
    metavar="INT",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
)
@with_options(click_options(SamplingConfig))
@offline_option
@click.option("--skip-existing", help="Skip seeds whose image is there", is_flag=True)
@click.option(
    "--grid",
    help="Also save all images as one contact sheet",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
)
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
    outdir: Path | None,
    subdirs: bool,
    seeds: list[int],
    max_batch_size: int,
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
    config = GenerationConfig.take(opts)
    if print_config:
        print(config.command(ctx, leave_out=["print_config"]))
        return
    if outdir is None:
        raise click.UsageError("Missing option '--outdir'.", ctx)

    from torch_utils import distributed
    from torch_utils.pictures import check_picture
    from training.generation import fetch, image_path, load
    from training.provenance import ImageRecord

    distributed.init()
    with distributed.fail_together():
        if grid is not None:
            check_picture("--grid", grid, {"--net": config.networks.net, "--gnet": config.networks.gnet})
    fetch(config.networks)
    with distributed.fail_together():
        generator = load(config)
        if grid is not None and generator.suffix != ".png":
            raise UserError("--grid needs a network that makes pixels; this one makes latents")
        if grid is not None and len(seeds) > MAX_GRID:
            raise UserError(f"--grid shows at most {MAX_GRID} images, not {len(seeds)}")
        files = [image_path(outdir, seed, subdirs, generator.suffix) for seed in seeds]
        if grid is not None and grid.resolve() in {file.resolve() for file in files}:
            raise UserError(f"--grid={grid}: is also the image of a seed: choose another place")
        there = {seed: file for seed, file in zip(seeds, files, strict=True) if skip_existing and _is_there(file)}
        todo = [seed for seed in seeds if seed not in there]
        facts = generator.describe(seeds)
        record = ImageRecord(outdir, facts)
        if grid is not None:
            record.leave_out(grid)
        unknown = record.check(there)
        images = generator.images(
            todo, record=lambda _generator: record, subdirs=subdirs, max_batch_size=max_batch_size
        )
    if unknown:
        distributed.print0(f"Note: {unknown} of the images that are there do not say what made them")
    found = f" ({len(there)} are there)" if skip_existing else ""
    distributed.print0(f"Generating {len(todo)} images to {outdir}{found}")
    for _batch in images:
        pass
    if grid is not None and distributed.get_rank() == 0:
        draw_grid(grid, files)
        print(f"Contact sheet: {grid}")
    distributed.shutdown()


if __name__ == "__main__":
    main()
