"""Images damaged and restored: measurements with noise, and samples of a denoiser that knows them."""

import math
from collections.abc import Callable

import numpy as np
import torch

from training.conditioning import DataSpec
from training.config.restoration import RestorationConfig
from training.denoiser import Denoiser
from training.editing.images import Editor, Images
from training.editing.masks import known_pixels
from training.restoration.methods import DPS, DiffPIR, PiGDM
from training.restoration.operators import (
    AveragePool,
    Blur,
    Mask,
    Operator,
    box_kernel,
    gaussian_kernel,
    motion_kernel,
)


def operator_for(config: RestorationConfig, mask: torch.Tensor | None, resolution: int) -> Operator:
    """What a task does to images.

    Args:
        mask: 1 where pixels are known, [N or 1, 1, H, W]; None for the other tasks.

    Raises:
        UserError: it does not fit the images.
    """
    if config.task == "super-resolution":
        pool = AveragePool(config.factor)
        pool(torch.zeros(1, 1, resolution, resolution))  # or it says why not
        return pool
    if config.task == "deblur":
        kernels: dict[str, Callable[[], torch.Tensor]] = {
            "gaussian": lambda: gaussian_kernel(config.width),
            "box": lambda: box_kernel(int(config.width)),
            "motion": lambda: motion_kernel(int(config.width), config.blur_angle),
        }
        return Blur(kernels[config.blur](), (resolution, resolution))
    assert mask is not None
    return Mask(mask)


def measure(operator: Operator, x: torch.Tensor, noise: float, indices: list[int], seed: int) -> torch.Tensor:
    """y = A x + noise n of images; n depends on the seed and the index of the image alone."""
    y = operator(x)
    # The last number keeps them apart from the draws that choose which pixels are known.
    draws = np.stack([np.random.default_rng([seed, index, 1]).standard_normal(y.shape[1:]) for index in indices])
    n = torch.from_numpy(draws).to(y.dtype).to(y.device)
    return y + noise * n * operator.observed(y)


def wrapper_for(
    config: RestorationConfig, operator: Operator, y: torch.Tensor, spec: DataSpec
) -> Callable[[Denoiser], Denoiser]:
    """The method as a function of the denoiser that it wraps, for the images whose measurements are y."""
    low, high = spec.pixel_range
    noise = config.noise * (high - low)
    if config.method == "pigdm":
        return lambda D: PiGDM(D, operator, y, noise, config.prior_std * (high - low))
    if config.method == "diffpir":
        return lambda D: DiffPIR(D, operator, y, noise, config.diffpir_weight)
    return lambda D: DPS(D, operator, y, noise, config.dps_step)


def restore_images(
    editor: Editor, images: Images, config: RestorationConfig, fills: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
    """Damaged images, uint8 [N, C, H, W], restored ones, uint8 [N, fills, C, H, W], and how good they are by name:
    `compared` where it is known what the images were, and `residual`.

    Args:
        images: that are damaged first, or, with `config.degraded`, damaged ones.
        fills: of each image.
        seed: of the noise, and of the first fill of the first image of the dataset; each fill has its own.

    Raises:
        UserError: the task does not fit the images.
    """
    spec = editor.net.spec
    low, high = spec.pixel_range
    mask = None
    if config.task == "mask":
        mask = known_pixels(config.masks, images.indices, seed, spec.resolution)
        mask = mask.expand(len(images.indices), -1, -1, -1).to(editor.device)
    operator = operator_for(config, mask, spec.resolution)
    latents = editor.latents(images.pixels)
    if config.degraded:
        y = latents * operator.observed(latents)
    else:
        y = measure(operator, latents, config.noise * (high - low), images.indices, seed)

    def wrapped(part: torch.Tensor) -> Callable[[Denoiser], Denoiser]:
        own = operator if mask is None else Mask(mask[part])
        return wrapper_for(config, own, y[part], spec)

    restored = editor.restore(images, wrapped, fills, seed)
    with torch.no_grad():
        damaged = editor.encoder.decode(operator.picture(y, low))
        far = [residual(operator, editor.latents(fill), y) / (high - low) for fill in restored.unbind(1)]
    results = {} if config.degraded else compared(images.pixels, damaged, restored)
    return damaged, restored, {**results, "residual": math.hypot(*far) / math.sqrt(fills)}


def residual(operator: Operator, x: torch.Tensor, y: torch.Tensor) -> float:
    """Root mean square of y - A x over what is measured: about the standard deviation of the noise, if images fit."""
    observed = operator.observed(y)
    return math.sqrt(float(((y - operator(x)) * observed).square().sum() / observed.sum()))


def compared(pixels: torch.Tensor, damaged: torch.Tensor, restored: torch.Tensor) -> dict[str, float]:
    """How near damaged and restored images, and the means of all restored ones of an image, are to the images: PSNR."""
    fills = restored.flatten(0, 1), pixels.repeat_interleave(restored.shape[1], dim=0)
    pairs = {"known": (damaged, pixels), "restored": fills, "their means": (restored.float().mean(dim=1), pixels)}
    return {f"PSNR of {name}": psnr(a, b) for name, (a, b) in pairs.items()}


def summary(results: dict[str, float], noise: float) -> list[str]:
    """What to say of results of `restore_images`, a line each."""
    found = [f"{name[8:]} {value:.2f}" for name, value in results.items() if name.startswith("PSNR of ")]
    lines = [f"PSNR in dB: {', '.join(found)}"] if found else []
    text = f"Residual: restored images, damaged likewise, differ from what is known by {results['residual']:.3g}"
    return [*lines, f"{text} of the range of pixels, beside --noise={noise:g}"]


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Peak signal-to-noise ratio of pixels from 0 to 255, in dB: 10 log10(255^2 / mean squared difference)."""
    mse = float((a.double() - b.double()).square().mean())
    return math.inf if mse == 0 else 10 * math.log10(255**2 / mse)
