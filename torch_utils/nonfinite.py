"""Where NaN and infinities come from."""

from collections.abc import Callable, Iterable
from typing import Any

import torch


def nonfinite_by_name(tensors: Iterable[tuple[str, torch.Tensor | None]]) -> dict[str, int]:
    """How many NaN and infinities the tensors hold, of those that hold any, by name."""
    found = [(name, (~x.isfinite()).sum()) for name, x in tensors if x is not None]
    counts = torch.stack([count for _, count in found]).tolist()
    return {name: count for (name, _), count in zip(found, counts, strict=True) if count > 0}


def nonfinite_origin(net: torch.nn.Module, run: Callable[[], Any]) -> str | None:
    """Name of the first layer that makes NaN or infinities of finite inputs when `run` is called, or None.

    Args:
        net: whose layers (modules without children) are watched.
        run: runs the network, for example once more on the images of a step that failed.
    """
    found: list[str] = []

    def watch(name: str):
        def hook(_module: torch.nn.Module, inputs: tuple, output: Any) -> None:
            if not found and _finite(inputs) and not _finite(output):
                found.append(name)

        return hook

    layers = [(name, module) for name, module in net.named_modules() if not any(module.children())]
    handles = [module.register_forward_hook(watch(name)) for name, module in layers]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _finite(values: Any) -> bool:
    if isinstance(values, torch.Tensor):
        return not values.is_floating_point() or bool(values.isfinite().all())
    return all(map(_finite, values)) if isinstance(values, (tuple, list)) else True
