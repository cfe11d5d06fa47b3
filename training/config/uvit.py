"""U-ViT (Bao et al. 2023, arXiv 2209.12152): what networks, losses and optimisers can be."""

from dataclasses import dataclass
from typing import ClassVar

from dnnlib.errors import UserError
from training.config.data import HUGE, MAX_CHANNELS, TINY
from training.config.ema import EMAConfig
from training.config.fields import FROM_PRESET, Config, option
from training.config.training import DataConfig, TrainConfig, parse_nimg

SCHEDULES = ("continuous", "cosine", "discrete")
PREDICTIONS = ("noise", "data", "edm")


@dataclass(frozen=True, kw_only=True)
class UViTNetwork(Config):
    """The network, the noise that it is trained on, and what it predicts. Bounds are a few times those of the largest
    published network.
    """

    patch_size: int = option(
        2, "Height and width of the patches that become tokens", low=1, high=256, default_text=FROM_PRESET
    )
    embed_dim: int = option(512, "Width of a token", low=2, high=MAX_CHANNELS, default_text=FROM_PRESET)
    depth: int = option(
        12, "Transformer blocks; an even number is one more, the middle one", low=1, high=256, default_text=FROM_PRESET
    )
    num_heads: int = option(8, "Attention heads per block", low=1, high=256, default_text=FROM_PRESET)
    mlp_ratio: float = option(4.0, "Width of the hidden layer of each block over that of a token", low=0.01, high=64)
    qkv_bias: bool = option(False, "Give queries, keys and values biases")
    mlp_time_embed: bool = option(False, "Two linear layers after the embedding of the time")
    null_class: bool = option(
        True, "Have one more class, which stands for none: for guidance of a class-conditional network by itself"
    )
    conv: bool = option(True, "A 3x3 convolution on the output", default_text=FROM_PRESET)
    skip: bool = option(True, "The long skip connections")
    skip_norm: bool = option(
        False, "Normalise before long skip connections are merged, which keeps deep networks stable; not in the paper"
    )
    schedule: str = option(
        "continuous",
        "Noise: VP in continuous time, the cosine schedule, or the 1000 steps of Stable Diffusion",
        flag="--noise-schedule",
        choices=SCHEDULES,
        default_text=FROM_PRESET,
    )
    prediction: str = option(
        "noise",
        "What the network predicts: the noise, the clean image, or EDM's mixture of both",
        flag="--predict",
        choices=PREDICTIONS,
        default_text=FROM_PRESET,
    )
    sigma_data: float = option(
        0.5, "Standard deviation of the data, for --predict=edm", low=TINY, high=HUGE, default_text="0.5"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.embed_dim % self.num_heads:
            raise UserError(f"--embed-dim={self.embed_dim} is not a multiple of --num-heads={self.num_heads}")


@dataclass(frozen=True, kw_only=True)
class UViTObjective(Config):
    """The squared error of what is predicted, at random times."""

    cond_dropout: float = option(
        0.1,
        "Probability that an image is learned without its condition, for guidance; networks without conditions, or "
        "without --null-class, take 0",
        low=0,
        high=1,
        default_text=FROM_PRESET,
    )
    noise_levels: str = option(
        "uniform",
        "Distribution of noise levels: uniform in time as published, or ln(sigma) normal as in EDM",
        choices=("uniform", "lognormal"),
        default_text=FROM_PRESET,
    )
    P_mean: float = option(-0.4, "Mean of ln(sigma), for lognormal", flag="--P_mean")
    P_std: float = option(1.0, "Its standard deviation", flag="--P_std", low=0, default_text="1")


@dataclass(frozen=True, kw_only=True)
class UViTOptimizer(Config):
    """AdamW with warm-up and, if wanted, half a cosine down to 0."""

    lr: float = option(2e-4, "Learning rate", above=0, default_text=FROM_PRESET)
    beta1: float = option(0.99, "AdamW's decay of the mean", low=0, below=1, default_text=FROM_PRESET)
    beta2: float = option(0.99, "AdamW's decay of the mean square", low=0, below=1, default_text=FROM_PRESET)
    eps: float = option(1e-8, flag=None, above=0)
    weight_decay: float = option(0.03, "AdamW's weight decay, of all parameters as published", low=0)
    decay_exclude_embeddings: bool = option(False, "Leave positions and classes out of the weight decay")
    warmup: int = option(
        5000 * 1024,
        "Images over which the learning rate rises",
        low=0,
        parse=parse_nimg,
        metavar="NIMG",
        default_text=FROM_PRESET,
    )
    decay_to: int = option(
        0,
        "Images at which it has fallen to 0 along a cosine, 0 = it stays",
        low=0,
        parse=parse_nimg,
        metavar="NIMG",
        default_text=FROM_PRESET,
    )
    grad_clip: float = option(0.0, "Largest norm of all gradients together, 0 = any", low=0, default_text="0")

    def __post_init__(self) -> None:
        super().__post_init__()
        if 0 < self.decay_to <= self.warmup:
            raise UserError(f"--decay-to={self.decay_to} must be after --warmup={self.warmup}")


@dataclass(frozen=True, kw_only=True)
class UViTData(DataConfig):
    """The images that a run learns from, with classes or captions."""

    cond: bool = option(True, "Train a model that follows classes, or captions")
    captions: bool = option(
        False, "Learn captions (dataset_tool.py captions) in place of classes", default_text=FROM_PRESET
    )


@dataclass(frozen=True, kw_only=True)
class UViTTraining(TrainConfig):
    """A training run of a U-ViT."""

    family: ClassVar[str] = "uvit"
    data: UViTData = UViTData()
    network: UViTNetwork = UViTNetwork()
    objective: UViTObjective = UViTObjective()
    optimizer: UViTOptimizer = UViTOptimizer()
    ema: EMAConfig = EMAConfig(ema_rate=0.9999)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data.captions and not self.data.cond:
            raise UserError("--captions=1 contradicts --cond=0: leave out one of them")
        classes = self.data.cond and not self.data.captions
        if classes and self.objective.cond_dropout > 0 and not self.network.null_class:
            raise UserError(
                f"--cond-dropout={self.objective.cond_dropout:g} needs a class that stands for none: "
                f"give --null-class=1, or --cond-dropout=0"
            )

    def notes(self) -> list[str]:
        end = self.optimizer.decay_to
        if 0 < end < self.run.duration:
            return [f"the learning rate is 0 from {end} images on: give a later --decay-to for a longer run"]
        return []
