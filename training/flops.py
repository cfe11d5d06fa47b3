"""Cost of one evaluation of a network: parameters, operations by kind of layer, memory.

Operations are counted as in EDM2, Table 6: a multiply-add of a convolution, linear layer or attention is one, and so is
each element that an elementwise operation or norm takes; 10^9 of them are a "Gflop". Normalising the weights counts, as
an evaluation on its own does it.
"""

from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from training.networks.edm2 import Block, MPConv, Precond, effective_weights


def count_operations(net: nn.Module) -> Counter[str]:
    """Operations of one evaluation of one sample by kind of layer, most first; no values are computed.

    Args:
        net: a `Precond` or `ToyModel` on the meta device.
    """
    counter = _OperationCounter()
    hooks = []
    for module in net.modules():
        if isinstance(module, (MPConv, Block)):
            hooks.append(module.register_forward_pre_hook(lambda module, _args: counter.path.append(module)))
            hooks.append(module.register_forward_hook(lambda _module, _args, _out: counter.path.pop() and None))
    try:
        with torch.no_grad(), counter:
            net(*example_inputs(net, batch=1, device="meta"))
    finally:
        for hook in hooks:
            hook.remove()
    return Counter(dict(counter.counts.most_common()))


def example_inputs(net: Any, batch: int, device: torch.device | str) -> tuple[torch.Tensor, ...]:
    """Arguments of one evaluation."""
    with torch.device(device):
        if not isinstance(net, Precond):
            return torch.zeros(batch, net.init_kwargs["in_dim"]), torch.ones(batch)
        x = torch.zeros(batch, net.img_channels, net.img_resolution, net.img_resolution)
        return x, torch.ones(batch), torch.zeros(batch, net.label_dim)


def count_parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def peak_memory_per_sample(net: Precond, device: torch.device, batch: int = 8) -> int:
    """Bytes of CUDA memory that one more sample takes at the peak of an evaluation without gradients.

    Args:
        net: on `device`; computes in its `precision`.
        batch: samples of the smaller of the two evaluations that are compared, the other being twice as large.
    """
    peaks = []
    # As in sampling: what the weights take is the same whatever the batch.
    with torch.inference_mode(), effective_weights(net):
        for samples in (batch, 2 * batch):
            inputs = example_inputs(net, samples, device)
            torch.cuda.reset_peak_memory_stats(device)
            net(*inputs)
            peaks.append(torch.cuda.max_memory_allocated(device))
    return (peaks[1] - peaks[0]) // batch


class _OperationCounter(TorchDispatchMode):
    """Adds up what each operation of torch costs. `path` holds the modules that are being evaluated."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.path: list[nn.Module] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        operation = func._overloadpacket
        module = self.path[-1] if self.path else None
        if operation in flop_registry:
            flops = flop_registry[operation](*args, **(kwargs or {}), out_val=out)
            self.counts[self._kind(module, operation)] += flops // 2
        elif operation is torch.ops.aten.linalg_vector_norm:
            self._add_elements(module, args[0])
        elif torch.Tag.pointwise in func.tags and operation is not torch.ops.aten.clone:
            self._add_elements(module, out)
        return out

    def _add_elements(self, module: nn.Module | None, tensor: torch.Tensor) -> None:
        in_layer = isinstance(module, MPConv)
        self.counts["weight normalization" if in_layer else "elementwise"] += tensor.numel()

    @staticmethod
    def _kind(module: nn.Module | None, operation: Any) -> str:
        if isinstance(module, MPConv):
            kernel = "x".join(map(str, module.weight.shape[2:]))
            return f"{kernel} convolution" if kernel else "linear"
        return "resampling" if operation is torch.ops.aten.convolution else "attention"
