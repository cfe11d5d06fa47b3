"""Folders for the Hugging Face hub: config.json, model.safetensors and a model card."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from dnnlib.download import is_url
from dnnlib.errors import UserError, one_line
from dnnlib.files import atomic_write
from training.config.training import OPTIONS_NAME
from training.encoders import Encoder
from training.families import architecture_of
from training.flops import count_parameters
from training.snapshot.description import Description
from training.snapshot.layout import Request, SnapshotFile, build_for, weights_dtype
from training.snapshot.native import NativeFile, write_native
from training.snapshot.published_edm2 import PUBLISHED_LICENSE

FOLDER_FILES = ("config.json", "model.safetensors")
SHOWN_CLASSES = 20  # names on the model card
OWN_FILES = {*FOLDER_FILES, "README.md", ".gitattributes"}


def open_folder(request: Request) -> NativeFile:
    """Open a folder of the hub: a native snapshot whose description is config.json.

    Raises:
        UserError: a file is missing or damaged, or it is the folder of another project.
    """
    folder = request.address
    missing = [name for name in FOLDER_FILES if not is_url(folder) and not Path(folder, name).is_file()]
    if missing and Path(folder, OPTIONS_NAME).is_file():
        raise UserError(f"{folder}: a training run without a snapshot yet: wait for its first, or lower --snapshot")
    if missing:
        raise UserError(
            f"{folder}: a folder without {missing[0]} is no snapshot (it needs {' and '.join(FOLDER_FILES)})"
        )
    config, weights = (request.fetch(name) for name in FOLDER_FILES)
    try:
        block = json.loads(config.read_text())
    except (ValueError, RecursionError) as err:
        raise UserError(f"{config}: not JSON ({one_line(err)})") from None
    request.check_which(weights)
    return NativeFile(weights, Description.from_json(str(config), block))


def export_folder(file: SnapshotFile, outdir: Path, license_id: str | None, dtype: torch.dtype | None) -> None:
    """Write the folder; `load_network(outdir)` reads it.

    Args:
        license_id: the weights' licence as the hub names it; None = as the file says.
        dtype: of the weights; None = as they are.

    Raises:
        UserError: the licence is not known, the network makes no images, or `outdir` holds something else.
        OSError: it could not be written.
    """
    license_id = license_id or file.description.license
    if license_id is None:
        raise UserError("under which licence? Give --license, such as mit or cc-by-4.0: it belongs on the model card")
    if not license_id.isprintable():
        raise UserError(f"--license={one_line(license_id)} is not the name of a licence")
    net, encoder = build_for(file)
    if not architecture_of(net).makes_images:
        raise UserError(f"{file.path}: a {type(net).__name__} makes no images and is not for the hub")
    config, weights = (outdir / name for name in FOLDER_FILES)
    if outdir.is_dir():
        if not {path.name for path in outdir.iterdir()} <= OWN_FILES:
            raise UserError(f"{outdir}: holds other files: choose a new folder")
        if config.is_file():
            open_folder(Request(str(outdir)))  # fails for the model of another project
    description = dataclasses.replace(file.description.with_data(net), license=license_id)
    config.unlink(missing_ok=True)  # comes last, so that weights never stand beside the description of others
    write_native(weights, net, file.get_tensor, dtype or weights_dtype(file, net), description)
    for path, text in [
        (outdir / "README.md", model_card(net, encoder, description)),
        (config, json.dumps(description.to_json(), indent=2) + "\n"),
    ]:
        with atomic_write(path, "w") as f:
            f.write(text)


def _classes(size: int, names: list[str] | None) -> str:
    """The classes in a cell of a table: how many, and what the first ones are called."""
    if size == 0:
        return "none (unconditional)"
    shown = ", ".join(one_line(name).replace("|", "\\|")[:40] for name in (names or [])[:SHOWN_CLASSES])
    return f"{size}: {shown}{', ...' if len(names or []) > SHOWN_CLASSES else ''}" if names else str(size)


def model_card(net: Any, encoder: Encoder, description: Description) -> str:
    """What the hub shows, in Markdown."""
    rows = [("Architecture", description.architecture.name)]
    rows.append(("Parameters", f"{count_parameters(net) / 1e6:.2f} M"))
    architecture, data = architecture_of(net), net.spec
    size = f"{data.resolution} x {data.resolution} x {data.channels}"
    vae = Path(encoder.vae_name).name if Path(encoder.vae_name).is_absolute() else encoder.vae_name
    rows.append(("Makes", f"{size} latents of {vae}" if vae else f"{size} images"))
    rows.append(("Classes", _classes(data.conditioning.size, description.class_names)))
    if description.nimg is not None:
        rows.append(("Trained on", f"{description.nimg:,} images"))
    if description.ema_std is not None:
        rows.append(("EMA width", f"{description.ema_std:.3f}"))
    attribution = ""
    if description.source is not None:
        rows.append(("Converted from", f"`{one_line(description.source)}`"))
        if description.license == PUBLISHED_LICENSE:
            attribution = "The weights are NVIDIA's, converted to another file format and otherwise unchanged.\n\n"
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"""---
license: {description.license}
library_name: openedm2
tags:
- diffusion
- {architecture.family.lower()}
---

# {architecture.family} model

| | |
|---|---|
{table}

{attribution}The architecture is that of {architecture.paper}.
`config.json` describes the network, `model.safetensors` holds its weights.

```bash
python generate_images.py --net=hf://OWNER/REPOSITORY --outdir=out --seeds=0-15
```
"""
