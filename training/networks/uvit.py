"""U-ViT: a vision transformer with long skip connections (Bao et al., CVPR 2023, arXiv 2209.12152).

Time, condition and noisy image patches are all tokens. Names of arguments and of the state dict are the published ones.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from dnnlib.errors import UserError


def timestep_embedding(t: torch.Tensor, dim: int, max_period: float = 10000) -> torch.Tensor:
    """Sinusoidal embedding [cos(t w_k), sin(t w_k)], w_k = max_period^(-k / h), k = 0, ..., h - 1, h = dim // 2.

    Args:
        t: time labels [N], any real type.

    Returns:
        float32 [N, dim]; an odd `dim` ends in zeros.
    """
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device) * (-math.log(max_period) / half)
    angles = torch.outer(t.float(), exponents.exp())
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, dim % 2))


def patchify(x: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Cut [N, C, h p, w p] into patches [N, h w, p p C], row by row; within one, channels vary fastest."""
    N, C, H, W = x.shape
    p = patch_size
    return x.reshape(N, C, H // p, p, W // p, p).permute(0, 2, 4, 3, 5, 1).reshape(N, -1, p * p * C)


def unpatchify(patches: torch.Tensor, grid: tuple[int, int], patch_size: int) -> torch.Tensor:
    """Put patches [N, h w, p p C] on a grid of (h, w) together to [N, C, h p, w p]: the inverse of `patchify`."""
    N, (h, w), p = len(patches), grid, patch_size
    return patches.reshape(N, h, w, p, p, -1).permute(0, 5, 1, 3, 2, 4).reshape(N, -1, h * p, w * p)


def truncated_normal_(p: torch.Tensor) -> None:
    """Fill with the published initial values, normal with standard deviation 0.02 and cut at 2."""
    if not p.is_meta:  # where it would take seconds, to import most of torch's compiler
        nn.init.trunc_normal_(p, std=0.02)


class Linear(nn.Linear):
    """A linear layer that computes in the type of its input, with the published initial values."""

    def reset_parameters(self) -> None:
        truncated_normal_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class LayerNorm(nn.LayerNorm):
    """Layer normalisation that takes and gives the type of its input; its statistics are float32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class PatchEmbed(nn.Module):
    """One token per patch: [N, C, h p, w p] -> [N, h w, D]."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # As kernel and stride are equal, the convolution is a linear layer on patches.
        weight = self.proj.weight.permute(0, 2, 3, 1).flatten(1)
        assert self.proj.bias is not None
        return F.linear(patchify(x, self.patch_size), weight.to(x.dtype), self.proj.bias.to(x.dtype))


class Attention(nn.Module):
    """Multi-head self-attention: softmax(q k^T / sqrt(d)) v."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        N, L, D = x.shape
        q, k, v = self.qkv(x).reshape(N, L, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(N, L, D))


class MLP(nn.Module):
    """Two linear layers with the exact GELU between them."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Transformer block; with `skip`, it first merges the tokens of an earlier block (paper, Section 3.1).

    Args:
        skip: whether `forward` takes these tokens.
        skip_norm: normalise both before they are merged. Not in the paper.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        skip: bool = False,
        skip_norm: bool = False,
    ):
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn = Attention(dim, num_heads, qkv_bias)
        self.norm2 = LayerNorm(dim)
        self.mlp = MLP(dim, int(dim * mlp_ratio))
        self.skip_norm = LayerNorm(2 * dim) if skip and skip_norm else None
        self.skip_linear = Linear(2 * dim, dim) if skip else None

    def forward(self, x: torch.Tensor, skip: torch.Tensor | None = None) -> torch.Tensor:
        if self.skip_linear is not None:
            assert skip is not None
            both = torch.cat([x, skip], dim=-1)
            x = self.skip_linear(both if self.skip_norm is None else self.skip_norm(both))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class UViT(nn.Module):
    """The network that predicts the noise, or the clean image, from a noisy image, its time label and a condition.

    Set `checkpoint_activations` to keep only what the blocks pass on for the backward pass, and compute what is inside
    them a second time.

    Args:
        img_size: height and width for which position embeddings are learned. At others they are interpolated.
        patch_size: p, height and width of a patch.
        in_chans: C, channels of the image.
        embed_dim: D, width of a token.
        depth: number of blocks; an even one counts one more, the middle block.
        num_heads: attention heads per block.
        mlp_ratio: width of the hidden layer of each block over D.
        qkv_bias: whether queries, keys and values have biases.
        qk_scale: without effect, as in the published computation; there for published configurations.
        mlp_time_embed: two linear layers after the sinusoidal embedding of the time label.
        num_classes: K, the number of classes, the null class included; -1 = no class condition.
        use_checkpoint: initial value of `checkpoint_activations`.
        conv: a 3x3 convolution on the output.
        skip: the long skip connections.
        skip_norm: layer normalisation before long skip connections are merged, which keeps deep networks stable.
        clip_dim: width of the context tokens of text; 0 = no text condition.
        num_clip_token: number of these tokens.

    Raises:
        UserError: arguments that do not fit together.
    """

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        mlp_time_embed: bool = False,
        num_classes: int = -1,
        use_checkpoint: bool = False,
        conv: bool = True,
        skip: bool = True,
        skip_norm: bool = False,
        clip_dim: int = 0,
        num_clip_token: int = 77,
    ):
        super().__init__()
        if embed_dim % num_heads:
            raise UserError(f"embed_dim {embed_dim} is not a multiple of num_heads {num_heads}")
        if img_size % patch_size:
            raise UserError(f"img_size {img_size} is not a multiple of patch_size {patch_size}")
        if num_classes > 0 and clip_dim > 0:
            raise UserError(f"num_classes {num_classes} and clip_dim {clip_dim}: a U-ViT takes classes or text")
        self.patch_size = patch_size
        self.grid_size = img_size // patch_size
        self.embed_dim = embed_dim
        self.checkpoint_activations = use_checkpoint
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.time_embed = nn.Identity()
        if mlp_time_embed:
            hidden = 4 * embed_dim
            self.time_embed = nn.Sequential(Linear(embed_dim, hidden), nn.SiLU(), Linear(hidden, embed_dim))
        self.label_emb = nn.Embedding(num_classes, embed_dim) if num_classes > 0 else None
        self.context_embed = Linear(clip_dim, embed_dim) if clip_dim > 0 else None
        self.extras = 1 + (num_classes > 0) + (num_clip_token if clip_dim > 0 else 0)
        self.pos_embed = nn.Parameter(torch.empty(1, self.extras + self.grid_size**2, embed_dim))
        truncated_normal_(self.pos_embed)

        def block(skip: bool = False) -> Block:
            return Block(embed_dim, num_heads, mlp_ratio, qkv_bias, skip, skip_norm)

        self.in_blocks = nn.ModuleList([block() for _ in range(depth // 2)])
        self.mid_block = block()
        self.out_blocks = nn.ModuleList([block(skip) for _ in range(depth // 2)])
        self.norm = LayerNorm(embed_dim)
        self.decoder_pred = Linear(embed_dim, patch_size**2 * in_chans)
        self.final_layer = nn.Conv2d(in_chans, in_chans, 3, padding=1) if conv else None

    def forward(self, x: torch.Tensor, label: torch.Tensor, cond: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            x: scaled noisy images [N, C, H, W], H and W multiples of p, in the type to compute in: float32, bfloat16 or
                float16. Weights can stay float32.
            label: time labels [N] or [1], any real type.
            cond: numbers of classes, int64 [N], or one-hot class vectors [N, K] (class K - 1 is the null class where
                there is one); or context tokens [N, tokens, clip_dim]; None for an unconditional network.

        Returns:
            Predicted noise or clean image, shaped like `x` and of its type.

        Raises:
            UserError: a size that patches do not fill, or a condition that the network does not take or lacks.
        """
        p, (H, W) = self.patch_size, x.shape[-2:]
        if H % p or W % p:
            raise UserError(f"images of {H}x{W} are not whole patches of {p}x{p}")
        grid = (H // p, W // p)
        time = self.time_embed(timestep_embedding(label, self.embed_dim).to(x.dtype)).expand(len(x), -1).unsqueeze(1)
        tokens = torch.cat([*self._extra_tokens(time, cond), self.patch_embed(x)], dim=1)
        tokens = tokens + self._positions(grid).to(x.dtype)
        skips = []
        for block in self.in_blocks:
            tokens = self._run(block, tokens)
            skips.append(tokens)
        tokens = self._run(self.mid_block, tokens)
        for block in self.out_blocks:
            tokens = self._run(block, tokens, skips.pop())
        patches = self.decoder_pred(self.norm(tokens))[:, self.extras :]
        out = unpatchify(patches, grid, p)
        if self.final_layer is None:
            return out
        bias = self.final_layer.bias
        assert bias is not None
        return F.conv2d(out, self.final_layer.weight.to(x.dtype), bias.to(x.dtype), padding=1)

    def _extra_tokens(self, time: torch.Tensor, cond: torch.Tensor | None) -> list[torch.Tensor]:
        """The tokens before the patches, in the published order: class and time, or time and text."""
        if self.label_emb is None and self.context_embed is None:
            if cond is not None:
                raise UserError("this network takes no condition: leave out the class or text")
            return [time]
        if cond is None:
            raise UserError("this network needs a condition for each image: a class (the null one is the last) or text")
        if self.label_emb is not None:
            weight = self.label_emb.weight
            label = cond.to(weight) @ weight if cond.is_floating_point() else self.label_emb(cond)
            return [label.to(time.dtype).unsqueeze(1), time]
        assert self.context_embed is not None
        if cond.shape[1:] != (self.extras - 1, self.context_embed.in_features):
            wanted = f"[{self.extras - 1}, {self.context_embed.in_features}]"
            raise UserError(f"contexts of {wanted} per image are needed, not {list(cond.shape[1:])}")
        return [time, self.context_embed(cond.to(time.dtype))]

    def _positions(self, grid: tuple[int, int]) -> torch.Tensor:
        """Position embeddings [1, extras + h w, D]; on other grids than the learned one, bicubically interpolated."""
        g = self.grid_size
        if grid == (g, g):
            return self.pos_embed
        extras, patches = self.pos_embed.float().split([self.extras, g * g], dim=1)
        patches = F.interpolate(unpatchify(patches, (g, g), 1), grid, mode="bicubic", align_corners=False)
        return torch.cat([extras, patchify(patches, 1)], dim=1)

    def _run(self, block: nn.Module, *tokens: torch.Tensor) -> torch.Tensor:
        if self.checkpoint_activations and torch.is_grad_enabled():
            return checkpoint(block, *tokens, use_reentrant=False)
        return block(*tokens)
