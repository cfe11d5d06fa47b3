"""The toy example: what its network can be."""

from dataclasses import dataclass

from training.config.data import HUGE, TINY
from training.config.fields import Config, option


@dataclass(frozen=True, kw_only=True)
class ToyNetwork(Config):
    """Arguments of `networks.toy.ToyModel`, and how large they may be in a file."""

    in_dim: int = option(2, flag=None, low=1, high=1 << 12)
    num_layers: int = option(4, flag=None, low=0, high=64)
    hidden_dim: int = option(64, flag=None, low=1, high=1 << 14)
    sigma_data: float = option(0.5, flag=None, low=TINY, high=HUGE)
