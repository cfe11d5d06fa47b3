"""The published computations written plainly: what the benchmarks compare with, and nothing else uses."""

import copy
import pickle
from collections.abc import Sequence
from pathlib import Path

import torch

# ---------------------------------------------------------------------------------------------------------
# Post-hoc reconstruction


@torch.no_grad()
def reconstruct_pickles(
    inputs: Sequence[Path], coefs: Sequence[Sequence[float]], outputs: Sequence[Path]
) -> list[torch.nn.Module]:
    """Read pickled networks whole, sum up each parameter of each output in float32, and write float16 pickles.

    Args:
        coefs: weights of the inputs, one row per output.
    """
    sums: list[torch.nn.Module] = []
    for i, path in enumerate(inputs):
        with open(path, "rb") as f:
            net = pickle.load(f)["ema"].float()
        if not sums:
            sums = [copy.deepcopy(net) for _ in outputs]
            for total in sums:
                for p in total.parameters():
                    p.zero_()
        for total, row in zip(sums, coefs, strict=True):
            for dst, src in zip(total.parameters(), net.parameters(), strict=True):
                dst += row[i] * src
    for total, path in zip(sums, outputs, strict=True):
        with open(path, "wb") as f:
            pickle.dump({"ema": total.half()}, f)
    return sums
