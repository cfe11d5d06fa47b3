"""What a snapshot's JSON block says, and the network and encoder that are built from it."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dnnlib.errors import UserError, one_line
from dnnlib.util import code_version
from torch_utils import safe_pickle
from training.encoders import ENCODERS, Encoder
from training.networks.edm2 import Precond
from training.networks.toy import ToyModel

FORMAT_VERSION = 1
METADATA_KEY = "openedm2"  # under which the JSON block stands in a file
ARCHITECTURES: dict[str, type[nn.Module]] = {"edm2.Precond": Precond, "toy.ToyModel": ToyModel}


def describe(net: nn.Module, encoder: Encoder, metadata: dict[str, Any]) -> dict[str, Any]:
    """The JSON block of a snapshot: `metadata` and what it takes to build network and encoder again."""
    architecture = next(name for name, cls in ARCHITECTURES.items() if type(net) is cls)
    return {
        **metadata,
        "format_version": FORMAT_VERSION,
        "architecture": {"name": architecture, "kwargs": safe_pickle.plain(net.init_kwargs, architecture)},
        "encoder": {"name": type(encoder).__name__, "kwargs": encoder.init_kwargs},
        "code_version": code_version(),
    }


def checked_metadata(source: str, metadata: Any) -> dict[str, Any]:
    """A JSON block in which what is there is of the right type. `source` names the file.

    Raises:
        UserError: it is not.
    """
    if not isinstance(metadata, dict):
        raise UserError(f"{source}: its description is not that of a network of this project")
    metadata = safe_pickle.plain(metadata, source)
    version = metadata.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(f"{source}: format version {one_line(version)[:50]} is unknown: update this code")
    for key, kind in _METADATA_TYPES.items():
        if metadata.get(key) is not None and type(metadata[key]) is not kind:
            raise UserError(f"{source}: its description is damaged: {key} is not of type {kind.__name__}")
    return metadata


_METADATA_TYPES = {
    **dict.fromkeys(["architecture", "encoder", "config", "dataset", "dataset_kwargs", "loss_kwargs"], dict),
    **dict.fromkeys(["source", "license", "code_version"], str),
    "nimg": int,
    "use_fp16": bool,
    "ema_std": float,
    "reconstructed_from": list,
}


def build(source: str, metadata: dict[str, Any]) -> tuple[nn.Module, Encoder]:
    """The network, still without values (on the meta device), and the encoder that a snapshot's JSON block describes.

    Raises:
        UserError: unknown names, or arguments that do not make a network. `source` names the file.
    """
    try:
        architecture, encoder = metadata["architecture"], metadata["encoder"]
        net_name, net_kwargs = architecture["name"], architecture["kwargs"]
        encoder_name, encoder_kwargs = encoder["name"], encoder["kwargs"]
        net_class, encoder_class = ARCHITECTURES.get(net_name), ENCODERS.get(encoder_name)
    except (KeyError, TypeError) as err:
        raise UserError(f"{source}: its description is incomplete ({one_line(repr(err))[:100]})") from None
    if net_class is None:
        raise UserError(f"{source}: unknown architecture {net_name[:50]!r} (known: {', '.join(ARCHITECTURES)})")
    if encoder_class is None:
        raise UserError(f"{source}: unknown encoder {encoder_name[:50]!r} (known: {', '.join(ENCODERS)})")
    make_net: Callable[..., nn.Module] = net_class
    if net_class is Precond:
        make_net = functools.partial(Precond, precision="fp32")
    try:
        _check_arguments(net_kwargs, _NETWORK_ARGUMENTS[net_name])
        _check_arguments(encoder_kwargs, _ENCODER_ARGUMENTS)
        with torch.device("meta"):
            made = make_net(**net_kwargs), encoder_class(**encoder_kwargs)
    except Exception as err:  # what a damaged or foreign description asks for can fail in any way
        raise misfit(source, err) from None
    channels = {len(encoder_kwargs[key]) for key in ("raw_mean", "raw_std") if key in encoder_kwargs}
    if isinstance(made[0], Precond) and channels and channels != {made[0].img_channels}:
        raise misfit(source, f"the encoder has statistics of {channels} channels")
    return made


def misfit(source: str, err: Exception | str) -> UserError:
    return UserError(f"{source}: the weights do not fit the architecture: {one_line(err)[:300]}")


# Arguments of networks and encoders, and which values are believed. The largest are a few times those of the largest
# published network: a hostile file could otherwise ask for one that takes hours to build.


def _whole(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and low <= value <= high


def _number(low: float, high: float) -> Callable[[Any], bool]:
    return lambda value: type(value) in (int, float) and low <= value <= high


def _optional(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


def _list(check: Callable[[Any], bool], low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is list and low <= len(value) <= high and all(map(check, value))


def _filter(value: Any) -> bool:
    return _list(_number(-1e6, 1e6), 2, 64)(value) and len(value) % 2 == 0 and abs(sum(value)) > 1e-6


TINY, HUGE = 1e-12, 1e12
_NETWORK_ARGUMENTS: dict[str, dict[str, Callable[[Any], bool]]] = {
    "edm2.Precond": dict(
        img_resolution=_whole(1, 1 << 14),
        img_channels=_whole(1, 1 << 12),
        label_dim=_whole(0, 1 << 20),
        sigma_data=_number(TINY, HUGE),
        logvar_channels=_whole(1, 1 << 14),
        model_channels=_whole(1, 1 << 12),
        channel_mult=_list(_whole(1, 16), 1, 8),
        channel_mult_noise=_optional(_whole(1, 64)),
        channel_mult_emb=_optional(_whole(1, 64)),
        num_blocks=_whole(0, 16),
        attn_resolutions=_list(_whole(0, 1 << 14), 0, 16),
        label_balance=_number(0, 1),
        concat_balance=_number(0, 1),
        resample_filter=_filter,
        channels_per_head=_whole(1, 1 << 14),
        dropout=_number(0, 0.999),
        res_balance=_number(0, 1),
        attn_balance=_number(0, 1),
        clip_act=_optional(_number(TINY, HUGE)),
    ),
    "toy.ToyModel": dict(
        in_dim=_whole(1, 1 << 12),
        num_layers=_whole(0, 64),
        hidden_dim=_whole(1, 1 << 14),
        sigma_data=_number(TINY, HUGE),
    ),
}
_ENCODER_ARGUMENTS: dict[str, Callable[[Any], bool]] = dict(
    vae_name=lambda value: type(value) is str and 0 < len(value) <= 500 and value.isprintable(),
    raw_mean=_list(_number(-HUGE, HUGE), 1, 1 << 12),
    raw_std=_list(_number(TINY, HUGE), 1, 1 << 12),
)


def _check_arguments(kwargs: dict[str, Any], known: dict[str, Callable[[Any], bool]]) -> None:
    """
    Raises:
        ValueError: there is an unknown argument, or one of the wrong type or beyond all measure.
    """
    for name, value in kwargs.items():
        if name not in known:
            raise ValueError(f"unknown argument {name[:50]!r}")
        if not known[name](value):
            shown = repr(value)[:50] if isinstance(value, (int, float, str)) else f"a {type(value).__name__}"
            raise ValueError(f"{name} cannot be {shown}")
