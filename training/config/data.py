"""What identifies a dataset, and how images can be made square."""

from dataclasses import dataclass

from dnnlib.errors import UserError
from training.config.fields import Config, option

TRANSFORMS = ("center-crop", "center-crop-wide", "center-crop-dhariwal", "center-crop-celeba", "celeba", "shorter-side")
RECORD_NAME = "generation.json"  # says what made the images of a folder
EDIT_NAME = "edit.json"  # says how they were edited
TINY, HUGE = 1e-12, 1e12  # what scales are believed to lie between
MAX_CHANNELS = 1 << 12
MAX_RESOLUTION = 1 << 14
MAX_CLASSES = 1 << 20
MAX_TOKENS = 1 << 12


def pixel_range_of(centered: bool) -> tuple[float, float]:
    """What black and white are to networks whose `centered` says whether images lie in [-1, 1] or in [0, 1]."""
    return (-1.0, 1.0) if centered else (0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class DatasetInfo(Config):
    """Number, size and labels of a dataset's images, and a hash of their content.

    `content_hash` is the SHA-256 of all names, sizes and labels, of the CRC-32 of up to 1024 evenly spaced images, and
    of the record of an encoder; a folder and a ZIP file of the same files agree.
    """

    count: int = option(flag=None, low=1)
    resolution: int = option(flag=None, low=1, high=MAX_RESOLUTION)
    channels: int = option(flag=None, low=1, high=MAX_CHANNELS)
    label_dim: int = option(flag=None, low=0, high=MAX_CLASSES)
    content_hash: str = option(flag=None)


@dataclass(frozen=True, kw_only=True)
class EncoderArguments(Config):
    """Arguments of encoders, and how large they may be in a file."""

    vae_name: str = option("", flag=None)
    vae_sha256: str = option("", flag=None)
    low: float = option(-1.0, flag=None, low=-HUGE, high=HUGE)
    high: float = option(1.0, flag=None, low=-HUGE, high=HUGE)
    raw_mean: tuple[float, ...] = option((), flag=None, low=-HUGE, high=HUGE, items=(0, MAX_CHANNELS))
    raw_std: tuple[float, ...] = option((), flag=None, low=TINY, high=HUGE, items=(0, MAX_CHANNELS))
    scale: float | None = option(None, flag=None, low=TINY, high=HUGE)
    shift: float = option(0.0, flag=None, low=-HUGE, high=HUGE)
    pixel_range: tuple[float, float] = option((0.0, 1.0), flag=None, low=-HUGE, high=HUGE)

    def __post_init__(self) -> None:
        super().__post_init__()
        for low, high in [(self.low, self.high), self.pixel_range]:
            if low >= high:
                raise UserError(f"pixels from {low:g} to {high:g}: white must be above black")
        if len(self.raw_mean) != len(self.raw_std):
            raise UserError(f"raw_mean of {len(self.raw_mean)} channels, but raw_std of {len(self.raw_std)}")
