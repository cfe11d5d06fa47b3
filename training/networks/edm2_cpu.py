"""A finished EDM2 network, rewritten for sampling on processors.

`FastDenoiser` computes what `edm2.Precond` computes, up to rounding, from weights that are transformed once:
normalisation, gains and the constants of magnitude preservation are folded into them, large 3x3 convolutions of
float32 run as Winograd's F(4x4, 3x3), and the convolutions' weights are kept in the layout that oneDNN computes with.
`for_sampling` chooses between it and what `edm2_gpu` has for GPUs.
"""

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from training.denoiser import Denoiser
from training.networks.edm2 import Block, Precond
from training.networks.edm2_gpu import CompiledDenoiser, with_fixed_weights
from training.networks.edm2_layers import MPConv, normalize, resample
from training.preconditioning import PRECISIONS, edm_coefficients

SILU_SCALE = 1 / 0.596  # of mp_silu; folded into whatever is linear behind it

# Winograd's minimal filtering F(4x4, 3x3) with the points 0, 1, -1, 2, -2 and infinity (Lavin & Gray 2016,
# arXiv 1509.09308): Y = A^T [(G g G^T) * (B^T d B)] A for a 6x6 tile d of the input, a filter g and a 4x4 tile Y.
_TILE, _PATCH = 4, 6
_WINOGRAD_BT = [
    [4, 0, -5, 0, 1, 0],
    [0, -4, -4, 1, 1, 0],
    [0, 4, -4, -1, 1, 0],
    [0, -2, -1, 2, 1, 0],
    [0, 2, -1, -2, 1, 0],
    [0, 4, 0, -5, 0, 1],
]
_WINOGRAD_G = [
    [1 / 4, 0, 0],
    [-1 / 6, -1 / 6, -1 / 6],
    [-1 / 6, 1 / 6, -1 / 6],
    [1 / 24, 1 / 12, 1 / 6],
    [1 / 24, -1 / 12, 1 / 6],
    [0, 0, 1],
]
_WINOGRAD_AT = [
    [1, 1, 1, 1, 1, 0],
    [0, 1, -1, 2, -2, 0],
    [0, 1, 1, 4, 4, 0],
    [0, 1, -1, 8, -8, 1],
]
_WINOGRAD_MIN_CHANNELS = 128  # below, the transforms cost more than they save
_WINOGRAD_MIN_SIZE = 10_000  # tiles sqrt(in out); below, reading the transformed weights takes the time
_WINOGRAD_CHUNK = 1 << 15  # tiles x channels worked on at a time, so that they stay in the cache


@functools.cache
def can_prepack(dtype: torch.dtype) -> bool:
    """Whether this PyTorch and processor can hold convolution weights in oneDNN's own layout.

    The operators are private, so they are tried rather than assumed; without them `F.conv2d` does the work.
    """
    w = torch.linspace(-1, 1, 32 * 16, dtype=torch.float32).reshape(32, 16, 1, 1)
    x = torch.linspace(-1, 1, 16 * 4, dtype=torch.float32).reshape(1, 16, 2, 2)
    try:
        result = _PackedConv(w.to(dtype), x.shape)(x.to(dtype).contiguous(memory_format=torch.channels_last))
    except (AttributeError, RuntimeError, TypeError):
        return False
    return torch.allclose(result.float(), F.conv2d(x, w), rtol=0, atol=0.1)


class _PlainConv:
    """Convolution of the same size, [N, in, H, W] -> [N, out, H, W], by the public function."""

    def __init__(self, w: torch.Tensor, groups: int = 1):
        self.w = w.contiguous(memory_format=torch.channels_last)
        self.groups = groups

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.w, padding=self.w.shape[-1] // 2, groups=self.groups)


class _PackedConv:
    """The same from weights in oneDNN's layout, chosen for inputs of shape `input_size` and right for all."""

    def __init__(self, w: torch.Tensor, input_size: Sequence[int], groups: int = 1):
        self.padding = [w.shape[-1] // 2] * 2
        self.groups = groups
        reorder = torch.ops.mkldnn._reorder_convolution_weight
        self.w = reorder(w.contiguous(), self.padding, [1, 1], [1, 1], groups, list(input_size))
        self.conv = torch.ops.mkldnn._convolution_pointwise.default

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x, self.w, None, self.padding, [1, 1], [1, 1], self.groups, "none", [], "")


def _conv(w: torch.Tensor, input_size: Sequence[int]) -> _PlainConv | _PackedConv:
    return _PackedConv(w, input_size) if can_prepack(w.dtype) else _PlainConv(w)


class _SiLUConv:
    """3x3 convolution of silu(x)."""

    def __init__(self, w: torch.Tensor, input_size: Sequence[int]):
        self.conv = _conv(w, input_size)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.silu(x))


class _WinogradSiLUConv:
    """The same, with 36 products of matrices in place of 144."""

    def __init__(self, w: torch.Tensor, input_size: Sequence[int]):
        N, C, H, W = input_size
        self.out_channels = w.shape[0]
        G = torch.tensor(_WINOGRAD_G, dtype=torch.float64)
        # One group of a grouped 1x1 convolution per element of the transformed tile.
        U = torch.einsum("ik,ockl,jl->ijoc", G, w.double(), G).reshape(-1, C, 1, 1).to(w.dtype)
        # Equal parts of the batch: for another number of tiles, oneDNN would convert the weights in each call.
        most = max(_WINOGRAD_CHUNK * _TILE**2 // (H * W * C), 1)
        self.at_a_time = math.ceil(N / math.ceil(N / most))
        tiles = self.at_a_time * H * W // _TILE**2
        self.products = _PackedConv(U, [1, _PATCH**2 * C, tiles, 1], groups=_PATCH**2)
        BT, AT = torch.tensor(_WINOGRAD_BT, dtype=w.dtype), torch.tensor(_WINOGRAD_AT, dtype=w.dtype)
        self.to_tiles, self.from_tiles = torch.kron(BT, BT), torch.kron(AT, AT)

    @staticmethod
    def pays(w: torch.Tensor, input_size: Sequence[int]) -> bool:
        N, C, H, W = input_size
        K = w.shape[0]
        return (
            w.dtype == torch.float32
            and H % _TILE == W % _TILE == 0
            and min(C, K) >= _WINOGRAD_MIN_CHANNELS
            and N * H * W // _TILE**2 * math.sqrt(C * K) >= _WINOGRAD_MIN_SIZE
            and can_prepack(w.dtype)
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        N, C, H, W = x.shape
        out = x.new_empty([N, H // _TILE, _TILE, W // _TILE, _TILE, self.out_channels])
        # Pixels before channels, with one pixel of padding.
        padded = x.new_empty([self.at_a_time, H + 2, W + 2, C])
        for edge in (padded[:, 0], padded[:, -1], padded[:, :, 0], padded[:, :, -1]):
            edge.zero_()
        for x_part, out_part in zip(x.split(self.at_a_time), out.split(self.at_a_time), strict=True):
            torch.ops.aten.silu.out(x_part.permute(0, 2, 3, 1), out=padded[: len(x_part), 1:-1, 1:-1])
            padded[len(x_part) :].zero_()
            self.filter(padded, out_part)
        return out.view(N, H, W, self.out_channels).permute(0, 3, 1, 2)

    def filter(self, padded: torch.Tensor, out: torch.Tensor) -> None:
        """[at_a_time, H + 2, W + 2, in] -> [N, H / 4, 4, W / 4, 4, out] of the first N."""
        N, rows, _, columns, _, K = out.shape
        C = padded.shape[-1]
        tiles = self.at_a_time * rows * columns
        # [at_a_time, rows, columns, in, 6, 6] -> [tiles, 36, in]
        d = padded.unfold(1, _PATCH, _TILE).unfold(2, _PATCH, _TILE)
        d = d.permute(0, 1, 2, 4, 5, 3).reshape(tiles, _PATCH**2, C)
        V = torch.bmm(self.to_tiles.expand(tiles, -1, -1), d)
        M = self.products(V.view(1, tiles, 1, -1).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        M = M.reshape(tiles, _PATCH**2, K)[: N * rows * columns]
        Y = torch.bmm(self.from_tiles.expand(len(M), -1, -1), M)
        out.copy_(Y.view(N, rows, columns, _TILE, _TILE, K).permute(0, 1, 3, 2, 4, 5))


def _silu_conv(w: torch.Tensor, input_size: Sequence[int]) -> _SiLUConv | _WinogradSiLUConv:
    return (_WinogradSiLUConv if _WinogradSiLUConv.pays(w, input_size) else _SiLUConv)(w, input_size)


def _folded(layer: MPConv, scale: float | torch.Tensor = 1) -> torch.Tensor:
    return layer.effective_weight() * scale


class _FastBlock:
    """A `Block`, for inputs [N, C, H, W] of `input_size` in channels_last."""

    def __init__(self, block: Block, input_size: Sequence[int], dtype: torch.dtype):
        self.enc = block.flavor == "enc"
        self.mode, self.filter = block.resample_mode, block.resample_filter
        self.clip_act = block.clip_act
        N, C, H, W = input_size
        H, W = {"keep": (H, W), "down": (H // 2, W // 2), "up": (H * 2, W * 2)}[self.mode]
        out = block.conv_res0.weight.shape[0]
        inside = [N, out, H, W]

        # mp_sum(x, y, t) = res_scale * x + (what is folded into conv_res1) * y
        t = block.res_balance
        norm = math.sqrt((1 - t) ** 2 + t**2)
        self.res_scale = (1 - t) / norm
        w = _folded(block.conv_res0, SILU_SCALE).to(dtype)
        self.conv_res0 = _silu_conv(w, [N, w.shape[1], H, W])
        self.conv_res1 = _silu_conv(_folded(block.conv_res1, SILU_SCALE * t / norm).to(dtype), inside)
        self.conv_skip = None
        if block.conv_skip is not None:
            scale = 1.0 if self.enc else self.res_scale
            self.conv_skip = _conv(_folded(block.conv_skip, scale).to(dtype), [N, C, H, W])

        self.num_heads = block.num_heads
        if block.attn_qkv is not None and block.attn_proj is not None:
            t = block.attn_balance
            norm = math.sqrt((1 - t) ** 2 + t**2)
            self.attn_scale = (1 - t) / norm
            self.attn_qkv = _conv(block.qkv_first(_folded(block.attn_qkv)).to(dtype), inside)
            self.attn_proj = _conv(_folded(block.attn_proj, t / norm).to(dtype), inside)

    def __call__(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """x: [N, C, H, W]; c: modulation [N, out, 1, 1] or [1, out, 1, 1]."""
        x = self.resample(x)
        if self.enc:
            x = normalize(self.conv_skip(x) if self.conv_skip is not None else x, dim=1)
        y = self.conv_res0(x)
        y = self.conv_res1(y.mul_(c))
        if self.conv_skip is not None and not self.enc:
            x = y.add_(self.conv_skip(x))
        else:
            x = y.add_(x, alpha=self.res_scale)
        if self.num_heads > 0:
            x = self.attn_proj(self.attention(self.attn_qkv(x))).add_(x, alpha=self.attn_scale)
        return x if self.clip_act is None else x.clamp_(-self.clip_act, self.clip_act)

    def resample(self, x: torch.Tensor) -> torch.Tensor:
        if len(self.filter) == 2 and self.filter[0] == self.filter[1]:
            if self.mode == "down":
                return F.avg_pool2d(x, 2)
            if self.mode == "up":
                return F.interpolate(x, scale_factor=2, mode="nearest")
        return resample(x, self.filter, self.mode)

    def attention(self, qkv: torch.Tensor) -> torch.Tensor:
        """[N, 3C, H, W] -> [N, C, H, W]."""
        N, C3, H, W = qkv.shape
        q, k, v = normalize(qkv.permute(0, 2, 3, 1).reshape(N, H * W, 3, self.num_heads, -1), dim=4).unbind(2)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return y.transpose(1, 2).reshape(N, H, W, C3 // 3).permute(0, 3, 1, 2)


class FastDenoiser:
    """The denoiser of a finished network on the CPU: D(x; sigma, labels) of `net`, up to rounding.

    It holds transformed copies of the weights (in float32 those of large 3x3 convolutions take four times the space,
    all others and bfloat16's the same), which do not follow later changes of `net`.

    Args:
        net: the network, on the CPU. Computes in `net.precision`, with float16 replaced by float32.
        batch_size: expected number of images per call. Others work as well, but perhaps slower.
    """

    @torch.no_grad()
    def __init__(self, net: Precond, batch_size: int):
        unet = net.unet
        self.img_resolution, self.img_channels, self.label_dim = net.img_resolution, net.img_channels, net.label_dim
        self.sigma_data = net.sigma_data
        self.precision = "fp32" if net.precision == "fp16" else net.precision
        self.dtype = dtype = PRECISIONS[self.precision]

        # Embedding: with a single product for the modulations of all blocks.
        self.freqs, self.phases = unet.emb_fourier.waves()
        if unet.emb_label is None:
            noise_scale = 1.0
            self.emb_label = None
        else:
            t = unet.label_balance
            norm = math.sqrt((1 - t) ** 2 + t**2)
            noise_scale = (1 - t) / norm
            self.emb_label = _folded(unet.emb_label, t / norm * math.sqrt(net.label_dim)).t().contiguous()
        self.emb_noise = _folded(unet.emb_noise, math.sqrt(2) * noise_scale).t().contiguous()
        blocks = [m for m in [*unet.enc.values(), *unet.dec.values()] if isinstance(m, Block)]
        self.modulation_sizes = [block.conv_res0.weight.shape[0] for block in blocks]
        modulations = [_folded(block.emb_linear, block.emb_gain * SILU_SCALE) for block in blocks]
        self.emb_linear = torch.cat(modulations).t().contiguous()

        # A dry run over the shapes, as in `UNet.forward`.
        size = [batch_size, unet.out_conv.weight.shape[0] + 1, net.img_resolution, net.img_resolution]
        skips = []
        self.enc, self.dec = [], []
        for module in unet.enc.values():
            if isinstance(module, MPConv):
                self.conv_in = _conv(_folded(module).to(dtype), size)
                size = [batch_size, module.weight.shape[0], *size[2:]]
            else:
                assert isinstance(module, Block)
                self.enc.append(_FastBlock(module, size, dtype))
                size = self._output_size(module, size)
            skips.append(size[1])
        for name, module in unet.dec.items():
            assert isinstance(module, Block)
            scales = None
            if "block" in name:
                # mp_cat(a, b, t) = (a * scales[0], b * scales[1])
                Na, Nb, t = size[1], skips.pop(), unet.concat_balance
                C = math.sqrt((Na + Nb) / ((1 - t) ** 2 + t**2))
                scales = (C / math.sqrt(Na) * (1 - t), C / math.sqrt(Nb) * t)
                size = [batch_size, Na + Nb, *size[2:]]
            self.dec.append((_FastBlock(module, size, dtype), scales))
            size = self._output_size(module, size)
        self.conv_out = _conv(_folded(unet.out_conv, unet.out_gain).to(dtype), size)

    @staticmethod
    def _output_size(block: Block, size: list[int]) -> list[int]:
        scale = {"keep": 1.0, "down": 0.5, "up": 2.0}[block.resample_mode]
        return [size[0], block.conv_res0.weight.shape[0], int(size[2] * scale), int(size[3] * scale)]

    @torch.no_grad()
    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, class_labels: torch.Tensor | None = None) -> torch.Tensor:
        """As `Precond.forward`, without its second result.

        Args:
            x: noisy images [N, img_channels, img_resolution, img_resolution].
            sigma: noise level, one element or [N].
            class_labels: [N, label_dim] or [1, label_dim]; None means the zero vector.

        Returns:
            D(x; sigma), float32, shaped like `x`.
        """
        x = x.float()
        c = edm_coefficients(torch.as_tensor(sigma).float().reshape(-1, 1, 1, 1), self.sigma_data)
        F_x = self._unet(c.c_in * x, self._modulations(c.c_noise.flatten(), class_labels))
        return torch.addcmul(c.c_skip * x, c.c_out, F_x.float())

    def _modulations(self, c_noise: torch.Tensor, class_labels: torch.Tensor | None) -> list[torch.Tensor]:
        """Of each block, [N, channels, 1, 1] or [1, channels, 1, 1]."""
        emb = (torch.outer(c_noise, self.freqs) + self.phases).cos_() @ self.emb_noise
        if self.emb_label is not None and class_labels is not None:
            emb = emb + class_labels.float().reshape(-1, self.label_dim) @ self.emb_label
        c = (F.silu(emb) @ self.emb_linear).add_(1).to(self.dtype)
        return [part[:, :, None, None] for part in c.split(self.modulation_sizes, dim=1)]

    def _unet(self, x: torch.Tensor, modulations: list[torch.Tensor]) -> torch.Tensor:
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        x = self.conv_in(x.to(self.dtype).contiguous(memory_format=torch.channels_last))
        skips = [x]
        remaining = iter(modulations)
        for block in self.enc:
            x = block(x, next(remaining))
            skips.append(x)
        for block, scales in self.dec:
            if scales is not None:
                x = self._concat(x, skips.pop(), scales)
            x = block(x, next(remaining))
        return self.conv_out(x)

    @staticmethod
    def _concat(a: torch.Tensor, b: torch.Tensor, scales: tuple[float, float]) -> torch.Tensor:
        N, C, H, W = a.shape
        out = a.new_empty([N, H, W, C + b.shape[1]]).permute(0, 3, 1, 2)
        torch.mul(a, scales[0], out=out[:, :C])
        torch.mul(b, scales[1], out=out[:, C:])
        return out


def for_sampling(net: Precond, batch_size: int, compiled: bool = False) -> Denoiser:
    """The fastest form of a finished network, which does not follow its later changes: on a CPU its `FastDenoiser`,
    elsewhere its `CompiledDenoiser` or, if that is not wanted, a copy with fixed weights."""
    if next(net.parameters()).device.type == "cpu":
        return FastDenoiser(net, batch_size)
    return CompiledDenoiser(net, batch_size) if compiled else with_fixed_weights(net)
