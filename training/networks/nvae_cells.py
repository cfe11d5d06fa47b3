"""Residual cells of NVAE (Vahdat & Kautz 2020, figure 3), and the architectures that are made of them."""

import re
from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from dnnlib.errors import UserError
from training.networks.nvae_layers import SE, BatchNorm2d, BNSwish, Conv2d, DataInitConv2d, SkipDown, SkipUp

BRANCH_SCALE = 0.1  # of what a cell adds to its skip connection
UP = -1  # stride of a cell that doubles the size


class ResOp(nn.Sequential):
    """Activation, nearest upsampling if `stride` is `UP`, and 3x3 convolution.

    The activation is BN and swish (`res_bnswish`, `res_bnswish5` with dilation 2), BN and ELU (`res_bnelu`) or ELU
    alone (`res_elu`).
    """

    def __init__(self, name: str, in_channels: int, out_channels: int, stride: int):
        if name == "res_elu":
            layers: dict[str, nn.Module] = {"act": nn.ELU()}
        elif name == "res_bnelu":
            layers = {"bn": _BNElu(in_channels)}
        else:
            layers = {"bn_act": BNSwish(in_channels)}
        if stride == UP:
            layers["upsample"] = nn.UpsamplingNearest2d(scale_factor=2)
        conv = DataInitConv2d if name == "res_elu" else Conv2d
        dilation = 2 if name == "res_bnswish5" else 1
        layers["conv_0"] = conv(in_channels, out_channels, 3, stride=max(stride, 1), dilation=dilation)
        super().__init__(OrderedDict(layers))


class _WrappedBatchNorm(nn.Module):
    """Batch norm under the published name."""

    def __init__(self, channels: int):
        super().__init__()
        self.bn = BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(x)


class _BNElu(_WrappedBatchNorm):
    """Batch norm and ELU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.elu(super().forward(x))


class _ConvBNSwish(nn.Module):
    """Plain convolution, batch norm and swish, under the published names."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__()
        conv = Conv2d(in_channels, out_channels, kernel, stride, groups=groups, bias=False, weight_norm=False)
        self.conv = nn.Sequential(conv, BNSwish(out_channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


class MConvOp(nn.Module):
    """Inverted bottleneck (`mconv_eEkKgG`): BN, 1x1 to E times the channels, KxK depthwise, 1x1 back, BN.

    G = 0 makes the middle convolution depthwise; otherwise it has G groups. Nearest upsampling stands in front.
    """

    def __init__(self, name: str, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        match = re.fullmatch(r"mconv_e(\d+)k(\d+)g(\d+)", name)
        assert match, name
        expansion, kernel, groups = map(int, match.groups())
        hidden = expansion * in_channels
        if groups and hidden % groups:
            raise UserError(f"arch_instance: {name} divides {hidden} channels into {groups} groups: change the widths")
        layers = [
            _WrappedBatchNorm(in_channels),
            _ConvBNSwish(in_channels, hidden, 1),
            _ConvBNSwish(hidden, hidden, kernel, max(stride, 1), groups or hidden),
            Conv2d(hidden, out_channels, 1, bias=False, weight_norm=False),
            _WrappedBatchNorm(out_channels),
        ]
        if stride == UP:
            layers.insert(0, nn.UpsamplingNearest2d(scale_factor=2))
        self.conv = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


class Cell(nn.Module):
    """Residual cell: skip(x) + 0.1 SE(ops(x)).

    Args:
        ops: names of its operations; the first one changes size and channels.
        stride: 1; 2 to halve the size; `UP` to double it.
    """

    def __init__(self, ops: tuple[str, ...], in_channels: int, out_channels: int, stride: int, use_se: bool):
        super().__init__()
        self.skip: nn.Module = nn.Identity()
        if stride == 2:
            self.skip = SkipDown(in_channels, out_channels)
        elif stride == UP:
            self.skip = SkipUp(in_channels, out_channels)
        kinds = [ResOp if name.startswith("res_") else MConvOp for name in ops]
        self._ops = nn.ModuleList()
        for i, (kind, name) in enumerate(zip(kinds, ops, strict=True)):
            self._ops.append(kind(name, out_channels if i else in_channels, out_channels, 1 if i else stride))
        self.se = SE(out_channels) if use_se else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = x
        for op in self._ops:
            branch = op(branch)
        return torch.add(self.skip(x), self.se(branch), alpha=BRANCH_SCALE)


# ---------------------------------------------------------------------------------------------------------
# Architectures


@dataclass(frozen=True)
class CellOps:
    """Operations of the cells of the encoder, the decoder, and before and after them."""

    encoder: tuple[str, ...]
    decoder: tuple[str, ...]
    pre: tuple[str, ...]
    post: tuple[str, ...]


def _twice(op: str) -> CellOps:
    return CellOps((op, op), (op, op), (op, op), (op, op))


def _bottleneck(tower: str, process: str) -> CellOps:
    return CellOps((tower,), (tower,), (process,), (process,))


def _mixed(*encoder: str) -> CellOps:
    return CellOps(encoder, ("mconv_e6k5g0",), encoder, ("mconv_e3k5g0",))


ARCHITECTURES = {
    "res_elu": _twice("res_elu"),
    "res_bnelu": _twice("res_bnelu"),
    "res_bnswish": _twice("res_bnswish"),
    "mbconv_sep": _bottleneck("mconv_e6k5g0", "mconv_e3k5g0"),
    "mbconv_sep11": _bottleneck("mconv_e6k11g0", "mconv_e3k5g0"),
    "mbconv_den": _bottleneck("mconv_e6k5g8", "mconv_e3k5g8"),
    "res_mbconv": _mixed("res_bnswish", "res_bnswish"),
    "res53_mbconv": _mixed("res_bnswish5", "res_bnswish"),
    "res35_mbconv": _mixed("res_bnswish", "res_bnswish5"),
    "res55_mbconv": _mixed("res_bnswish5", "res_bnswish5"),
    "mbconv_res": CellOps(
        ("mconv_e6k5g0",), ("res_bnswish", "res_bnswish"), ("mconv_e3k5g0",), ("res_bnswish", "res_bnswish")
    ),
}
