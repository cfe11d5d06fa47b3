"""Weights of the published U-ViT code: plain state dicts (`imagenet256_uvit_huge.pth`) and training checkpoints
(`500000.ckpt/`), read without executing anything in them, and written.

The files do not say the architecture. Shapes tell all of it but the number of attention heads, for which the published
widths stand, and for text the number of context tokens, which is 77 in published networks.
"""

import math
import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dnnlib.errors import UserError, one_line
from dnnlib.files import atomic_write
from torch_utils.tensor_files import read_tensors
from training.conditioning import Conditioning, DataSpec
from training.config.names import unknown_preset
from training.config.training import Preset
from training.config.uvit import UViTNetwork
from training.config.uvit_presets import UVIT_PRESETS
from training.encoders import PUBLISHED_CLIP, PUBLISHED_VAE, Encoder, StabilityVAEEncoder, StandardRGBEncoder
from training.networks.uvit import UViT
from training.networks.uvit_denoiser import known_conditions
from training.snapshot.description import FORMAT_VERSION, Description
from training.snapshot.layout import FOLDER, GetTensor, LoadedFile, Request, check_storable

ARCHITECTURE = "uvit.UViTDenoiser"
SCALES = {"tokens": 0.2301}  # of the published latents by kind of condition
SCALE = 0.18215  # of the others
HEADS = {512: 8, 768: 12, 1024: 16, 1152: 16}  # of published networks by width
CLIP_TOKENS = 77  # context tokens of published networks
NETWORKS = {"ema": "nnet_ema.pth", "net": "nnet.pth"}  # files of a training checkpoint


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
        raise UserError(
            f"{source}: how many attention heads? No published network is {width} wide: name its preset (--arch), or "
            f"give num_heads"
        )
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


class PublishedUViT(LoadedFile):
    """A published file or folder as a snapshot: `which` is 'ema' or, of training checkpoints, 'net'.

    What the weights do not say is that of the preset: the one that is asked for, or the published one of these sizes;
    where there is none, `note` says what was assumed.

    Raises:
        UserError: as `read`, or there is no such preset.
    """

    says_architecture = False

    def __init__(self, request: Request):
        path = Path(request.address) if request.suffix == FOLDER else request.fetch()
        preset = None if request.preset is None else _preset_named(request.preset)
        checkpoint = read(path, request.which, **({} if preset is None else _known(preset)))
        self.path, arguments = checkpoint.path, checkpoint.arguments
        if preset is None:
            network, self.note = _understood(arguments)
        else:
            network = preset.config.network
        self._tensors = {f"net.{name}": tensor for name, tensor in checkpoint.state.items()}
        conditioning = _conditioning(arguments, network)
        if conditioning.kind == "tokens":  # which the published code keeps in a file of its own
            self._tensors["empty_context"] = torch.zeros(conditioning.shape)
        self.names = list(self._tensors)
        data = DataSpec(channels=arguments["in_chans"], resolution=arguments["img_size"], conditioning=conditioning)
        encoder: Encoder = StandardRGBEncoder()
        if data.channels == 4:
            scale = SCALES.get(conditioning.kind, SCALE)
            encoder = StabilityVAEEncoder(PUBLISHED_VAE, scale=scale, pixel_range=(-1.0, 1.0))
        block = {
            "format_version": FORMAT_VERSION,
            "architecture": {"name": ARCHITECTURE, "kwargs": network.to_json()},
            "encoder": {"name": type(encoder).__name__, "kwargs": encoder.init_kwargs},
            "data": data.to_json(),
            "source": self.path.name,
        }
        if conditioning.kind == "tokens":
            kwargs = {"model": PUBLISHED_CLIP, "tokens": conditioning.tokens, "width": conditioning.size}
            block["text_encoder"] = {"name": "TextEncoder", "kwargs": kwargs}
        self.description = Description.from_json(str(self.path), block)


def is_checkpoint_folder(request: Request) -> bool:
    """Whether a folder is a training checkpoint of the published code, or holds some."""
    folder = Path(request.address)
    return folder.is_dir() and (folder.joinpath(NETWORKS["ema"]).is_file() or any(folder.glob("*.ckpt")))


def write_state_dict(
    path: Path, net: nn.Module, get_tensor: GetTensor, dtype: torch.dtype, _description: Description
) -> None:
    """Write a snapshot as a state dict that the published code loads, complete or not at all.

    Args: as `training.snapshot.native.write_native`.

    Raises:
        UserError: a value is NaN or infinite.
        OSError: it could not be written.
    """
    state = {}
    for name in net.state_dict():
        if name.startswith("net."):
            state[name.removeprefix("net.")] = tensor = get_tensor(name).to(dtype)
            check_storable(path, name, tensor)
    write(path, state)


def _preset_named(name: str) -> Preset:
    if name not in UVIT_PRESETS:
        raise unknown_preset("preset", name, UVIT_PRESETS)
    return UVIT_PRESETS[name]


def _known(preset: Preset) -> dict[str, int]:
    """What shapes do not tell, of a preset."""
    known = {"num_heads": preset.config.network.num_heads}
    return known | ({"num_clip_token": preset.context[0]} if preset.context[0] else {})


def _understood(arguments: Mapping[str, Any]) -> tuple[UViTNetwork, str]:
    """The network of these arguments of `UViT`, and what the user should know about it."""
    for name, preset in UVIT_PRESETS.items():
        if preset.published and _fits(preset, arguments):
            return preset.config.network, f"taken for {name}, by the sizes of its weights (--arch names another)"
    classes = arguments["num_classes"]
    null_class = classes % 10 == 1 and classes > 1
    fields = {name: value for name, value in arguments.items() if name in UViTNetwork.__dataclass_fields__}
    network = UViTNetwork(**fields, null_class=null_class)
    last = "class for none" if null_class else "no class for none"
    text = f"taken for a network with {network.num_heads} heads that predicts the noise of continuous time"
    return network, f"{text}{f', {classes} classes with {last}' if classes > 0 else ''} (--arch names a preset)"


def _fits(preset: Preset, arguments: Mapping[str, Any]) -> bool:
    """Whether the network of a preset has these arguments of `UViT`."""
    network = preset.config.network
    classes = preset.classes + network.null_class if preset.classes else -1
    data = dict(img_size=preset.resolution, in_chans=preset.channels, num_classes=classes, clip_dim=preset.context[1])
    kwargs = {**network.to_json(), **data}
    return all(kwargs[name] == value for name, value in arguments.items() if name in kwargs)


def _conditioning(arguments: Mapping[str, Any], network: UViTNetwork) -> Conditioning:
    if arguments["clip_dim"] > 0:
        conditioning = Conditioning.of_text(arguments["num_clip_token"], arguments["clip_dim"])
    else:
        classes = arguments["num_classes"]
        conditioning = Conditioning.of_labels(classes - network.null_class if classes > 0 else 0)
    return known_conditions(conditioning, network)


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
