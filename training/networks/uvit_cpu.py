"""A finished U-ViT for sampling on processors: linear layers with weights in oneDNN's layout and in the type to compute
in, and GELU computed with the layer before it, while its results are in the cache.
"""

import copy
import functools

import torch
import torch.nn.functional as F
from torch import nn

from training.denoiser import Denoiser
from training.networks.uvit import Block, UViT
from training.networks.uvit_denoiser import UViTDenoiser
from training.preconditioning import compute_dtype


class PackedLinear(nn.Module):
    """A finished linear layer, and GELU on its results if wanted: [..., in] -> [..., out].

    Args:
        dtype: of input, weights and output.
        rows: product of the input's other dimensions, which the layout is chosen for; right for all.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype, rows: int, gelu: bool = False):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().to(dtype).contiguous(), rows)
        self.bias = None if linear.bias is None else linear.bias.detach().to(dtype)
        self.pointwise = "gelu" if gelu else "none"
        self.linear = torch.ops.mkldnn._linear_pointwise.default

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x, self.weight, self.bias, self.pointwise, [], "none")  # the exact GELU, not the one by tanh


@functools.cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether this PyTorch and processor have these layers; the operators are private, so they are tried."""
    linear = nn.Linear(32, 16)
    x = torch.linspace(-1, 1, 64).reshape(2, 32)
    try:
        result = PackedLinear(linear, dtype, 2, gelu=True)(x.to(dtype))
    except (AttributeError, RuntimeError, TypeError):
        return False
    return torch.allclose(result.float(), F.gelu(linear(x)), rtol=0, atol=0.1)


@torch.no_grad()
def with_packed_weights(net: UViTDenoiser, batch_size: int) -> UViTDenoiser:
    """A copy of a network that computes the same up to rounding. It follows no later changes and cannot be trained."""
    dtype = compute_dtype(net.precision, torch.device("cpu"))
    packed = copy.deepcopy(net).eval().requires_grad_(False)
    unet = packed.net
    assert isinstance(unet, UViT)
    rows = batch_size * unet.pos_embed.shape[1]
    for block in [*unet.in_blocks, unet.mid_block, *unet.out_blocks]:
        assert isinstance(block, Block)
        attn, mlp = block.attn, block.mlp
        attn.register_module("qkv", PackedLinear(attn.qkv, dtype, rows))
        attn.register_module("proj", PackedLinear(attn.proj, dtype, rows))
        hidden = PackedLinear(mlp.fc1, dtype, rows, gelu=True)
        block.register_module("mlp", nn.Sequential(hidden, PackedLinear(mlp.fc2, dtype, rows)))
        if block.skip_linear is not None:
            block.register_module("skip_linear", PackedLinear(block.skip_linear, dtype, rows))
    return packed


def for_sampling(net: UViTDenoiser, batch_size: int, _compiled: bool = False) -> Denoiser:
    """The fastest form of a finished network, which does not follow its later changes."""
    device = next(net.parameters()).device
    packs = device.type == "cpu" and can_pack(compute_dtype(net.precision, device))
    return with_packed_weights(net, batch_size) if packs else net
