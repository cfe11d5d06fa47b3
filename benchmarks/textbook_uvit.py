"""U-ViT written plainly (arXiv 2209.12152): what its benchmarks compare with. Its state dict is that of
`training.networks.uvit.UViT`."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from training.config.uvit import UViTOptimizer


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(dim=-1) @ v


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        N, L, D = x.shape
        qkv = self.qkv(x).reshape(N, L, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return self.proj(attention(q, k, v).transpose(1, 2).reshape(N, L, D))


class MLP(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, skip: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim)
        self.skip_linear = nn.Linear(2 * dim, dim) if skip else None

    def forward(self, x: torch.Tensor, skip: torch.Tensor | None = None) -> torch.Tensor:
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, patch_size: int, in_chans: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class UViT(nn.Module):
    """Without a condition."""

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, depth: int, num_heads: int):
        super().__init__()
        self.patch_size, self.grid = patch_size, img_size // patch_size
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid**2, embed_dim))
        self.in_blocks = nn.ModuleList([Block(embed_dim, num_heads, skip=False) for _ in range(depth // 2)])
        self.mid_block = Block(embed_dim, num_heads, skip=False)
        self.out_blocks = nn.ModuleList([Block(embed_dim, num_heads, skip=True) for _ in range(depth // 2)])
        self.norm = nn.LayerNorm(embed_dim)
        self.decoder_pred = nn.Linear(embed_dim, patch_size**2 * in_chans)
        self.final_layer = nn.Conv2d(in_chans, in_chans, 3, padding=1)

    def forward(self, x: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        half = self.pos_embed.shape[-1] // 2
        angles = torch.outer(label, 10000 ** (-torch.arange(half) / half))
        time = torch.cat([angles.cos(), angles.sin()], dim=1)
        tokens = torch.cat([time.unsqueeze(1), self.patch_embed(x)], dim=1) + self.pos_embed
        skips = []
        for block in self.in_blocks:
            tokens = block(tokens)
            skips.append(tokens)
        tokens = self.mid_block(tokens)
        for block in self.out_blocks:
            tokens = block(tokens, skips.pop())
        patches = self.decoder_pred(self.norm(tokens))[:, 1:]
        N, g, p = len(x), self.grid, self.patch_size
        patches = patches.reshape(N, g, g, p, p, -1)
        return self.final_layer(torch.einsum("nhwpqc->nchpwq", patches).reshape(N, -1, g * p, g * p))


class Optimization:
    """AdamW with warm-up, and an exponential average of the weights, a parameter at a time."""

    def __init__(self, net: nn.Module, options: UViTOptimizer, ema_rate: float):
        self.weights = list(net.parameters())
        self.adam = torch.optim.AdamW(
            self.weights,
            lr=0.0,
            betas=(options.beta1, options.beta2),
            eps=options.eps,
            weight_decay=options.weight_decay,
            foreach=False,
        )
        self.average = [p.detach().clone() for p in self.weights]
        self.options, self.ema_rate, self.nimg = options, ema_rate, 0

    def step(self, loss: torch.Tensor, batch: int) -> None:
        self.adam.zero_grad()
        loss.backward()
        self.adam.param_groups[0]["lr"] = self.options.lr * min(self.nimg / self.options.warmup, 1)
        self.adam.step()
        self.nimg += batch
        with torch.no_grad():
            for average, weight in zip(self.average, self.weights, strict=True):
                average.copy_(self.ema_rate * average + (1 - self.ema_rate) * weight)
