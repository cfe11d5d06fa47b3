"""Magnitude-preserving layers of EDM2, and the normalisation of their weights.

Source: Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models", CVPR 2024
(arXiv 2312.02696). Equation and figure numbers refer to that paper.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

EPS = 1e-4  # in the denominator of normalisations


def normalize(x: torch.Tensor, dim: int | Sequence[int] | None = None, eps: float = EPS) -> torch.Tensor:
    """Scale `x` to unit root mean square over `dim` (default: all dimensions but the first); Eq. 47.

    The magnitude is computed in float32; the result has the dtype and shape of `x`.
    """
    dims = list(range(1, x.ndim)) if dim is None else [dim] if isinstance(dim, int) else list(dim)
    if torch.is_grad_enabled():
        return _Normalize.apply(x, dims, eps)
    _, _, inverse = _magnitudes(x, dims, eps)
    return x * inverse.to(x.dtype)


def _magnitudes(x: torch.Tensor, dims: list[int], eps: float) -> tuple[torch.Tensor, float, torch.Tensor]:
    """|x|, sqrt(n) and 1 / (|x| / sqrt(n) + eps), in float32."""
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=torch.float32)
    root = math.sqrt(math.prod([x.shape[d] for d in dims]))
    return norm, root, (norm * (1 / root)).add_(eps).reciprocal_()


class _Normalize(torch.autograd.Function):
    """x / m with m = |x| / sqrt(n) + eps, and its gradient grad / m - x (x . grad) / (|x| sqrt(n) m^2).

    Written out, it takes a fraction of the memory traffic of autograd's.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dims: list[int], eps: float) -> torch.Tensor:
        norm, root, inverse = _magnitudes(x, dims, eps)
        ctx.save_for_backward(x, norm, inverse)
        ctx.dims, ctx.root = dims, root
        return x * inverse.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        x, norm, inverse = ctx.saved_tensors
        dot = (x * grad).sum(ctx.dims, keepdim=True, dtype=torch.float32)
        # One factor 1 / m comes last: both could be more than float16 holds.
        along = dot * inverse / (norm * ctx.root).clamp(min=torch.finfo(torch.float32).tiny)
        return torch.addcmul(grad, x, along.to(x.dtype), value=-1).mul_(inverse.to(x.dtype)), None, None


def resample(x: torch.Tensor, f: Sequence[float] = (1, 1), mode: str = "keep") -> torch.Tensor:
    """Halve ('down'), double ('up') or keep ('keep') the resolution of [N, C, H, W] with the FIR filter `f`.

    `f` has an even number of taps; it is normalised to unit sum and applied along both axes.
    """
    if mode == "keep":
        return x
    assert len(f) % 2 == 0, f"the filter needs an even number of taps, not {len(f)}"
    # Filled in place: copying them to a GPU would make it wait.
    taps = torch.cat([x.new_full([1], tap / sum(f), dtype=torch.float32) for tap in f])
    channels, pad = x.shape[1], (len(f) - 1) // 2
    kernel = torch.outer(taps, taps).to(x.dtype).expand(channels, 1, -1, -1)
    if mode == "down":
        return F.conv2d(x, kernel, groups=channels, stride=2, padding=pad)
    assert mode == "up", mode
    return F.conv_transpose2d(x, kernel * 4, groups=channels, stride=2, padding=pad)


def mp_silu(x: torch.Tensor) -> torch.Tensor:
    """SiLU divided by its standard deviation under a unit normal (Eq. 81)."""
    return F.silu(x).mul_(1 / 0.596)


def mp_sum(a: torch.Tensor, b: torch.Tensor, t: float = 0.5) -> torch.Tensor:
    """Blend of two uncorrelated unit-magnitude tensors, `t` being the share of `b` (Eq. 88)."""
    norm = math.sqrt((1 - t) ** 2 + t**2)
    return torch.lerp(a, b, t).mul_(1 / norm)  # in place: quicker than in a tensor of its own


def mp_cat(a: torch.Tensor, b: torch.Tensor, dim: int = 1, t: float = 0.5) -> torch.Tensor:
    """Concatenation in which `a` and `b` contribute in the ratio (1 - t) : t whatever their sizes (Eq. 103)."""
    Na, Nb = a.shape[dim], b.shape[dim]
    C = math.sqrt((Na + Nb) / ((1 - t) ** 2 + t**2))
    return torch.cat([a * (C / math.sqrt(Na) * (1 - t)), b * (C / math.sqrt(Nb) * t)], dim=dim)


def _drawn(draw: Callable[..., torch.Tensor], shape: Sequence[int], scale: float = 1) -> torch.Tensor:
    """draw(*shape) * scale. On the meta device that would take a second, to import most of torch's compiler."""
    values = torch.empty(*shape)
    return values if values.is_meta else draw(*shape) * scale


class MPFourier(nn.Module):
    """Random Fourier features of unit magnitude (Eq. 75): [N] -> [N, num_channels]."""

    freqs: torch.Tensor
    phases: torch.Tensor

    def __init__(self, num_channels: int, bandwidth: float = 1):
        super().__init__()
        self.register_buffer("freqs", _drawn(torch.randn, [num_channels], 2 * math.pi * bandwidth))
        self.register_buffer("phases", _drawn(torch.rand, [num_channels], 2 * math.pi))

    def waves(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Frequencies and phases, float32 [num_channels]."""
        return self.freqs.float(), self.phases.float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        freqs, phases = self.waves()
        return (math.sqrt(2) * (torch.outer(x.float(), freqs) + phases).cos()).to(x.dtype)


class MPPositional(nn.Module):
    """Cosines and sines of fixed frequencies, of unit magnitude where they come in pairs: [N] -> [N, num_channels].

    Frequencies fall geometrically from 1 to 1e-4 (Vaswani et al. 2017, arXiv 1706.03762, Section 3.5), so that features
    change slowly from one noise level to the next.
    """

    def __init__(self, num_channels: int):
        super().__init__()
        self.num_channels = num_channels

    def waves(self, device: torch.device | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Frequencies and phases, as of `MPFourier`: a cosine and a sine of each frequency, side by side."""
        i = torch.arange(self.num_channels, device=device)
        freqs = torch.exp((i // 2) * (-2 * math.log(1e4) / self.num_channels))
        return freqs, (i % 2) * (-math.pi / 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        freqs, phases = self.waves(x.device)
        return (math.sqrt(2) * (torch.outer(x.float(), freqs) + phases).cos()).to(x.dtype)


class MPConv(nn.Module):
    """Bias-free convolution (or linear layer, `kernel=[]`) with normalised weights (Eq. 47).

    The stored weight is [out, in, *kernel]. What multiplies the input is the effective weight
    normalize(weight) / sqrt(fan_in), times `gain`.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: Sequence[int] = ()):
        super().__init__()
        self.weight = nn.Parameter(_drawn(torch.randn, [out_channels, in_channels, *kernel]))
        self.shared_weight: torch.Tensor | None = None  # set inside `effective_weights`
        self.is_effective = False  # whether `weight` is the effective weight already, see `hold_effective_weights`

    def effective_weight(self) -> torch.Tensor:
        """normalize(weight) / sqrt(fan_in), that is, w / (|w| + eps sqrt(fan_in))."""
        if self.is_effective:
            return self.weight
        (norm,), (root,) = _row_norms([self.weight]), _fan_in_roots([self.weight])
        return self.weight / (norm + EPS * root)

    def forward(
        self,
        x: torch.Tensor,
        gain: float | torch.Tensor = 1,
        order: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """
        Args:
            order: rearranges the rows of the weight, and with them the channels of the output.
        """
        w = self.effective_weight() if self.shared_weight is None else self.shared_weight
        if isinstance(gain, torch.Tensor) or gain != 1:
            w = w * gain
        if order is not None:
            w = order(w)
        w = w.to(x.dtype)
        if w.ndim == 2:
            return x @ w.t()
        if w.shape[-1] == 1 and x.device.type == "cpu":  # where a product of matrices is quicker, as are its gradients
            return F.linear(x.permute(0, 2, 3, 1), w.flatten(1)).permute(0, 3, 1, 2)
        return F.conv2d(x, w, padding=w.shape[-1] // 2)


def _mp_convs(net: nn.Module) -> list[MPConv]:
    return [m for m in net.modules() if isinstance(m, MPConv)]


def _fan_in_roots(weights: Sequence[torch.Tensor]) -> list[float]:
    return [math.sqrt(math.prod(w.shape[1:])) for w in weights]  # also of no rows, as processes may hold


def _row_norms(weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """|w| of each row, [out, 1, ...]."""
    return [torch.linalg.vector_norm(w, dim=list(range(1, w.ndim)), keepdim=True) for w in weights]


@torch.no_grad()
def normalize_weights_(net: nn.Module) -> None:
    """Forced weight normalisation (Eq. 66), in place: due once per optimiser step, before its first forward pass."""
    weights: list[torch.Tensor] = [conv.weight for conv in _mp_convs(net)]
    _normalize_rows_(weights, _row_norms(weights))


@contextmanager
def effective_weights(net: nn.Module, normalize_first: bool = False) -> Iterator[None]:
    """Inside, each effective weight of `net` is computed once instead of in every forward pass.

    With `normalize_first`, `normalize_weights_` is done on the way. The parameters must not change inside. Where
    gradients are recorded, any number of backward passes may run inside; on leaving, what they found is passed on to
    the parameters' `.grad` in one step, so the gradients are complete only after the block.
    """
    convs = _mp_convs(net)
    weights: list[torch.Tensor] = [conv.weight for conv in convs]
    with torch.no_grad():
        norms = _row_norms(weights)
        if normalize_first:
            _normalize_rows_(weights, norms)
        magnitudes = torch._foreach_add(norms, [EPS * root for root in _fan_in_roots(weights)])
        shared = torch._foreach_div(weights, magnitudes)
    for conv, w in zip(convs, shared, strict=True):
        conv.shared_weight = w.requires_grad_(conv.weight.requires_grad and torch.is_grad_enabled())
    try:
        yield
        found = [
            (w, norm, magnitude, e.grad)
            for w, norm, magnitude, e in zip(weights, norms, magnitudes, shared, strict=True)
            if e.grad is not None
        ]
        if found:
            _pass_on_gradients(*map(list, zip(*found, strict=True)))
    finally:
        for conv in convs:
            conv.shared_weight = None


def hold_effective_weights(net: nn.Module) -> None:
    """From now on, the weights of `net` are effective ones, as another network with the stored ones provides them."""
    for conv in _mp_convs(net):
        conv.is_effective = True


def shared_weights(net: nn.Module) -> dict[str, torch.Tensor | None]:
    """The effective weights inside `effective_weights`, by the names of the stored ones; outside, None for each."""
    convs = {name: module for name, module in net.named_modules() if isinstance(module, MPConv)}
    return {f"{name}.weight": conv.shared_weight for name, conv in convs.items()}


# What follows works on lists, which a GPU goes through with few kernels; norms have a value per row, [out, 1, ...].


def _normalize_rows_(weights: list[torch.Tensor], norms: list[torch.Tensor]) -> None:
    """Forced weight normalisation of weights, and of their norms with them."""
    scales = torch._foreach_div(norms, _fan_in_roots(weights))
    torch._foreach_add_(scales, EPS)
    torch._foreach_reciprocal_(scales)
    torch._foreach_mul_(weights, scales)
    torch._foreach_mul_(norms, scales)


@torch.no_grad()
def _pass_on_gradients(
    weights: list[torch.Tensor], norms: list[torch.Tensor], magnitudes: list[torch.Tensor], found: list[torch.Tensor]
) -> None:
    """Add the gradients of weights, computed from those of the effective ones, to the `.grad` of weights.

    Row by row, the effective weight is e = w / m with m = |w| + eps sqrt(fan_in), so the gradient is
    grad / m - w (w . grad) / (|w| m^2). Written out, it takes a quarter of the memory traffic of autograd's.

    Args:
        norms: |w|.
        magnitudes: m.
        found: gradients of the effective weights.
    """
    grads: list[torch.Tensor] = []
    for w in weights:
        if w.grad is None:
            w.grad = torch.zeros_like(w)
        grads.append(w.grad)
    along = [(w * grad).sum(list(range(1, w.ndim)), keepdim=True) for w, grad in zip(weights, found, strict=True)]
    inverses = torch._foreach_reciprocal(magnitudes)
    torch._foreach_mul_(along, torch._foreach_mul(inverses, inverses))
    torch._foreach_div_(along, torch._foreach_clamp_min(norms, torch.finfo(torch.float32).tiny))
    torch._foreach_addcmul_(grads, found, inverses)
    torch._foreach_addcmul_(grads, weights, along, value=-1)
