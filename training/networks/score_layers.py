"""Layers of the score networks of Song et al. 2021 (arXiv 2011.13456, Appendix H): blocks, attention, embeddings.

Attributes have the published names, as the state dicts show them. Weights stay float32 and are cast to the type of the
images; images are [N, C, H, W], fastest with the channels last.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from dnnlib.errors import UserError
from training.networks.dropout import LayerWithDropout
from training.networks.edm2 import MAX_PLAIN_TOKENS
from training.networks.fir import Taps, conv_downsample, conv_upsample, downsample, upsample

# Called as act(x, inplace=False).
ACTIVATIONS: dict[str, Callable[..., torch.Tensor]] = {
    "swish": F.silu,
    "elu": F.elu,
    "relu": F.relu,
    "lrelu": lambda x, inplace=False: F.leaky_relu(x, 0.2, inplace),
}


def activation(name: str) -> Callable[..., torch.Tensor]:
    """The activation of a published name, called as act(x, inplace=False).

    Raises:
        UserError: no such activation.
    """
    if name not in ACTIVATIONS:
        raise UserError(f"nonlinearity must be one of {', '.join(ACTIVATIONS)}, not {name!r}")
    return ACTIVATIONS[name]


def variance_scaling(shape: Sequence[int], fan_in: int, fan_out: int, scale: float = 1.0) -> nn.Parameter:
    """Parameter drawn from U(-b, b) with b = sqrt(3 scale / mean fan), the initialisation of DDPM; scale 0 = nearly 0.

    Those of convolutions have the channels last in memory, as the images do.
    """
    values = torch.empty(*shape)
    if len(shape) == 4:
        values = values.contiguous(memory_format=torch.channels_last)
    if not values.is_meta:  # where drawing would take a second, to import most of torch's compiler
        bound = math.sqrt(3 * max(scale, 1e-10) / ((fan_in + fan_out) / 2))
        values.uniform_(-bound, bound)
    return nn.Parameter(values)


class Linear(nn.Module):
    """y = x W^T + b: [N, in] -> [N, out]."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.weight = variance_scaling([out_channels, in_channels], in_channels, out_channels)
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


def conv2d(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, **options) -> torch.Tensor:
    """F.conv2d with parameters cast to the type of the images; 1x1 as the product of matrices that it is."""
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if weight.shape[2:] == (1, 1) and x.device.type == "cpu":  # where that is quicker
        return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)
    return F.conv2d(x, weight, bias, **options)


class Conv(nn.Module):
    """Convolution of 3x3 or 1x1 pixels with bias, which keeps the resolution."""

    def __init__(self, in_channels: int, out_channels: int, size: int = 3, init_scale: float = 1.0):
        super().__init__()
        area = size**2
        shape = [out_channels, in_channels, size, size]
        self.weight = variance_scaling(shape, in_channels * area, out_channels * area, init_scale)
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return conv2d(x, self.weight, self.bias, padding=self.weight.shape[-1] // 2)


class NIN(nn.Module):
    """Linear map of the channels of each pixel ("network in network"); the weight W is [in, out]."""

    def __init__(self, in_channels: int, out_channels: int, init_scale: float = 0.1):
        super().__init__()
        self.W = variance_scaling([in_channels, out_channels], in_channels, out_channels, init_scale)
        self.b = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.permute(0, 2, 3, 1), self.W.t().to(x.dtype), self.b.to(x.dtype)).permute(0, 3, 1, 2)


class GroupNorm(nn.Module):
    """Group normalisation, followed by an activation if one is given.

    Args:
        groups: at most; channels / 4 where that is less and `narrow_groups` is set.
    """

    def __init__(self, channels: int, groups: int = 32, narrow_groups: bool = True, eps: float = 1e-6):
        super().__init__()
        self.groups = max(min(channels // 4, groups), 1) if narrow_groups else groups
        self.eps = eps
        if channels % self.groups:
            raise UserError(f"{channels} channels cannot be normalised in {self.groups} groups of equal size")
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor, act: Callable[..., torch.Tensor] | None = None) -> torch.Tensor:
        x = F.group_norm(x, self.groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)
        return x if act is None else act(x, inplace=not torch.is_grad_enabled())


# ---------------------------------------------------------------------------------------------------------
# Embeddings of the label


class GaussianFourierProjection(nn.Module):
    """[sin, cos](2 pi W v) of a value v, with random frequencies W that stay as they are: [N] -> [N, 2 nf]."""

    def __init__(self, nf: int, scale: float):
        super().__init__()
        values = torch.empty(nf)
        self.W = nn.Parameter(values if values.is_meta else values.normal_() * scale, requires_grad=False)

    def forward(self, v: torch.Tensor) -> torch.Tensor:
        angles = v[:, None] * self.W.detach() * (2 * math.pi)
        return torch.cat([angles.sin(), angles.cos()], dim=1)


def positional_embedding(labels: torch.Tensor, dim: int) -> torch.Tensor:
    """[sin, cos](label * 10000^(-k / (dim / 2 - 1))) for k < dim / 2: [N] -> float32 [N, dim], 0 at the end if odd."""
    half = dim // 2
    k = torch.arange(half, device=labels.device, dtype=torch.float32)
    angles = labels.float()[:, None] * (k * (-math.log(10000) / (half - 1))).exp()
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), [0, dim % 2])


# ---------------------------------------------------------------------------------------------------------
# Resampling


def double(x: torch.Tensor, fir: Taps) -> torch.Tensor:
    """Images of twice the resolution, by FIR filter or (None) nearest neighbours."""
    return F.interpolate(x, scale_factor=2, mode="nearest") if fir is None else upsample(x, fir)


def halve(x: torch.Tensor, fir: Taps) -> torch.Tensor:
    """Images of half the resolution, by FIR filter or (None) means of 2x2 pixels."""
    return F.avg_pool2d(x, 2) if fir is None else downsample(x, fir)


class _Resample(nn.Module):
    """Change of resolution with a convolution, without, or with one that is fused with a FIR filter.

    Args:
        channels, out_channels: of input and output; the same without convolution.
        with_conv: whether there is a convolution, `Conv2d_0` with FIR and `Conv_0` without.
        fir: taps of the filter, None = nearest neighbours or plain strides.
    """

    def __init__(self, channels: int, out_channels: int, with_conv: bool, fir: Taps):
        super().__init__()
        self.fir = fir
        self.Conv_0 = Conv(channels, out_channels) if with_conv and fir is None else None
        self.Conv2d_0 = Conv(channels, out_channels) if with_conv and fir is not None else None


class Downsample(_Resample):
    """Images of half the resolution."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.Conv_0 is not None:  # one row and one column of zeros, on the right and below
            return conv2d(F.pad(x, [0, 1, 0, 1]), self.Conv_0.weight, self.Conv_0.bias, stride=2)
        if self.Conv2d_0 is not None:
            return conv_downsample(x, self.Conv2d_0.weight, self.fir, self.Conv2d_0.bias)
        return halve(x, self.fir)


class Upsample(_Resample):
    """Images of twice the resolution."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.Conv_0 is not None:
            return self.Conv_0(double(x, None))
        if self.Conv2d_0 is not None:
            return conv_upsample(x, self.Conv2d_0.weight, self.fir, self.Conv2d_0.bias)
        return double(x, self.fir)


# ---------------------------------------------------------------------------------------------------------
# Blocks


def residual_sum(x: torch.Tensor, h: torch.Tensor, rescale: bool) -> torch.Tensor:
    """x + h, over sqrt(2) if `rescale`: the variance of two independent parts stays what it was."""
    return (x + h).mul_(math.sqrt(0.5)) if rescale else x + h


class AttnBlock(nn.Module):
    """Self-attention of one head over all pixels, added to its input.

    Args:
        channels: of the images.
        init_scale: of the last layer.
        skip_rescale: divide the sum by sqrt(2).
        narrow_groups: see `GroupNorm`.
    """

    def __init__(self, channels: int, init_scale: float = 0.0, skip_rescale: bool = False, narrow_groups: bool = True):
        super().__init__()
        self.skip_rescale = skip_rescale
        self.GroupNorm_0 = GroupNorm(channels, narrow_groups=narrow_groups)
        self.NIN_0, self.NIN_1, self.NIN_2 = (NIN(channels, channels) for _ in range(3))
        self.NIN_3 = NIN(channels, channels, init_scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        N, C, H, W = x.shape
        h = self.GroupNorm_0(x).permute(0, 2, 3, 1).reshape(N, H * W, C)
        weight = torch.cat([self.NIN_0.W, self.NIN_1.W, self.NIN_2.W], dim=1).to(x.dtype)
        bias = torch.cat([self.NIN_0.b, self.NIN_1.b, self.NIN_2.b]).to(x.dtype)
        q, k, v = F.linear(h, weight.t(), bias).chunk(3, dim=2)
        if x.device.type == "cpu" and H * W <= MAX_PLAIN_TOKENS:
            h = (q * C**-0.5 @ k.transpose(1, 2)).softmax(dim=2) @ v
        else:
            h = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        h = self.NIN_3(h.reshape(N, H, W, C).permute(0, 3, 1, 2))
        return residual_sum(x, h, self.skip_rescale)


class ResnetBlock(LayerWithDropout):
    """Residual block with the time embedding in its middle, of DDPM and of NCSN++ (there after BigGAN).

    Args:
        channels, out_channels: of input and output.
        act: activation.
        emb_channels: of the time embedding, None = without.
        dropout: probability.
        init_scale: of the last convolution.
        skip_rescale: divide the sum by sqrt(2).
        shortcut: the layer on the other path where channels or resolution change, with its published name:
            'NIN_0' (DDPM), 'Conv_2' (NCSN++); 'Conv_2 3x3' is DDPM's with a convolution.
        up, down: whether the resolution is doubled or halved within the block.
        fir: filter for that, None = nearest neighbours and 2x2 means.
        narrow_groups: see `GroupNorm`.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        act: Callable[..., torch.Tensor] = F.silu,
        emb_channels: int | None = None,
        dropout: float = 0.0,
        init_scale: float = 0.0,
        skip_rescale: bool = False,
        shortcut: str = "Conv_2",
        up: bool = False,
        down: bool = False,
        fir: Taps = None,
        narrow_groups: bool = True,
    ):
        super().__init__()
        self.act = act
        self.dropout = dropout
        self.skip_rescale = skip_rescale
        self.up, self.down, self.fir = up, down, fir
        self.GroupNorm_0 = GroupNorm(channels, narrow_groups=narrow_groups)
        self.Conv_0 = Conv(channels, out_channels)
        self.Dense_0 = None if emb_channels is None else Linear(emb_channels, out_channels)
        self.GroupNorm_1 = GroupNorm(out_channels, narrow_groups=narrow_groups)
        self.Conv_1 = Conv(out_channels, out_channels, init_scale=init_scale)
        changes = channels != out_channels or up or down
        size = 3 if shortcut == "Conv_2 3x3" else 1
        self.NIN_0 = NIN(channels, out_channels) if changes and shortcut == "NIN_0" else None
        self.Conv_2 = Conv(channels, out_channels, size) if changes and shortcut != "NIN_0" else None

    def forward(self, x: torch.Tensor, emb: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            x: images [N, channels, H, W].
            emb: activated time embedding [N or 1, emb_channels] in the type of `x`; None = leave it out.
        """
        h = self.GroupNorm_0(x, self.act)
        if self.up or self.down:
            resample = double if self.up else halve
            h, x = resample(h, self.fir), resample(x, self.fir)
        h = self.Conv_0(h)
        if self.Dense_0 is not None and emb is not None:
            h = h.add_(self.Dense_0(emb)[:, :, None, None])
        h = self.GroupNorm_1(h, self.act)
        h = self.Conv_1(self.drop(h))
        for shortcut in (self.NIN_0, self.Conv_2):
            x = x if shortcut is None else shortcut(x)
        return residual_sum(x, h, self.skip_rescale)
