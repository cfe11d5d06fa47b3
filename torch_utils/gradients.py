"""Gradients in one piece of memory, and parameters with the channels last."""

from collections.abc import Iterable

import torch

from torch_utils import distributed


def flat_gradients(parameters: Iterable[torch.nn.Parameter]) -> torch.Tensor:
    """One vector of zeros, float32 [number of weights], of which the gradients of all parameters become views.

    So one operation clears, sums or checks them all.
    """
    params = [p for p in parameters if p.requires_grad]
    flat = torch.zeros(sum(p.numel() for p in params), device=params[0].device)
    for p, part in zip(params, flat.split([p.numel() for p in params]), strict=True):
        p.grad = part.as_strided(p.shape, p.stride())  # in the memory format of the parameter
    return flat


def flat_weights(parameters: Iterable[torch.nn.Parameter]) -> torch.Tensor:
    """One vector of all weights, float32 [number of weights], of which the parameters become views.

    Its order is that of `flat_gradients`. So one operation changes them all.
    """
    params = [p for p in parameters if p.requires_grad]
    flat = torch.empty(sum(p.numel() for p in params), device=params[0].device)
    for p, part in zip(params, flat.split([p.numel() for p in params]), strict=True):
        p.data = part.as_strided(p.shape, p.stride()).copy_(p.detach())
    return flat


def use_channels_last(net: torch.nn.Module) -> None:
    """Store the weights of convolutions as their activations are stored, so that none has to be converted."""
    for p in net.parameters():
        if p.ndim == 4:
            p.data = p.data.contiguous(memory_format=torch.channels_last)


def storage_order(p: torch.Tensor) -> tuple[int, ...]:
    """The order of dimensions in which a tensor is contiguous: with the channels last where it is after
    `use_channels_last`, else as it is."""
    last = p.ndim == 4 and p.is_contiguous(memory_format=torch.channels_last)
    return (0, 2, 3, 1) if last else tuple(range(p.ndim))


def channels_last_views(parameters: Iterable[torch.nn.Parameter]) -> list[torch.Tensor]:
    """Parameters and their gradients in `storage_order`. Fused Adam would copy tensors that are not contiguous."""
    views = []
    for p in parameters:
        if p.grad is not None:
            order = storage_order(p)
            view = p.detach().permute(order)
            view.grad = p.grad.permute(order)
            views.append(view)
    return views


class Totals:
    """Figures of a vector of gradients where each process has those of all weights.

    `torch_utils.sharding.TotalsOfPieces` has them where each has those of a part.
    """

    def sum_(self, gradients: torch.Tensor) -> None:
        """Sum the gradients over processes, in place."""
        distributed.sum_gradients_(gradients)

    def norm(self, gradients: torch.Tensor) -> torch.Tensor:
        """Euclidean norm of the gradients of all weights, float32 []."""
        return norm_of(gradients)

    def count_nonfinite(self, gradients: torch.Tensor) -> torch.Tensor:
        """Number of NaN and infinities among the gradients of all weights, int64 []."""
        return count_nonfinite(gradients)


def count_nonfinite(values: torch.Tensor) -> torch.Tensor:
    """Number of NaN and infinities, int64 [], without waiting for a GPU."""
    if values.device.type == "cpu" and values.sum().isfinite():  # any would spoil the sum, a quarter of the work
        return torch.zeros([], dtype=torch.int64)
    return (~values.isfinite()).sum()


def replace_nonfinite_(values: torch.Tensor) -> None:
    """Set NaN and infinities to 0, in place."""
    torch.nan_to_num(values, nan=0, posinf=0, neginf=0, out=values)


def clip_by_norm_(gradients: torch.Tensor, max_norm: float, norm: torch.Tensor | None = None) -> torch.Tensor:
    """Scale a vector of gradients down to the norm `max_norm`, in place; returns its norm before, float32 [].

    A negative `max_norm` changes nothing. A GPU is not waited for.

    Args:
        norm: of the gradients of which the vector is a part; None = of the vector.
    """
    norm = norm_of(gradients) if norm is None else norm
    if max_norm >= 0:
        gradients.mul_((max_norm / (norm + 1e-6)).clamp(max=1))
    return norm


def norm_of(vector: torch.Tensor) -> torch.Tensor:
    """Euclidean norm of a long vector, [].

    In parts on CPUs, where torch adds up squares one by one: of 15 million float32 numbers, 6e-4 of the norm are lost.
    """
    if vector.device.type != "cpu":
        return torch.linalg.vector_norm(vector)
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(vector.split(1 << 16))))
