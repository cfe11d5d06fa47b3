"""Score-SDE models (Song et al. 2021, arXiv 2011.13456): what networks, losses and optimisers can be."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from dnnlib.errors import UserError
from training.config.data import HUGE, MAX_CHANNELS, MAX_RESOLUTION, TINY, pixel_range_of
from training.config.ema import EMAConfig
from training.config.fields import FROM_PRESET, Config, all_fields, option
from training.config.training import DataConfig, TrainConfig, parse_ints, parse_nimg

MODELS = ("ncsnpp", "ddpm", "ncsn", "ncsnv2")
SDES = ("ve", "vp", "subvp")
# Of the options of networks, those that some kinds of networks do not have.
REFINE_NETS = ("plan", "nf", "nonlinearity", "centered", "sigma_min", "sigma_max", "num_scales")
FIXED_IN_DDPM = (
    "fir", "fir_kernel", "skip_rescale", "resblock_type", "progressive", "progressive_input", "progressive_combine",
    "embedding_type", "fourier_scale",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ScoreNetwork(Config):
    """The network, and the SDE whose score it knows. Bounds are a few times those of the largest published network."""

    sde: str = option("ve", "SDE: variance exploding, variance preserving, or sub-VP", choices=SDES)
    continuous: bool = option(True, "Know the score at all times; otherwise at --num-scales noise levels")
    sigma_min: float = option(0.01, "Lowest noise level of VE", low=TINY, high=HUGE)
    sigma_max: float = option(50.0, "Highest noise level of VE", low=TINY, high=HUGE)
    beta_min: float = option(0.1, "First rate of VP and sub-VP", low=0, high=1e4)
    beta_max: float = option(20.0, "Last rate of VP and sub-VP", low=TINY, high=1e4)
    num_scales: int = option(1000, "Noise levels where they are discrete", low=2, high=1 << 16)
    model: str = option("ncsnpp", "Network: ncsnpp is NCSN++ and DDPM++", choices=MODELS)
    plan: int = option(
        64,
        "Layout of NCSN and NCSNv2, named after a resolution: 64, 128 or 256",
        flag="--refine-plan",
        low=64,
        high=256,
    )
    nf: int = option(128, "Base number of channels", low=1, high=MAX_CHANNELS, default_text=FROM_PRESET)
    ch_mult: tuple[int, ...] = option(
        (1, 2, 2, 2), "Channel multiple per level, finest first", low=1, high=64, items=(1, 10), parse=parse_ints
    )
    num_res_blocks: int = option(4, "Residual blocks per level", low=1, high=32, default_text=FROM_PRESET)
    attn_resolutions: tuple[int, ...] = option(
        (16,), "Resolutions with attention, or 'none'", low=0, high=MAX_RESOLUTION, items=(0, 16), parse=parse_ints
    )
    dropout: float = option(0.1, "Dropout probability", low=0, below=1, default_text=FROM_PRESET)
    resamp_with_conv: bool = option(True, "Convolve where a layer of its own changes the resolution")
    conditional: bool = option(True, "Let the network see the noise level")
    fir: bool = option(True, "Change resolutions by FIR filters", default_text=FROM_PRESET)
    fir_kernel: tuple[float, ...] = option((1, 3, 3, 1), flag=None, low=-1e6, high=1e6, items=(2, 16))
    skip_rescale: bool = option(True, "Divide sums by sqrt(2)")
    resblock_type: str = option("biggan", "Kind of residual blocks", choices=("biggan", "ddpm"))
    progressive: str = option(
        "none",
        "How the image grows on the way up",
        choices=("none", "output_skip", "residual"),
        default_text=FROM_PRESET,
    )
    progressive_input: str = option(
        "none",
        "How it is taken in on the way down",
        choices=("none", "input_skip", "residual"),
        default_text=FROM_PRESET,
    )
    progressive_combine: str = option("sum", "How an input skip is combined", choices=("sum", "cat"))
    embedding_type: str = option(
        "fourier", "Embedding of the noise level", choices=("fourier", "positional"), default_text=FROM_PRESET
    )
    fourier_scale: float = option(16.0, "Standard deviation of the Fourier embedding's frequencies", above=0, high=HUGE)
    init_scale: float = option(0.0, flag=None, low=0, high=1e6)
    nonlinearity: str = option("swish", "Activation", choices=("swish", "elu", "relu", "lrelu"))
    centered: bool = option(False, "Let images lie in [-1, 1]; otherwise in [0, 1]", default_text=FROM_PRESET)
    scale_by_sigma: bool = option(True, "Divide the output by sigma", default_text=FROM_PRESET)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sde == "ve" and self.sigma_min >= self.sigma_max:
            raise UserError(f"--sigma-min={self.sigma_min:g} must be below --sigma-max={self.sigma_max:g}")
        if self.sde != "ve" and self.beta_min > self.beta_max:
            raise UserError(f"--beta-min={self.beta_min:g} must not be above --beta-max={self.beta_max:g}")
        if self.sde == "subvp" and not self.continuous:
            raise UserError("--continuous=0: sub-VP has no noise levels of its own, only continuous times")
        if self.sde == "vp" and not self.continuous and self.beta_max >= self.num_scales:
            raise UserError(
                f"--num-scales={self.num_scales} is too few for --beta-max={self.beta_max:g}: a step's share of noise, "
                f"beta_max / num_scales, must be less than 1"
            )
        if self.model in ("ncsn", "ncsnv2") and (self.sde != "ve" or self.continuous):
            raise UserError(f"--model={self.model} numbers noise levels: it needs --sde=ve --continuous=0")
        if self.sde == "ve" and self.continuous and self.scale_by_sigma and self.embedding == "positional":
            raise UserError("a positional embedding numbers noise levels: with --sde=ve it needs --continuous=0")
        defaults = {field.name: field for field in dataclasses.fields(self)}
        for field in all_fields(type(self)):
            if field.name in self._unused() and getattr(self, field.name) != defaults[field.name].default:
                raise UserError(f"{field.flag} has no effect with --model={self.model}: leave it out")

    @property
    def pixel_range(self) -> tuple[float, float]:
        """What black and white are to the network."""
        return pixel_range_of(self.centered)

    @property
    def embedding(self) -> str:
        return "positional" if self.model == "ddpm" else self.embedding_type

    def _unused(self) -> set[str]:
        """Options that say nothing about this kind of network."""
        of_sde = {"sde", "continuous", "model", "sigma_min", "sigma_max", "beta_min", "beta_max", "num_scales"}
        if self.model in ("ncsn", "ncsnv2"):
            return {field.name for field in all_fields(type(self))} - of_sde - set(REFINE_NETS)
        return {"plan", *(FIXED_IN_DDPM if self.model == "ddpm" else ())}

    @property
    def raw_arguments(self) -> dict[str, Any]:
        """Arguments of the raw network beside the size of its images."""
        kept = {field.name for field in all_fields(type(self))} - self._unused()
        kept -= {"sde", "continuous", "model", "beta_min", "beta_max"}
        return {name: getattr(self, name) for name in sorted(kept)}


@dataclass(frozen=True, kw_only=True)
class ScoreObjective(Config):
    """Denoising score matching (Song et al. 2021, Eq. 7)."""

    reduce_mean: bool = option(
        True, "Take the mean of squares over an image; otherwise half their sum", default_text=FROM_PRESET
    )
    likelihood_weighting: bool = option(False, "Weight times so that the loss bounds the likelihood")
    importance_sampling: bool = option(False, "Draw times in proportion to that weight, in place of multiplying by it")
    dequantize: bool = option(False, "Spread pixels over the width of their level")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.importance_sampling and not self.likelihood_weighting:
            raise UserError("--importance-sampling=1 needs --likelihood-weighting=1")


@dataclass(frozen=True, kw_only=True)
class ScoreOptimizer(Config):
    """Adam with warm-up, a linear fall at the end, and clipping by the global norm."""

    lr: float = option(2e-4, "Learning rate", above=0, default_text=FROM_PRESET)
    beta1: float = option(0.9, "Adam's decay of the mean", low=0, below=1)
    eps: float = option(1e-8, flag=None, above=0)
    weight_decay: float = option(0.0, "Adam's weight decay", low=0)
    warmup: int = option(
        5000 * 128, "Images over which the learning rate rises", low=0, parse=parse_nimg, metavar="NIMG"
    )
    decay_from: int = option(0, "Images at which it begins to fall", low=0, parse=parse_nimg, metavar="NIMG")
    decay_to: int = option(
        0, "Images at which it has fallen to 0, 0 = it stays", low=0, parse=parse_nimg, metavar="NIMG", default_text="0"
    )
    grad_clip: float = option(1.0, "Largest norm of all gradients together, 0 = any", low=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decay_to > 0 and not self.warmup <= self.decay_from < self.decay_to:
            raise UserError(
                f"--warmup={self.warmup}, --decay-from={self.decay_from}, --decay-to={self.decay_to}: must be in order"
            )


@dataclass(frozen=True, kw_only=True)
class ScoreTraining(TrainConfig):
    """A training run of a score-SDE model."""

    family: ClassVar[str] = "score_sde"
    data: DataConfig = DataConfig(cond=False)
    network: ScoreNetwork = ScoreNetwork()
    objective: ScoreObjective = ScoreObjective()
    optimizer: ScoreOptimizer = ScoreOptimizer()
    ema: EMAConfig = EMAConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data.cond:
            raise UserError(
                "--cond=1: networks of score-SDE models know no classes; leave it out, and ask for classes when "
                "sampling (train_classifier.py)"
            )
        if self.objective.likelihood_weighting and not self.network.continuous:
            raise UserError("--likelihood-weighting=1 needs continuous times: give --continuous=1")

    def notes(self) -> list[str]:
        end = self.optimizer.decay_to
        if 0 < end < self.run.duration:
            return [f"the learning rate is 0 from {end} images on: give a later --decay-to for a longer run"]
        return []
