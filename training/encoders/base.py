"""What encoders have in common, and those that need no VAE."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

RandnLike = Callable[[torch.Tensor], torch.Tensor]
FINAL_STD = 0.5  # standard deviation that latents are brought to: sigma_data of the published models


class Encoder:
    """Pixels <-> raw latents (as stored in datasets) <-> final latents (float32, what the model sees).

    `vae_name` says which VAE decodes the latents; '' = none does.
    """

    vae_name = ""

    def output_suffix(self, channels: int) -> str:
        """File type of decoded final latents with that many channels: '.png' or '.npy'."""
        return ".png"

    def final_channels(self, stored: int) -> int:
        """Channels of the final latents that raw latents of `stored` channels become."""
        return stored

    def fits(self, channels: int) -> bool:
        """Whether its statistics are those of final latents of so many channels."""
        return True

    def for_pixels(self, low: float, high: float) -> "Encoder":
        """The encoder for networks to which pixels are numbers from `low` to `high`; of latents, it itself."""
        return self

    def prepare(self, device: torch.device) -> None:
        """Download and load what `encode_pixels` and `decode` would otherwise load when first called.

        Raises:
            UserError: something is missing, damaged or not to be downloaded unasked.
            RunError: something could not be downloaded now.
        """

    def encode_pixels(self, x: torch.Tensor, randn_like: RandnLike = torch.randn_like) -> torch.Tensor:
        """uint8 pixels [N, C, H, W] -> raw latents; `randn_like` draws where they are draws themselves."""
        raise NotImplementedError

    def encode_latents(self, x: torch.Tensor, randn_like: RandnLike = torch.randn_like) -> torch.Tensor:
        """Raw latents -> final latents; `randn_like` draws where the raw latents describe a distribution."""
        raise NotImplementedError

    def encode(self, x: torch.Tensor, randn_like: RandnLike = torch.randn_like) -> torch.Tensor:
        """uint8 pixels [N, C, H, W] -> final latents."""
        return self.encode_latents(self.encode_pixels(x, randn_like), randn_like)

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """Final latents -> uint8 pixels (or float32 raw latents where there are no pixels)."""
        raise NotImplementedError

    def describe(self) -> str:
        """The encoder in a few words."""
        return "pixels"

    @property
    def init_kwargs(self) -> dict:
        """Arguments that build an equal encoder, as plain JSON values."""
        return {}

    @property
    def record(self) -> dict:
        """What files hold of the encoder, as plain JSON values."""
        return {"name": type(self).__name__, "kwargs": self.init_kwargs}


class StandardRGBEncoder(Encoder):
    """uint8 pixels of any channel count <-> [low, high]."""

    def __init__(self, low: float = -1.0, high: float = 1.0):
        self.low, self.high = low, high

    @property
    def init_kwargs(self) -> dict:
        return {} if (self.low, self.high) == (-1, 1) else dict(low=self.low, high=self.high)

    def for_pixels(self, low: float, high: float) -> "StandardRGBEncoder":
        return StandardRGBEncoder(low, high)

    def output_suffix(self, channels: int) -> str:
        return ".png" if channels <= 4 else ".npy"  # PNG ends at RGBA

    def encode_pixels(self, x: torch.Tensor, randn_like: RandnLike = torch.randn_like) -> torch.Tensor:
        return x

    def encode_latents(self, x: torch.Tensor, randn_like: RandnLike = torch.randn_like) -> torch.Tensor:
        return x.float() / (255 / (self.high - self.low)) + self.low

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        scale = 255 / (self.high - self.low)
        return (x.float() * scale + (0.5 - self.low * scale)).clip(0, 255).to(torch.uint8)


class RawLatentEncoder(Encoder):
    """Latents of unknown origin, whitened per channel with stored statistics; there are no pixels.

    Args:
        raw_mean, raw_std: statistics of the raw latents, per channel.
    """

    def output_suffix(self, channels: int) -> str:
        return ".npy"

    def __init__(self, raw_mean: Sequence[float], raw_std: Sequence[float]):
        self.raw_mean = list(raw_mean)
        self.raw_std = list(raw_std)

    def fits(self, channels: int) -> bool:
        return len(self.raw_mean) == len(self.raw_std) == channels

    @property
    def init_kwargs(self) -> dict:
        return dict(raw_mean=self.raw_mean, raw_std=self.raw_std)

    def describe(self) -> str:
        return "latents whitened, of no VAE that is known"

    def measured(self, raw_mean: Sequence[float], raw_std: Sequence[float]) -> "RawLatentEncoder":
        """The same with other statistics."""
        return RawLatentEncoder(raw_mean, raw_std)

    def encode_latents(self, x: torch.Tensor, randn_like: RandnLike = torch.randn_like) -> torch.Tensor:
        return whiten(x.float(), self.raw_mean, self.raw_std)

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        return unwhiten(x.float(), self.raw_mean, self.raw_std)


class Moments:
    """Mean and standard deviation per channel of raw latents, gathered one item after the other.

    Sums are float64 and in the order of the items: the same items in the same order give the same bits.

    Args:
        distribution: items are mean and standard deviation of what is drawn from them.
    """

    def __init__(self, distribution: bool):
        self.distribution = distribution
        self.sums: np.ndarray | float = 0.0  # [2, C]: of means and mean squares
        self.count = 0

    def add(self, item: np.ndarray) -> None:
        """Take the raw latents [C, H, W] of one item."""
        x = np.array(item, np.float64, order="C")  # another order would make other sums
        variance = 0.0
        if self.distribution:
            x, std = np.split(x, 2)
            variance = np.square(std).mean(axis=(1, 2))
        self.sums = self.sums + np.stack([x.mean(axis=(1, 2)), np.square(x).mean(axis=(1, 2)) + variance])
        self.count += 1

    def result(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation per channel."""
        mean, mean_square = np.asarray(self.sums) / self.count
        return mean.tolist(), np.sqrt(np.maximum(mean_square - mean**2, 0)).tolist()


def to_pixels(x: torch.Tensor) -> torch.Tensor:
    """Floats around [0, 1], clamped to it, -> uint8 pixels."""
    return (x.clamp(0, 1) * 255).to(torch.uint8)


def whiten(x: torch.Tensor, raw_mean: Sequence[float], raw_std: Sequence[float]) -> torch.Tensor:
    """[N, C, H, W] with the given statistics, per channel or one for all -> mean 0, standard deviation 0.5."""
    return (x - _channels(raw_mean, x)) / _channels(raw_std, x) * FINAL_STD


def unwhiten(x: torch.Tensor, raw_mean: Sequence[float], raw_std: Sequence[float]) -> torch.Tensor:
    """The inverse of `whiten`."""
    return x / FINAL_STD * _channels(raw_std, x) + _channels(raw_mean, x)


def _channels(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).reshape(1, -1, 1, 1)
