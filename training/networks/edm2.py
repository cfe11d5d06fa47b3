"""The EDM2 network: the U-Net of config G and its preconditioning.

Source: Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models", CVPR 2024
(arXiv 2312.02696). Equation and figure numbers refer to that paper.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from dnnlib.errors import UserError
from training.conditioning import Conditioning, DataSpec
from training.config.edm2 import EDM2Network
from training.networks.dropout import LayerWithDropout
from training.networks.edm2_layers import (
    MPConv,
    MPFourier,
    MPPositional,
    mp_cat,
    mp_silu,
    mp_sum,
    normalize,
    resample,
)
from training.preconditioning import PRECISIONS, compute_dtype, edm_coefficients

# Pixels up to which a processor is faster with plain attention than with the fused one, above all in bfloat16.
MAX_PLAIN_TOKENS = 256


# ---------------------------------------------------------------------------------------------------------
# U-Net


class Block(LayerWithDropout):
    """Residual block with optional self-attention (Fig. 21, right).

    Args:
        flavor: 'enc' normalises its input pixel-wise; 'dec' does not.
        resample_mode: 'keep', 'down' or 'up', applied first.
        attention: whether self-attention follows.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        flavor: str = "enc",
        resample_mode: str = "keep",
        resample_filter: Sequence[float] = EDM2Network.resample_filter,
        attention: bool = False,
        channels_per_head: int = EDM2Network.channels_per_head,
        dropout: float = EDM2Network.dropout,
        res_balance: float = EDM2Network.res_balance,
        attn_balance: float = EDM2Network.attn_balance,
        clip_act: float | None = EDM2Network.clip_act,
    ):
        super().__init__()
        self.flavor = flavor
        self.resample_mode = resample_mode
        self.resample_filter = resample_filter
        # At least one head, so that attention asked for on a narrow network is there, and heads of equal size.
        most_heads = max(out_channels // channels_per_head, 1)
        self.num_heads = next(h for h in range(most_heads, 0, -1) if out_channels % h == 0) if attention else 0
        self.dropout = dropout
        self.res_balance = res_balance
        self.attn_balance = attn_balance
        self.clip_act = clip_act
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.conv_res0 = MPConv(out_channels if flavor == "enc" else in_channels, out_channels, kernel=[3, 3])
        self.emb_linear = MPConv(emb_channels, out_channels)
        self.conv_res1 = MPConv(out_channels, out_channels, kernel=[3, 3])
        self.conv_skip = MPConv(in_channels, out_channels, kernel=[1, 1]) if in_channels != out_channels else None
        self.attn_qkv = MPConv(out_channels, out_channels * 3, kernel=[1, 1]) if attention else None
        self.attn_proj = MPConv(out_channels, out_channels, kernel=[1, 1]) if attention else None

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        x = resample(x, f=self.resample_filter, mode=self.resample_mode)
        if self.flavor == "enc":
            if self.conv_skip is not None:
                x = self.conv_skip(x)
            x = normalize(x, dim=1)

        # Residual branch, modulated by the embedding.
        y = self.conv_res0(mp_silu(x))
        c = self.emb_linear(emb, gain=self.emb_gain) + 1
        y = mp_silu(y * c[:, :, None, None].to(y.dtype))
        y = self.conv_res1(self.drop(y))
        if self.flavor == "dec" and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = mp_sum(x, y, t=self.res_balance)

        if self.attn_qkv is not None and self.attn_proj is not None:
            x = mp_sum(x, self.attn_proj(self.attention(self.attn_qkv(x, order=self.qkv_first))), t=self.attn_balance)
        if self.clip_act is not None:
            x = F.hardtanh(x, -self.clip_act, self.clip_act)  # clamp, with a cheaper gradient
        return x

    def qkv_first(self, w: torch.Tensor) -> torch.Tensor:
        """Rows in the order (head, channel, q|k|v) -> (q|k|v, head, channel), in which channels lie side by side."""
        return w.unflatten(0, (self.num_heads, -1, 3)).movedim(2, 0).flatten(0, 2)

    def attention(self, qkv: torch.Tensor) -> torch.Tensor:
        """Cosine attention over all pixels: [N, 3C, H, W], ordered by `qkv_first`, -> [N, C, H, W]."""
        N, C3, H, W = qkv.shape
        qkv = qkv.permute(0, 2, 3, 1).reshape(N, H * W, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).contiguous()
        q, k, v = normalize(qkv, dim=4)  # each [N, heads, pixels, C / heads]
        if qkv.device.type == "cpu" and H * W <= MAX_PLAIN_TOKENS:
            weights = (q * (1 / math.sqrt(q.shape[3])) @ k.transpose(2, 3)).softmax(dim=3)
            y = weights @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        return y.transpose(1, 2).reshape(N, H, W, C3 // 3).permute(0, 3, 1, 2)


class UNet(nn.Module):
    """F(x, c_noise, labels) of EDM2, config G (Fig. 21, left).

    Args:
        img_resolution: height and width of the images; divisible by 2 ** (levels - 1).
        img_channels: number of image channels.
        label_dim: length of the class vectors, 0 = unconditional.
        model_channels: base number of channels.
        channel_mult: multiple of `model_channels` at each level, finest first.
        channel_mult_noise: multiple for the noise embedding (default: that of the finest level).
        channel_mult_emb: multiple for the final embedding (default: the largest of all levels).
        num_blocks: residual blocks per level.
        attn_resolutions: resolutions at which blocks have self-attention.
        label_balance: share of the class embedding against the noise embedding.
        concat_balance: share of the skip connections against the main path.
        noise_embedding: 'fourier' or 'positional', see `MPFourier` and `MPPositional`.
        noise_bandwidth: standard deviation of the frequencies of the former.
        block_kwargs: passed on to every `Block`.

    Set `checkpoint_activations` to keep only what the blocks pass on for the backward pass, and compute what is inside
    of them once more (Chen et al. 2016, arXiv 1604.06174): the same gradients in less memory and more time.

    Raises:
        UserError: the resolution cannot be halved as often as there are levels, or an unknown noise embedding.
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int,
        model_channels: int = EDM2Network.model_channels,
        channel_mult: Sequence[int] = EDM2Network.channel_mult,
        channel_mult_noise: int | None = EDM2Network.channel_mult_noise,
        channel_mult_emb: int | None = EDM2Network.channel_mult_emb,
        num_blocks: int = EDM2Network.num_blocks,
        attn_resolutions: Sequence[int] = EDM2Network.attn_resolutions,
        label_balance: float = EDM2Network.label_balance,
        concat_balance: float = EDM2Network.concat_balance,
        noise_embedding: str = EDM2Network.noise_embedding,
        noise_bandwidth: float = EDM2Network.noise_bandwidth,
        **block_kwargs,
    ):
        super().__init__()
        if img_resolution % 2 ** (len(channel_mult) - 1) != 0:
            raise UserError(
                f"resolution {img_resolution} is not divisible by {2 ** (len(channel_mult) - 1)}, "
                f"as a network of {len(channel_mult)} levels needs: use fewer levels (--channel-mult)"
            )
        if noise_embedding not in ("fourier", "positional"):
            raise UserError(f"noise_embedding must be fourier or positional, not {noise_embedding!r}")
        self.checkpoint_activations = False
        self.label_dim = label_dim
        self.label_balance = label_balance
        self.concat_balance = concat_balance
        cblock = [model_channels * m for m in channel_mult]
        cnoise = model_channels * channel_mult_noise if channel_mult_noise is not None else cblock[0]
        cemb = model_channels * channel_mult_emb if channel_mult_emb is not None else max(cblock)
        self.out_gain = nn.Parameter(torch.zeros([]))

        random = noise_embedding == "fourier"
        self.emb_fourier = MPFourier(cnoise, noise_bandwidth) if random else MPPositional(cnoise)
        self.emb_noise = MPConv(cnoise, cemb)
        self.emb_label = MPConv(label_dim, cemb) if label_dim > 0 else None

        def block(cin: int, cout: int, **kwargs) -> Block:
            return Block(cin, cout, cemb, **kwargs, **block_kwargs)

        # Encoder. The image gets a constant channel in place of biases.
        self.enc = nn.ModuleDict()
        cout = img_channels + 1
        skip_channels = []
        for level, channels in enumerate(cblock):
            res = img_resolution >> level
            if level == 0:
                self.enc[f"{res}x{res}_conv"] = MPConv(cout, channels, kernel=[3, 3])
                cout = channels
            else:
                self.enc[f"{res}x{res}_down"] = block(cout, cout, flavor="enc", resample_mode="down")
            skip_channels.append(cout)
            for idx in range(num_blocks):
                attention = res in attn_resolutions
                self.enc[f"{res}x{res}_block{idx}"] = block(cout, channels, flavor="enc", attention=attention)
                cout = channels
                skip_channels.append(cout)

        # Decoder: mirrors the encoder, with one more block per level to consume all skips.
        self.dec = nn.ModuleDict()
        for level, channels in reversed(list(enumerate(cblock))):
            res = img_resolution >> level
            if level == len(cblock) - 1:
                self.dec[f"{res}x{res}_in0"] = block(cout, cout, flavor="dec", attention=True)
                self.dec[f"{res}x{res}_in1"] = block(cout, cout, flavor="dec")
            else:
                self.dec[f"{res}x{res}_up"] = block(cout, cout, flavor="dec", resample_mode="up")
            for idx in range(num_blocks + 1):
                cin = cout + skip_channels.pop()
                attention = res in attn_resolutions
                self.dec[f"{res}x{res}_block{idx}"] = block(cin, channels, flavor="dec", attention=attention)
                cout = channels
        self.out_conv = MPConv(cout, img_channels, kernel=[3, 3])

    def forward(self, x: torch.Tensor, noise_labels: torch.Tensor, class_labels: torch.Tensor | None) -> torch.Tensor:
        """
        Args:
            x: c_in * noisy image, [N, C, H, W] in the dtype to compute in.
            noise_labels: c_noise, float32 [N] or [1].
            class_labels: [N, label_dim] or [1, label_dim]; None if unconditional.
        """
        emb = self.emb_noise(self.emb_fourier(noise_labels))
        if self.emb_label is not None:
            assert class_labels is not None
            # One-hot labels scaled to unit magnitude.
            emb = mp_sum(emb, self.emb_label(class_labels * math.sqrt(self.label_dim)), t=self.label_balance)
        emb = mp_silu(emb).to(x.dtype)

        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        if x.device.type != "mps":  # channels_last lets pixel norms and convolutions run along contiguous memory
            x = x.contiguous(memory_format=torch.channels_last)

        def run(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
            if self.checkpoint_activations and torch.is_grad_enabled():
                return checkpoint(block, x, emb, use_reentrant=False)
            return block(x, emb)

        skips = []
        for module in self.enc.values():
            x = module(x) if isinstance(module, MPConv) else run(module, x)
            skips.append(x)
        for name, module in self.dec.items():
            if "block" in name:
                x = mp_cat(x, skips.pop(), t=self.concat_balance)
            x = run(module, x)
        return self.out_conv(x, gain=self.out_gain)


# ---------------------------------------------------------------------------------------------------------
# Preconditioning and uncertainty


class Precond(nn.Module):
    """The EDM2 denoiser D(x; sigma, labels) around a `UNet`, with the uncertainty u(sigma) of Eq. 17.

    Args:
        img_resolution, img_channels, label_dim: shape of images and class vectors (0 = unconditional).
        precision: 'fp32', 'bf16' or 'fp16': what the U-Net computes in (see `preconditioning.compute_dtype`).
            Weights stay float32.
        sigma_data: standard deviation of the data.
        logvar_channels: width of the uncertainty estimator.
        unet_kwargs: passed on to `UNet`.
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int,
        precision: str = "fp16",
        sigma_data: float = EDM2Network.sigma_data,
        logvar_channels: int = EDM2Network.logvar_channels,
        **unet_kwargs,
    ):
        super().__init__()
        if precision not in PRECISIONS:
            raise UserError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
        self.init_kwargs = dict(
            img_resolution=img_resolution,
            img_channels=img_channels,
            label_dim=label_dim,
            sigma_data=sigma_data,
            logvar_channels=logvar_channels,
            **unet_kwargs,
        )
        self.img_resolution = img_resolution
        self.img_channels = img_channels
        self.label_dim = label_dim
        self.precision = precision
        self.sigma_data = sigma_data
        self.unet = UNet(img_resolution, img_channels, label_dim, **unet_kwargs)
        self.logvar_fourier = MPFourier(logvar_channels)
        self.logvar_linear = MPConv(logvar_channels, 1)

    @property
    def spec(self) -> DataSpec:
        """What its images look like, and what conditions it takes."""
        conditioning = Conditioning.of_labels(self.label_dim)
        return DataSpec(channels=self.img_channels, resolution=self.img_resolution, conditioning=conditioning)

    def compute_dtype(self, device: torch.device) -> torch.dtype:
        """What the U-Net computes in on a device."""
        return compute_dtype(self.precision, device)

    def forward(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        return_logvar: bool = False,
    ):
        """
        Args:
            x: noisy images [N, img_channels, img_resolution, img_resolution].
            sigma: noise level, one element or [N].
            class_labels: [N, label_dim] or [1, label_dim]. None on a conditional network means the zero vector.
            return_logvar: also return u(sigma).

        Returns:
            D(x; sigma), float32, shaped like `x`; with `return_logvar` also float32 [N, 1, 1, 1] (or [1, 1, 1, 1]).
        """
        x = x.float()
        sigma = torch.as_tensor(sigma).float().to(x.device).reshape(-1, 1, 1, 1)
        if self.label_dim == 0:
            class_labels = None
        elif class_labels is None:
            class_labels = torch.zeros([1, self.label_dim], device=x.device)
        else:
            class_labels = class_labels.float().reshape(-1, self.label_dim)
        c = edm_coefficients(sigma, self.sigma_data)
        F_x = self.unet((c.c_in * x).to(self.compute_dtype(x.device)), c.c_noise.flatten(), class_labels)
        D_x = c.c_skip * x + c.c_out * F_x.float()
        if return_logvar:
            logvar = self.logvar_linear(self.logvar_fourier(c.c_noise.flatten())).reshape(-1, 1, 1, 1)
            return D_x, logvar
        return D_x
