"""Cost of one evaluation of a network: parameters, operations by kind of layer, memory.

Operations are counted as in EDM2, Table 6: a multiply-add of a convolution, linear layer or attention is one, and so is
each element that an elementwise operation or norm takes; 10^9 of them are a "Gflop". Normalising the weights counts, as
an evaluation on its own does it.
"""

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

Inputs = tuple[torch.Tensor, ...]


def count_operations(net: nn.Module, inputs: Inputs) -> Counter[str]:
    """Operations of one evaluation by kind of layer, most first; no values are computed.

    Args:
        net: on the meta device.
        inputs: its arguments, there, too.
    """
    counter = _OperationCounter()
    hooks = []
    for module in net.modules():
        if _is_layer(module):
            hooks.append(module.register_forward_pre_hook(lambda module, _args: counter.path.append(module)))
            hooks.append(module.register_forward_hook(lambda _module, _args, _out: counter.path.pop() and None))
    try:
        with torch.no_grad(), counter:
            net(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return Counter(dict(counter.counts.most_common()))


def count_parameters(net: nn.Module) -> int:
    """Number of trainable values."""
    return sum(p.numel() for p in net.parameters())


def peak_memory_per_sample(
    net: nn.Module,
    inputs: Callable[[int], Inputs],
    context: Callable[[nn.Module], AbstractContextManager],
    batch: int = 8,
) -> int:
    """Bytes of CUDA memory that one more sample takes at the peak of an evaluation without gradients.

    Args:
        net: on a GPU; computes in its `precision`.
        inputs: arguments of an evaluation of that many samples.
        context: entered once around the evaluations, as in sampling: what the weights take there is the same whatever
            the batch.
        batch: samples of the smaller of the two evaluations that are compared, the other being twice as large.
    """
    device = next(net.parameters()).device
    peaks = []
    with torch.inference_mode(), context(net):
        for samples in (batch, 2 * batch):
            arguments = inputs(samples)
            torch.cuda.reset_peak_memory_stats(device)
            net(*arguments)
            peaks.append(torch.cuda.max_memory_allocated(device))
    return (peaks[1] - peaks[0]) // batch


def _is_layer(module: nn.Module) -> bool:
    """Whether a module is a convolution or linear layer: one with a weight of two or more dimensions of its own."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim >= 2


class _OperationCounter(TorchDispatchMode):
    """Adds up the cost of each operation of torch. `path` holds the layers that are being evaluated."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.path: list[nn.Module] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        operation = func._overloadpacket
        layer = self.path[-1] if self.path else None
        if operation in flop_registry:
            flops = flop_registry[operation](*args, **(kwargs or {}), out_val=out)
            self.counts[self._kind(layer, operation)] += flops // 2
        elif operation is torch.ops.aten.linalg_vector_norm:
            self._add_elements(layer, args[0])
        elif torch.Tag.pointwise in func.tags and operation is not torch.ops.aten.clone:
            self._add_elements(layer, out)
        return out

    def _add_elements(self, layer: nn.Module | None, tensor: torch.Tensor) -> None:
        self.counts["elementwise" if layer is None else "weight normalization"] += tensor.numel()

    @staticmethod
    def _kind(layer: nn.Module | None, operation: Any) -> str:
        if layer is not None:
            kernel = "x".join(map(str, layer.get_parameter("weight").shape[2:]))
            return f"{kernel} convolution" if kernel else "linear"
        return "resampling" if operation is torch.ops.aten.convolution else "attention"
