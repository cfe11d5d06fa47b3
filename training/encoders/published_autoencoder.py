"""The published autoencoder of U-ViT (`autoencoder_kl.pth`, KL-f8 of Rombach et al. 2022) for diffusers."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from dnnlib.errors import UserError, one_line
from dnnlib.files import atomic_write
from torch_utils.tensor_files import read_tensors

PUBLISHED_SCALE = 0.18215  # of all but MS-COCO
# Names that are replaced wherever they stand between dots, in this order.
RENAMED = {
    r"(down|up)\.(\d+)\.block": r"\1_blocks.\2.resnets",
    r"down\.(\d+)\.downsample": r"down_blocks.\1.downsamplers.0",
    r"up\.(\d+)\.upsample": r"up_blocks.\1.upsamplers.0",
    r"mid\.block_1": "mid_block.resnets.0",
    r"mid\.block_2": "mid_block.resnets.1",
    r"mid\.attn_1\.norm": "mid_block.attentions.0.group_norm",
    r"mid\.attn_1\.([qkv])": r"mid_block.attentions.0.to_\1",
    r"mid\.attn_1\.proj_out": "mid_block.attentions.0.to_out.0",
    "nin_shortcut": "conv_shortcut",
    "norm_out": "conv_norm_out",
}


def diffusers_name(name: str, levels: int) -> str:
    """The name in diffusers of a published tensor; levels of the decoder are counted from the coarsest there."""
    for pattern, replacement in RENAMED.items():
        name = re.sub(rf"(?<=\.){pattern}(?=\.)", replacement, name)
    return re.sub(r"(?<=\.up_blocks\.)\d+", lambda match: str(levels - 1 - int(match[0])), name)


def diffusers_state(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights by their names in diffusers; 1x1 convolutions of the attention are linear layers there."""
    levels = _count(state, r"encoder\.down\.(\d+)\.")
    renamed = {diffusers_name(name, levels): tensor for name, tensor in state.items()}
    linear = re.compile(r".*\.attentions\.0\.to_.*\.weight")
    return {name: t[:, :, 0, 0] if linear.fullmatch(name) else t for name, t in renamed.items()}


def diffusers_config(state: Mapping[str, torch.Tensor], scale_factor: float) -> dict[str, Any]:
    """Configuration of the AutoencoderKL whose published weights these are.

    Args:
        scale_factor: what latents are multiplied by: 0.18215, for MS-COCO 0.2301.

    Raises:
        UserError: they are not those of such an autoencoder.
    """
    try:
        levels = _count(state, r"encoder\.down\.(\d+)\.")
        return dict(
            _class_name="AutoencoderKL",
            in_channels=state["encoder.conv_in.weight"].shape[1],
            out_channels=state["decoder.conv_out.weight"].shape[0],
            latent_channels=state["post_quant_conv.weight"].shape[1],
            block_out_channels=[state[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)],
            layers_per_block=_count(state, r"encoder\.down\.0\.block\.(\d+)\."),
            down_block_types=["DownEncoderBlock2D"] * levels,
            up_block_types=["UpDecoderBlock2D"] * levels,
            act_fn="silu",
            norm_num_groups=32,
            scaling_factor=scale_factor,
        )
    except (KeyError, IndexError) as err:
        raise UserError(f"no weights of a KL autoencoder: {err} is missing") from None


def convert_autoencoder(path: str | Path, folder: str | Path, scale_factor: float = PUBLISHED_SCALE) -> None:
    """Write a published autoencoder as a folder that diffusers, and `dataset_tool.py encode --encoder`, read.

    Args:
        path: the published file.
        folder: where config.json and diffusion_pytorch_model.safetensors are written.
        scale_factor: see `diffusers_config`.

    Raises:
        UserError: no such file, a damaged one, or one of something else.
        OSError: it could not be written.
    """
    state = read_tensors(Path(path))
    try:
        config = diffusers_config(state, scale_factor)
    except UserError as err:
        raise UserError(f"{path}: {err}") from None
    tensors = {name: tensor.contiguous().clone() for name, tensor in diffusers_state(state).items()}
    with atomic_write(Path(folder) / "diffusion_pytorch_model.safetensors") as f:
        f.write(safetensors.torch.save(tensors, metadata={"format": "pt"}))
    with atomic_write(Path(folder) / "config.json", "w") as f:
        f.write(json.dumps(config, indent=2) + "\n")


def load_autoencoder(path: str | Path, model_class: Any) -> Any:
    """diffusers' AutoencoderKL with the weights of a published file.

    Args:
        model_class: diffusers' class of that name.

    Raises:
        UserError: no such file, a damaged one, or one of something else.
    """
    state = read_tensors(Path(path))
    try:
        config = diffusers_config(state, PUBLISHED_SCALE)
        del config["_class_name"]
        model = model_class(**config)
        model.load_state_dict(diffusers_state(state))
    except (UserError, RuntimeError) as err:
        raise UserError(f"{path}: {one_line(err)[:300]}") from None
    return model


def _count(names: Mapping[str, Any], pattern: str) -> int:
    """How many numbers stand in names at a place."""
    return len({match[1] for name in names if (match := re.match(pattern, name))})
