"""Layers of NVAE: convolutions with weight normalisation, batch norm, squeeze and excitation, skip connections.

Vahdat & Kautz 2020, "NVAE: A Deep Hierarchical Variational Autoencoder" (arXiv 2007.03898), sections 3.1 and 3.2.
Names of parameters and buffers are those of the published checkpoints.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from torch_utils import distributed
from training.networks import nvae_cpu

WEIGHT_EPS = 1e-5  # added to |v| in weight normalisation
BN_MOMENTUM = 0.05


class Conv2d(nn.Conv2d):
    """Convolution whose weight is e^g v / |v|, with one norm per output channel (Salimans & Kingma 2016).

    The padding keeps the size at stride 1. Parameters: `weight` v [out, in / groups, k, k]; `bias` [out], if any;
    `log_weight_norm` g [out, 1, 1, 1], where there is weight normalisation.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
        weight_norm: bool = True,
    ):
        padding = dilation * (kernel // 2)
        super().__init__(in_channels, out_channels, kernel, stride, padding, dilation, groups, bias)
        self.log_weight_norm: nn.Parameter | None = None
        if weight_norm:
            self.log_weight_norm = nn.Parameter(torch.empty(out_channels, 1, 1, 1))
            self.reset_norm(self.weight)
        self.shared_weight: torch.Tensor | None = None  # set inside `effective_weights`

    def reset_parameters(self) -> None:
        """Torch's initial weight and bias; nothing on the meta device, which has no values and would take seconds."""
        if not self.weight.is_meta:
            super().reset_parameters()

    @torch.no_grad()
    def reset_norm(self, v: torch.Tensor) -> None:
        """Norms as those of `v`; nothing on the meta device."""
        if self.log_weight_norm is not None and not v.is_meta:
            self.log_weight_norm.copy_((row_norms(v) + 0.01).log())

    def direction(self) -> torch.Tensor:
        """v [out, in / groups, k, k], of which only the direction counts."""
        return self.weight

    def effective_weight(self) -> torch.Tensor:
        """What multiplies the input, [out, in / groups, k, k]."""
        v = self.direction()
        if self.log_weight_norm is None:
            return v
        return v * (self.log_weight_norm.exp() / (row_norms(v) + WEIGHT_EPS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w = self.effective_weight() if self.shared_weight is None else self.shared_weight
        if nvae_cpu.suits(x, w, self.stride[0], self.dilation[0]):
            return nvae_cpu.depthwise(x, w)
        return self._conv_forward(x, w, self.bias)


def row_norms(v: torch.Tensor) -> torch.Tensor:
    """|v| of each output channel, [out, 1, 1, 1]."""
    return torch.linalg.vector_norm(v, dim=(1, 2, 3), keepdim=True)


class DataInitConv2d(Conv2d):
    """Convolution that chooses its scale and bias in its first forward pass of training.

    With out = conv(x, v / |v|) of the first batch of all processes, they become such that each channel leaves with mean
    0 and standard deviation 1/5. `init_done` (not in published checkpoints) keeps loaded weights as they are.
    """

    init_done: torch.Tensor

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("init_done", torch.tensor(False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and not self.init_done:
            self._initialize(x)
        return super().forward(x)

    @torch.no_grad()
    def _initialize(self, x: torch.Tensor) -> None:
        assert self.log_weight_norm is not None and self.bias is not None
        out = self._conv_forward(x, self.weight / (row_norms(self.weight) + WEIGHT_EPS), None).float()
        count = distributed.all_reduce_sum_(out.new_tensor([out.numel() / out.shape[1]]))
        mean = distributed.all_reduce_sum_(out.sum(dim=(0, 2, 3))) / count
        deviation = out - mean.reshape(-1, 1, 1)
        var = distributed.all_reduce_sum_(deviation.square().sum(dim=(0, 2, 3))) / (count - 1)
        std = 5 * var.sqrt() + WEIGHT_EPS
        self.bias.copy_(-mean / std)
        self.log_weight_norm.copy_(-std.log().reshape(-1, 1, 1, 1))
        self.init_done.fill_(True)
        if self.shared_weight is not None:
            self.shared_weight = self.effective_weight()


# ---------------------------------------------------------------------------------------------------------
# All effective weights at once


def convolutions(net: nn.Module) -> list[Conv2d]:
    """Convolutions of a network in the order in which it registers them."""
    return [m for m in net.modules() if isinstance(m, Conv2d)]


def stacked_weights(convs: Sequence[Conv2d]) -> dict[tuple[int, int], torch.Tensor]:
    """Effective weights as matrices [out, in k k / groups], those of one shape stacked: [n, out, columns].

    The keys are (out, columns). Each stack keeps the order of `convs`.
    """
    stacks = {}
    for shape, group in _by_shape(convs).items():
        v = torch.stack([conv.direction().flatten(1) for conv in group])
        log_norms = [conv.log_weight_norm for conv in group]
        if any(g is not None for g in log_norms):
            none = v.new_zeros(shape[0], 1)
            g = torch.stack([none if g is None else g.flatten(1) for g in log_norms])
            scale = g.exp() / (torch.linalg.vector_norm(v, dim=2, keepdim=True) + WEIGHT_EPS)
            normalized = torch.tensor([g is not None for g in log_norms], device=v.device).reshape(-1, 1, 1)
            v = v * torch.where(normalized, scale, 1)
        stacks[shape] = v
    return stacks


def _by_shape(convs: Sequence[Conv2d]) -> dict[tuple[int, int], list[Conv2d]]:
    groups: dict[tuple[int, int], list[Conv2d]] = {}
    for conv in convs:
        groups.setdefault((conv.out_channels, conv.weight[0].numel()), []).append(conv)
    return groups


@contextmanager
def effective_weights(net: Any) -> Iterator[None]:
    """Inside, each effective weight of an NVAE is computed once instead of in every forward pass.

    `net.weight_stacks()` then gives these. The parameters must not change inside. Where gradients are recorded, any
    number of backward passes may run inside; on leaving, what they found is passed on to the parameters' `.grad`, so
    the gradients are complete only after the block.
    """
    convs = convolutions(net)
    if any(isinstance(conv, DataInitConv2d) and not conv.init_done for conv in convs):
        yield  # the next forward pass changes the parameters
        return
    record = torch.is_grad_enabled() and any(conv.weight.requires_grad for conv in convs)
    stacks = stacked_weights(convs)
    shared = {shape: stack.detach().requires_grad_(record) for shape, stack in stacks.items()}
    for shape, group in _by_shape(convs).items():
        # Their gradients are gathered by one stack, where those of slices would each be as large as the whole.
        for conv, w in zip(group, shared[shape].unbind(), strict=True):
            conv.shared_weight = w.view(conv.weight.shape)
    net.shared_stacks = shared
    try:
        yield
        used = [shape for shape, w in shared.items() if w.grad is not None]
        if used:
            torch.autograd.backward([stacks[shape] for shape in used], [shared[shape].grad for shape in used])
    finally:
        net.shared_stacks = None
        for conv in convs:
            conv.shared_weight = None


# ---------------------------------------------------------------------------------------------------------
# Batch norm


class BatchNorm2d(nn.BatchNorm2d):
    """Batch norm with the statistics of all processes, where there are several.

    The biased variance normalises, the unbiased one enters the running variance.
    """

    def __init__(self, channels: int):
        super().__init__(channels, momentum=BN_MOMENTUM)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and distributed.get_world_size() > 1:
            return self._forward_together(x)
        return super().forward(x)

    def _forward_together(self, x: torch.Tensor) -> torch.Tensor:
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        values = x.float()
        count = distributed.all_reduce_sum_(x.new_tensor([x.numel() / x.shape[1]], dtype=torch.float32))
        mean = _SumOverProcesses.apply(values.sum(dim=(0, 2, 3))) / count
        centered = values - mean.reshape(-1, 1, 1)
        var = _SumOverProcesses.apply(centered.square().sum(dim=(0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, BN_MOMENTUM)
            self.running_var.lerp_(var * (count / (count - 1)), BN_MOMENTUM)
        scale = self.weight * (var + self.eps).rsqrt()
        return (centered * scale.reshape(-1, 1, 1) + self.bias.reshape(-1, 1, 1)).to(x.dtype)


class _SumOverProcesses(torch.autograd.Function):
    """Sum of a tensor over all processes. Each process's result enters its loss, so the gradient is a sum, too."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return distributed.all_reduce_sum_(x.clone())

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return distributed.all_reduce_sum_(grads[0].clone())


class BNSwish(BatchNorm2d):
    """Batch norm, then x sigmoid(x)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(super().forward(x))


def batch_norms(net: nn.Module) -> list[BatchNorm2d]:
    """Batch norms of a network in the order in which it registers them."""
    return [m for m in net.modules() if isinstance(m, BatchNorm2d)]


# ---------------------------------------------------------------------------------------------------------
# Other parts of a cell


class SE(nn.Module):
    """Squeeze and excitation (Hu et al. 2018): scales each channel by a function of all channels' means."""

    def __init__(self, channels: int):
        super().__init__()
        hidden = max(channels // 16, 4)
        self.se = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels), nn.Sigmoid())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.se(x.mean(dim=(2, 3))).unsqueeze(-1).unsqueeze(-1)


class SkipDown(nn.Module):
    """Skip connection to half the size: swish, then each quarter of the output channels sees another pixel of 2x2."""

    OFFSETS = ((0, 0), (1, 1), (0, 1), (1, 0))  # (row, column)

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        quarter = out_channels // 4
        self.conv_1 = Conv2d(in_channels, quarter, 1)
        self.conv_2 = Conv2d(in_channels, quarter, 1)
        self.conv_3 = Conv2d(in_channels, quarter, 1)
        self.conv_4 = Conv2d(in_channels, out_channels - 3 * quarter, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.silu(x)
        convs = (self.conv_1, self.conv_2, self.conv_3, self.conv_4)
        # Not convolutions of stride 2: with the channels last, the weight gradient of a 1x1 one writes past its memory
        # on CPUs from 64x64 on (torch 2.13 with oneDNN 3).
        return torch.cat([conv(x[:, :, i::2, j::2]) for conv, (i, j) in zip(convs, self.OFFSETS, strict=True)], dim=1)


class SkipUp(nn.Sequential):
    """Skip connection to twice the size: bilinear interpolation and a 1x1 convolution.

    They commute, so the convolution comes first, on a quarter of the pixels.
    """

    def __init__(self, in_channels: int, out_channels: int):
        upsample = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        super().__init__(upsample, Conv2d(in_channels, out_channels, 1, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        upsample, conv = self
        return upsample(conv(x))


class EncoderCombiner(nn.Module):
    """Features of the encoder, plus a 1x1 convolution of the decoder's at the same place."""

    def __init__(self, encoder_channels: int, decoder_channels: int):
        super().__init__()
        self.conv = Conv2d(decoder_channels, encoder_channels, 1)

    def forward(self, encoder: torch.Tensor, decoder: torch.Tensor) -> torch.Tensor:
        return encoder + self.conv(decoder)


class DecoderCombiner(nn.Module):
    """1x1 convolution of the decoder's features and a group of latents."""

    def __init__(self, channels: int, latents: int):
        super().__init__()
        self.conv = Conv2d(channels + latents, channels, 1)

    def forward(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return self.conv(torch.cat([x, z], dim=1))
