"""Consistency sampling: images by a few evaluations of a consistency model."""

import torch

from training.samplers.grids import Grid
from training.samplers.ode import AfterUpdate, RandnLike, Solution


def consistency(
    D: Solution,
    x: torch.Tensor,
    grid: Grid,
    options: None,
    *,
    randn_like: RandnLike,
    after_update: AfterUpdate,
) -> torch.Tensor:
    """Multistep consistency sampling (Song et al. 2023, arXiv 2303.01469, Algorithm 1), one evaluation per level.

    The model gives the clean image at the end of the path that x is on, f(x, sigma). Each further level sigma' begins
    from it and fresh noise z:

        x <- f(x, sigma) + sigma' z

    The paper ends paths at a small epsilon, with sqrt(sigma'^2 - epsilon^2) for sigma'; here they end at 0.
    """
    for sigma, sigma_next in grid.steps():
        x = D(x, sigma)
        if sigma_next > 0:
            x = x + sigma_next.item() * randn_like(x)
        x = after_update(x, sigma_next, randn_like)
    return x
