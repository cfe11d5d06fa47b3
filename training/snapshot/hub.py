"""Export of a snapshot as a folder for the Hugging Face hub: config.json, model.safetensors and a model card."""

import json
from pathlib import Path
from typing import Any

import torch

from dnnlib.errors import UserError, one_line
from dnnlib.files import atomic_write
from training.encoders import Encoder, StabilityVAEEncoder
from training.flops import count_parameters
from training.networks.edm2 import Precond
from training.snapshot.files import FOLDER_FILES, SnapshotFile, build_for, open_snapshot, weights_dtype, write_snapshot
from training.snapshot.published_edm2 import PUBLISHED_LICENSE

OWN_FILES = {*FOLDER_FILES, "README.md", ".gitattributes"}


def export_folder(file: SnapshotFile, outdir: Path, license_id: str | None, dtype: torch.dtype | None) -> None:
    """Write the folder; `load_network(outdir)` reads it.

    Args:
        license_id: the weights' licence as the hub names it; None = as the file says.
        dtype: of the weights; None = as they are.

    Raises:
        UserError: the licence is not known, the network makes no images, or `outdir` holds something else.
    """
    license_id = license_id or file.metadata.get("license")
    if license_id is None:
        raise UserError("under which licence? Give --license, such as mit or cc-by-4.0: it belongs on the model card")
    if not license_id.isprintable():
        raise UserError(f"--license={one_line(license_id)} is not the name of a licence")
    net, encoder = build_for(file)
    if not isinstance(net, Precond):
        raise UserError(f"{file.path}: a {type(net).__name__} makes no images and is not for the hub")
    config, weights = (outdir / name for name in FOLDER_FILES)
    if outdir.is_dir():
        if not {path.name for path in outdir.iterdir()} <= OWN_FILES:
            raise UserError(f"{outdir}: holds other files: choose a new folder")
        if config.is_file():
            open_snapshot(outdir)  # fails for the model of another project
    metadata = {**file.metadata, "license": license_id}
    config.unlink(missing_ok=True)  # comes last, so that weights never stand beside the description of others
    write_snapshot(weights, net, file.get_tensor, dtype or weights_dtype(file, net), metadata)
    for path, text in [
        (outdir / "README.md", model_card(net, encoder, metadata)),
        (config, json.dumps(metadata, indent=2) + "\n"),
    ]:
        with atomic_write(path, "w") as f:
            f.write(text)


def model_card(net: Precond, encoder: Encoder, metadata: dict[str, Any]) -> str:
    """What the hub shows, in Markdown."""
    rows = [("Architecture", metadata["architecture"]["name"])]
    rows.append(("Parameters", f"{count_parameters(net) / 1e6:.2f} M"))
    size = f"{net.img_resolution} x {net.img_resolution} x {net.img_channels}"
    latents = isinstance(encoder, StabilityVAEEncoder)
    rows.append(("Makes", f"{size} latents of {encoder.vae_name}" if latents else f"{size} images"))
    rows.append(("Classes", str(net.label_dim) if net.label_dim else "none (unconditional)"))
    if metadata.get("nimg") is not None:
        rows.append(("Trained on", f"{metadata['nimg']:,} images"))
    if metadata.get("ema_std") is not None:
        rows.append(("EMA width", f"{metadata['ema_std']:.3f}"))
    if metadata.get("source") is not None:
        rows.append(("Converted from", f"`{one_line(metadata['source'])}`"))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    attribution = ""
    if metadata.get("source") is not None and metadata["license"] == PUBLISHED_LICENSE:
        attribution = "The weights are NVIDIA's, converted to another file format and otherwise unchanged.\n\n"
    return f"""---
license: {metadata["license"]}
library_name: openedm2
tags:
- diffusion
- edm2
---

# EDM2 diffusion model

| | |
|---|---|
{table}

{attribution}The architecture is that of Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion
Models" (CVPR 2024, [arXiv 2312.02696](https://arxiv.org/abs/2312.02696)). `config.json` describes the network,
`model.safetensors` holds its weights.

```bash
python generate_images.py --net=hf://OWNER/REPOSITORY --outdir=out --seeds=0-15
```
"""
