"""The published score-SDE models under their published names, and models of the digits.

Published results are those of 50,000 images: FID, inception score, and by the probability flow FID and bits per
dimension (Song et al. 2021, Tables 1 to 3).
"""

from typing import Any

from training.config.ema import EMAConfig
from training.config.samplers import GridConfig, PredictorCorrector, SamplerConfig
from training.config.score_sde import ScoreNetwork, ScoreObjective, ScoreOptimizer, ScoreTraining
from training.config.training import Ki, Preset, RunConfig

BATCH = 128
SHORT, LONG = 1_300_000, 2_400_000  # steps, of images up to 64 pixels and above
DEEP = {"num_res_blocks": 8}
# Networks, by what differs from the defaults.
DDPMPP = {"fir": False, "embedding_type": "positional", "scale_by_sigma": False, "centered": True}
VP_NCSNPP = DDPMPP | {"fir": True, "progressive_input": "residual"}
DDPM = {"model": "ddpm", "num_res_blocks": 2, "centered": True, "scale_by_sigma": False}
SKIPS = {"progressive": "output_skip", "progressive_input": "input_skip"}
LARGE = {**SKIPS, "num_scales": 2000, "dropout": 0.0, "num_res_blocks": 2, "ch_mult": (1, 1, 2, 2, 2, 2, 2)}
MEGAPIXEL = {
    **SKIPS, "num_scales": 2000, "dropout": 0.0, "num_res_blocks": 1, "nf": 16, "sigma_max": 1348.0,
    "ch_mult": (1, 2, 4, 8, 16, 32, 32, 32),
}  # fmt: skip
DDPM_256 = DDPM | {"dropout": 0.0, "ch_mult": (1, 1, 2, 2, 4, 4)}


def _preset(
    network: dict[str, Any],
    predictor: str,
    corrector: str = "none",
    *,
    resolution: int = 32,
    snr: float = 0.16,
    n_steps_each: int = 1,
    reduce_mean: bool = False,
    ema: float = 0.999,
    lr: float = 2e-4,
    batch: int = BATCH,
    steps: int = SHORT,
    warmup: int = 5000,
    clip: float = 1.0,
    published: str = "",
) -> Preset:
    """A published configuration. Its figures in steps become figures in images."""
    net = ScoreNetwork(**network)
    config = ScoreTraining(
        network=net,
        objective=ScoreObjective(reduce_mean=reduce_mean),
        optimizer=ScoreOptimizer(lr=lr, warmup=warmup * batch, grad_clip=clip),
        ema=EMAConfig(ema_rate=ema),
        run=RunConfig(
            duration=steps * batch,
            batch=batch,
            status=1000 * batch,
            snapshot=50_000 * batch,
            checkpoint=10_000 * batch,
        ),
    )
    pc = PredictorCorrector(predictor=predictor, corrector=corrector, snr=snr, n_steps_each=n_steps_each)
    sampler = SamplerConfig(solver="pc", grid=GridConfig(num_steps=net.num_scales), pc=pc)
    return Preset(config, resolution, channels=3, classes=0, published=published, sampler=sampler)


def _ve(network: dict[str, Any], **options: Any) -> Preset:
    return _preset({"sde": "ve", **network}, "reverse_diffusion", "langevin", **options)


def _vp(network: dict[str, Any], predictor: str = "euler_maruyama", **options: Any) -> Preset:
    return _preset({"sde": "vp", **network}, predictor, reduce_mean=True, **{"ema": 0.9999, **options})


def _subvp(network: dict[str, Any], **options: Any) -> Preset:
    return _vp({**network, "sde": "subvp"}, **options)


def _large(sigma_max: float) -> Preset:
    """256 pixels, by VE."""
    network = LARGE | {"sigma_max": sigma_max}
    return _ve(network, resolution=256, snr=0.075, batch=64, steps=LONG)


def _megapixel(reduce_mean: bool) -> Preset:
    """1024 pixels, by VE."""
    return _ve(MEGAPIXEL, resolution=1024, snr=0.15, batch=8, steps=LONG, ema=0.9999, reduce_mean=reduce_mean)


def _ddpm_256() -> Preset:
    network = DDPM_256 | {"continuous": False}
    return _vp(network, "ancestral_sampling", resolution=256, lr=2e-5, batch=64, steps=LONG)


def _refine(model: str, sigma_max: float, levels: int, corrector_steps: int, snr: float, **options: Any) -> Preset:
    """NCSN and NCSNv2, by annealed Langevin dynamics alone."""
    plan = {"plan": 128} if options.get("resolution") == 128 else {}
    network = {
        "model": model, "nonlinearity": "elu", "continuous": False, "sigma_max": sigma_max, "num_scales": levels, **plan
    }  # fmt: skip
    return _preset(network, "none", "ald", snr=snr, n_steps_each=corrector_steps, **options)


def _ncsn(sigma_max: float, levels: int, corrector_steps: int, snr: float, ema: float, **options: Any) -> Preset:
    plain = {"lr": 1e-3, "warmup": 0, "clip": 0.0, "ema": ema}
    return _refine("ncsn", sigma_max, levels, corrector_steps, snr, **plain, **options)


def _digits(network: dict[str, Any], reduce_mean: bool) -> Preset:
    """Handwritten digits, 8x8 grayscale (datasets/digits.zip), 0.18 M parameters."""
    small = {"nf": 16, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (), "dropout": 0.0}
    batch, duration = 64, 112 * Ki
    config = ScoreTraining(
        network=ScoreNetwork(**small, **network),
        objective=ScoreObjective(reduce_mean=reduce_mean),
        optimizer=ScoreOptimizer(lr=2e-3, warmup=50 * batch, decay_from=duration * 65 // 100, decay_to=duration),
        ema=EMAConfig(ema_rate=0.99),
        run=RunConfig(duration=duration, batch=batch, status=4 * Ki, snapshot=16 * Ki, checkpoint=48 * Ki),
    )
    return Preset(config, resolution=8, channels=1, classes=0)


def _own_images() -> Preset:
    """Own images of 32x32 pixels without classes, VP, 1.26 M parameters: an evening on two CPU cores."""
    batch, duration = 64, 512 * Ki
    network = DDPMPP | {"nf": 32, "ch_mult": (1, 2, 2), "num_res_blocks": 1, "attn_resolutions": (8,), "dropout": 0.0}
    config = ScoreTraining(
        network=ScoreNetwork(sde="vp", **network),
        optimizer=ScoreOptimizer(lr=1e-3, warmup=100 * batch, decay_from=duration * 65 // 100, decay_to=duration),
        ema=EMAConfig(ema_rate=0.999),
        run=RunConfig(
            duration=duration, batch=batch, batch_gpu=32, status=4 * Ki, snapshot=64 * Ki, checkpoint=64 * Ki
        ),
    )
    # After short trainings the corrector mends what the probability flow gets wrong.
    sampler = SamplerConfig(solver="pc", grid=GridConfig(num_steps=100))
    return Preset(
        config, resolution=32, channels=3, classes=0, sampler=sampler, speed="40 on 1 CPU core",
        cost="an evening on 2 CPU cores",
    )  # fmt: skip


DISCRETE = {"continuous": False}
DISCRETE_VE = {"continuous": False, "embedding_type": "positional"}
RESIDUAL = {"progressive_input": "residual"}
DEEP_STEPS = 950_000

SCORE_PRESETS: dict[str, Preset] = {
    "ve/cifar10_ncsnpp": _ve(RESIDUAL | DISCRETE_VE, published="FID 2.45, IS 9.73"),
    "ve/cifar10_ncsnpp_continuous": _ve(RESIDUAL, published="FID 2.38, IS 9.83"),
    "ve/cifar10_ncsnpp_deep_continuous": _ve(RESIDUAL | DEEP, steps=DEEP_STEPS, published="FID 2.20, IS 9.89"),
    "ve/cifar10_ddpm": _ve({"model": "ddpm", "num_res_blocks": 2, **DISCRETE}),
    "ve/celeba_ncsnpp": _ve(RESIDUAL | DISCRETE_VE | {"sigma_max": 90.0}, resolution=64, snr=0.17),
    "ve/bedroom_ncsnpp_continuous": _large(378.0),
    "ve/church_ncsnpp_continuous": _large(380.0),
    "ve/ffhq_256_ncsnpp_continuous": _large(348.0),
    "ve/celebahq_256_ncsnpp_continuous": _large(348.0),
    "ve/ffhq_ncsnpp_continuous": _megapixel(reduce_mean=True),
    "ve/celebahq_ncsnpp_continuous": _megapixel(reduce_mean=False),
    "ve/ncsn/cifar10": _ncsn(1.0, 10, 100, 0.316, ema=0.0),
    "ve/ncsn/cifar10_5": _ncsn(1.0, 10, 100, 0.316, ema=0.999),
    "ve/ncsn/cifar10_124": _ncsn(50.0, 232, 5, 0.176, ema=0.0),
    "ve/ncsn/cifar10_1245": _ncsn(50.0, 232, 5, 0.176, ema=0.999),
    "ve/ncsn/celeba": _ncsn(1.0, 10, 100, 0.316, ema=0.0, resolution=64),
    "ve/ncsn/celeba_5": _ncsn(1.0, 10, 100, 0.316, ema=0.999, resolution=64),
    "ve/ncsn/celeba_124": _ncsn(90.0, 500, 5, 0.128, ema=0.0, resolution=64),
    "ve/ncsn/celeba_1245": _ncsn(90.0, 500, 5, 0.128, ema=0.999, resolution=64),
    "ve/ncsnv2/cifar10": _refine("ncsnv2", 50.0, 232, 5, 0.176, lr=1e-4),
    "ve/ncsnv2/celeba": _refine("ncsnv2", 90.0, 500, 5, 0.128, lr=1e-4, resolution=64),
    "ve/ncsnv2/bedroom": _refine("ncsnv2", 190.0, 1086, 3, 0.095, lr=1e-4, resolution=128, steps=LONG, ema=0.9999),
    "vp/cifar10_ddpmpp": _vp(DDPMPP | DISCRETE, "ancestral_sampling", published="FID 2.78, IS 9.64"),
    "vp/cifar10_ddpmpp_continuous": _vp(DDPMPP, published="FID 2.55, IS 9.58; flow: FID 3.93, 3.16 bits/dim"),
    "vp/cifar10_ddpmpp_deep_continuous": _vp(
        DDPMPP | DEEP, steps=DEEP_STEPS, published="FID 2.41, IS 9.68; flow: FID 3.08, 3.13 bits/dim"
    ),
    "vp/cifar10_ncsnpp": _vp(VP_NCSNPP | DISCRETE, "reverse_diffusion"),
    "vp/cifar10_ncsnpp_continuous": _vp(VP_NCSNPP),
    "vp/cifar10_ncsnpp_deep_continuous": _vp(VP_NCSNPP | DEEP, steps=DEEP_STEPS),
    "vp/ddpm/cifar10": _vp(DDPM | DISCRETE, "ancestral_sampling", published="FID 3.24; flow: FID 3.37, 3.28 bits/dim"),
    "vp/ddpm/cifar10_continuous": _vp(DDPM, published="flow: FID 3.69, 3.21 bits/dim"),
    "vp/ddpm/cifar10_unconditional": _vp(DDPM | DISCRETE | {"conditional": False}, "ancestral_sampling"),
    "vp/ddpm/bedroom": _ddpm_256(),
    "vp/ddpm/church": _ddpm_256(),
    "vp/ddpm/celebahq": _ddpm_256(),
    "subvp/cifar10_ddpm_continuous": _subvp(DDPM, published="flow: FID 3.56, 3.05 bits/dim"),
    "subvp/cifar10_ddpmpp_continuous": _subvp(DDPMPP, published="FID 2.61, IS 9.56; flow: FID 3.16, 3.02 bits/dim"),
    "subvp/cifar10_ddpmpp_deep_continuous": _subvp(
        DDPMPP | DEEP, steps=DEEP_STEPS, published="FID 2.41, IS 9.57; flow: FID 2.92, 2.99 bits/dim"
    ),
    "subvp/cifar10_ncsnpp_continuous": _subvp(VP_NCSNPP),
    "subvp/cifar10_ncsnpp_deep_continuous": _subvp(VP_NCSNPP | DEEP, steps=DEEP_STEPS),
    "pixels32-vp-cpu": _own_images(),
    "digits-ve": _digits({"sigma_max": 5.0, "fourier_scale": 1.0, "progressive_input": "residual"}, reduce_mean=False),
    "digits-vp": _digits({"sde": "vp", **DDPMPP}, reduce_mean=True),
    "digits-subvp": _digits({"sde": "subvp", **DDPMPP}, reduce_mean=True),
}
