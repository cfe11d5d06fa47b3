"""The networks that snapshots hold, by the name that stands in the files."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from dnnlib.util import UserError
from training.config.edm2 import TRAINING_PRESETS, preset_network, unknown_preset
from training.networks.edm2 import Precond
from training.networks.toy import ToyModel
from training.snapshot.bounds import HUGE, TINY, Check, check_arguments, filter_taps, list_of, number, optional, whole


@dataclass(frozen=True)
class Conditioning:
    """What a network is conditioned on.

    Args:
        kind: 'none', 'classes', 'vector' or 'tokens'.
        size: number of classes, or length of the vector or of each token.
        tokens: number of tokens.
    """

    kind: str = "none"
    size: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class DataSpec:
    """What a network works on: images (or latents) [N, channels, resolution, resolution] and their conditioning."""

    channels: int
    resolution: int
    conditioning: Conditioning


@dataclass(frozen=True)
class Architecture:
    """An entry of `ARCHITECTURES`.

    Args:
        network: the class, whose instances have their arguments as `init_kwargs`.
        arguments: which arguments a file may give, and which values of them are believed.
        fixed: arguments that are not a file's business.
        data: what a network works on; None = no images.
    """

    network: type[nn.Module]
    arguments: Mapping[str, Check]
    fixed: Mapping[str, Any]
    data: Callable[[Any], DataSpec | None]

    def build(self, kwargs: Mapping[str, Any]) -> nn.Module:
        """The network of these arguments.

        Raises:
            ValueError: one is unknown, or its value is not believed.
            Exception: the network cannot be made of them; it can fail in any way.
        """
        check_arguments(kwargs, self.arguments)
        return self.network(**kwargs, **self.fixed)


def _edm2_data(net: Precond) -> DataSpec:
    conditioning = Conditioning("classes", net.label_dim) if net.label_dim > 0 else Conditioning()
    return DataSpec(net.img_channels, net.img_resolution, conditioning)


ARCHITECTURES: dict[str, Architecture] = {
    "edm2.Precond": Architecture(
        network=Precond,
        arguments=dict(
            img_resolution=whole(1, 1 << 14),
            img_channels=whole(1, 1 << 12),
            label_dim=whole(0, 1 << 20),
            sigma_data=number(TINY, HUGE),
            logvar_channels=whole(1, 1 << 14),
            model_channels=whole(1, 1 << 12),
            channel_mult=list_of(whole(1, 16), 1, 8),
            channel_mult_noise=optional(whole(1, 64)),
            channel_mult_emb=optional(whole(1, 64)),
            num_blocks=whole(0, 16),
            attn_resolutions=list_of(whole(0, 1 << 14), 0, 16),
            label_balance=number(0, 1),
            concat_balance=number(0, 1),
            resample_filter=filter_taps,
            channels_per_head=whole(1, 1 << 14),
            dropout=number(0, 0.999),
            res_balance=number(0, 1),
            attn_balance=number(0, 1),
            clip_act=optional(number(TINY, HUGE)),
        ),
        fixed=dict(precision="fp32"),
        data=_edm2_data,
    ),
    "toy.ToyModel": Architecture(
        network=ToyModel,
        arguments=dict(
            in_dim=whole(1, 1 << 12),
            num_layers=whole(0, 64),
            hidden_dim=whole(1, 1 << 14),
            sigma_data=number(TINY, HUGE),
        ),
        fixed={},
        data=lambda _net: None,
    ),
}


def architecture_name(net: nn.Module) -> str:
    """The name in `ARCHITECTURES` of a network's class.

    Raises:
        UserError: there is none.
    """
    for name, architecture in ARCHITECTURES.items():
        if type(net) is architecture.network:
            return name
    raise UserError(
        f"a {type(net).__name__} cannot be saved as a snapshot, only networks of {', '.join(ARCHITECTURES)}"
    )


def preset_architecture(preset: str) -> tuple[str, dict[str, Any]]:
    """The name and the arguments of the network of a training preset, on the data that it is meant for.

    Raises:
        UserError: no such preset.
    """
    if preset not in TRAINING_PRESETS:
        raise unknown_preset("preset", preset, TRAINING_PRESETS)
    return "edm2.Precond", preset_network(preset)
