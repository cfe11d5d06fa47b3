"""A classifier of noisy images that knows how noisy they are: a wide residual network, for guidance.

Source: Song et al. 2021 (arXiv 2011.13456, Appendix I.1), after Zagoruyko & Komodakis 2016 (arXiv 1605.07146).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dnnlib.errors import UserError
from training.conditioning import DataSpec
from training.config.classifier import CIFAR10_MEAN, CIFAR10_STD, ClassifierNetwork
from training.networks.score_layers import GaussianFourierProjection, GroupNorm, Linear, conv2d, variance_scaling
from training.preconditioning import compute_dtype


class Conv3x3(nn.Module):
    """Convolution of 3x3 pixels without bias."""

    def __init__(self, channels: int, out_channels: int, stride: int = 1):
        super().__init__()
        self.stride = stride
        self.weight = variance_scaling([out_channels, channels, 3, 3], channels * 9, out_channels * 9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return conv2d(x, self.weight, None, stride=self.stride, padding=1)


class WideBlock(nn.Module):
    """Two normalised convolutions, the embedding between them, beside a shortcut without weights.

    Args:
        channels, out_channels: of input and output; the shortcut has zeros in the further channels.
        emb_channels: of the embedding of the noise level.
        stride: factor by which the resolution falls; the shortcut takes means.
        activate_shortcut: the shortcut begins behind the first normalisation and activation.
    """

    def __init__(
        self, channels: int, out_channels: int, emb_channels: int, stride: int = 1, activate_shortcut: bool = False
    ):
        super().__init__()
        self.stride = stride
        self.activate_shortcut = activate_shortcut
        self.norm1 = GroupNorm(channels, eps=1e-5)
        self.conv1 = Conv3x3(channels, out_channels, stride)
        self.emb = Linear(emb_channels, out_channels)
        self.norm2 = GroupNorm(out_channels, eps=1e-5)
        self.conv2 = Conv3x3(out_channels, out_channels)

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        h = self.norm1(x, F.relu)
        if self.activate_shortcut:
            x = h
        h = self.conv1(h) + self.emb(emb)[:, :, None, None]
        h = self.conv2(self.norm2(h, F.relu))
        if self.stride > 1:
            x = F.avg_pool2d(x, self.stride)
        return h + F.pad(x, [0, 0, 0, 0, 0, h.shape[1] - x.shape[1]])


class NoiseConditionalWRN(nn.Module):
    """log p(class | x, sigma), up to a constant, of noisy images.

    Args:
        img_channels: of the images.
        num_classes: number of classes.
        depth: number of layers, 6 n + 4: three groups of n blocks.
        width: multiple of the channels 16, 32 and 64 of the groups.
        nf: number of Fourier frequencies of ln sigma; the embedding has four times as many channels.
        fourier_scale: their standard deviation.
        mean, std: of each channel of clean images; one number stands for all channels.

    Raises:
        UserError: a depth that is not 6 n + 4, or statistics of another number of channels.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self,
        img_channels: int = 3,
        num_classes: int = 10,
        depth: int = 28,
        width: int = 10,
        nf: int = 128,
        fourier_scale: float = 16,
        mean: Sequence[float] = CIFAR10_MEAN,
        std: Sequence[float] = CIFAR10_STD,
    ):
        super().__init__()
        n, remainder = divmod(depth - 4, 6)
        if remainder or n < 1:
            raise UserError(f"depth must be 6 n + 4 with n of 1 or more, not {depth}")
        if {len(mean), len(std)} - {1, img_channels}:
            raise UserError(f"mean and std must have 1 or {img_channels} values")
        self.num_classes = num_classes
        self.register_buffer("mean", torch.tensor(mean).reshape(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).reshape(1, -1, 1, 1))
        emb_channels = 4 * nf
        self.fourier = GaussianFourierProjection(nf, fourier_scale)
        self.emb_layers = nn.ModuleList([Linear(2 * nf, emb_channels), Linear(emb_channels, emb_channels)])
        self.conv_in = Conv3x3(img_channels, 16)
        self.blocks = nn.ModuleList()
        channels = 16
        for group, stride in enumerate((1, 2, 2)):
            for block in range(n):
                first = block == 0
                out_channels = 16 * width * 2**group
                self.blocks.append(
                    WideBlock(channels, out_channels, emb_channels, stride if first else 1, first and group == 0)
                )
                channels = out_channels
        self.norm_out = GroupNorm(channels, eps=1e-5)
        self.linear_out = Linear(channels, num_classes)

    def forward(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: noisy images y + sigma n, [N, C, H, W].
            sigma: noise levels, [N] or one element.

        Returns:
            Logits, float32 [N, num_classes].
        """
        x = standardised((x - self.mean) / self.std)
        if x.device.type != "mps":
            x = x.contiguous(memory_format=torch.channels_last)
        emb = self.fourier(sigma.flatten().float().log().to(x.device))
        emb = self.emb_layers[1](F.silu(self.emb_layers[0](emb)))
        emb = F.silu(emb).to(x.dtype)  # as all blocks take it
        h = self.conv_in(x)
        for block in self.blocks:
            h = block(h, emb)
        return self.linear_out(self.norm_out(h, F.relu).mean(dim=(2, 3))).float()


def standardised(x: torch.Tensor) -> torch.Tensor:
    """Images less their means, over their standard deviations or 1 / sqrt(size) where those are less."""
    x = x - x.mean(dim=(1, 2, 3), keepdim=True)
    std = x.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
    return x / std.clamp(min=x[0].numel() ** -0.5)


class NoisyClassifier(nn.Module):
    """A classifier of noisy images, and what these look like: logits of log p(class | x, sigma).

    Args:
        data: size and classes of the images.
        precision: what the network computes in, 'fp32', 'bf16' or 'fp16'.
        arguments: fields of `config.classifier.ClassifierNetwork`.

    Raises:
        UserError: data without classes, or arguments that do not go together.
    """

    def __init__(self, data: DataSpec, precision: str = "fp32", **arguments: Any):
        super().__init__()
        config = ClassifierNetwork(**arguments)
        if data.conditioning.kind != "classes":
            raise UserError("a classifier needs images with classes")
        self.spec = dataclasses.replace(data, pixel_range=config.pixel_range)
        self.sigma_min, self.sigma_max = config.sigma_min, config.sigma_max
        self.precision = precision
        self.net = NoiseConditionalWRN(
            data.channels,
            data.conditioning.size,
            config.depth,
            config.width,
            config.nf,
            config.fourier_scale,
            config.mean,
            config.std,
        )
        self.init_kwargs = config.to_json()

    def forward(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: noisy images y + sigma n in the range of `spec`, [N, C, H, W].
            sigma: noise levels, [N] or one element.

        Returns:
            Logits, float32 [N, classes].
        """
        # The network sees pixels in [0, 1], and noise in their units.
        low, high = self.spec.pixel_range
        x = ((x - low) / (high - low)).to(compute_dtype(self.precision, x.device))
        return self.net(x, sigma / (high - low))
