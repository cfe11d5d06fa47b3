"""Classifiers of noisy images, which guide denoisers that know no classes: what they can be, and their presets."""

from dataclasses import dataclass
from typing import ClassVar

from dnnlib.errors import UserError
from training.config.data import HUGE, MAX_CHANNELS, TINY, pixel_range_of
from training.config.ema import EMAConfig
from training.config.fields import FROM_PRESET, Config, option
from training.config.score_sde import ScoreOptimizer
from training.config.training import DataConfig, Ki, Preset, RunConfig, TrainConfig

CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


@dataclass(frozen=True, kw_only=True)
class ClassifierNetwork(Config):
    """A wide residual network, and the images that it tells apart. The defaults are those of Song et al. 2021."""

    depth: int = option(28, "Layers, 6 n + 4", low=10, high=1000, default_text=FROM_PRESET)
    width: int = option(10, "Multiple of 16, 32 and 64 channels", low=1, high=64, default_text=FROM_PRESET)
    nf: int = option(128, "Fourier frequencies of the noise level", low=1, high=MAX_CHANNELS, default_text=FROM_PRESET)
    fourier_scale: float = option(16.0, "Their standard deviation", above=0, high=HUGE, default_text=FROM_PRESET)
    mean: tuple[float, ...] = option((0.5,), flag=None, low=-1e6, high=1e6, items=(1, MAX_CHANNELS))
    std: tuple[float, ...] = option((0.25,), flag=None, low=TINY, high=1e6, items=(1, MAX_CHANNELS))
    centered: bool = option(
        True, "Images lie in [-1, 1], otherwise in [0, 1]: as with the denoiser to be guided", default_text=FROM_PRESET
    )
    sigma_min: float = option(0.01, "Lowest noise level", low=TINY, high=HUGE, default_text=FROM_PRESET)
    sigma_max: float = option(
        160.0,
        "Highest noise level: no guidance beyond the two. VP and sub-VP reach 152",
        low=TINY,
        high=HUGE,
        default_text=FROM_PRESET,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sigma_min >= self.sigma_max:
            raise UserError(f"--sigma-min={self.sigma_min:g} must be below --sigma-max={self.sigma_max:g}")

    @property
    def pixel_range(self) -> tuple[float, float]:
        """What black and white are to the network."""
        return pixel_range_of(self.centered)


@dataclass(frozen=True, kw_only=True)
class ClassifierObjective(Config):
    """Cross-entropy at noise levels whose logarithm is uniform: nothing to choose."""


@dataclass(frozen=True, kw_only=True)
class ClassifierTraining(TrainConfig):
    """A training run of a classifier of noisy images."""

    family: ClassVar[str] = "classifier"
    network: ClassifierNetwork = ClassifierNetwork()
    objective: ClassifierObjective = ClassifierObjective()
    optimizer: ScoreOptimizer = ScoreOptimizer()
    ema: EMAConfig = EMAConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data.cond:
            raise UserError("--cond=0: a classifier learns classes; leave it out")
        if self.run.metrics or self.run.preview != 0:
            given = "--metrics" if self.run.metrics else "--preview"
            raise UserError(f"{given}: a classifier makes no images; leave it out")


def _preset(
    network: ClassifierNetwork, resolution: int, channels: int, *, batch: int, lr: float, steps: int, ema: float
) -> Preset:
    duration, often = steps * batch, 4 * Ki if steps < 10_000 else 128 * Ki
    config = ClassifierTraining(
        data=DataConfig(cond=True),
        network=network,
        optimizer=ScoreOptimizer(
            lr=lr, warmup=steps // 20 * batch, decay_from=steps * 65 // 100 * batch, decay_to=duration
        ),
        ema=EMAConfig(ema_rate=ema),
        run=RunConfig(duration=duration, batch=batch, status=often, snapshot=0, checkpoint=16 * often, preview=0),
    )
    return Preset(config, resolution, channels, classes=10)


# Where the noise is 20, images of VP and sub-VP show nothing of their class yet: what is beyond needs no guidance.
SMALL = {"depth": 10, "width": 1, "nf": 16, "fourier_scale": 1.0, "sigma_min": 0.02}
CLASSIFIER_PRESETS: dict[str, Preset] = {
    # Song et al. 2021, Appendix I.1; it does not say how long and how fast its classifier was trained.
    "cifar10-classifier-ve": _preset(
        ClassifierNetwork(mean=CIFAR10_MEAN, std=CIFAR10_STD, centered=False, sigma_max=50.0),
        32, 3, batch=128, lr=2e-4, steps=100_000, ema=0.999,
    ),
    "digits-classifier": _preset(
        ClassifierNetwork(**SMALL, sigma_max=20.0), 8, 1, batch=128, lr=2e-3, steps=1200, ema=0.99
    ),
    "digits-classifier-ve": _preset(
        ClassifierNetwork(**SMALL, centered=False, sigma_max=5.0), 8, 1, batch=128, lr=2e-3, steps=1200, ema=0.99
    ),
}  # fmt: skip
