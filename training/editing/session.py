"""A run of edit_images.py: what it edits with, and where the results go."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dnnlib.errors import UserError
from dnnlib.files import atomic_write, check_not_input
from torch_utils.pictures import check_picture, drawable, image_grid, save_image
from training.config.data import EDIT_NAME
from training.config.generation import GenerationConfig
from training.editing import vae
from training.editing.images import Editor
from training.generation import fetch, load
from training.guides import architecture_of_file
from training.provenance import format_seeds

FLOW_SOLVER = "rk45"  # what carries images to noise, and back


def open_editor(opts: dict[str, Any], batch: int, flow: bool = False) -> Editor:
    """The denoiser that the options name; with `flow`, sampled by the probability flow.

    Raises:
        UserError: the options do not go together, or name something else.
    """
    if flow and (opts["sampler"] or FLOW_SOLVER) != FLOW_SOLVER:
        raise UserError(f"--sampler={opts['sampler']}: noise and images are matched by {FLOW_SOLVER}: leave it out")
    config = GenerationConfig.take({**opts, "sampler": FLOW_SOLVER} if flow else opts)
    fetch(config.networks)
    return Editor(load(config), batch)


def works_with_denoiser(opts: dict[str, Any]) -> bool:
    """Whether the network is a denoiser, rather than an NVAE."""
    if opts["net"] is None:
        return True  # a preset
    architecture = architecture_of_file(opts["net"], opts["arch"])
    return architecture is None or architecture.is_denoiser


def open_vae(opts: dict[str, Any]) -> vae.Editor:
    """The NVAE that the options name.

    Raises:
        UserError: an option that it does not know, or another network.
    """
    given = [name for name, value in opts.items() if value is not None and name not in ("net", "arch", "device")]
    if given:
        raise UserError(f"--{given[0].replace('_', '-')} has no effect on NVAE: leave it out")
    return vae.Editor(opts["net"], opts["device"] or "auto", opts["arch"])


def check_places(outdir: Path | None, sheet: Path | None, inputs: dict[str, Any]) -> None:
    """Refuse (UserError) to write over what other options ask to read, and into a dataset; sheets are PNG files."""
    if outdir is not None:
        check_not_input("--outdir", outdir, inputs)
    if sheet is not None:
        check_picture("--sheet", sheet, inputs)


def draw_sheet(path: Path, pictures: torch.Tensor, captions: list[str]) -> None:
    """Contact sheet of pictures [N, C, H, W] in rows, each with these captions."""
    columns = len(captions)
    save_image(path, image_grid(drawable(pictures), columns, captions * (len(pictures) // columns)))
    print(f"Contact sheet: {path}")


def save_results(outdir: Path, sheet: Path | None, rows: dict[str, Any], originals: Any, captions: list[str]) -> None:
    """Results {name: [K, C, H, W]} as files {name}-{k}.png, and a sheet of originals and results, a row for each."""
    shown = []
    for (name, pictures), before in zip(rows.items(), originals, strict=True):
        for k, picture in enumerate(pictures):
            save_image(outdir / f"{name}-{k:02d}.png", picture.cpu().numpy())
        shown.append(torch.cat([before, pictures]))
    if sheet is not None:
        draw_sheet(sheet, torch.cat(shown), captions)
    print(f"{sum(map(len, rows.values()))} images in {outdir}")


def save_fills(
    outdir: Path,
    sheet: Path | None,
    indices: list[int],
    before: Sequence[torch.Tensor],
    fills: torch.Tensor,
    captions: list[str],
) -> None:
    """Fills [N, K, C, H, W] of images, and a sheet of what was there `before` of each image, and of its fills."""
    rows = {f"{index:06d}": pictures for index, pictures in zip(indices, fills, strict=True)}
    save_results(outdir, sheet, rows, torch.stack(list(before), dim=1), captions)


def save_record(
    outdir: Path, edit: str, maker: Mapping[str, Any], options: Mapping[str, Any], results: Mapping[str, float] = {}
) -> None:
    """Say in edit.json what made the results of the newest edit in a folder.

    Args:
        edit: the command.
        maker: network, sampler and the like, as plain JSON values.
        options: of the command itself; None = not given.
        results: what was found of the images.
    """
    texts = {key: format_seeds(value) if isinstance(value, list) else value for key, value in options.items()}
    given = {key: value for key, value in texts.items() if value is not None}
    finite = {name: value for name, value in results.items() if math.isfinite(value)}
    record = {"edit": edit, **given, **maker, **({"results": finite} if finite else {})}
    with atomic_write(outdir / EDIT_NAME, "w") as f:
        f.write(json.dumps(record, indent=2) + "\n")
