"""Depthwise convolutions of small images on processors, whose weight gradients torch takes long for."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

MAX_PIXELS = 64  # of an image; the products below grow with the square of it


def suits(x: torch.Tensor, w: torch.Tensor, stride: int, dilation: int) -> bool:
    """Whether `depthwise` can take the place of a convolution of x [N, C, H, W] with a weight w, and is faster."""
    depthwise = w.shape[0] == x.shape[1] and w.shape[1] == 1 and stride == dilation == 1
    small = x.device.type == "cpu" and x.dtype == torch.float32 and x.shape[2] * x.shape[3] <= MAX_PIXELS
    return depthwise and small and torch.is_grad_enabled() and w.requires_grad and not torch.is_autocast_enabled("cpu")


def depthwise(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Convolution of each channel of x [N, C, H, W] with its own kernel w [C, 1, k, k], k odd, of the same size."""
    return _Depthwise.apply(x, w)


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, w)
        return F.conv2d(x, w, padding=w.shape[2] // 2, groups=len(w))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        x, w = ctx.saved_tensors
        (grad,) = grads
        C, _, k, _ = w.shape
        grad_x = F.conv2d(grad, w.flip(2, 3), padding=k // 2, groups=C) if ctx.needs_input_grad[0] else None
        # The sum over images of what each pixel of the input means for each of the output, for all kernels at once,
        # and then of the pairs that are equally far apart.
        pairs = torch.bmm(_by_channel(grad).transpose(1, 2), _by_channel(x)).flatten(1)
        grad_w = pairs @ _distances(x.shape[2], x.shape[3], k)
        return grad_x, grad_w.reshape(w.shape)


def _by_channel(x: torch.Tensor) -> torch.Tensor:
    """[N, C, H, W] -> [C, N, H W]."""
    N, C, H, W = x.shape
    return x.permute(0, 2, 3, 1).reshape(-1, C).t().contiguous().view(C, N, H * W)


@functools.lru_cache(maxsize=16)
def _distances(height: int, width: int, k: int) -> torch.Tensor:
    """1 where a pair of pixels (output, input) is as far apart as a place of the kernel says: [(H W)^2, k^2]."""
    place = torch.arange(height * width)
    dy, dx = ((p[None, :] - p[:, None] + k // 2).flatten() for p in (place // width, place % width))
    inside = (dy >= 0) & (dy < k) & (dx >= 0) & (dx < k)
    return F.one_hot(torch.where(inside, dy * k + dx, k * k), k * k + 1)[:, : k * k].float()
