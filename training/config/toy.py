"""What a user can choose in the toy example."""

import math
from dataclasses import dataclass

from dnnlib.errors import UserError
from training.config.data import HUGE, TINY
from training.config.fields import Config, option
from training.config.metrics import TOY_CLASSES

GUIDANCE, CFG_GUIDANCE = 3.0, 4.0  # weights in the figure, of autoguidance and of classifier-free guidance
MAX_GUIDANCE = 100.0


@dataclass(frozen=True, kw_only=True)
class ToyNetwork(Config):
    """Arguments of `networks.toy.ToyModel`, and how large they may be in a file."""

    in_dim: int = option(2, flag=None, low=1, high=1 << 12)
    num_layers: int = option(4, flag=None, low=0, high=64)
    hidden_dim: int = option(64, flag=None, low=1, high=1 << 14)
    sigma_data: float = option(0.5, flag=None, low=TINY, high=HUGE)


@dataclass(frozen=True)
class ToyConfig:
    """What defines a training run of the toy example.

    Args:
        cls: class to learn: 'A', 'B' or 'AB'.
        num_layers, hidden_dim: of the network: number of hidden layers, and their width.
        iterations: training length.
        batch: points per iteration.
        P_mean, P_std: mean and standard deviation of ln(sigma), which is normally distributed.
        sigma_data: standard deviation of the data.
        lr: learning rate until iteration `lr_iter`, after which it falls with the inverse square root.
        ema_std: relative width of the power-function EMA.
        seed: of the weights and the training data.
    """

    cls: str = "A"
    num_layers: int = ToyNetwork.num_layers
    hidden_dim: int = ToyNetwork.hidden_dim
    iterations: int = 4096
    batch: int = 4096
    P_mean: float = -2.3
    P_std: float = 1.5
    sigma_data: float = ToyNetwork.sigma_data
    lr: float = 1e-2
    lr_iter: int = 512
    ema_std: float = 0.010
    seed: int = 0


def parse_class(text: str) -> str:
    """A class of the toy example.

    Raises:
        UserError: an unknown class.
    """
    if text not in TOY_CLASSES:
        raise UserError(f"unknown class {text!r} (known: {', '.join(TOY_CLASSES)})")
    return text


def parse_weights(text: str) -> list[float]:
    """Guidance weights, from numbers with commas between them.

    Raises:
        UserError: a part is no number, or is out of range.
    """
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        weights = [math.nan]
    if not all(abs(weight) <= MAX_GUIDANCE for weight in weights):
        raise UserError(f"{text!r} is not a list of numbers such as 1.5,2,3 (up to {MAX_GUIDANCE:g})")
    return weights
