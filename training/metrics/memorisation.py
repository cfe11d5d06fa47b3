"""Whether generated images are copies of training images: by the distances to their nearest neighbours."""

import math

import torch

from dnnlib.errors import UserError
from training.metrics.arrays import ROWS, Array, checked_pair, double, nearest

NEIGHBOURS, ALPHA = 50, 0.5  # of calibrated distances, as published
CELLS, FEWEST_IN_CELL = 10, 20  # of C_T
ITERATIONS = 100  # of k-means, at most


# ---------------------------------------------------------------------------------------------------------
# Calibrated distances


def memorisation(train: Array, fake: Array, neighbours: int = NEIGHBOURS, alpha: float = ALPHA) -> dict[str, float]:
    """Calibrated distances of generated images to the training images (Carlini et al. 2023, arXiv 2301.13188).

    An image's distance to its nearest training image, over alpha times the mean of the distances to its k nearest ones.
    Below 1, the nearest one stands out from a neighbourhood that is otherwise empty, as that of a copy does: it is
    nearer than alpha times that mean.

    Args:
        train, fake: features [N, D] and [M, D].
        neighbours: k.

    Returns:
        `memorised`, the share of generated images with a calibrated distance below 1, and `calibrated`, the median of
        the calibrated distances; at most 1 / alpha.

    Raises:
        UserError: fewer than k training images, or a set holds NaN or infinity.
    """
    train, fake = checked_pair(train, fake)
    if len(train) < neighbours:
        raise UserError(
            f"calibrated distances to {neighbours} neighbours need as many training images; there are {len(train)}"
        )
    distances = nearest(fake, train, neighbours)[0].sqrt()
    mean = distances.mean(dim=1)
    calibrated = torch.where(mean > 0, distances[:, 0] / (alpha * mean), 0.0)
    return {"memorised": float((calibrated < 1).double().mean()), "calibrated": float(calibrated.median())}


# ---------------------------------------------------------------------------------------------------------
# The three-sample test


def copying_score(
    train: Array,
    held_out: Array,
    fake: Array,
    cells: int = CELLS,
    fewest: int = FEWEST_IN_CELL,
    seed: int = 0,
) -> float:
    """C_T of the three-sample test of data copying (Meehan et al. 2020, arXiv 2004.05675, Section 4).

    d is an image's distance to its nearest training image. Within a cell of the space, the Mann-Whitney statistic Z_U
    compares d of generated images with d of held-out ones; C_T is its mean over cells, weighted by the held-out images
    that a cell has. Where generated images are as far from the training images as others of the same kind are, it is
    about normal with a variance of at most 1; far below 0 (the paper: -5) they are copies, and far above it they are
    off.

    Cells are those of k-means on the training images. Cells with few generated images, which say little, are left out.

    Args:
        train, held_out, fake: features [N, D], [n, D] and [m, D].
        cells: how many.
        fewest: generated images, and at least one held-out image, that a cell must have.
        seed: of the first centres.

    Raises:
        UserError: fewer training images than cells, no cell with enough images, or a set holds NaN or infinity.
    """
    train, held_out = checked_pair(train, held_out)
    _, fake = checked_pair(train, fake)
    if len(train) < cells:
        raise UserError(f"C_T over {cells} cells needs as many training images; there are {len(train)}")
    centres = k_means(train, cells, seed)
    d_held, d_fake = (nearest(x, train, 1)[0][:, 0] for x in (held_out, fake))
    in_held, in_fake = (nearest(x, centres, 1)[1][:, 0] for x in (held_out, fake))
    total, weights = 0.0, 0
    for cell in range(cells):
        theirs, ours = d_held[in_held == cell], d_fake[in_fake == cell]
        if len(ours) >= fewest and len(theirs) > 0:
            total += len(theirs) * mann_whitney(theirs, ours)
            weights += len(theirs)
    if weights == 0:
        raise UserError(f"C_T: no part of the space has {fewest} generated images and a held-out one: give more")
    return total / weights


def mann_whitney(p: torch.Tensor, q: torch.Tensor) -> float:
    """Z_U: by how many standard deviations values q are larger than values p, under equal distributions.

    U counts the pairs in which q is larger, ties as a half; its mean is nm / 2, its variance nm (n + m + 1) / 12.

    Args:
        p, q: values [n] and [m].
    """
    n, m = len(p), len(q)
    ordered = p.sort().values
    below, up_to = (torch.searchsorted(ordered, q, right=right).double().sum() for right in (False, True))
    U = float(below + up_to) / 2
    return (U - n * m / 2) / math.sqrt(n * m * (n + m + 1) / 12)


def k_means(x: torch.Tensor, k: int, seed: int = 0) -> torch.Tensor:
    """Centres of k clusters by Lloyd's algorithm, float64 [k, D], from k-means++ (Arthur & Vassilvitskii 2007).

    Args:
        x: features [N, D], N at least k.
        seed: of the first centres.
    """
    generator = torch.Generator().manual_seed(seed)
    centres = double(x[torch.randint(len(x), [1], generator=generator).to(x.device)])
    while len(centres) < k:
        squares = nearest(x, centres, 1)[0][:, 0].cpu()
        # Where all images are centres already, any of them will do.
        weights = squares if squares.sum() > 0 else torch.ones_like(squares)
        level = torch.rand([], generator=generator, dtype=torch.float64) * weights.sum()
        chosen = int(torch.searchsorted(weights.cumsum(0), level).clamp(max=len(x) - 1))
        centres = torch.cat([centres, double(x[chosen : chosen + 1])])
    before = None
    for _ in range(ITERATIONS):
        cells = nearest(x, centres, 1)[1][:, 0]
        if before is not None and torch.equal(cells, before):
            break
        sums, before = torch.zeros_like(centres), cells
        for i in range(0, len(x), ROWS):
            sums.index_add_(0, cells[i : i + ROWS], double(x[i : i + ROWS]))
        counts = cells.bincount(minlength=k)[:, None]
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
    return centres
