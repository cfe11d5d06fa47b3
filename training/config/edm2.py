"""Named configurations, with what they take and give."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dnnlib.errors import UserError
from training.config.metrics import METRIC_FILES

Mi = 1 << 20
Ki = 1 << 10


def _edm2(
    duration: int, channels: int, lr: float, dropout: float, P_mean: float, P_std: float, decay: float
) -> dict[str, Any]:
    """A configuration of EDM2, Table 6: batch 2048, config G."""
    return dict(
        duration=duration * Mi,
        batch=2048,
        channels=channels,
        lr=lr,
        dropout=dropout,
        P_mean=P_mean,
        P_std=P_std,
        decay=decay,
        channel_mult=(1, 2, 3, 4),
        num_blocks=3,
        attn_resolutions=(16, 8),
        rampup_Mimg=10.0,
        ema_std=(0.050, 0.100),
        status=128 * Ki,
        snapshot=8 * Mi,
        checkpoint=128 * Mi,
    )


def _img512(duration: int, channels: int, lr: float, dropout: float) -> dict[str, Any]:
    """ImageNet 512x512 as 64x64x4 latents."""
    return _edm2(duration, channels, lr, dropout, P_mean=-0.4, P_std=1.0, decay=70000)


def _img64(duration: int, channels: int, lr: float, dropout: float) -> dict[str, Any]:
    """ImageNet 64x64 as pixels."""
    return _edm2(duration, channels, lr, dropout, P_mean=-0.8, P_std=1.6, decay=35000)


def _digits() -> dict[str, Any]:
    """Handwritten digits, 8x8 grayscale (datasets/digits.zip), class-conditional, 0.17 M parameters.

    Takes about a minute on two CPU cores (147 thousand images, 1152 steps). Of 1000 samples (EMA 0.100, 18 steps) about
    98 % have a nearest real image of the requested class, 99 % with autoguidance by the 8-channel network of 16
    thousand images at weight 1.5; their distance to it is 1.06 times that between real images. Longer training lowers
    that ratio below 1: the network begins to memorise.
    """
    return dict(
        duration=144 * Ki,
        batch=128,
        channels=16,
        lr=0.04,
        dropout=0.0,
        P_mean=-0.4,
        P_std=1.0,
        decay=300,
        channel_mult=(1, 2),
        num_blocks=1,
        attn_resolutions=(),
        rampup_Mimg=20 * 128 / 1e6,
        ema_std=(0.050, 0.100),
        status=4 * Ki,
        snapshot=16 * Ki,
        checkpoint=48 * Ki,
    )


TRAINING_PRESETS: dict[str, dict[str, Any]] = {
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
    "digits": _digits(),
}


def preset_network(name: str) -> dict[str, Any]:
    """Arguments of the network of a training preset, on the data that it is meant for."""
    preset = TRAINING_PRESETS[name]
    dataset = "digits" if name == "digits" else name.split("-")[1]
    resolution, channels, label_dim = {"img512": (64, 4, 1000), "img64": (64, 3, 1000), "digits": (8, 1, 10)}[dataset]
    return dict(
        img_resolution=resolution,
        img_channels=channels,
        label_dim=label_dim,
        model_channels=preset["channels"],
        channel_mult=list(preset["channel_mult"]),
        num_blocks=preset["num_blocks"],
        attn_resolutions=list(preset["attn_resolutions"]),
    )


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
VAE_FILES = [
    f"hf://stabilityai/sd-vae-ft-mse/{name}" for name in ("config.json", "diffusion_pytorch_model.safetensors")
]


def files_for(name: str) -> list[str]:
    """URLs of all that a generation preset or metric needs.

    Raises:
        UserError: no such preset or metric.
    """
    if name in METRIC_FILES:
        return METRIC_FILES[name]
    preset = GENERATION_PRESETS.get(name)
    if preset is None:
        raise unknown_preset("NAME", name, [*GENERATION_PRESETS, *METRIC_FILES])
    dataset = name.split("-")[1]
    files = [
        preset.net,
        *([preset.gnet] if preset.gnet is not None else []),
        *(VAE_FILES if dataset == "img512" else []),
    ]
    return [*files, f"{PUBLISHED_FILES}/dataset-refs/{dataset}.pkl"]


def unknown_preset(option: str, name: str, known: Iterable[str]) -> UserError:
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f"the nearest are {', '.join(near)}" if near else f"there are {', '.join(known[:5])}, ..."
    return UserError(f"{option}: unknown preset {name!r}; {hint}")
