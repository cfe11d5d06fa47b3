"""NCSN++, DDPM++ and DDPM: the U-Nets of Song et al. 2021 (arXiv 2011.13456, Appendix H) and Ho et al. 2020.

Both are one layout with different options. The modules are numbered in the order of their construction, as in the
published state dicts: `all_modules.{i}`.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dnnlib.errors import UserError
from training.networks.score_layers import (
    AttnBlock,
    Conv,
    Downsample,
    GaussianFourierProjection,
    GroupNorm,
    Linear,
    ResnetBlock,
    Upsample,
    activation,
    positional_embedding,
    residual_sum,
)


class Combine(nn.Module):
    """The pyramid's images after a 1x1 convolution, added to h ('sum') or put in front of it ('cat')."""

    def __init__(self, channels: int, out_channels: int, method: str):
        super().__init__()
        self.method = method
        self.Conv_0 = Conv(channels, out_channels, size=1)

    def forward(self, pyramid: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        pyramid = self.Conv_0(pyramid)
        return torch.cat([pyramid, h], dim=1) if self.method == "cat" else pyramid + h


class EncoderLevel(NamedTuple):
    """Modules of one resolution on the way down; `attention` has one entry per block."""

    blocks: list[ResnetBlock]
    attention: list[AttnBlock | None]
    down: nn.Module | None  # to the next level
    pyramid_down: Downsample | None
    combine: Combine | None


class DecoderLevel(NamedTuple):
    """Modules of one resolution on the way up."""

    blocks: list[ResnetBlock]
    attention: AttnBlock | None
    pyramid_up: Upsample | None  # from the level below
    norm: GroupNorm | None  # of the pyramid's output
    conv: Conv | None
    up: nn.Module | None  # to the next level


class Parts(NamedTuple):
    """The numbered modules by what they do. A tuple, so that they have no second name in the state dict."""

    fourier: GaussianFourierProjection | None
    emb_layers: list[Linear]
    conv_in: Conv
    encoder: list[EncoderLevel]
    mid: tuple[ResnetBlock, AttnBlock, ResnetBlock]
    decoder: list[DecoderLevel]
    norm_out: GroupNorm | None
    conv_out: Conv | None


def check_option(name: str, value: str, known: Sequence[str]) -> None:
    """Check the value of an option.

    Raises:
        UserError: the value is none of those known.
    """
    if value not in known:
        raise UserError(f"{name} must be one of {', '.join(known)}, not {value!r}")


class NCSNpp(nn.Module):
    """The network of NCSN++ and DDPM++: the score, or the noise, in noisy images.

    Args:
        img_resolution: height and width of the images; divisible by 2 ** (levels - 1).
        img_channels: number of image channels.
        nf: base number of channels.
        ch_mult: multiple of `nf` at each level, finest first.
        num_res_blocks: residual blocks per level.
        attn_resolutions: resolutions with self-attention.
        dropout: probability, in residual blocks.
        resamp_with_conv: whether separate layers that change the resolution have a convolution.
        conditional: whether the network looks at its label.
        fir, fir_kernel: whether resolutions change by FIR filters, and their taps.
        skip_rescale: whether sums are divided by sqrt(2).
        resblock_type: 'biggan' changes the resolution in residual blocks, 'ddpm' between them.
        progressive: how the image grows on the way up: 'none', 'output_skip' (StyleGAN2) or 'residual'.
        progressive_input: how it is taken in on the way down: 'none', 'input_skip' or 'residual'.
        progressive_combine: 'sum' or 'cat', of 'input_skip'.
        embedding_type: of the label: 'fourier' (it is sigma) or 'positional' (a number).
        fourier_scale: standard deviation of the frequencies.
        init_scale: of the last convolution in blocks and output.
        nonlinearity: 'swish', 'elu', 'relu' or 'lrelu'.
        centered: images lie in [-1, 1]; otherwise in [0, 1], and the network maps them to [-1, 1].
        scale_by_sigma: whether the output is divided by sigma, so that it is the score.
        sigma_min, sigma_max, num_scales: the noise levels that positional labels number, the largest being 0.

    Set `checkpoint_activations` to keep only what blocks pass on for the backward pass, and compute what is inside of
    them once more (Chen et al. 2016, arXiv 1604.06174).

    Raises:
        UserError: unknown options, or a resolution that cannot be halved as often as there are levels.
    """

    sigmas: torch.Tensor
    narrow_groups = True  # fewer groups where there are few channels

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        nf: int = 128,
        ch_mult: Sequence[int] = (1, 2, 2, 2),
        num_res_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.1,
        resamp_with_conv: bool = True,
        conditional: bool = True,
        fir: bool = True,
        fir_kernel: Sequence[float] = (1, 3, 3, 1),
        skip_rescale: bool = True,
        resblock_type: str = "biggan",
        progressive: str = "none",
        progressive_input: str = "none",
        progressive_combine: str = "sum",
        embedding_type: str = "fourier",
        fourier_scale: float = 16,
        init_scale: float = 0.0,
        nonlinearity: str = "swish",
        centered: bool = False,
        scale_by_sigma: bool = True,
        sigma_min: float = 0.01,
        sigma_max: float = 50.0,
        num_scales: int = 1000,
    ):
        super().__init__()
        check_option("resblock_type", resblock_type, ("biggan", "ddpm"))
        check_option("progressive", progressive, ("none", "output_skip", "residual"))
        check_option("progressive_input", progressive_input, ("none", "input_skip", "residual"))
        check_option("progressive_combine", progressive_combine, ("sum", "cat"))
        check_option("embedding_type", embedding_type, ("fourier", "positional"))
        if img_resolution % 2 ** (len(ch_mult) - 1) != 0:
            raise UserError(
                f"resolution {img_resolution} is not divisible by {2 ** (len(ch_mult) - 1)}, "
                f"as a network of {len(ch_mult)} levels needs: use fewer levels (ch_mult)"
            )
        self.checkpoint_activations = False
        self.img_resolution, self.img_channels = img_resolution, img_channels
        self.nf = nf
        self.dropout, self.init_scale, self.skip_rescale = dropout, init_scale, skip_rescale
        self.fir = tuple(fir_kernel) if fir else None
        self.resamp_with_conv = resamp_with_conv
        self.resblock_type = resblock_type
        self.progressive, self.progressive_input = progressive, progressive_input
        self.progressive_combine = progressive_combine
        self.conditional, self.embedding_type = conditional, embedding_type
        self.act = activation(nonlinearity)
        self.centered, self.scale_by_sigma = centered, scale_by_sigma
        ln_sigmas = torch.linspace(math.log(sigma_max), math.log(sigma_min), num_scales, dtype=torch.float64)
        self.register_buffer("sigmas", ln_sigmas.exp())

        self.all_modules = nn.ModuleList()
        self.parts = self._build(attn_resolutions, [nf * m for m in ch_mult], num_res_blocks, fourier_scale)

    # -----------------------------------------------------------------------------------------------------
    # Construction, in the order of the published numbers

    def _add(self, module):
        """Number a module, and return it."""
        self.all_modules.append(module)
        return module

    def _block(self, channels: int, out_channels: int, **resample: bool) -> ResnetBlock:
        block = ResnetBlock(
            channels,
            out_channels,
            act=self.act,
            emb_channels=self.nf * 4,
            dropout=self.dropout,
            init_scale=self.init_scale,
            skip_rescale=self.skip_rescale,
            shortcut="Conv_2" if self.resblock_type == "biggan" else "NIN_0",
            fir=self.fir,
            narrow_groups=self.narrow_groups,
            **resample,
        )
        return self._add(block)

    def _attention(self, channels: int) -> AttnBlock:
        return self._add(AttnBlock(channels, self.init_scale, self.skip_rescale, self.narrow_groups))

    def _norm(self, channels: int) -> GroupNorm:
        return self._add(GroupNorm(channels, narrow_groups=self.narrow_groups))

    def _build(
        self, attn_resolutions: Sequence[int], widths: Sequence[int], num_res_blocks: int, fourier_scale: float
    ) -> Parts:
        fourier, emb_layers = None, []
        if self.embedding_type == "fourier":
            fourier = self._add(GaussianFourierProjection(self.nf, fourier_scale))
        if self.conditional:
            width = self.nf * (1 if fourier is None else 2)
            emb_layers = [self._add(Linear(width, self.nf * 4)), self._add(Linear(self.nf * 4, self.nf * 4))]
        conv_in = self._add(Conv(self.img_channels, self.nf))

        attends = [self.img_resolution >> level in attn_resolutions for level in range(len(widths))]
        skips, channels, pyramid = [self.nf], self.nf, self.img_channels
        encoder: list[EncoderLevel] = []
        for level, width in enumerate(widths):
            modules, channels, pyramid = self._encoder_level(
                channels, width, pyramid, [attends[level]] * num_res_blocks, skips, last=level == len(widths) - 1
            )
            encoder.append(modules)

        mid = (self._block(channels, channels), self._attention(channels), self._block(channels, channels))

        decoder: list[DecoderLevel] = []
        for level, width in reversed(list(enumerate(widths))):
            inputs = [channels + skips.pop()] + [width + skips.pop() for _ in range(num_res_blocks)]
            modules, pyramid = self._decoder_level(
                inputs, width, pyramid, attends[level], first=level == len(widths) - 1, last=level == 0
            )
            decoder.append(modules)
            channels = width
        assert not skips
        norm_out = conv_out = None
        if self.progressive != "output_skip":
            norm_out = self._norm(channels)
            conv_out = self._add(Conv(channels, self.img_channels, init_scale=self.init_scale))
        return Parts(fourier, emb_layers, conv_in, encoder, mid, decoder, norm_out, conv_out)

    def _encoder_level(
        self, channels: int, width: int, pyramid: int, attends: list[bool], skips: list[int], last: bool
    ) -> tuple[EncoderLevel, int, int]:
        """Modules of a level, and the channels of h and of the pyramid that it passes on; adds to `skips`."""
        blocks, attention = [], []
        for attend in attends:
            blocks.append(self._block(channels, width))
            attention.append(self._attention(width) if attend else None)
            channels = width
            skips.append(channels)
        down = pyramid_down = combine = None
        if not last:
            if self.resblock_type == "biggan":
                down = self._block(channels, channels, down=True)
            else:
                down = self._add(Downsample(channels, channels, self.resamp_with_conv, self.fir))
            if self.progressive_input == "input_skip":
                pyramid_down = Downsample(pyramid, pyramid, with_conv=False, fir=self.fir)
                combine = self._add(Combine(pyramid, channels, self.progressive_combine))
                channels *= 2 if self.progressive_combine == "cat" else 1
            elif self.progressive_input == "residual":
                pyramid_down = self._add(Downsample(pyramid, channels, with_conv=True, fir=self.fir))
                pyramid = channels
            skips.append(channels)
        return EncoderLevel(blocks, attention, down, pyramid_down, combine), channels, pyramid

    def _decoder_level(
        self, inputs: list[int], width: int, pyramid: int, attends: bool, first: bool, last: bool
    ) -> tuple[DecoderLevel, int]:
        """Modules of a level, and the channels of the pyramid that it passes on."""
        blocks = [self._block(channels, width) for channels in inputs]
        attention = self._attention(width) if attends else None
        pyramid_up = norm = conv = up = None
        if self.progressive == "output_skip" or (self.progressive == "residual" and first):
            pyramid = self.img_channels if self.progressive == "output_skip" else width
            pyramid_up = None if first else Upsample(pyramid, pyramid, with_conv=False, fir=self.fir)
            norm = self._norm(width)
            init_scale = self.init_scale if self.progressive == "output_skip" else 1.0
            conv = self._add(Conv(width, pyramid, init_scale=init_scale))
        elif self.progressive == "residual":
            pyramid_up = self._add(Upsample(pyramid, width, with_conv=True, fir=self.fir))
            pyramid = width
        if not last:
            if self.resblock_type == "biggan":
                up = self._block(width, width, up=True)
            else:
                up = self._add(Upsample(width, width, self.resamp_with_conv, self.fir))
        return DecoderLevel(blocks, attention, pyramid_up, norm, conv, up), pyramid

    # -----------------------------------------------------------------------------------------------------
    # The function

    def forward(self, x: torch.Tensor, labels: torch.Tensor, cond: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            x: noisy images [N, C, H, W], in the type to compute in.
            labels: [N] or [1]: sigma ('fourier') or numbers ('positional').
            cond: ignored: the network has no other condition.

        Returns:
            The score or the noise, [N, C, H, W]: float32 if it was divided by sigma, else in the type of `x`.
        """
        emb = self.embed(labels, x.dtype)

        def run(module: nn.Module, h: torch.Tensor) -> torch.Tensor:
            args = (h, emb) if isinstance(module, ResnetBlock) else (h,)
            if self.checkpoint_activations and torch.is_grad_enabled():
                return checkpoint(module, *args, use_reentrant=False)  # type: ignore[return-value]
            return module(*args)

        if not self.centered:
            x = 2 * x - 1
        if x.device.type != "mps":
            x = x.contiguous(memory_format=torch.channels_last)
        h, skips = self._encode(x, run)
        for module in self.parts.mid:
            h = run(module, h)
        h = self._decode(h, skips, run)
        if self.scale_by_sigma:
            sigma = labels.float() if self.embedding_type == "fourier" else self.sigmas[labels.long()].float()
            h = h.float() / sigma.reshape(-1, 1, 1, 1)
        return h

    def embed(self, labels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        """Activated embedding of the labels, [N, 4 nf] or [1, 4 nf] in `dtype`; None for unconditional networks."""
        if not self.conditional:
            return None
        if self.parts.fourier is not None:
            emb = self.parts.fourier(labels.float().log())
        else:
            emb = positional_embedding(labels, self.nf)
        for layer in self.parts.emb_layers:  # blocks want it activated
            emb = self.act(layer(emb))
        return emb.to(dtype)

    def _encode(self, x: torch.Tensor, run: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Images at the lowest resolution, and those for the way back."""
        h, pyramid = self.parts.conv_in(x), x
        skips = [h]
        for level in self.parts.encoder:
            for block, attention in zip(level.blocks, level.attention, strict=True):
                h = run(block, h)
                if attention is not None:
                    h = run(attention, h)
                skips.append(h)
            if level.down is not None:
                h = run(level.down, h)
                if level.pyramid_down is not None:
                    pyramid = level.pyramid_down(pyramid)
                    if level.combine is not None:
                        h = level.combine(pyramid, h)
                    else:
                        h = pyramid = residual_sum(pyramid, h, self.skip_rescale)
                skips.append(h)
        return h, skips

    def _decode(self, h: torch.Tensor, skips: list[torch.Tensor], run: Callable[..., torch.Tensor]) -> torch.Tensor:
        pyramid = None
        for level in self.parts.decoder:
            for block in level.blocks:
                h = run(block, torch.cat([h, skips.pop()], dim=1))
            if level.attention is not None:
                h = run(level.attention, h)
            if level.pyramid_up is not None and pyramid is not None:
                pyramid = level.pyramid_up(pyramid)
            if level.norm is not None and level.conv is not None:
                image = level.conv(level.norm(h, self.act))
                pyramid = image if pyramid is None else pyramid + image
            elif pyramid is not None:
                h = pyramid = residual_sum(pyramid, h, self.skip_rescale)
            if level.up is not None:
                h = run(level.up, h)
        if self.parts.norm_out is not None and self.parts.conv_out is not None:
            return self.parts.conv_out(self.parts.norm_out(h, self.act))
        assert pyramid is not None
        return pyramid


class DDPM(NCSNpp):
    """The network of DDPM (Ho et al. 2020, arXiv 2006.11239): positional labels, 32 groups, no filters or pyramids.

    Args:
        options: those of `NCSNpp` that are not fixed here.
    """

    narrow_groups = False

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        num_res_blocks: int = 2,
        centered: bool = True,
        scale_by_sigma: bool = False,
        **options,
    ):
        super().__init__(
            img_resolution,
            img_channels,
            num_res_blocks=num_res_blocks,
            centered=centered,
            scale_by_sigma=scale_by_sigma,
            fir=False,
            skip_rescale=False,
            resblock_type="ddpm",
            embedding_type="positional",
            **options,
        )
