"""Sets of features as tensors, and the distances within and between them, in float64."""

import math
from collections.abc import Iterator

import numpy as np
import torch

from dnnlib.errors import UserError

Array = np.ndarray | torch.Tensor
ROWS, COLUMNS = 1024, 4096  # of a block of distances: 32 MiB


def double(x: Array) -> torch.Tensor:
    """The array as a float64 tensor, on the CPU if its device has no float64.

    Raises:
        UserError: a value is NaN or infinite.
    """
    tensor = torch.as_tensor(x)
    if not tensor.isfinite().all():
        raise UserError("features or their statistics hold NaN or infinity: check the images and the detector")
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def checked_pair(x: Array, y: Array) -> tuple[torch.Tensor, torch.Tensor]:
    """Two sets of features, [N, D] and [M, D], on a device that has float64.

    Raises:
        UserError: other shapes.
    """
    a, b = torch.as_tensor(x), torch.as_tensor(y)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise UserError(
            f"sets of features must be of shapes [N, D] and [M, D], not {list(a.shape)} and {list(b.shape)}"
        )
    return (a.cpu(), b.cpu()) if a.device.type == "mps" else (a, b)


def blocks(x: torch.Tensor, y: torch.Tensor) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """Blocks of the squared distances between rows of x and of y: rows of x, rows of y, float64 values."""
    for i in range(0, len(x), ROWS):
        a = double(x[i : i + ROWS])
        for j in range(0, len(y), COLUMNS):
            b = double(y[j : j + COLUMNS])
            lengths = a.square().sum(dim=1, keepdim=True) + b.square().sum(dim=1)
            yield slice(i, i + len(a)), slice(j, j + len(b)), torch.addmm(lengths, a, b.mT, alpha=-2).clamp_(min=0)


def nearest(x: torch.Tensor, y: torch.Tensor, k: int, itself: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of y nearest to each row of x: squared distances, float64 [N, k], ascending, and indices, int64 [N, k].

    Args:
        x, y: features [N, D] and [M, D].
        k: at most M, or M - 1 where a row is not its own neighbour.
        itself: False = row i of y is no neighbour of row i of x, for x = y.
    """
    best = torch.full([len(x), k], math.inf, dtype=torch.float64, device=x.device)
    found = torch.zeros([len(x), k], dtype=torch.int64, device=x.device)
    for rows, columns, squares in blocks(x, y):
        if not itself:
            squares.diagonal(rows.start - columns.start).fill_(math.inf)
        here = torch.arange(columns.start, columns.stop, device=x.device).expand_as(squares)
        best[rows], chosen = torch.cat([best[rows], squares], dim=1).topk(k, dim=1, largest=False)
        found[rows] = torch.cat([found[rows], here], dim=1).gather(1, chosen)
    return best, found
