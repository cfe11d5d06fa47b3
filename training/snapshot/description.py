"""What a snapshot's JSON block says, and the network and encoder that are built from it."""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dnnlib.util import UserError, code_version
from training.encoders import ENCODERS, Encoder
from training.networks_edm2 import Precond
from training.networks_toy import ToyModel

FORMAT_VERSION = 1
ARCHITECTURES: dict[str, type[nn.Module]] = {"edm2.Precond": Precond, "toy.ToyModel": ToyModel}

# The largest arguments of a network that are believed, a few times those of the largest published one. A hostile file
# could otherwise ask for a network that takes hours to build.
MAX_ARGUMENTS = dict(
    img_resolution=1 << 16,
    img_channels=1 << 12,
    label_dim=1 << 24,
    model_channels=1 << 12,
    channel_mult=64,
    channel_mult_noise=64,
    channel_mult_emb=64,
    num_blocks=64,
    attn_resolutions=1 << 16,
    logvar_channels=1 << 16,
    channels_per_head=1 << 16,
    in_dim=1 << 12,
    num_layers=1 << 10,
    hidden_dim=1 << 16,
)
MAX_LIST = 64  # numbers in a list
MAY_BE_NONE = {"channel_mult_noise", "channel_mult_emb", "clip_act"}
TEXTS = {"vae_name"}


def describe(net: nn.Module, encoder: Encoder, metadata: dict[str, Any]) -> dict[str, Any]:
    """The JSON block of a snapshot: `metadata` and what it takes to build network and encoder again."""
    architecture = next(name for name, cls in ARCHITECTURES.items() if type(net) is cls)
    return {
        **metadata,
        "format_version": FORMAT_VERSION,
        "architecture": {"name": architecture, "kwargs": net.init_kwargs},
        "encoder": {"name": type(encoder).__name__, "kwargs": encoder.init_kwargs},
        "code_version": code_version(),
    }


def build(source: str, metadata: dict[str, Any]) -> tuple[nn.Module, Encoder]:
    """The network, still without values (on the meta device), and the encoder that a snapshot's JSON block describes.

    Raises:
        UserError: unknown names, or arguments that do not make a network. `source` names the file.
    """
    try:
        architecture, encoder = metadata["architecture"], metadata["encoder"]
        net_class, net_kwargs = ARCHITECTURES.get(architecture["name"]), architecture["kwargs"]
        encoder_class, encoder_kwargs = ENCODERS.get(encoder["name"]), encoder["kwargs"]
    except (KeyError, TypeError) as err:
        raise UserError(f"{source}: its description is incomplete ({err!r})") from None
    if net_class is None:
        raise UserError(f"{source}: unknown architecture {architecture['name']!r} (known: {', '.join(ARCHITECTURES)})")
    if encoder_class is None:
        raise UserError(f"{source}: unknown encoder {encoder['name']!r} (known: {', '.join(ENCODERS)})")
    make_net: Callable[..., nn.Module] = (
        functools.partial(net_class, precision="fp32") if net_class is Precond else net_class
    )
    try:
        _check_arguments({**net_kwargs, **encoder_kwargs})
        with torch.device("meta"):
            return make_net(**net_kwargs), encoder_class(**encoder_kwargs)
    except Exception as err:  # what a damaged or foreign description asks for can fail in any way
        raise misfit(source, err) from None


def misfit(source: str, err: Exception | str) -> UserError:
    reason = " ".join(str(err).split())[:300]
    return UserError(f"{source}: the weights do not fit the architecture: {reason}")


def _check_arguments(kwargs: dict[str, Any]) -> None:
    """
    Raises:
        ValueError: an argument of a network or encoder is of the wrong type or beyond all measure.
    """
    for name, value in kwargs.items():
        numbers = value if isinstance(value, list) else [value]
        if len(numbers) > MAX_LIST:
            raise ValueError(f"{name} has {len(numbers)} values")
        for number in numbers:
            if name in MAX_ARGUMENTS:
                fine = type(number) is int and 0 <= number <= MAX_ARGUMENTS[name]
            else:
                fine = type(number) in (int, float) and math.isfinite(number)
            if not (fine or (number is None and name in MAY_BE_NONE) or (type(number) is str and name in TEXTS)):
                raise ValueError(f"{name}={str(value)[:100]}")
