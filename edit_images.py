"""Edit images with a trained network."""

from pathlib import Path
from typing import Any

import click

from dnnlib.cli import CommandGroup, device_option, offline_option, parse_int_list, parsed_by, with_options
from dnnlib.errors import UserError

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


@click.group(cls=CommandGroup)
def main() -> None:
    """Edit images with a trained network."""


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
    from torch_utils.pictures import check_picture, save_image
    from training import editing_vae

    check_picture("--sheet", sheet, {"--net": net, "--data": data})
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
@with_options([data_option(), INDICES_OPTION, sheet_option()])
@click.option("--steps", help="Pictures in a row", metavar="INT", type=click.INT, default=8, show_default=True)
@with_options([device_option, offline_option])
def interpolate(net: str, data: str, indices: list[int], sheet: Path, steps: int, device: str) -> None:
    """From each image to the next one, on great circles of an NVAE's latents.

    \b
    Example:
      python edit_images.py interpolate --net=out/digits-nvae/network-snapshot-0000051.safetensors \\
          --data=datasets/digits.zip --indices=0-5 --sheet=out/digits-nvae/interpolation.png
    """
    from torch_utils.pictures import check_picture
    from training import editing_vae

    check_picture("--sheet", sheet, {"--net": net, "--data": data})
    editor = editing_vae.Editor(net, device)
    editing_vae.save_sheet(sheet, editing_vae.interpolate(editor, editor.images_of(data, indices), steps))
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
