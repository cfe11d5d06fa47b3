"""The published U-ViT models under their published names, and models of the digits.

Published results are FIDs of 50,000 images (MS-COCO: 30,000), with the sampler of the preset and the weight of
guidance that stands beside them, in the convention of `--guidance`: 1 more than the published scale.
"""

import math
from typing import Any

from training.config.dpm_solver import DPMSolver
from training.config.ema import EMAConfig
from training.config.samplers import GridConfig, SamplerConfig
from training.config.training import Ki, Preset, RunConfig
from training.config.uvit import UViTData, UViTNetwork, UViTObjective, UViTOptimizer, UViTTraining

# Networks by their names in the paper.
SMALL = dict(embed_dim=512, depth=12, num_heads=8)
MID = dict(embed_dim=768, depth=16, num_heads=12)
LARGE = dict(embed_dim=1024, depth=20, num_heads=16)
HUGE = dict(embed_dim=1152, depth=28, num_heads=16, conv=False)
CLIP = (77, 768)  # tokens of captions, and their width
WORDS = (8, 32)  # the same of `dataset_tool.py captions --text-encoder=words`
LAST_SIGMA = math.sqrt(math.expm1(0.1e-4 + 9.95e-8))  # of the continuous schedule at t = 1e-4

EULER_MARUYAMA = SamplerConfig(solver="euler-maruyama", grid=GridConfig(num_steps=1000))
DPM_SOLVER = SamplerConfig(
    solver="dpm-single",
    grid=GridConfig(num_steps=50, spacing="log-snr", sigma_min=LAST_SIGMA),
    dpm=DPMSolver(prediction="noise"),
)
DPM_SOLVER_PP = SamplerConfig(solver="dpm-single", grid=GridConfig(num_steps=50, spacing="time"))


def _preset(
    network: dict[str, Any],
    resolution: int,
    channels: int,
    published: str,
    sampler: SamplerConfig,
    *,
    steps: int,
    batch: int,
    classes: int = 0,
    context: tuple[int, int] = (0, 0),
    dropout: float = 0.0,
    lr: float = 2e-4,
    betas: tuple[float, float] = (0.99, 0.99),
    warmup: int = 5000,
    xflip: bool = False,
) -> Preset:
    """A published configuration. Its figures in steps become figures in images."""
    config = UViTTraining(
        data=UViTData(cond=classes > 0 or context[0] > 0, captions=context[0] > 0, xflip=xflip),
        network=UViTNetwork(**network, null_class=dropout > 0),
        objective=UViTObjective(cond_dropout=dropout),
        optimizer=UViTOptimizer(lr=lr, beta1=betas[0], beta2=betas[1], warmup=warmup * batch),
        ema=EMAConfig(ema_rate=0.9999),
        run=RunConfig(
            duration=steps * batch,
            batch=batch,
            checkpoint_activations=batch == 1024,
            status=1000 * batch,
            snapshot=50_000 * batch,
            checkpoint=50_000 * batch,
        ),
    )
    return Preset(config, resolution, channels, classes, published, sampler, context)


def _pixels(network: dict[str, Any], resolution: int, published: str, sampler: SamplerConfig, **options: Any) -> Preset:
    """A model of pixels, with mirrored images."""
    return _preset(network, resolution, 3, published, sampler, **{"xflip": True, "batch": 128, **options})


def _imagenet64(network: dict[str, Any], published: str) -> Preset:
    network = {**network, "patch_size": 4}
    return _pixels(network, 64, published, DPM_SOLVER, classes=1000, lr=3e-4, steps=300_000, batch=1024)


def _latents(network: dict[str, Any], resolution: int, published: str, steps: int) -> Preset:
    """A class-conditional model of ImageNet's latents: the large ones in continuous time, the huge ones in steps."""
    huge = network["depth"] == HUGE["depth"]
    sampler = DPM_SOLVER_PP if huge else DPM_SOLVER
    return _preset(
        {**network, "patch_size": resolution // 16, "schedule": "discrete" if huge else "continuous"},
        resolution,
        4,
        published,
        sampler,
        classes=1000,
        dropout=0.1 if huge else 0.15,
        steps=steps,
        batch=1024,
    )


def _captions(network: dict[str, Any], published: str) -> Preset:
    """A model of latents of MS-COCO's images and captions."""
    return _preset(
        {**network, "schedule": "discrete"},
        32,
        4,
        published,
        DPM_SOLVER_PP,
        context=CLIP,
        dropout=0.1,
        betas=(0.9, 0.9),
        steps=1_000_000,
        batch=256,
    )


def _digits(
    duration: int, resolution: int = 8, channels: int = 1, context: tuple[int, int] = (0, 0), lr: float = 4e-3
) -> Preset:
    """Handwritten digits, 0.27 M parameters and 16 tokens of patches: grayscale of 8x8 (datasets/digits.zip) or latents
    of 4x4; by class, or with captions.
    """
    batch = 32
    text = context[0] > 0
    config = UViTTraining(
        data=UViTData(captions=text),
        network=UViTNetwork(patch_size=resolution // 4, embed_dim=64, depth=4, num_heads=4, prediction="edm"),
        objective=UViTObjective(cond_dropout=0.1, noise_levels="lognormal"),
        optimizer=UViTOptimizer(lr=lr, beta1=0.9, warmup=100 * batch, decay_to=duration),
        ema=EMAConfig(ema_rate=0.99),
        run=RunConfig(duration=duration, batch=batch, status=4 * Ki, snapshot=16 * Ki, checkpoint=48 * Ki),
    )
    return Preset(config, resolution, channels, classes=0 if text else 10, context=context)


def _own_images() -> Preset:
    """Own images of 32x32 pixels, of any classes, 1.5 M parameters and 256 tokens: an evening on two CPU cores.

    Preconditioned and weighted as the digits, which learn faster so than by the published objective, at EDM2's noise
    levels for pixels.
    """
    batch, duration = 32, 384 * Ki
    config = UViTTraining(
        network=UViTNetwork(patch_size=2, embed_dim=128, depth=6, num_heads=4, prediction="edm"),
        objective=UViTObjective(cond_dropout=0.1, noise_levels="lognormal", P_mean=-0.8, P_std=1.6),
        optimizer=UViTOptimizer(lr=1e-3, beta1=0.9, warmup=100 * batch, decay_to=duration),
        ema=EMAConfig(ema_rate=0.999),
        run=RunConfig(duration=duration, batch=batch, status=4 * Ki, snapshot=64 * Ki, checkpoint=64 * Ki),
    )
    return Preset(
        config, resolution=32, channels=3, classes=0, speed="20 on 1 CPU core", cost="an evening on 2 CPU cores"
    )


UVIT_PRESETS: dict[str, Preset] = {
    "cifar10_uvit_small": _pixels(
        SMALL, 32, "FID 3.11", EULER_MARUYAMA, steps=500_000, betas=(0.99, 0.999), warmup=2500
    ),
    "celeba64_uvit_small": _pixels(SMALL | {"patch_size": 4}, 64, "FID 2.87", EULER_MARUYAMA, steps=500_000),
    "imagenet64_uvit_mid": _imagenet64(MID, "FID 5.85"),
    "imagenet64_uvit_large": _imagenet64(LARGE, "FID 4.26"),
    "imagenet256_uvit_large": _latents(LARGE, 32, "FID 3.40 with guidance 1.4", 300_000),
    "imagenet256_uvit_huge": _latents(HUGE, 32, "FID 2.29 with guidance 1.4", 500_000),
    "imagenet512_uvit_large": _latents(LARGE, 64, "FID 4.67 with guidance 1.7", 500_000),
    "imagenet512_uvit_huge": _latents(HUGE, 64, "FID 4.05 with guidance 1.7", 500_000),
    "mscoco_uvit_small": _captions(SMALL, "FID 5.95 with guidance 2"),
    "mscoco_uvit_small_deep": _captions(SMALL | {"depth": 16}, "FID 5.48 with guidance 2"),
    "pixels32-uvit-cpu": _own_images(),
    "digits-uvit": _digits(144 * Ki),
    "digits-uvit-latent": _digits(64 * Ki, resolution=4, channels=4),
    "digits-uvit-text": _digits(144 * Ki, context=WORDS, lr=2e-3),
}
