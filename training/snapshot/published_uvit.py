"""Weights of the published U-ViT code: plain state dicts (`imagenet256_uvit_huge.pth`) and training checkpoints
(`500000.ckpt/`), read without executing anything in them, and written.

The files do not say the architecture. Shapes tell all of it but the number of attention heads, for which the published
widths stand, and for text the number of context tokens, which is 77 in published networks.
"""

import math
import os
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dnnlib.errors import DamagedFileError, UserError, one_line
from dnnlib.files import atomic_write
from torch_utils.checkpoint import load_checked
from training.networks.uvit import UViT

HEADS = {512: 8, 768: 12, 1024: 16, 1152: 16}  # of published networks by width
CLIP_TOKENS = 77  # context tokens of published networks
NETWORKS = {"ema": "nnet_ema.pth", "net": "nnet.pth"}  # files of a training checkpoint
TYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass
class Checkpoint:
    """A published network.

    Attributes:
        state: the weights by name, on the CPU as they are stored.
        arguments: of `UViT`.
        path: the file that they are from.
    """

    state: dict[str, torch.Tensor]
    arguments: dict[str, Any]
    path: Path

    def build(self) -> UViT:
        """The network with these weights in float32, in eval mode and without gradients."""
        with torch.device("meta"):
            net = UViT(**self.arguments)
        net.load_state_dict({name: tensor.float() for name, tensor in self.state.items()}, assign=True)
        return net.eval().requires_grad_(False)


def read(path: str | os.PathLike, which: str = "ema", **known: Any) -> Checkpoint:
    """The weights of a published file, and the architecture that they belong to.

    Args:
        path: a state dict (.pth), a training checkpoint (N.ckpt/), or a folder of these, of which the latest is taken.
        which: 'ema' or 'net': the network of a training checkpoint.
        known: arguments of `UViT` that are not to be guessed, such as num_heads.

    Raises:
        UserError: no such file, a damaged one, one that asks for more than tensors, or one that holds no U-ViT.
    """
    file = _network_file(Path(path), which)
    state = read_tensors(file)
    arguments = {**guess_architecture({name: tuple(t.shape) for name, t in state.items()}, str(file), **known), **known}
    _check_fit(state, arguments, str(file))
    return Checkpoint(state, arguments, file)


def write(path: str | os.PathLike, state: Mapping[str, torch.Tensor]) -> None:
    """Write a state dict that the published code loads.

    Raises:
        OSError: it could not be written.
    """
    stored = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in state.items()}
    with atomic_write(path) as f:
        torch.save(OrderedDict(stored), f)


def guess_architecture(shapes: Mapping[str, tuple[int, ...]], source: str = "the file", **known: Any) -> dict[str, Any]:
    """Arguments of `UViT` for weights of these shapes.

    Args:
        source: names the file in errors.
        known: what is known of num_heads and num_clip_token.

    Raises:
        UserError: they are not those of a U-ViT, or do not tell enough.
    """
    try:
        width, in_chans, patch_size, _ = shapes["patch_embed.proj.weight"]
        hidden, _ = shapes["mid_block.mlp.fc1.weight"]
        _, tokens, _ = shapes["pos_embed"]
        context = shapes.get("context_embed.weight", (0, 0))[1]
    except (KeyError, ValueError, IndexError):
        raise UserError(f"{source}: holds no U-ViT (its tensors: {', '.join(list(shapes)[:3])}, ...)") from None
    blocks = len({name.split(".")[1] for name in shapes if name.startswith("in_blocks.")})
    classes = shapes["label_emb.weight"][0] if "label_emb.weight" in shapes else -1
    text = known.get("num_clip_token", CLIP_TOKENS) if context else 0
    patches = tokens - 1 - (classes > 0) - text
    grid = math.isqrt(max(patches, 0))
    if grid**2 != patches or grid == 0:
        advice = f"; how many of them are text? (not {text}: give num_clip_token)" if context else ""
        raise UserError(f"{source}: its {tokens} tokens are not those of a square image{advice}")
    num_heads = known.get("num_heads", HEADS.get(width))
    if num_heads is None:
        raise UserError(f"{source}: how many attention heads? No published network is {width} wide: give num_heads")
    return dict(
        img_size=grid * patch_size,
        patch_size=patch_size,
        in_chans=in_chans,
        embed_dim=width,
        depth=2 * blocks,
        num_heads=num_heads,
        mlp_ratio=_ratio(hidden, width),
        qkv_bias="mid_block.attn.qkv.bias" in shapes,
        mlp_time_embed="time_embed.0.weight" in shapes,
        num_classes=classes,
        conv="final_layer.weight" in shapes,
        skip=blocks == 0 or "out_blocks.0.skip_linear.weight" in shapes,
        skip_norm="out_blocks.0.skip_norm.weight" in shapes,
        clip_dim=context,
        num_clip_token=text or CLIP_TOKENS,
    )


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a published state dict by name, on the CPU.

    Raises:
        UserError: no such file, a damaged one, or one that asks for more than tensors.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        state = load_checked(path, mmap=True)
    except pickle.UnpicklingError as err:
        raise UserError(f"{path}: not plain tensors ({one_line(err)[:150]}); nothing in the file was run") from None
    except Exception as err:  # torch has many ways to say that a file is damaged
        raise DamagedFileError(f"{path}: damaged ({one_line(err)[:150]}): copy it again") from None
    if not isinstance(state, dict) or not state:
        raise UserError(f"{path}: holds no weights by name, but a {type(state).__name__}")
    for name, tensor in state.items():
        is_weight = isinstance(tensor, torch.Tensor) and tensor.dtype in TYPES and tensor.numel() > 0
        if not isinstance(name, str) or not is_weight:
            raise UserError(f"{path}: {one_line(name)[:50]!r} in it is no tensor of floating-point weights")
    # Overlapping elements would make a large network of a small file.
    if sum(t.numel() * t.itemsize for t in state.values()) > path.stat().st_size:
        raise UserError(f"{path}: its tensors share their values, which no published file needs")
    return dict(state)


def _ratio(hidden: int, width: int) -> float:
    """The number of which int(width * number) is `hidden`."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _network_file(path: Path, which: str) -> Path:
    """The file of a network that a path stands for."""
    if which not in NETWORKS:
        raise UserError(f"{path}: holds no network {which!r}, only {' and '.join(map(repr, NETWORKS))}")
    if not path.is_dir():
        if which != "ema":
            raise UserError(f"{path}: holds no network {which!r}, only 'ema'")
        return path
    if not (path / NETWORKS[which]).is_file():
        steps = [p for p in path.glob("*.ckpt") if p.stem.isdecimal() and (p / NETWORKS[which]).is_file()]
        if not steps:
            raise UserError(f"{path}: a folder without {NETWORKS[which]}, and without N.ckpt folders that have it")
        path = max(steps, key=lambda p: int(p.stem))
    return path / NETWORKS[which]


def _check_fit(state: Mapping[str, torch.Tensor], arguments: dict[str, Any], source: str) -> None:
    """Check that names and shapes are those of the network."""
    try:
        with torch.device("meta"):
            wanted = UViT(**arguments).state_dict()
    except (TypeError, UserError, RuntimeError) as err:
        raise UserError(f"{source}: its weights make no U-ViT ({one_line(err)})") from None
    for what, names in [("lacks", wanted.keys() - state.keys()), ("also holds", state.keys() - wanted.keys())]:
        if names:
            raise UserError(f"{source}: {what} {', '.join(sorted(names)[:3])} ({len(names)} in all): not a whole U-ViT")
    for name, tensor in state.items():
        if tensor.shape != wanted[name].shape:
            raise UserError(f"{source}: {name} is {list(tensor.shape)} instead of {list(wanted[name].shape)}")
