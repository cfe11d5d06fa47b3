"""NCSN and NCSNv2: RefineNets with dilated convolutions and InstanceNorm++.

Source: Song & Ermon 2019 (arXiv 1907.05600, Appendix A) for NCSN, whose normalisations look at the noise level; Song &
Ermon 2020 (arXiv 2006.09011, Appendix B) for NCSNv2, which divides its output by sigma instead. Attributes have the
published names.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from dnnlib.errors import UserError
from training.networks.score_layers import activation, conv2d

Act = Callable[..., torch.Tensor]
Norm = Callable[[int], nn.Module]  # channels -> normalisation, called as norm(x, labels)


class Conv(nn.Module):
    """Convolution that keeps the resolution, with PyTorch's initialisation."""

    def __init__(self, channels: int, out_channels: int, size: int = 3, dilation: int = 1, bias: bool = True):
        super().__init__()
        self.dilation = dilation
        shape = [out_channels, channels, size, size]
        self.weight = nn.Parameter(torch.empty(shape).contiguous(memory_format=torch.channels_last))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        bound = 1 / math.sqrt(channels * size**2)
        for p in self.parameters():
            if not p.is_meta:
                nn.init.uniform_(p, -bound, bound)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        padding = self.weight.shape[-1] // 2 * self.dilation
        return conv2d(x, self.weight, self.bias, padding=padding, dilation=self.dilation)


class ConvMeanPool(nn.Module):
    """Convolution followed by means of 2x2 pixels."""

    def __init__(self, channels: int, out_channels: int, size: int = 3):
        super().__init__()
        self.conv = Conv(channels, out_channels, size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.conv.weight.shape[-1] == 1:  # the order does not matter then, and this one is cheaper
            return self.conv(F.avg_pool2d(x, 2))
        return F.avg_pool2d(self.conv(x), 2)


def _instance_norm_plus(x: torch.Tensor, gamma: torch.Tensor, alpha: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """gamma (IN(x) + alpha m) + beta, with m the means of the channels, standardised among themselves.

    The parameters are [C], [1, C] or [N, C].
    """
    eps = 1e-5
    means = x.float().mean(dim=(2, 3))
    var, mean = torch.var_mean(means, dim=1, keepdim=True)
    standardised = (means - mean) * (var + eps).rsqrt()
    shift = (gamma * alpha * standardised + beta).to(x.dtype)[:, :, None, None]
    scale = gamma.to(x.dtype).reshape(-1, x.shape[1], 1, 1)
    # Not F.group_norm: with the channels last it takes the variance from squares, which loses digits.
    return torch.addcmul(shift, F.instance_norm(x, eps=eps), scale)


class InstanceNormPlus(nn.Module):
    """InstanceNorm++ (NCSN, Appendix A.1): it keeps what instance normalisation loses, the means of the channels."""

    alpha: nn.Parameter
    gamma: nn.Parameter
    beta: nn.Parameter

    def __init__(self, channels: int):
        super().__init__()
        for name, mean, std in [("alpha", 1, 0.02), ("gamma", 1, 0.02), ("beta", 0, 0)]:
            self.register_parameter(name, nn.Parameter(_normal([channels], mean, std)))

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        return _instance_norm_plus(x, self.gamma, self.alpha, self.beta)


class ConditionalInstanceNormPlus(nn.Module):
    """InstanceNorm++ with parameters of each noise level: rows gamma, alpha, beta of an embedding."""

    def __init__(self, channels: int, num_scales: int):
        super().__init__()
        weight = torch.cat([_normal([num_scales, 2 * channels], 1, 0.02), torch.zeros(num_scales, channels)], dim=1)
        self.embed = nn.Embedding(num_scales, 3 * channels, _weight=weight)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        gamma, alpha, beta = self.embed(labels.long()).chunk(3, dim=-1)
        return _instance_norm_plus(x, gamma, alpha, beta)


def _normal(shape: Sequence[int], mean: float, std: float) -> torch.Tensor:
    values = torch.empty(*shape)
    return values if values.is_meta else nn.init.normal_(values, mean, std)


class ResidualBlock(nn.Module):
    """Two normalised convolutions beside a shortcut.

    Args:
        channels, out_channels: of input and output.
        norm, act: normalisation and activation.
        down: the first block of a stage: halves the resolution, or dilates its convolutions where dilation > 1.
        dilation: of the convolutions.
    """

    def __init__(self, channels: int, out_channels: int, norm: Norm, act: Act, down: bool, dilation: int):
        super().__init__()
        self.act = act
        halves = down and dilation == 1
        middle = channels if down else out_channels
        self.conv1 = Conv(channels, middle, dilation=dilation)
        self.normalize2 = norm(middle)
        self.conv2 = ConvMeanPool(middle, out_channels) if halves else Conv(middle, out_channels, dilation=dilation)
        self.shortcut = None
        if halves:
            self.shortcut = ConvMeanPool(channels, out_channels, size=1)
        elif down:
            self.shortcut = Conv(channels, out_channels, dilation=dilation)
        elif channels != out_channels:
            self.shortcut = Conv(channels, out_channels, size=1)
        self.normalize1 = norm(channels)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        h = self.conv1(self.act(self.normalize1(x, labels)))
        h = self.conv2(self.act(self.normalize2(h, labels)))
        return h + (x if self.shortcut is None else self.shortcut(x))


class RCUBlock(nn.Module):
    """Residual convolution units: `units` times x + (activation and convolution, twice)."""

    def __init__(self, channels: int, units: int, act: Act, norm: Norm | None = None):
        super().__init__()
        self.act = act
        self.units = units
        for unit in range(1, units + 1):
            for stage in (1, 2):
                if norm is not None:
                    self.add_module(f"{unit}_{stage}_norm", norm(channels))
                self.add_module(f"{unit}_{stage}_conv", Conv(channels, channels, bias=False))

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        layers = iter(self.children())
        for _ in range(self.units):
            h = x
            for _ in (1, 2):
                layer = next(layers)
                if not isinstance(layer, Conv):
                    h, layer = layer(h, labels), next(layers)
                h = layer(self.act(h))
            x = x + h
        return x


class CRPBlock(nn.Module):
    """Chained residual pooling: x + conv(pool(x)) + conv(pool(conv(pool(x)))), over 5x5 pixels.

    With normalisation (NCSN), means are taken in place of maxima.
    """

    def __init__(self, channels: int, act: Act, norm: Norm | None = None):
        super().__init__()
        self.act = act
        self.convs = nn.ModuleList(Conv(channels, channels, bias=False) for _ in range(2))
        self.norms = nn.ModuleList() if norm is None else nn.ModuleList(norm(channels) for _ in range(2))

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        x = path = self.act(x)
        for i, conv in enumerate(self.convs):
            if len(self.norms) > 0:
                path = F.avg_pool2d(self.norms[i](path, labels), 5, stride=1, padding=2)
            else:
                path = F.max_pool2d(path, 5, stride=1, padding=2)
            path = conv(path)
            x = x + path
        return x


class MSFBlock(nn.Module):
    """Multi-resolution fusion: the sum of the inputs after a convolution each, at the resolution of the first."""

    def __init__(self, channels: Sequence[int], out_channels: int, norm: Norm | None = None):
        super().__init__()
        self.convs = nn.ModuleList(Conv(c, out_channels) for c in channels)
        self.norms = nn.ModuleList() if norm is None else nn.ModuleList(norm(c) for c in channels)

    def forward(self, images: Sequence[torch.Tensor], labels: torch.Tensor | None = None) -> torch.Tensor:
        total = None
        for i, (x, conv) in enumerate(zip(images, self.convs, strict=True)):
            h = conv(self.norms[i](x, labels) if len(self.norms) > 0 else x)
            if h.shape[2:] != images[0].shape[2:]:
                h = F.interpolate(h, size=images[0].shape[2:], mode="bilinear", align_corners=True)
            total = h if total is None else total + h
        assert total is not None
        return total


class RefineBlock(nn.Module):
    """RefineNet block: one or two inputs, adapted, fused, pooled and put out at the resolution of the first."""

    def __init__(self, channels: Sequence[int], out_channels: int, units: int, act: Act, norm: Norm | None):
        super().__init__()
        self.adapt_convs = nn.ModuleList(RCUBlock(c, 2, act, norm) for c in channels)
        self.output_convs = RCUBlock(out_channels, units, act, norm)
        self.msf = MSFBlock(channels, out_channels, norm) if len(channels) > 1 else None
        self.crp = CRPBlock(out_channels, act, norm)

    def forward(self, labels: torch.Tensor | None, *images: torch.Tensor) -> torch.Tensor:
        adapted = [block(x, labels) for block, x in zip(self.adapt_convs, images, strict=True)]
        h = adapted[0] if self.msf is None else self.msf(adapted, labels)
        return self.output_convs(self.crp(h, labels), labels)


class Stage(NamedTuple):
    """A stage of residual blocks, and the refinement at its resolution."""

    name: str
    width: int  # multiple of nf
    dilation: int
    refine: str
    refine_width: int


PLANS = {
    64: (
        Stage("res1", 1, 1, "refine4", 1),
        Stage("res2", 2, 1, "refine3", 1),
        Stage("res3", 2, 2, "refine2", 2),
        Stage("res4", 2, 4, "refine1", 2),
    ),
    128: (
        Stage("res1", 1, 1, "refine5", 1),
        Stage("res2", 2, 1, "refine4", 1),
        Stage("res3", 2, 1, "refine3", 2),
        Stage("res4", 4, 2, "refine2", 2),
        Stage("res5", 4, 4, "refine1", 4),
    ),
    256: (
        Stage("res1", 1, 1, "refine5", 1),
        Stage("res2", 2, 1, "refine4", 1),
        Stage("res3", 2, 1, "refine3", 2),
        Stage("res31", 2, 1, "refine31", 2),
        Stage("res4", 4, 2, "refine2", 2),
        Stage("res5", 4, 4, "refine1", 4),
    ),
}


class NCSNv2(nn.Module):
    """The score of noisy images, for noise levels that are numbered.

    Args:
        img_resolution: height and width of the images; divisible by 2, 4 or 8 for the plans 64, 128 and 256.
        img_channels: number of image channels.
        plan: layout, named after the resolution that it was published for: 64, 128 or 256.
        nf: base number of channels.
        nonlinearity: 'elu', 'swish', 'relu' or 'lrelu'.
        centered: images lie in [-1, 1]; otherwise in [0, 1], and the network maps them to [-1, 1].
        sigma_min, sigma_max, num_scales: the noise levels that labels number, the largest being 0.

    Set `checkpoint_activations` to keep only what blocks pass on for the backward pass.

    Raises:
        UserError: unknown plan or nonlinearity, or a resolution that cannot be halved.
    """

    sigmas: torch.Tensor
    conditional = False  # whether normalisations look at the noise level

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        plan: int = 64,
        nf: int = 128,
        nonlinearity: str = "elu",
        centered: bool = False,
        sigma_min: float = 0.01,
        sigma_max: float = 50.0,
        num_scales: int = 232,
    ):
        super().__init__()
        if plan not in PLANS:
            raise UserError(f"plan must be one of {', '.join(map(str, PLANS))}, not {plan}")
        self.stages = PLANS[plan]
        halvings = sum(stage.dilation == 1 for stage in self.stages[1:])
        if img_resolution % 2**halvings != 0:
            raise UserError(f"resolution {img_resolution} is not divisible by {2**halvings}, as plan {plan} needs")
        self.checkpoint_activations = False
        self.img_resolution, self.img_channels = img_resolution, img_channels
        self.centered = centered
        self.act = act = activation(nonlinearity)
        if not self.conditional:
            ln_sigmas = torch.linspace(math.log(sigma_max), math.log(sigma_min), num_scales, dtype=torch.float64)
            self.register_buffer("sigmas", ln_sigmas.exp())

        def norm(channels: int) -> nn.Module:
            if self.conditional:
                return ConditionalInstanceNormPlus(channels, num_scales)
            return InstanceNormPlus(channels)

        self.begin_conv = Conv(img_channels, nf)
        self.normalizer = norm(nf)
        self.end_conv = Conv(nf, img_channels)
        channels = nf
        for stage in self.stages:
            width, down = nf * stage.width, stage is not self.stages[0]
            blocks = [
                ResidualBlock(channels, width, norm, act, down, stage.dilation),
                ResidualBlock(width, width, norm, act, False, stage.dilation),
            ]
            self.add_module(stage.name, nn.ModuleList(blocks))
            channels = width
        inputs: dict[str, list[int]] = {}
        for stage in reversed(self.stages):
            inputs[stage.refine] = [nf * stage.width, *inputs.get("below", [])]
            inputs["below"] = [nf * stage.refine_width]
        # In the published order of the parameters, in which averages are stored.
        for stage in sorted(self.stages, key=lambda stage: stage.refine):
            units = 3 if stage is self.stages[0] else 1
            block = RefineBlock(
                inputs[stage.refine], nf * stage.refine_width, units, act, norm if self.conditional else None
            )
            self.add_module(stage.refine, block)

    def forward(self, x: torch.Tensor, labels: torch.Tensor, cond: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            x: noisy images [N, C, H, W], in the type to compute in.
            labels: numbers of the noise levels, [N] or [1].
            cond: ignored: the network has no other condition.

        Returns:
            The score, [N, C, H, W]: float32 if it was divided by sigma, else in the type of `x`.
        """

        def run(module: nn.Module, *args: torch.Tensor) -> torch.Tensor:
            if self.checkpoint_activations and torch.is_grad_enabled():
                return checkpoint(module, *args, use_reentrant=False)  # type: ignore[return-value]
            return module(*args)

        if not self.centered:
            x = 2 * x - 1
        if x.device.type != "mps":
            x = x.contiguous(memory_format=torch.channels_last)
        h = self.begin_conv(x)
        outputs = []
        for stage in self.stages:
            for block in getattr(self, stage.name):
                h = run(block, h, labels)
            outputs.append(h)
        below: list[torch.Tensor] = []
        for stage in reversed(self.stages):
            below = [run(getattr(self, stage.refine), labels, outputs.pop(), *below)]
        h = self.end_conv(self.act(self.normalizer(below[0], labels)))
        if self.conditional:
            return h
        return h.float() / self.sigmas[labels.long()].float().reshape(-1, 1, 1, 1)


class NCSN(NCSNv2):
    """The first NCSN: every normalisation looks at the noise level, and the output is the score as it is.

    Args:
        all: as of `NCSNv2`; the plan is that of 64 pixels.
    """

    conditional = True
