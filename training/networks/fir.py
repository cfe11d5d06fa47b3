"""Resampling of images with FIR filters, alone or fused with a convolution, as grouped convolutions.

Source: Karras et al. 2020, "Analyzing and Improving the Image Quality of StyleGAN" (arXiv 1912.04958), Section 5.2 and
Appendix B, as used by Song et al. 2021 (arXiv 2011.13456), Appendix H. A filter is a list of taps for one axis,
applied along both and normalised to unit sum; None is the box filter. Images are [N, C, H, W] of any floating-point
type and memory format (channels_last is by far the fastest), with zeros outside of their edges.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

Taps = Sequence[float] | None


def upfirdn(
    x: torch.Tensor, kernel: torch.Tensor, up: int = 1, down: int = 1, pad: tuple[int, int] = (0, 0)
) -> torch.Tensor:
    """Images with up - 1 zeros after each pixel, padded, convolved with a kernel, and every `down`-th pixel kept.

    Args:
        x: [N, C, H, W].
        kernel: [h, w], applied to each channel as a true convolution (it is flipped).
        up, down: factors of the resolution.
        pad: zeros before and after, along both axes; negative = pixels cut off.
    """
    channels = x.shape[1]
    if up == 1:
        if pad[0] != pad[1] or pad[0] < 0:
            x, pad = F.pad(x, [*pad, *pad]), (0, 0)
        return F.conv2d(x, _per_channel(kernel.flip(0, 1), x), stride=down, padding=pad[0], groups=channels)
    # A transposed convolution gives all pixels that the kernel reaches; padding beyond them adds zeros.
    margins = [m for size in reversed(kernel.shape) for m in (pad[0] - size + 1, up + pad[1] - size)]
    crop = max(0, -max(margins))
    x = F.conv_transpose2d(x, _per_channel(kernel, x), stride=up, padding=crop, groups=channels)
    if any(margin != -crop for margin in margins):
        x = F.pad(x, [margin + crop for margin in margins])
    return x[:, :, ::down, ::down] if down > 1 else x


def _per_channel(kernel: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return kernel.to(x.dtype).expand(x.shape[1], 1, -1, -1)


def fir_kernel(taps: Taps, gain: float, device: torch.device) -> torch.Tensor:
    """Outer product of the taps with themselves, of sum `gain`: float32 [n, n]."""
    values = (1.0, 1.0) if taps is None else tuple(taps)
    # Filled in place: copying them to a GPU would make it wait.
    k = torch.cat([torch.full([1], value / sum(values), device=device) for value in values])
    return torch.outer(k, k) * gain


def upsample(x: torch.Tensor, taps: Taps = None, gain: float = 1) -> torch.Tensor:
    """Images of twice the resolution, filtered by `taps`: [N, C, 2H, 2W]."""
    kernel = fir_kernel(taps, 4 * gain, x.device)
    p = len(kernel) - 2
    return upfirdn(x, kernel, up=2, pad=((p + 1) // 2 + 1, p // 2))


def downsample(x: torch.Tensor, taps: Taps = None, gain: float = 1) -> torch.Tensor:
    """Images of half the resolution, filtered by `taps`: [N, C, H/2, W/2]."""
    kernel = fir_kernel(taps, gain, x.device)
    p = len(kernel) - 2
    return upfirdn(x, kernel, down=2, pad=((p + 1) // 2, p // 2))


def conv_downsample(
    x: torch.Tensor, weight: torch.Tensor, taps: Taps = None, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Filtered images, convolved with `weight` [out, C, k, k] at every second pixel: [N, out, H/2, W/2].

    Parameters are cast to the type of the images.
    """
    kernel = fir_kernel(taps, 1, x.device)
    p = len(kernel) - 2 + weight.shape[-1] - 1
    x = upfirdn(x, kernel, pad=((p + 1) // 2, p // 2))
    return F.conv2d(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), stride=2)


def conv_upsample(
    x: torch.Tensor, weight: torch.Tensor, taps: Taps = None, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Images with zeros between their pixels, convolved with `weight` [out, C, k, k], then filtered: [N, out, 2H, 2W].

    Parameters are cast to the type of the images.
    """
    kernel = fir_kernel(taps, 4, x.device)
    p = len(kernel) - 2 - (weight.shape[-1] - 1)
    x = F.conv_transpose2d(x, weight.to(x.dtype).flip(2, 3).transpose(0, 1), stride=2)
    x = upfirdn(x, kernel, pad=((p + 1) // 2 + 1, p // 2 + 1))
    return x if bias is None else x + bias.to(x.dtype)[:, None, None]
