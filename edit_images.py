"""Edit images with a trained network."""

from pathlib import Path
from typing import Any

import click

from dnnlib.cli import CommandGroup, device_option, offline_option, parse_int_list, parsed_by, with_options
from dnnlib.errors import UserError
from training.config.fields import click_options
from training.config.generation import NetworksConfig, SamplingConfig, check_seed
from training.config.restoration import MaskConfig, RestorationConfig

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


@main.command()
@with_options([data_option(), INDICES_OPTION, *click_options(MaskConfig)])
@with_options([*FILL_OPTIONS, OUTDIR_OPTION, sheet_option(required=False), BATCH_OPTION])
@denoiser_options
def inpaint(
    data: str,
    indices: list[int],
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
    masks = MaskConfig.take(opts)
    masks.check()
    check_seed(seed + fills * (max(indices) + 1))

    from training.editing.masks import known_pixels
    from training.editing.session import check_places, open_editor, save_fills, save_record

    check_places(outdir, sheet, {"--data": data, "--mask": masks.path})
    editor = open_editor(opts, batch)
    images = editor.images_of(data, indices)
    known = known_pixels(masks, indices, seed, editor.net.spec.resolution)
    filled = editor.inpaint(images, known, fills, seed)
    hidden = (images.pixels * known.to(images.pixels.device)).to(images.pixels.dtype)
    save_fills(outdir, sheet, indices, [images.pixels, hidden], filled, ["image", "known", *["filled"] * fills])
    options = {"data": data, "indices": indices, "fills": fills, "seed": seed, **masks.flat()}
    save_record(outdir, "inpaint", editor.describe(images.cond), options)


@main.command()
@with_options([data_option(), INDICES_OPTION, *click_options(RestorationConfig)])
@with_options([*FILL_OPTIONS, OUTDIR_OPTION, sheet_option(required=False), BATCH_OPTION])
@denoiser_options
def restore(
    data: str,
    indices: list[int],
    fills: int,
    seed: int,
    outdir: Path,
    sheet: Path | None,
    batch: int,
    **opts: Any,
) -> None:
    """Damage images and restore them, several times each: enlarge, deblur, or fill in what noise has not hidden.

    What is known of an image is a linear function of it with noise, drawn by --seed for each image. Restored images
    agree with it as far as the noise allows, and differ where it leaves a choice. With --degraded=1, the images of
    --data are damaged already, of super-resolution so many times smaller.

    \b
    Examples:
      python edit_images.py restore --net=out/digits --task=super-resolution --data=datasets/digits.zip \\
          --outdir=out/enlarged --sheet=out/enlarged.png
      python edit_images.py restore --net=out/digits --task=deblur --blur=motion --blur-width=3 --method=diffpir \\
          --noise=0.1 --data=datasets/digits.zip --outdir=out/deblurred --sheet=out/deblurred.png
    """
    config = RestorationConfig.take(opts)
    check_seed(seed + fills * (max(indices) + 1))

    from training.editing.restoring import restore_images, summary
    from training.editing.session import check_places, open_editor, save_fills, save_record

    check_places(outdir, sheet, {"--data": data, "--mask": config.masks.path})
    editor = open_editor(opts, batch)
    images = editor.images_of(data, indices, config.shrinks if config.degraded else 1)
    print(f"Known: {config.describe()}")
    damaged, restored, results = restore_images(editor, images, config, fills, seed)
    before = {"known": damaged} if config.degraded else {"image": images.pixels, "known": damaged}
    save_fills(outdir, sheet, indices, [*before.values()], restored, [*before, *["restored"] * fills])
    options = {"data": data, "indices": indices, "fills": fills, "seed": seed, **config.used()}
    save_record(outdir, "restore", editor.describe(images.cond), options, results)
    print("\n".join(summary(results, config.noise)))


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
    from training.editing.session import check_places, open_editor, save_fills, save_record

    check_seed(seed + fills * (max(indices) + 1))
    check_places(outdir, sheet, {"--data": data})
    editor = open_editor(opts, batch)
    images = editor.images_of(data, indices)
    coloured = editor.colorize(images, fills, seed)
    grey = images.pixels.float().mean(dim=1, keepdim=True).round().expand_as(images.pixels).to(images.pixels.dtype)
    save_fills(outdir, sheet, indices, [images.pixels, grey], coloured, ["image", "grey", *["coloured"] * fills])
    options = {"data": data, "indices": indices, "fills": fills, "seed": seed}
    save_record(outdir, "colorize", editor.describe(images.cond), options)


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
    from training.editing.session import check_places, draw_sheet, open_editor, save_record

    check_places(outdir, sheet, {"--data": data})
    editor = open_editor(opts, batch, flow=True)
    images = editor.images_of(data, indices)
    noise = editor.encode(images)
    outdir.mkdir(parents=True, exist_ok=True)
    for index, z in zip(indices, noise, strict=True):
        with atomic_write(outdir / f"{index:06d}.npy") as f:
            np.save(f, z.cpu().numpy())
    save_record(outdir, "encode", editor.describe(images.cond), {"data": data, "indices": indices})
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

    from training.editing import session

    session.check_places(outdir, sheet, {"--data": data})
    if seeds is not None:
        check_seed(max(seeds))
    if session.works_with_denoiser(opts):
        editor = session.open_editor(opts, batch, flow=True)
        if seeds is not None:
            noise, cond = editor.ends_of_seeds(seeds)
        else:
            images = editor.images_of(str(data), indices)
            noise, cond = editor.encode(images), images.cond
        pictures, maker = editor.interpolate(noise, cond, frames), editor.describe(None if seeds else cond)
    else:
        editor = session.open_vae(opts)
        latents = editor.draw(seeds) if seeds is not None else editor.encode(editor.images_of(str(data), indices))
        pictures, maker = editor.interpolate(latents, frames), editor.describe()
    rows = {f"{a:06d}-{b:06d}": row for a, b, row in zip(chosen[:-1], chosen[1:], pictures, strict=True)}
    captions = [f"{k / (frames - 1):.2f}" for k in range(frames)]
    session.save_results(outdir, sheet, rows, [row[:0] for row in pictures], captions)
    which = {"data": data, "indices": indices} if seeds is None else {"seeds": seeds}
    session.save_record(outdir, "interpolate", maker, {**which, "frames": frames})


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
    from training.editing.session import check_places, save_record
    from training.editing.vae import Editor, save_sheet
    from training.editing.vae import reconstruct as reconstructions

    check_places(outdir, sheet, {"--net": net, "--data": data})
    editor = Editor(net, device)
    images, picture = reconstructions(editor, editor.images_of(data, indices), keep, temperature)
    save_sheet(sheet, picture)
    if outdir is not None:
        outdir.mkdir(parents=True, exist_ok=True)
        for index, image in zip(indices, images, strict=True):
            save_image(outdir / f"{index:06d}.png", image)
        save_record(outdir, "reconstruct", editor.describe(), {"data": data, "indices": indices})
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
    if (data is None) == (seeds is None):
        raise UserError("which images? Give --data, or --seeds of images to generate")

    from training.editing.session import check_places, save_record
    from training.editing.vae import Editor, save_sheet
    from training.editing.vae import traverse as traversal

    check_places(outdir, None, {"--data": data})
    editor = Editor(net, device)
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
        save_sheet(path, traversal(editor, latents, group, columns, temperature))
        print(f"Contact sheet: {path}")
    which = {"data": data, "indices": indices} if seeds is None else {"seeds": seeds}
    options = {**which, "groups": groups, "columns": columns, "temperature": temperature}
    save_record(outdir, "traverse", editor.describe(), options)


if __name__ == "__main__":
    main()
