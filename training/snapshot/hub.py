"""Export of a snapshot as a folder for the Hugging Face hub: config.json, model.safetensors and a model card."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dnnlib.util import UserError, atomic_write
from training.encoders import Encoder, StabilityVAEEncoder
from training.networks_edm2 import Precond
from training.snapshot import FOLDER_FILES, SnapshotFile, build_for, write_snapshot

PUBLISHED_NAME = r"edm2-img(512|64)-.*\.pkl"  # file names of NVIDIA's published networks
PUBLISHED_LICENSE = "cc-by-nc-sa-4.0"


def export_folder(file: SnapshotFile, outdir: Path, license_id: str | None, dtype: torch.dtype) -> None:
    """Write the folder; `load_network(outdir)` reads it.

    Args:
        license_id: the weights' licence as the hub names it; None = that of NVIDIA's published networks, for those.

    Raises:
        UserError: the licence is not known, or `outdir` holds something else.
    """
    if re.fullmatch(PUBLISHED_NAME, file.metadata.get("source", "")):
        license_id = license_id or PUBLISHED_LICENSE
    license_id = license_id or file.metadata.get("license")
    if license_id is None:
        raise UserError("under which licence? Give --license, such as mit or cc-by-4.0: it belongs on the model card")
    present = {path.name for path in outdir.iterdir()} if outdir.is_dir() else set()
    if present and not present >= set(FOLDER_FILES):
        raise UserError(f"{outdir}: holds other files: choose a new folder")
    net, encoder = build_for(file)
    metadata = {**file.metadata, "license": license_id}
    write_snapshot(outdir / FOLDER_FILES[1], net, file.get_tensor, dtype, metadata)
    for name, text in [
        (FOLDER_FILES[0], json.dumps(metadata, indent=2) + "\n"),
        ("README.md", model_card(net, encoder, metadata)),
    ]:
        with atomic_write(outdir / name, "w") as f:
            f.write(text)


def model_card(net: nn.Module, encoder: Encoder, metadata: dict[str, Any]) -> str:
    """What the hub shows, in Markdown."""
    rows = [("Architecture", metadata["architecture"]["name"])]
    rows.append(("Parameters", f"{sum(p.numel() for p in net.parameters()) / 1e6:.2f} M"))
    if isinstance(net, Precond):
        size = f"{net.img_resolution} x {net.img_resolution} x {net.img_channels}"
        latents = isinstance(encoder, StabilityVAEEncoder)
        rows.append(("Makes", f"{size} latents of {encoder.vae_name}" if latents else f"{size} images"))
        rows.append(("Classes", str(net.label_dim) if net.label_dim else "none (unconditional)"))
    if "nimg" in metadata:
        rows.append(("Trained on", f"{metadata['nimg']:,} images"))
    if "ema_std" in metadata:
        rows.append(("EMA width", f"{metadata['ema_std']:.3f}"))
    if "source" in metadata:
        rows.append(("Converted from", f"`{metadata['source']}`"))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    attribution = ""
    if re.fullmatch(PUBLISHED_NAME, metadata.get("source", "")):
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
