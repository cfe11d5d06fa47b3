"""Edit images with a trained network."""

from pathlib import Path
from typing import Any

import click

from dnnlib.cli import CommandGroup, device_option, offline_option, parse_int_list, parsed_by, with_options
from dnnlib.errors import UserError
from dnnlib.files import check_not_input
from training.config.fields import click_options
from training.config.generation import GenerationConfig, NetworksConfig, SamplingConfig, check_seed

FLOW_SOLVER = "rk45"  # what carries images to noise, and back
NET_OPTION = click.option(
    "--net", help="Network snapshot: a file, a Hugging Face folder, or a URL", metavar="FILE", required=True
)
INDICES_OPTION = click.option(
    "--indices",
    help="Which images of --data",
    metavar="LIST",
    default="0-9",
    show_default=True,
    callback=parsed_by(parse_int_list),
)
OUTDIR_OPTION = click.option(
    "--outdir",
    help="Where to save the results",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
)
FILL_OPTIONS = [
    click.option("--fills", help="Results per image", type=click.IntRange(min=1), default=4, show_default=True),
    click.option("--seed", help="Seed of the results", type=click.IntRange(min=0), default=0, show_default=True),
]
BATCH_OPTION = click.option(
    "--batch", help="Images at a time", metavar="INT", type=click.IntRange(min=1), default=32, show_default=True
)


TEMPERATURE_OPTION = click.option(
    "--temperature",
    help="Scale of what is drawn from the prior",
    metavar="FLOAT",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
)


def sheet_option(required: bool = True) -> Any:
    return click.option(
        "--sheet",
        help="Where to save the contact sheet, a PNG file",
        metavar="FILE",
        type=click.Path(dir_okay=False, path_type=Path),
        required=required,
    )


def data_option(required: bool = True) -> Any:
    return click.option("--data", help="Images: a folder or ZIP file", metavar="ZIP|DIR", required=required)


DENOISER_OPTIONS = [*click_options(NetworksConfig), *click_options(SamplingConfig), offline_option]


def denoiser_options(command: Any) -> Any:
    """The options of networks and samplers, as those of generate_images.py."""
    return with_options(DENOISER_OPTIONS)(command)


@click.group(cls=CommandGroup)
def main() -> None:
    """Edit images with a trained network."""


def open_editor(opts: dict[str, Any], batch: int, flow: bool = False) -> Any:
    """The denoiser that the options name; with `flow`, sampled by the probability flow."""
    from training.editing import Editor
    from training.generation import fetch, load

    if flow and (opts["sampler"] or FLOW_SOLVER) != FLOW_SOLVER:
        raise UserError(f"--sampler={opts['sampler']}: noise and images are matched by {FLOW_SOLVER}: leave it out")
    config = GenerationConfig.take({**opts, "sampler": FLOW_SOLVER} if flow else opts)
    fetch(config.networks)
    return Editor(load(config), batch)


def works_with_denoiser(opts: dict[str, Any]) -> bool:
    """Whether the network is a denoiser, rather than an NVAE."""
    from training.families import ARCHITECTURES
    from training.snapshot import open_snapshot

    if opts["net"] is None:
        return True  # a preset
    name = open_snapshot(opts["net"], preset=opts["arch"]).description.architecture.name
    return name not in ARCHITECTURES or ARCHITECTURES[name].is_denoiser


def open_vae(opts: dict[str, Any]) -> Any:
    """The NVAE that the options name."""
    from training.editing_vae import Editor

    given = [name for name, value in opts.items() if value is not None and name not in ("net", "arch", "device")]
    if given:
        raise UserError(f"--{given[0].replace('_', '-')} has no effect on NVAE: leave it out")
    return Editor(opts["net"], opts["device"] or "auto", opts["arch"])


def check_places(outdir: Path | None, sheet: Path | None, inputs: dict[str, Any]) -> None:
    """Refuse (UserError) to write over what other options ask to read, and into a dataset; sheets are PNG files."""
    from torch_utils.pictures import check_picture

    if outdir is not None:
        check_not_input("--outdir", outdir, inputs)
    if sheet is not None:
        check_picture("--sheet", sheet, inputs)


def draw_sheet(path: Path, pictures: Any, captions: list[str]) -> None:
    """Contact sheet of pictures [N, C, H, W] in rows, each with these captions."""
    from torch_utils.pictures import drawable, image_grid, save_image

    columns = len(captions)
    save_image(path, image_grid(drawable(pictures), columns, captions * (len(pictures) // columns)))
    print(f"Contact sheet: {path}")


def save_results(outdir: Path, sheet: Path | None, rows: dict[str, Any], originals: Any, captions: list[str]) -> None:
    """Results {name: [K, C, H, W]} as files {name}-{k}.png, and a sheet of originals and results, a row for each."""
    import torch

    from torch_utils.pictures import save_image

    shown = []
    for (name, pictures), before in zip(rows.items(), originals, strict=True):
        for k, picture in enumerate(pictures):
            save_image(outdir / f"{name}-{k:02d}.png", picture.cpu().numpy())
        shown.append(torch.cat([before, pictures]))
    if sheet is not None:
        draw_sheet(sheet, torch.cat(shown), captions)
    print(f"{sum(map(len, rows.values()))} images in {outdir}")


@main.command()
@with_options([data_option(), INDICES_OPTION])
@click.option(
    "--mask", help="A picture: white is kept, black is filled in", metavar="FILE", type=click.Path(path_type=Path)
)
@click.option(
    "--box", help="Fill in this box of pixels", metavar="LEFT,TOP,RIGHT,BOTTOM", callback=parsed_by(parse_int_list)
)
@click.option(
    "--ratio",
    help="Fill in that share of all pixels, here and there",
    type=click.FloatRange(min=0, max=1, min_open=True),
)
@with_options([*FILL_OPTIONS, OUTDIR_OPTION, sheet_option(required=False), BATCH_OPTION])
@denoiser_options
def inpaint(
    data: str,
    indices: list[int],
    mask: Path | None,
    box: list[int] | None,
    ratio: float | None,
    fills: int,
    seed: int,
    outdir: Path,
    sheet: Path | None,
    batch: int,
    **opts: Any,
) -> None:
    """Fill in what is hidden of images, several times each; what is not hidden stays as it is.

    \b
    Example:
      python edit_images.py inpaint --net=out/ve/network-snapshot-0000114-ema.safetensors --sampler=pc --steps=200 \\
          --data=datasets/digits.zip --box=0,4,8,8 --outdir=out/inpainted --sheet=out/inpainted.png
    """
    from training import editing

    if [mask, box, ratio].count(None) != 2:
        raise UserError("what is to be filled in? Give one of --mask, --box and --ratio")
    if box is not None and len(box) != 4:
        raise UserError(f"--box: four numbers LEFT,TOP,RIGHT,BOTTOM, not {len(box)}")
    check_seed(seed + fills * (max(indices) + 1))
    check_places(outdir, sheet, {"--data": data, "--mask": mask})
    editor = open_editor(opts, batch)
    images = editor.images_of(data, indices)
    resolution = editor.net.spec.resolution
    if mask is not None:
        known = editing.mask_of_file(mask, resolution)
    elif box is not None:
        known = editing.mask_of_box(box, resolution)
    else:
        known = editing.mask_of_ratio(ratio or 0.0, indices, seed, resolution)
    filled = editor.inpaint(images, known, fills, seed)
    hidden = (images.pixels * known.to(images.pixels.device)).to(images.pixels.dtype)
    save_fills(outdir, sheet, images, hidden, filled, ["image", "known", *["filled"] * fills])


def save_fills(outdir: Path, sheet: Path | None, images: Any, known: Any, fills: Any, captions: list[str]) -> None:
    """Fills [N, K, C, H, W] of images, and a sheet of each image, what is known of it, and its fills."""
    import torch

    rows = {f"{index:06d}": pictures for index, pictures in zip(images.indices, fills, strict=True)}
    save_results(outdir, sheet, rows, torch.stack([images.pixels, known], dim=1), captions)


@main.command()
@with_options([data_option(), INDICES_OPTION, *FILL_OPTIONS, OUTDIR_OPTION, sheet_option(required=False), BATCH_OPTION])
@denoiser_options
def colorize(
    data: str,
    indices: list[int],
    fills: int,
    seed: int,
    outdir: Path,
    sheet: Path | None,
    batch: int,
    **opts: Any,
) -> None:
    """Colour images, several times each; their brightness stays as it is. Images may be grey or coloured.

    \b
    Example:
      python edit_images.py colorize --net=checkpoint_24.pth --arch=ve/cifar10_ncsnpp_continuous --sampler=pc \\
          --steps=1000 --data=photos.zip --outdir=out/coloured --sheet=out/coloured.png
    """
    check_seed(seed + fills * (max(indices) + 1))
    check_places(outdir, sheet, {"--data": data})
    editor = open_editor(opts, batch)
    images = editor.images_of(data, indices)
    coloured = editor.colorize(images, fills, seed)
    grey = images.pixels.float().mean(dim=1, keepdim=True).round().expand_as(images.pixels).to(images.pixels.dtype)
    save_fills(outdir, sheet, images, grey, coloured, ["image", "grey", *["coloured"] * fills])


@main.command()
@with_options([data_option(), INDICES_OPTION, OUTDIR_OPTION, sheet_option(required=False), BATCH_OPTION])
@denoiser_options
def encode(data: str, indices: list[int], outdir: Path, sheet: Path | None, batch: int, **opts: Any) -> None:
    """Find the noise that the probability flow makes each image of, and save it as {index}.npy, float32 [C, H, W].

    The sheet shows each image, and what the flow makes of its noise.

    \b
    Example:
      python edit_images.py encode --net=out/vp/network-snapshot-0000114-ema.safetensors --data=datasets/digits.zip \\
          --outdir=out/noise --sheet=out/noise.png
    """
    import numpy as np

    from dnnlib.files import atomic_write

    check_places(outdir, sheet, {"--data": data})
    editor = open_editor(opts, batch, flow=True)
    images = editor.images_of(data, indices)
    noise = editor.encode(images)
    outdir.mkdir(parents=True, exist_ok=True)
    for index, z in zip(indices, noise, strict=True):
        with atomic_write(outdir / f"{index:06d}.npy") as f:
            np.save(f, z.cpu().numpy())
    if sheet is not None:
        import torch

        back = editor.decode(noise, images.cond, range(len(noise)))
        draw_sheet(sheet, torch.stack([images.pixels, back], dim=1).flatten(0, 1), ["image", "decoded"])
    print(f"{len(noise)} encoded images in {outdir}")


@main.command()
@with_options([data_option(required=False), INDICES_OPTION])
@click.option(
    "--seeds",
    help="Images of these seeds, in the place of --data and --indices",
    metavar="LIST",
    callback=parsed_by(parse_int_list),
)
@click.option(
    "--frames", help="Pictures in a row", metavar="INT", type=click.IntRange(min=2), default=8, show_default=True
)
@with_options([OUTDIR_OPTION, sheet_option(required=False), BATCH_OPTION])
@denoiser_options
def interpolate(
    data: str | None,
    indices: list[int],
    seeds: list[int] | None,
    frames: int,
    outdir: Path,
    sheet: Path | None,
    batch: int,
    **opts: Any,
) -> None:
    """Blend from each image to the next one, on great circles of what the network makes them of.

    Of a denoiser, that is noise at the other end of the probability flow; a picture has the class of the nearer end. Of
    an NVAE, it is the latents of each group.

    \b
    Examples:
      python edit_images.py interpolate --net=out/vp/network-snapshot-0000114-ema.safetensors --seeds=0-4 \\
          --outdir=out/blended --sheet=out/blended.png
      python edit_images.py interpolate --net=out/vp/network-snapshot-0000114-ema.safetensors \\
          --data=datasets/digits.zip --indices=0-4 --outdir=out/blended --sheet=out/blended.png
    """
    if (data is None) == (seeds is None):
        raise UserError("which images? Give --data, or --seeds of images to generate")
    chosen = indices if seeds is None else seeds
    if len(chosen) < 2:
        raise UserError("to blend, two images are needed: see --indices and --seeds")
    check_places(outdir, sheet, {"--data": data})
    if seeds is not None:
        check_seed(max(seeds))
    if works_with_denoiser(opts):
        editor = open_editor(opts, batch, flow=True)
        if seeds is not None:
            noise, cond = editor.ends_of_seeds(seeds)
        else:
            images = editor.images_of(data, indices)
            noise, cond = editor.encode(images), images.cond
        pictures = editor.interpolate(noise, cond, frames)
    else:
        editor = open_vae(opts)
        latents = editor.draw(seeds) if seeds is not None else editor.encode(editor.images_of(data, indices))
        pictures = editor.interpolate(latents, frames)
    rows = {f"{a:06d}-{b:06d}": row for a, b, row in zip(chosen[:-1], chosen[1:], pictures, strict=True)}
    captions = [f"{k / (frames - 1):.2f}" for k in range(frames)]
    save_results(outdir, sheet, rows, [row[:0] for row in pictures], captions)


@main.command()
@NET_OPTION
@with_options([data_option(), INDICES_OPTION, sheet_option()])
@click.option(
    "--keep",
    help="A row for each of these: so many groups from the top come from the image, the others from the prior  "
    "[default: all]",
    metavar="LIST",
    callback=parsed_by(parse_int_list),
)
@TEMPERATURE_OPTION
@click.option(
    "--outdir",
    help="Also save each reconstruction",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
)
@with_options([device_option, offline_option])
def reconstruct(
    net: str,
    data: str,
    indices: list[int],
    sheet: Path,
    keep: list[int] | None,
    temperature: float,
    outdir: Path | None,
    device: str,
) -> None:
    """Images as an NVAE's posterior means show them, and what remains when only the top groups are kept.

    \b
    Example:
      python edit_images.py reconstruct --net=out/digits-nvae/network-snapshot-0000051.safetensors \\
          --data=datasets/digits.zip --keep=3,2,1 --sheet=out/digits-nvae/reconstructions.png
    """
    from torch_utils.pictures import save_image
    from training import editing_vae

    check_places(outdir, sheet, {"--net": net, "--data": data})
    editor = editing_vae.Editor(net, device)
    images, picture = editing_vae.reconstruct(editor, editor.images_of(data, indices), keep, temperature)
    editing_vae.save_sheet(sheet, picture)
    if outdir is not None:
        outdir.mkdir(parents=True, exist_ok=True)
        for index, image in zip(indices, images, strict=True):
            save_image(outdir / f"{index:06d}.png", image)
    print(f"Contact sheet: {sheet}")


@main.command()
@NET_OPTION
@with_options([data_option(required=False), INDICES_OPTION])
@click.option(
    "--seeds",
    help="Images of these seeds, in the place of --data and --indices",
    metavar="LIST",
    callback=parsed_by(parse_int_list),
)
@click.option(
    "--outdir",
    help="Where to save a contact sheet for each group, named after it and its scale",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
)
@click.option(
    "--groups",
    help="Which groups, the top one is 0  [default: all]",
    metavar="LIST",
    callback=parsed_by(parse_int_list),
)
@click.option(
    "--columns", help="Pictures in a row", metavar="INT", type=click.IntRange(min=2), default=8, show_default=True
)
@TEMPERATURE_OPTION
@with_options([device_option, offline_option])
def traverse(
    net: str,
    data: str | None,
    indices: list[int],
    seeds: list[int] | None,
    outdir: Path,
    groups: list[int] | None,
    columns: int,
    temperature: float,
    device: str,
) -> None:
    """What each group of an NVAE's latents does: it is drawn again while the others stay.

    \b
    Example:
      python edit_images.py traverse --net=out/digits-nvae/network-snapshot-0000051.safetensors \\
          --seeds=0-5 --outdir=out/digits-nvae/traversal
    """
    from training import editing_vae

    if (data is None) == (seeds is None):
        raise UserError("which images? Give --data, or --seeds of images to generate")
    check_places(outdir, None, {"--data": data})
    editor = editing_vae.Editor(net, device)
    count = editor.net.num_groups
    groups = list(range(count)) if groups is None else groups
    if max(groups) >= count:
        raise UserError(f"--groups: {max(groups)} is too large, the network has groups 0 to {count - 1}")
    if seeds is not None:
        latents = editor.draw(seeds, temperature)
    else:
        latents = editor.encode(editor.images_of(str(data), indices))
    for group in groups:
        path = outdir / f"{editor.name_of_group(group).replace(' ', '-')}.png"
        editing_vae.save_sheet(path, editing_vae.traverse(editor, latents, group, columns, temperature))
        print(f"Contact sheet: {path}")


if __name__ == "__main__":
    main()
