"""EDM2: what its network, loss and optimiser can be, and its presets with published results."""

from dataclasses import dataclass
from typing import ClassVar

from dnnlib.errors import UserError
from training.config.data import HUGE, MAX_CHANNELS, MAX_RESOLUTION, TINY
from training.config.fields import FROM_PRESET, Config, option
from training.config.metrics import METRIC_FILES, METRICS
from training.config.names import unknown_preset
from training.config.training import PIXEL_CHANNELS, Ki, Mi, Preset, RunConfig, TrainConfig, parse_ints


@dataclass(frozen=True, kw_only=True)
class EDM2Network(Config):
    """Arguments of the network beside the shape of the data. The bounds are a few times the largest
    published network: a hostile file could otherwise ask for one that takes hours to build.
    """

    model_channels: int = option(
        192, "Base number of channels", flag="--channels", low=1, high=MAX_CHANNELS, default_text=FROM_PRESET
    )
    channel_mult: tuple[int, ...] = option(
        (1, 2, 3, 4),
        "Channel multiple per level, finest first",
        low=1,
        high=16,
        items=(0, 8),
        parse=parse_ints,
        default_text=FROM_PRESET,
    )
    num_blocks: int = option(3, "Residual blocks per level", low=1, high=16, default_text=FROM_PRESET)
    attn_resolutions: tuple[int, ...] = option(
        (16, 8),
        "Resolutions with self-attention, or 'none'",
        low=0,
        high=MAX_RESOLUTION,
        items=(0, 16),
        parse=parse_ints,
        default_text=FROM_PRESET,
    )
    dropout: float = option(0, "Dropout probability", low=0, below=1, default_text=FROM_PRESET)
    noise_embedding: str = option(
        "fourier",
        "Embedding of the noise level: random Fourier features (published), or sines and cosines of fixed frequencies",
        choices=("fourier", "positional"),
    )
    noise_bandwidth: float = option(
        1.0,
        "Standard deviation of the frequencies of Fourier features; lower = the network changes less from one noise "
        "level to the next",
        above=0,
        high=1e4,
        default_text="1",
    )
    channel_mult_noise: int | None = option(None, flag=None, low=1, high=64)
    channel_mult_emb: int | None = option(None, flag=None, low=1, high=64)
    label_balance: float = option(0.5, flag=None, low=0, high=1)
    concat_balance: float = option(0.5, flag=None, low=0, high=1)
    resample_filter: tuple[float, ...] = option((1, 1), flag=None, low=-1e6, high=1e6, items=(2, 64))
    channels_per_head: int = option(64, flag=None, low=1, high=1 << 14)
    res_balance: float = option(0.3, flag=None, low=0, high=1)
    attn_balance: float = option(0.3, flag=None, low=0, high=1)
    clip_act: float | None = option(256, flag=None, low=TINY, high=HUGE)
    sigma_data: float = option(0.5, flag=None, low=TINY, high=HUGE)
    logvar_channels: int = option(128, flag=None, low=1, high=1 << 14)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.channel_mult:
            raise UserError("--channel-mult needs one positive number per level, such as 1,2,3,4")
        if self.noise_embedding == "positional" and self.noise_bandwidth != EDM2Network.noise_bandwidth:
            raise UserError("--noise-bandwidth has no effect with --noise-embedding=positional: leave it out")
        if len(self.resample_filter) % 2 != 0 or abs(sum(self.resample_filter)) <= 1e-6:
            raise UserError("resample_filter must have an even number of taps and a sum other than 0")


@dataclass(frozen=True, kw_only=True)
class EDM2Objective(Config):
    """The noise levels of training: ln(sigma) ~ N(P_mean, P_std^2) (EDM2, Table 6)."""

    P_mean: float = option(-0.4, "Mean of ln(sigma) in training", flag="--P_mean", default_text=FROM_PRESET)
    P_std: float = option(1.0, "Standard deviation of ln(sigma)", flag="--P_std", above=0, default_text=FROM_PRESET)


@dataclass(frozen=True, kw_only=True)
class EDM2Optimizer(Config):
    """Adam, and the learning rate of EDM2's Eq. 67 with a linear ramp-up."""

    lr: float = option(0.01, "Reference learning rate", above=0, default_text=FROM_PRESET)
    decay: float = option(
        70e3,
        "Batches before the learning rate decays, 0 = never",
        low=0,
        metavar="BATCHES",
        default_text=FROM_PRESET,
    )
    rampup_Mimg: float = option(10.0, flag=None, low=0)
    betas: tuple[float, ...] = option((0.9, 0.99), flag=None, low=0, below=1, items=(2, 2))
    eps: float = option(1e-8, flag=None, above=0)


@dataclass(frozen=True, kw_only=True)
class EDM2Training(TrainConfig):
    """A training run of EDM2."""

    family: ClassVar[str] = "edm2"
    network: EDM2Network = EDM2Network()
    objective: EDM2Objective = EDM2Objective()
    optimizer: EDM2Optimizer = EDM2Optimizer()

    def __post_init__(self) -> None:
        super().__post_init__()
        levels = len(self.network.channel_mult)
        if self.dataset is not None and self.dataset.resolution % 2 ** (levels - 1) != 0:
            raise UserError(
                f"{self.data.data}: resolution {self.dataset.resolution} is not divisible by {2 ** (levels - 1)}, as a "
                f"network of {levels} levels needs: give fewer levels with --channel-mult, or convert the images to "
                f"another resolution"
            )

    def notes(self) -> list[str]:
        assert self.dataset is not None
        levels = [self.dataset.resolution >> level for level in range(len(self.network.channel_mult))]
        wanted = self.network.attn_resolutions
        if not wanted or set(levels) & set(wanted):
            return []
        return [
            f"no level has a resolution of --attn-resolutions={','.join(map(str, wanted))} "
            f"(levels: {', '.join(map(str, levels))}); only the coarsest block has attention"
        ]


# ---------------------------------------------------------------------------------------------------------
# Training


def _published(
    classes: int, image_channels: int, duration: int, channels: int, lr: float, dropout: float,
    P_mean: float, P_std: float, decay: float,
) -> Preset:  # fmt: skip
    """A configuration of EDM2, Table 6: batch 2048, config G, for 64x64 pixels or latents."""
    config = EDM2Training(
        network=EDM2Network(model_channels=channels, dropout=dropout),
        objective=EDM2Objective(P_mean=P_mean, P_std=P_std),
        optimizer=EDM2Optimizer(lr=lr, decay=decay),
        run=RunConfig(duration=duration * Mi, batch=2048),
    )
    return Preset(config, resolution=64, channels=image_channels, classes=classes)


def _img512(duration: int, channels: int, lr: float, dropout: float) -> Preset:
    """ImageNet 512x512 as 64x64x4 latents."""
    return _published(1000, 4, duration, channels, lr, dropout, P_mean=-0.4, P_std=1.0, decay=70000)


def _img64(duration: int, channels: int, lr: float, dropout: float) -> Preset:
    """ImageNet 64x64 as pixels."""
    return _published(1000, 3, duration, channels, lr, dropout, P_mean=-0.8, P_std=1.6, decay=35000)


def _digits() -> Preset:
    """Handwritten digits, 8x8 grayscale (datasets/digits.zip), class-conditional, 0.17 M parameters.

    Takes about a minute on two CPU cores (147 thousand images, 1152 steps). Of 1000 samples (EMA 0.100, 18 steps) about
    98 % have a nearest real image of the requested class, 99 % with autoguidance by the 8-channel network of 16
    thousand images at weight 1.5; their distance to it is 1.06 times that between real images. Longer training lowers
    that ratio below 1: the network begins to memorise.
    """
    config = EDM2Training(
        network=EDM2Network(model_channels=16, channel_mult=(1, 2), num_blocks=1, attn_resolutions=()),
        objective=EDM2Objective(P_mean=-0.4, P_std=1.0),
        optimizer=EDM2Optimizer(lr=0.04, decay=300, rampup_Mimg=20 * 128 / 1e6),
        run=RunConfig(duration=144 * Ki, batch=128, status=4 * Ki, snapshot=16 * Ki, checkpoint=48 * Ki),
    )
    return Preset(config, resolution=8, channels=1, classes=10, speed="2800 on 2 CPU cores")


def _digits_prior() -> Preset:
    """Latents of the digits by an NVAE of the preset digits-nvae (three groups of 8 channels), class-conditional.

    Final latents have a standard deviation of 0.5 as all latents here, which is sigma_data; so this is EDM's
    preconditioning with sigma_data = 1 of the NVAE's own latents, whose standard deviation is 1. Classes are decided by
    few of the latents, at high noise levels, so these are trained more. docs/nvae.md has what it gives.
    """
    config = EDM2Training(
        network=EDM2Network(model_channels=32, channel_mult=(1, 1), num_blocks=1, attn_resolutions=()),
        objective=EDM2Objective(P_mean=0.6, P_std=1.0),
        optimizer=EDM2Optimizer(lr=0.02, decay=300, rampup_Mimg=20 * 128 / 1e6),
        run=RunConfig(duration=128 * Ki, batch=128, status=4 * Ki, snapshot=32 * Ki, checkpoint=32 * Ki),
    )
    return Preset(config, resolution=4, channels=24, classes=10)


def _own(
    resolution: int, channels: int, cost: str, *, width: int, levels: tuple[int, ...], blocks: int, duration: int,
    batch: int, batch_gpu: int, interval: int, attention: tuple[int, ...] = (16, 8), dropout: float = 0.0,
    speed: str = "",
) -> Preset:  # fmt: skip
    """A configuration for images of one's own: pixels, or latents where there are four channels, of any classes.

    Noise levels are those of the published models, and so is the learning rate: it falls with the square root of the
    width. The rate rises over the first hundredth of the training, and falls from a fifth of it on.

    Args:
        cost: of the whole training.
        interval: images between snapshots, and between training states.
    """
    pixels = channels in PIXEL_CHANNELS
    config = EDM2Training(
        network=EDM2Network(
            model_channels=width, channel_mult=levels, num_blocks=blocks, attn_resolutions=attention, dropout=dropout
        ),
        objective=EDM2Objective(P_mean=-0.8 if pixels else -0.4, P_std=1.6 if pixels else 1.0),
        optimizer=EDM2Optimizer(
            lr=round(0.012 * (128 / width) ** 0.5, 4), decay=duration // batch // 5, rampup_Mimg=duration / 100 / 1e6
        ),
        run=RunConfig(
            duration=duration,
            batch=batch,
            batch_gpu=batch_gpu,
            status=interval // 16,
            snapshot=interval,
            checkpoint=interval,
        ),
    )
    return Preset(config, resolution=resolution, channels=channels, classes=0, speed=speed, cost=cost)


def _on_cpu(resolution: int, channels: int, speed: str) -> Preset:
    """An evening on two CPU cores: 1.2 million parameters, half a million images, 8192 steps.

    The speed is that of one thread, by its CPU time: two to four hours if two cores are 1.7 times as fast. Not run to
    its end; docs/own-images.md shows what a smaller network gives after a sixteenth of it.
    """
    small = resolution < 64
    return _own(
        resolution, channels, "an evening on 2 CPU cores", width=32 if small else 16,
        levels=(1, 2, 2) if small else (1, 2, 4, 4), blocks=1, attention=(8,), duration=512 * Ki, batch=64,
        batch_gpu=32, interval=64 * Ki, speed=speed,
    )  # fmt: skip


def _on_gpu(resolution: int, channels: int) -> Preset:
    """A day on one GPU: 37 million parameters at 32x32, 31 million at 64x64. Not run.

    Planned for 5e13 multiplications and additions per second in float16, of which an image takes six times the
    multiply-adds that `count_flops.py` counts. With dropout, since own images are fewer than ImageNet's.
    """
    small = resolution < 64
    return _own(
        resolution, channels, "a day on one GPU; not run", width=128 if small else 64,
        levels=(1, 2, 2) if small else (1, 2, 3, 4), blocks=3, duration=(64 if small else 48) * Mi, batch=512,
        batch_gpu=128 if small else 64, interval=2 * Mi, dropout=0.1,
    )  # fmt: skip


def _on_gpus(resolution: int, channels: int) -> Preset:
    """A day on eight GPUs: 132 million parameters at 32x32, and at 64x64 the 124 million of EDM2-XS. Not run.

    Planned as `_on_gpu`, eight times as fast. EDM2-XS itself saw 1.1 (pixels) and 2.1 billion images.
    """
    small = resolution < 64
    return _own(
        resolution, channels, "a day on 8 GPUs; not run", width=192 if small else 128,
        levels=(1, 2, 3) if small else (1, 2, 3, 4), blocks=3, duration=(256 if small else 128) * Mi, batch=1024,
        batch_gpu=128 if small else 64, interval=8 * Mi, dropout=0.1,
    )  # fmt: skip


TRAINING_PRESETS: dict[str, Preset] = {
    "edm2-img512-xxs": _img512(duration=2048, channels=64, lr=0.0170, dropout=0.0),
    "edm2-img512-xs": _img512(duration=2048, channels=128, lr=0.0120, dropout=0.0),
    "edm2-img512-s": _img512(duration=2048, channels=192, lr=0.0100, dropout=0.0),
    "edm2-img512-m": _img512(duration=2048, channels=256, lr=0.0090, dropout=0.1),
    "edm2-img512-l": _img512(duration=1792, channels=320, lr=0.0080, dropout=0.1),
    "edm2-img512-xl": _img512(duration=1280, channels=384, lr=0.0070, dropout=0.1),
    "edm2-img512-xxl": _img512(duration=896, channels=448, lr=0.0065, dropout=0.1),
    "edm2-img64-xs": _img64(duration=1024, channels=128, lr=0.0120, dropout=0.0),
    "edm2-img64-s": _img64(duration=1024, channels=192, lr=0.0100, dropout=0.0),
    "edm2-img64-m": _img64(duration=2048, channels=256, lr=0.0090, dropout=0.1),
    "edm2-img64-l": _img64(duration=1024, channels=320, lr=0.0080, dropout=0.1),
    "edm2-img64-xl": _img64(duration=640, channels=384, lr=0.0070, dropout=0.1),
    "pixels32-cpu": _on_cpu(32, 3, "43 on 1 CPU core"),
    "pixels32-gpu": _on_gpu(32, 3),
    "pixels32-8gpus": _on_gpus(32, 3),
    "pixels64-cpu": _on_cpu(64, 3, "25 on 1 CPU core"),
    "pixels64-gpu": _on_gpu(64, 3),
    "pixels64-8gpus": _on_gpus(64, 3),
    "latents32-cpu": _on_cpu(32, 4, "41 on 1 CPU core"),
    "latents32-gpu": _on_gpu(32, 4),
    "latents32-8gpus": _on_gpus(32, 4),
    "latents64-cpu": _on_cpu(64, 4, "24 on 1 CPU core"),
    "latents64-gpu": _on_gpu(64, 4),
    "latents64-8gpus": _on_gpus(64, 4),
    "digits": _digits(),
    "digits-nvae-prior": _digits_prior(),
}


# ---------------------------------------------------------------------------------------------------------
# Generation


PUBLISHED_FILES = "https://nvlabs-fi-cdn.nvidia.com/edm2"


@dataclass(frozen=True)
class GenerationPreset:
    """Published networks, how they are combined, and the published result of 50,000 images.

    Args:
        net, gnet: URLs of main and guiding network.
        guidance: guidance weight.
        metric: 'FID' or 'FD-DINOv2'.
        value: what the metric gave.
    """

    net: str
    metric: str
    value: float
    gnet: str | None = None
    guidance: float = 1.0


def _network(name: str, std: float, kimg: int | None = None) -> str:
    """URL of a post-hoc reconstruction of a published network, by default of its full training."""
    default_kimg = {
        **dict.fromkeys(["img512-xs", "img512-s", "img512-m"], 2147483),
        **{"img512-l": 1879048, "img512-xl": 1342177, "img512-xxl": 939524},
        **{"img64-s": 1073741, "img64-m": 2147483, "img64-l": 1073741, "img64-xl": 671088},
        **dict.fromkeys(["img512-xs-uncond", "img512-s-uncond"], 2147483),
    }
    kimg = default_kimg[name] if kimg is None else kimg
    return f"{PUBLISHED_FILES}/posthoc-reconstructions/edm2-{name}-{kimg:07d}-{std:.3f}.pkl"


def _generation_presets() -> dict[str, GenerationPreset]:
    presets: dict[str, GenerationPreset] = {}

    def add(name: str, value: float, net: str, gnet: str | None = None, guidance: float = 1.0) -> None:
        metric = "FID" if name.endswith("-fid") else "FD-DINOv2"
        presets[f"edm2-{name}"] = GenerationPreset(net, metric, value, gnet, guidance)

    # One network: (EMA width, result) for FID, then for FD-DINOv2; EDM2, Table 2.
    for size, fid, dino in [
        ("xs", (0.135, 3.53), (0.200, 103.39)),
        ("s", (0.130, 2.56), (0.190, 68.64)),
        ("m", (0.100, 2.25), (0.155, 58.44)),
        ("l", (0.085, 2.06), (0.155, 52.25)),
        ("xl", (0.085, 1.96), (0.155, 45.96)),
        ("xxl", (0.070, 1.91), (0.150, 42.84)),
    ]:
        add(f"img512-{size}-fid", fid[1], _network(f"img512-{size}", fid[0]))
        add(f"img512-{size}-dino", dino[1], _network(f"img512-{size}", dino[0]))
    for size, std, value in [("s", 0.075, 1.58), ("m", 0.060, 1.43), ("l", 0.040, 1.33), ("xl", 0.040, 1.33)]:
        add(f"img64-{size}-fid", value, _network(f"img64-{size}", std))

    # Classifier-free guidance by the unconditional XS network of the same EMA width: (width, weight, result).
    for size, fid, dino in [
        ("xs", (0.045, 1.40, 2.91), (0.150, 1.70, 79.94)),
        ("s", (0.025, 1.40, 2.23), (0.085, 1.90, 52.32)),
        ("m", (0.030, 1.20, 2.01), (0.015, 2.00, 41.98)),
        ("l", (0.015, 1.20, 1.88), (0.035, 1.70, 38.20)),
        ("xl", (0.020, 1.20, 1.85), (0.030, 1.70, 35.67)),
        ("xxl", (0.015, 1.20, 1.81), (0.015, 1.70, 33.09)),
    ]:
        for metric, (std, guidance, value) in [("fid", fid), ("dino", dino)]:
            net, gnet = _network(f"img512-{size}", std), _network("img512-xs-uncond", std)
            add(f"img512-{size}-guid-{metric}", value, net, gnet, guidance)

    # Autoguidance by a smaller network after shorter training: (its widths, weight, result); autoguidance, Table 1.
    for name, guide, kimg, fid, dino in [
        ("img512-s", "img512-xs", 134217, (0.070, 0.125, 2.10, 1.34), (0.120, 0.165, 2.45, 36.67)),
        ("img512-xxl", "img512-m", 268435, (0.075, 0.155, 2.05, 1.25), (0.130, 0.205, 2.30, 24.18)),
        ("img512-s-uncond", "img512-xs-uncond", 134217, (0.070, 0.110, 2.85, 3.86), (0.090, 0.125, 2.90, 90.39)),
        ("img64-s", "img64-xs", 134217, (0.045, 0.110, 1.70, 1.01), (0.105, 0.175, 2.20, 31.85)),
    ]:
        for metric, (std, guide_std, guidance, value) in [("fid", fid), ("dino", dino)]:
            net, gnet = _network(name, std), _network(guide, guide_std, kimg)
            add(f"{name}-autog-{metric}", value, net, gnet, guidance)
    return presets


GENERATION_PRESETS = _generation_presets()


def generation_table() -> str:
    """All generation presets with their networks and published results."""
    rows = [("preset", "network", "guiding network", "guidance", "result")]
    for name, preset in GENERATION_PRESETS.items():
        nets = [_short(url) for url in (preset.net, preset.gnet) if url is not None]
        guidance = f"{preset.guidance:.2f}" if preset.gnet is not None else ""
        rows.append((name, nets[0], nets[1] if len(nets) > 1 else "", guidance, f"{preset.metric} {preset.value:.2f}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def _short(url: str) -> str:
    return url.rsplit("/", 1)[-1].removeprefix("edm2-").removesuffix(".pkl")


# Other published files, by what they are needed for: `python snapshot_tool.py prefetch`.
PUBLISHED_VAE, PUBLISHED_CLIP = "stabilityai/sd-vae-ft-mse", "openai/clip-vit-large-patch14"
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "vocab.json", "merges.txt", "special_tokens_map.json")
HUB_FILES = {
    PUBLISHED_VAE: ("config.json", "diffusion_pytorch_model.safetensors"),
    PUBLISHED_CLIP: ("config.json", "model.safetensors", *TOKENIZER_FILES),
}


def files_for(name: str) -> list[str]:
    """URLs of all that a generation preset, a metric or a model of the hub needs.

    Raises:
        UserError: no such preset, metric or model.
    """
    if name in METRICS and METRICS[name].entry in METRIC_FILES:
        return METRIC_FILES[METRICS[name].entry]
    if name in HUB_FILES:
        return [f"hf://{name}/{file}" for file in HUB_FILES[name]]
    preset = GENERATION_PRESETS.get(name)
    if preset is None:
        raise unknown_preset("NAME", name, [*GENERATION_PRESETS, *METRIC_FILES, *HUB_FILES])
    dataset = name.split("-")[1]
    files = [
        preset.net,
        *([preset.gnet] if preset.gnet is not None else []),
        *(files_for(PUBLISHED_VAE) if dataset == "img512" else []),
    ]
    return [*files, f"{PUBLISHED_FILES}/dataset-refs/{dataset}.pkl"]
