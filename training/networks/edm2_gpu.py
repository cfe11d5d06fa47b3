"""A finished EDM2 network for sampling on GPUs: with weights that are transformed once and, if wanted, compiled."""

import copy

import torch
from torch import nn

from training.networks.edm2 import Precond
from training.networks.edm2_layers import MPConv


@torch.no_grad()
def with_fixed_weights(net: Precond) -> Precond:
    """A copy of `net` that computes the same from effective weights, those of convolutions in the type computed in.

    It does not follow later changes of `net`, and cannot be trained.
    """
    fixed = copy.deepcopy(net).eval().requires_grad_(False)
    device = next(net.parameters()).device
    for conv in fixed.modules():
        if isinstance(conv, MPConv):
            w = conv.effective_weight()
            # Not in linear layers and the last convolution: they compute in float32, or multiply by a gain in it.
            if w.ndim == 4 and conv is not fixed.unet.out_conv:
                w = w.to(fixed.compute_dtype(device))
                w = w.contiguous(memory_format=torch.channels_last) if device.type == "cuda" else w
            # CUDA graphs read parameters where they are; other inputs they copy in each call.
            conv.shared_weight = nn.Parameter(w, requires_grad=False)
            conv.weight = nn.Parameter(w.new_empty([0]), requires_grad=False)
    return fixed


class CompiledDenoiser:
    """The denoiser of a finished network with its U-Net compiled, and on CUDA replayed as a CUDA graph.

    The first call compiles, which takes a minute or more; PyTorch keeps the kernels (TORCHINDUCTOR_CACHE_DIR).

    Args:
        net: the network. Later changes of it are not followed.
        batch_size: largest number of images per call. Smaller batches are filled up, so that all share one compilation.
    """

    def __init__(self, net: Precond, batch_size: int):
        self.batch_size = batch_size
        self.label_dim = net.label_dim
        self.net = with_fixed_weights(net)
        on_cuda = next(net.parameters()).device.type == "cuda"
        self.net.unet.compile(dynamic=False, mode="reduce-overhead" if on_cuda else "default")

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, class_labels: torch.Tensor | None = None) -> torch.Tensor:
        """As `Precond.forward`, without its second result."""
        assert len(x) <= self.batch_size, f"{len(x)} images, and at most {self.batch_size} were to come"
        sigma = torch.as_tensor(sigma).float().to(x.device).reshape(-1).expand(len(x))
        labels = x.new_zeros([1, self.label_dim]) if class_labels is None else class_labels
        labels = labels.reshape(-1, self.label_dim).expand(len(x), -1) if self.label_dim > 0 else None
        torch.compiler.cudagraph_mark_step_begin()
        D_x = self.net(self._filled(x), self._filled(sigma), None if labels is None else self._filled(labels))
        return D_x[: len(x)]

    def _filled(self, x: torch.Tensor) -> torch.Tensor:
        """As many rows as `batch_size`, the last one repeated."""
        return torch.cat([x, x[-1:].expand(self.batch_size - len(x), *x.shape[1:])])
