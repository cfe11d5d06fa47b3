"""NVAE: what its network, objective and optimiser can be, and its presets with published results."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from dnnlib.errors import UserError
from training.config.data import TINY
from training.config.ema import MAX_STD, MIN_STD, PowerFunctionConfig, parse_std_list
from training.config.fields import FROM_PRESET, Config, option
from training.config.training import DataConfig, Ki, Preset, RunConfig, TrainConfig

ARCH_INSTANCES = (
    "res_elu",
    "res_bnelu",
    "res_bnswish",
    "mbconv_sep",
    "mbconv_sep11",
    "res53_mbconv",
    "res35_mbconv",
    "res55_mbconv",
    "mbconv_res",
    "mbconv_den",
    "res_mbconv",
)
DECODERS = ("bernoulli", "mixture", "normal")
MAX_CELLS = 1024  # of a network; the largest published one has 200
MAX_WIDTH = 1 << 14  # channels where the resolution is lowest


def groups_per_scale(num_scales: int, num_groups: int, ada_groups: bool, min_groups: int = 1) -> list[int]:
    """Latent groups of each scale, the one of the highest resolution first (Vahdat & Kautz 2020, table 6).

    With `ada_groups`, each scale has half as many as the one before, but at least `min_groups`.
    """
    groups = [num_groups]
    for _ in range(num_scales - 1):
        groups.append(max(min_groups, groups[-1] // 2) if ada_groups else num_groups)
    return groups


def _count(default: int, help: str, flag: str, low: int, high: int) -> Any:
    return option(default, help, flag=flag, low=low, high=high, default_text=FROM_PRESET)


def _choice(default: bool, help: str, flag: str) -> Any:
    return option(default, help, flag=flag, default_text=FROM_PRESET)


@dataclass(frozen=True, kw_only=True)
class NVAENetwork(Config):
    """Arguments of the network beside the shape of the data, under their published names."""

    decoder: str = option(
        "mixture",
        "Distribution of pixels: black and white, a mixture of logistics, or one normal",
        choices=DECODERS,
        default_text=FROM_PRESET,
    )
    levels: int = option(
        256, "Grey levels that pixels are brought to: 32 are 5 bits", low=2, high=256, default_text=FROM_PRESET
    )
    loss_crop: int = option(
        0,
        "Black border that images get, in pixels; the likelihood leaves it out",
        flag="--pad",
        low=0,
        high=256,
        default_text=FROM_PRESET,
    )
    published_decoder: bool = option(False, "Compute likelihoods with the published code's defects")
    arch_instance: str = option(
        "res_mbconv", "Kinds of cells", flag="--arch_instance", choices=ARCH_INSTANCES, default_text=FROM_PRESET
    )
    num_latent_scales: int = _count(1, "Resolutions with latents", "--num_latent_scales", 1, 8)
    num_groups_per_scale: int = _count(
        10, "Latent groups of the highest resolution, or of each", "--num_groups_per_scale", 1, 128
    )
    num_latent_per_group: int = _count(20, "Latent channels of a group", "--num_latent_per_group", 1, 512)
    ada_groups: bool = _choice(False, "Halve the number of groups from scale to scale", "--ada_groups")
    min_groups_per_scale: int = _count(1, "Least number of groups with --ada_groups", "--min_groups_per_scale", 1, 128)
    num_channels_enc: int = _count(
        32, "Channels of the encoder at full resolution; each halving doubles them", "--num_channels_enc", 1, 1024
    )
    num_channels_dec: int = _count(32, "Those of the decoder", "--num_channels_dec", 1, 1024)
    num_preprocess_blocks: int = _count(2, "Halvings before the latents", "--num_preprocess_blocks", 0, 8)
    num_preprocess_cells: int = _count(3, "Cells of each of these blocks", "--num_preprocess_cells", 1, 16)
    num_cell_per_cond_enc: int = _count(1, "Cells of the encoder per group", "--num_cell_per_cond_enc", 1, 16)
    num_postprocess_blocks: int = _count(2, "Doublings after the latents", "--num_postprocess_blocks", 0, 8)
    num_postprocess_cells: int = _count(3, "Cells of each of these blocks", "--num_postprocess_cells", 1, 16)
    num_cell_per_cond_dec: int = _count(1, "Cells of the decoder per group", "--num_cell_per_cond_dec", 1, 16)
    num_mixture_dec: int = _count(10, "Logistics in the mixture of each pixel", "--num_mixture_dec", 1, 128)
    num_nf: int = _count(0, "Flow cells of each posterior", "--num_nf", 0, 16)
    use_se: bool = _choice(False, "Squeeze and excitation", "--use_se")
    res_dist: bool = _choice(False, "Posteriors relative to priors", "--res_dist")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_preprocess_blocks != self.num_postprocess_blocks:
            raise UserError("--num_preprocess_blocks and --num_postprocess_blocks must be equal")
        if self.groups == [1] and self.num_channels_enc != self.num_channels_dec:
            raise UserError("a VAE of one group needs --num_channels_enc equal to --num_channels_dec")
        if self.num_channels_enc << self.halvings > MAX_WIDTH or self.num_channels_dec << self.halvings > MAX_WIDTH:
            raise UserError(f"each of {self.halvings} halvings doubles the channels, to more than {MAX_WIDTH}")
        per_group = self.num_cell_per_cond_enc + self.num_cell_per_cond_dec + self.num_nf
        per_block = self.num_preprocess_cells + self.num_postprocess_cells
        cells = sum(self.groups) * per_group + self.num_preprocess_blocks * per_block
        if cells > MAX_CELLS:
            raise UserError(f"{sum(self.groups)} groups and their blocks have {cells} cells, more than {MAX_CELLS}")

    @property
    def groups(self) -> list[int]:
        """Latent groups of each scale, the highest resolution first."""
        return groups_per_scale(
            self.num_latent_scales, self.num_groups_per_scale, self.ada_groups, self.min_groups_per_scale
        )

    @property
    def halvings(self) -> int:
        """How often the resolution is halved on the way to the top group."""
        return self.num_preprocess_blocks + self.num_latent_scales - 1

    def check_images(self, resolution: int, channels: int) -> None:
        """Check that the network can take images of a size.

        Raises:
            UserError: it cannot.
        """
        padded = resolution + 2 * self.loss_crop
        if padded % (1 << self.halvings):
            border = f" with a border of {self.loss_crop}" if self.loss_crop else ""
            raise UserError(
                f"resolution {resolution}{border} cannot be halved {self.halvings} times, which "
                f"--num_preprocess_blocks={self.num_preprocess_blocks} and --num_latent_scales="
                f"{self.num_latent_scales} ask for: use fewer, or a border (--pad)"
            )
        if self.decoder == "bernoulli" and channels != 1:
            raise UserError(f"--decoder=bernoulli is for images of one channel, not {channels}: use mixture")
        if self.decoder == "mixture" and channels not in (1, 3):
            raise UserError(f"--decoder=mixture is for images of one or three channels, not {channels}: use normal")


@dataclass(frozen=True, kw_only=True)
class NVAEObjective(Config):
    """The weight of the KL term over the training, and that of the regularisers."""

    kl_anneal_portion: float = option(
        0.3, "Share of the training in which the KL term grows to its full weight", flag="--kl_anneal_portion",
        above=0, high=1,
    )  # fmt: skip
    kl_const_portion: float = option(
        1e-4, "Share of the training before that", flag="--kl_const_portion", low=0, high=1
    )
    kl_const_coeff: float = option(1e-4, "Least weight of the KL term", flag="--kl_const_coeff", low=0, high=1)
    weight_decay_norm: float = option(
        0.0, "Weight of spectral norms and batch norm scales", flag="--weight_decay_norm", low=0,
        default_text=FROM_PRESET,
    )  # fmt: skip
    weight_decay_norm_init: float = option(
        10.0, "Where that weight begins, if it is annealed", flag="--weight_decay_norm_init", above=0,
        default_text=FROM_PRESET,
    )  # fmt: skip
    weight_decay_norm_anneal: bool = option(
        False, "Anneal it as the KL term grows", flag="--weight_decay_norm_anneal", default_text=FROM_PRESET
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight_decay_norm_anneal and self.weight_decay_norm == 0:
            raise UserError("--weight_decay_norm_anneal needs --weight_decay_norm above 0, where it ends")


@dataclass(frozen=True, kw_only=True)
class NVAEOptimizer(Config):
    """Adamax, and a learning rate with a linear warm-up and a cosine over the whole training."""

    lr: float = option(0.01, "Learning rate after the warm-up", above=0, default_text=FROM_PRESET)
    learning_rate_min: float = option(1e-4, "Learning rate at the end", flag="--learning_rate_min", low=0)
    warmup_portion: float = option(
        0.0, "Share of the training in which the learning rate rises", flag="--warmup_portion", low=0, below=1,
        default_text=FROM_PRESET,
    )  # fmt: skip
    weight_decay: float = option(3e-4, "Decay of all weights", flag="--weight_decay", low=0)
    betas: tuple[float, ...] = option((0.9, 0.999), flag=None, low=0, below=1, items=(2, 2))
    eps: float = option(1e-3, flag=None, above=TINY)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.learning_rate_min > self.lr:
            raise UserError(f"--learning_rate_min={self.learning_rate_min:g} is above --lr={self.lr:g}")


@dataclass(frozen=True, kw_only=True)
class NVAEData(DataConfig):
    """The images that a run learns from; their labels are not used."""

    cond: bool = option(False, flag=None)


def parse_widths(text: str) -> tuple[float, ...]:
    """As `parse_std_list`; 'none' or '' are no widths."""
    return () if text.strip().lower() in ("", "none") else parse_std_list(text)


@dataclass(frozen=True, kw_only=True)
class NVAEAverages(PowerFunctionConfig):
    """The EMA profiles that a run tracks: none, as published, unless they are asked for."""

    ema_std: tuple[float, ...] = option(
        (),
        "Widths of the tracked EMA profiles; without any, snapshots hold the latest weights",
        parse=parse_widths,
        low=MIN_STD,
        below=MAX_STD,
        items=(0, 64),
        default_text="none",
    )


@dataclass(frozen=True, kw_only=True)
class NVAETraining(TrainConfig):
    """A training run of NVAE. Its schedules stretch over `run.duration`."""

    family: ClassVar[str] = "nvae"
    data: NVAEData = NVAEData()
    network: NVAENetwork = NVAENetwork()
    objective: NVAEObjective = NVAEObjective()
    optimizer: NVAEOptimizer = NVAEOptimizer()
    ema: NVAEAverages = NVAEAverages()

    def __post_init__(self) -> None:
        super().__post_init__()
        if 1 in (self.run.batch, self.run.batch_gpu):
            raise UserError("batch norm needs at least two images at a time: give a larger --batch or --batch-gpu")
        if self.run.checkpoint_activations:
            raise UserError(
                "--checkpoint-activations=1: batch norm would count each image twice: use a smaller --batch-gpu"
            )
        if self.dataset is not None:
            self.network.check_images(self.dataset.resolution, self.dataset.channels)

    def notes(self) -> list[str]:
        preset = TRAINING_PRESETS.get(self.preset)
        if preset is None or self.optimizer.lr != preset.config.optimizer.lr:
            return []
        ratio = self.run.batch / preset.config.run.batch
        if ratio > 0.5:
            return []
        # Malladi et al. 2022 (arXiv 2205.10287): adaptive optimisers keep their noise so.
        return [
            f"--lr={self.optimizer.lr:g} was chosen for batches of {preset.config.run.batch}: with --batch="
            f"{self.run.batch}, the square root rule gives --lr={self.optimizer.lr * math.sqrt(ratio):.1g}"
        ]


# ---------------------------------------------------------------------------------------------------------
# Presets


def _published(
    images: tuple[int, int, int], epochs: tuple[int, int], batch: int, widths: int, groups: dict[str, Any],
    lambdas: tuple[float, float], result: str, *, blocks: int = 1, cells: int = 2, flows: int = 1, lr: float = 0.01,
    **network: Any,
) -> Preset:  # fmt: skip
    """A configuration of the published code's README, for all of its processes together.

    Args:
        images: resolution, channels and number of images.
        epochs: of the training, and of its warm-up.
        lambdas: weight of the regularisers, at first and at last.
        result: what was published.
    """
    resolution, channels, count = images
    config = NVAETraining(
        data=NVAEData(xflip=channels == 3),
        network=NVAENetwork(
            num_channels_enc=widths,
            num_channels_dec=widths,
            num_preprocess_blocks=blocks,
            num_preprocess_cells=cells,
            num_postprocess_blocks=blocks,
            num_postprocess_cells=cells,
            num_cell_per_cond_enc=2,
            num_cell_per_cond_dec=2,
            num_nf=flows,
            use_se=True,
            res_dist=True,
            **groups,
            **network,
        ),
        objective=NVAEObjective(
            weight_decay_norm=lambdas[1],
            weight_decay_norm_init=lambdas[0],
            weight_decay_norm_anneal=lambdas[0] != lambdas[1],
        ),
        optimizer=NVAEOptimizer(lr=lr, warmup_portion=epochs[1] / epochs[0]),
        run=RunConfig(
            duration=epochs[0] * count,
            batch=batch,
            status=_rounded(64 * Ki, batch),
            snapshot=_rounded(1024 * Ki, batch),
            checkpoint=_rounded(1024 * Ki, batch),
        ),
    )
    return Preset(config, resolution=resolution, channels=channels, classes=0, published=result)


def _rounded(interval: int, batch: int) -> int:
    """The next multiple of the batch."""
    return -(-interval // batch) * batch


def _groups(groups: Sequence[int], least: int = 1) -> dict[str, Any]:
    """Options for so many groups of each scale, the highest resolution first."""
    ada = len(groups) > 1
    return dict(
        num_latent_scales=len(groups),
        num_groups_per_scale=groups[0],
        ada_groups=ada,
        min_groups_per_scale=least,
    )


def _small(duration: int, interval: int, **network: Any) -> NVAETraining:
    """A network of 16 channels at two scales for a processor, with what worked best on the digits."""
    options: dict[str, Any] = dict(
        num_latent_scales=2,
        num_groups_per_scale=2,
        ada_groups=True,
        num_latent_per_group=8,
        num_channels_enc=16,
        num_channels_dec=16,
        num_preprocess_blocks=1,
        num_preprocess_cells=1,
        num_postprocess_blocks=1,
        num_postprocess_cells=1,
        num_mixture_dec=5,
        use_se=True,
        res_dist=True,
    )
    return NVAETraining(
        network=NVAENetwork(**{**options, **network}),
        objective=NVAEObjective(weight_decay_norm=0.01),
        optimizer=NVAEOptimizer(lr=0.01, warmup_portion=0.05),
        run=RunConfig(duration=duration, batch=64, status=4 * Ki, snapshot=interval, checkpoint=interval),
    )


def _digits(duration: int, **network: Any) -> Preset:
    """Handwritten digits, 8x8 grayscale (datasets/digits.zip)."""
    return Preset(_small(duration, duration // 2, levels=17, **network), resolution=8, channels=1, classes=0)


def _own_images() -> Preset:
    """Own images of 32x32 pixels, gray or RGB: 0.57 M parameters, latents of 16x16 and 8x8: an evening on two
    CPU cores."""
    config = _small(256 * Ki, 32 * Ki, num_groups_per_scale=4)
    return Preset(
        config, resolution=32, channels=3, classes=0, speed="34 on 1 CPU core", cost="an evening on 2 CPU cores"
    )


RECALLED = "as the paper's table 1 is remembered"  # the repository prints no table

TRAINING_PRESETS: dict[str, Preset] = {
    "nvae-mnist": _published(
        (28, 1, 60_000), (400, 5), 400, 32, _groups([10, 5]), (0.01, 0.01), "78.01 nats",
        blocks=2, cells=3, flows=0, decoder="bernoulli", loss_crop=2,
    ),
    "nvae-mnist-flow": _published(
        (28, 1, 60_000), (400, 5), 400, 32, _groups([10, 5]), (0.01, 0.01), "78.19 nats",
        blocks=2, cells=3, decoder="bernoulli", loss_crop=2,
    ),
    "nvae-cifar10": _published(
        (32, 3, 50_000), (400, 5), 256, 128, _groups([30]), (0.01, 0.01), "2.91 bits/dim"
    ),
    "nvae-celeba64": _published(
        (64, 3, 162_770), (90, 5), 128, 64, _groups([20, 10, 5]), (0.1, 0.1), f"2.03 bits/dim, {RECALLED}"
    ),
    "nvae-imagenet32": _published(
        (32, 3, 1_281_147), (45, 1), 576, 192, _groups([28]), (1.0, 0.01), f"3.92 bits/dim, {RECALLED}"
    ),
    "nvae-celeba256": _published(
        (256, 3, 27_000), (300, 5), 96, 30, _groups([16, 8, 4, 4, 4], 4), (1.0, 0.01), "0.70 bits/dim (5 bits)",
        flows=2, levels=32,
    ),
    "nvae-ffhq256": _published(
        (256, 3, 63_000), (200, 5), 96, 30, _groups([16, 8, 4, 4, 4], 4), (1.0, 0.1),
        f"0.69 bits/dim (5 bits), {RECALLED}", flows=2, levels=32, lr=0.008,
    ),
    "pixels32-nvae-cpu": _own_images(),
    "digits-nvae": _digits(50 * Ki),
    "digits-nvae-binary": _digits(25 * Ki, decoder="bernoulli", num_channels_enc=8, num_channels_dec=8),
}  # fmt: skip


def presets_table() -> str:
    """All published presets with their results, a line each."""
    return "\n".join(
        f"  {name:16s} {preset.published}" for name, preset in TRAINING_PRESETS.items() if preset.published
    )
