"""Distances between sets of features, and scores of them, computed in float64."""

import math
from collections.abc import Sequence

import numpy as np
import torch

from dnnlib.errors import UserError
from dnnlib.progress import Progress
from training.metrics.arrays import Array, blocks, checked_pair, double, nearest

SUBSET_SIZE = 1000  # of the kernel distance
SPLITS = 10  # of the inception score
K_PRECISION, K_DENSITY = 3, 5  # which neighbours
CMMD_BANDWIDTH, CMMD_SCALE = 10, 1000  # as published
PROGRESS_DELAY = 2  # seconds until a progress bar appears


# ---------------------------------------------------------------------------------------------------------
# Frechet distance


def frechet_distance(mu1: Array, sigma1: Array, mu2: Array, sigma2: Array) -> float:
    """Squared Frechet distance between two Gaussians (Dowson & Landau 1982): FID (Heusel et al. 2017).

    |mu1 - mu2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2)). With S2 = L L^T, the eigenvalues of S1 S2 are those of the
    symmetric L^T S1 L, so the last trace is the sum of their square roots, and no matrix root is needed.

    The error is about 1e-14 of tr(S1) + tr(S2) for covariances of full rank. It is less than 1e-8 of that for singular
    ones, whose zero eigenvalues come out as rounding errors before the square roots are taken.

    Args:
        mu1, mu2: means [D].
        sigma1, sigma2: covariances [D, D], which may be singular.

    Raises:
        UserError: the shapes do not match, or a value is NaN or infinite.
    """
    mu1, sigma1, mu2, sigma2 = (double(x) for x in (mu1, sigma1, mu2, sigma2))
    if not (mu1.ndim == 1 and mu1.shape == mu2.shape and sigma1.shape == sigma2.shape == mu1.shape * 2):
        raise UserError(
            f"statistics of different features cannot be compared: means {list(mu1.shape)} and {list(mu2.shape)}, "
            f"covariances {list(sigma1.shape)} and {list(sigma2.shape)}"
        )
    root1, root2 = _root(sigma1), _root(sigma2)
    # The root with fewer columns gives fewer zero eigenvalues.
    if root1.shape[1] < root2.shape[1]:
        return _distance(mu2, sigma2, mu1, sigma1, root1)
    return _distance(mu1, sigma1, mu2, sigma2, root2)


def frechet_error(groups: Sequence[tuple[int, Array, Array]], mu: Array, sigma: Array) -> float:
    """Standard error of the Frechet distance between images and a fixed reference: delete-a-group jackknife.

    The distance is recomputed without each of the G groups in turn; the variance is (G - 1) / G times the sum of
    squared deviations (Quenouille 1956, Tukey 1958). This takes G distances and only sums over the groups, and accounts
    for means and covariances alike. A bootstrap would need the features, and its draws repeat images, while the
    distance has an upward bias that depends on the number of distinct images. The jackknife loses only 1 / G of them,
    which adds the same bias for every group. The bias of the distance itself is not part of the error. With G groups
    the error is known to about 1 / sqrt(2 (G - 1)), so 10 to 20 of them are enough.

    On terminals, a progress bar appears after a few seconds, as thousands of features take longer.

    Args:
        groups: for each group, the number of images, the sum of their features x [D], and the sum of x x^T [D, D],
            accumulated in float64. Groups are alike and of equal size up to rounding: image i is in group i mod G.
        mu, sigma: mean [D] and covariance [D, D] of the reference.

    Raises:
        UserError: fewer than 2 groups, an empty one, or fewer than 2 images outside one of them; also as
            `frechet_distance`.
    """
    counts = [count for count, _, _ in groups]
    total = sum(counts)
    if len(groups) < 2 or min(counts) < 1 or total - max(counts) < 2:
        raise UserError(
            f"an error bar needs 2 or more groups of images, none empty, and 2 images outside each; these are {counts}"
        )
    sums = [double(x) for _, x, _ in groups]
    products = [double(xx) for _, _, xx in groups]
    sum_of_all, product_of_all = sum(sums[1:], sums[0]), sum(products[1:], products[0])
    mu, sigma = double(mu), double(sigma)
    root = _root(sigma)  # that of the reference, as it is the same for all groups
    distances = []
    parts = zip(counts, sums, products, strict=True)
    progress = Progress(parts, desc="Error bar", unit="group", total=len(groups), delay=PROGRESS_DELAY)
    for count, x, xx in progress:
        n = total - count
        mean = (sum_of_all - x) / n
        covariance = (product_of_all - xx - n * torch.outer(mean, mean)) / (n - 1)
        distances.append(_distance(mean, covariance, mu, sigma, root))
    return float(np.std(distances) * math.sqrt(len(groups) - 1))


def _distance(
    mu1: torch.Tensor, sigma1: torch.Tensor, mu2: torch.Tensor, sigma2: torch.Tensor, root2: torch.Tensor
) -> float:
    """`frechet_distance`, given the root of sigma2."""
    eigenvalues = torch.linalg.eigvalsh(root2.mT @ sigma1 @ root2)
    trace_of_root = eigenvalues.clamp(min=0).sqrt().sum()
    return float((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * trace_of_root)


def _root(sigma: torch.Tensor) -> torch.Tensor:
    """A of a covariance A A^T; if it is singular, A has as many columns as its rank."""
    root, failure = torch.linalg.cholesky_ex(sigma)
    if not failure:
        return root
    # Eigenvalues that are zero up to rounding are dropped: their square roots would not be small.
    values, vectors = torch.linalg.eigh(sigma)
    kept = values > len(values) * torch.finfo(values.dtype).eps * values[-1]
    return vectors[:, kept] * values[kept].sqrt()


# ---------------------------------------------------------------------------------------------------------
# Kernel distance


def kernel_distance(
    x: Array, y: Array, subsets: int = 100, subset_size: int = SUBSET_SIZE, seed: int = 0
) -> tuple[float, float]:
    """Kernel distance KID (Bińkowski et al. 2018): squared maximum mean discrepancy, and its standard error.

    The kernel is (a.b / D + 1)^3. The estimator is unbiased, so it may be negative; the result is its mean over subsets
    that are drawn from both sets without replacement.

    Subsets of the same images are not independent, so their standard deviation s over the square root of their number
    would be too optimistic. For subsets of m out of N images, the delete-d jackknife (Shao & Wu 1989) has the variance
    s^2 m / (N - m), to which that of the draw, s^2 / subsets, is added. If both sets are from the same distribution,
    this is about twice the true error.

    Args:
        x, y: features [N, D] and [M, D].
        subsets, subset_size: how many subsets, of how many images.
        seed: of the random subsets.

    Raises:
        UserError: one of the sets has no more than `subset_size` images, or holds NaN or infinity.
    """
    x, y = checked_pair(x, y)
    smaller = min(len(x), len(y))
    if smaller <= subset_size:
        raise UserError(f"KID over subsets of {subset_size} images needs more than {subset_size}; there are {smaller}")
    generator = torch.Generator().manual_seed(seed)

    def draw(features: torch.Tensor) -> torch.Tensor:
        chosen = torch.randperm(len(features), generator=generator)[:subset_size]
        return double(features[chosen.to(features.device)])

    values = [unbiased_mmd(draw(x), draw(y)) for _ in range(subsets)]
    variance = np.var(values, ddof=1) * (subset_size / (smaller - subset_size) + 1 / subsets)
    return float(np.mean(values)), math.sqrt(variance)


def unbiased_mmd(x: torch.Tensor, y: torch.Tensor) -> float:
    """Unbiased estimate of the squared maximum mean discrepancy (Bińkowski et al. 2018, Eq. 4).

    Args:
        x, y: features, float64 [m, D].
    """

    def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a @ b.mT / a.shape[1] + 1) ** 3

    m = len(x)
    kxx, kyy = kernel(x, x), kernel(y, y)
    within = (kxx.sum() - kxx.trace() + kyy.sum() - kyy.trace()) / (m * (m - 1))
    return float(within - 2 * kernel(x, y).mean())


def gaussian_mmd(
    x: Array, y: Array, bandwidth: float = CMMD_BANDWIDTH, scale: float = CMMD_SCALE
) -> tuple[float, float]:
    """CMMD (Jayasumana et al. 2024, arXiv 2401.09603): squared maximum mean discrepancy under a Gaussian kernel.

    With k(a, b) = exp(-|a - b|^2 / (2 sigma^2)), it is scale (E k(x, x') + E k(y, y') - 2 E k(x, y)). The first
    estimate is unbiased, as the paper defines it: it leaves out an image's kernel with itself, k(x_i, x_i) = 1, and may
    be negative. The second one keeps it, as the tool of the paper does, and is never negative: it is larger by
    scale ((1 - mean k(x, x')) / N + (1 - mean k(y, y')) / M), where the means are those of the first.

    Returns:
        The unbiased estimate, and the biased one.

    Args:
        x, y: features [N, D] and [M, D].
        bandwidth: sigma.
        scale: what the distance is multiplied by.

    Raises:
        UserError: one of the sets has fewer than 2 images, or holds NaN or infinity.
    """
    x, y = checked_pair(x, y)
    if min(len(x), len(y)) < 2:
        raise UserError(f"CMMD needs 2 or more images of each set; there are {len(x)} and {len(y)}")

    def total(a: torch.Tensor, b: torch.Tensor) -> float:
        parts = (float((squares / (-2 * bandwidth**2)).exp_().sum()) for _, _, squares in blocks(a, b))
        return math.fsum(parts)

    n, m = len(x), len(y)
    xx, yy, between = total(x, x), total(y, y), total(x, y) / (n * m)
    unbiased = (xx - n) / (n * (n - 1)) + (yy - m) / (m * (m - 1)) - 2 * between
    return scale * unbiased, scale * (xx / n**2 + yy / m**2 - 2 * between)


# ---------------------------------------------------------------------------------------------------------
# Inception score


def inception_score(logits: Array, splits: int = SPLITS) -> tuple[float, float]:
    """Inception score exp(E KL(p(y|x) || p(y))) (Salimans et al. 2016): mean and standard deviation over splits.

    Args:
        logits: [N, classes].
        splits: how many parts of consecutive images, equal in size up to one image.

    Raises:
        UserError: fewer images than splits, or a value is NaN or infinite.
    """
    if len(logits) < splits:
        raise UserError(f"the inception score over {splits} splits needs {splits} or more images, not {len(logits)}")
    scores = []
    for part in torch.as_tensor(logits).tensor_split(splits):
        log_p = double(part).log_softmax(dim=1)
        log_mean = log_p.logsumexp(dim=0) - math.log(len(part))
        scores.append(float((log_p.exp() * (log_p - log_mean)).sum(dim=1).mean().exp()))
    return float(np.mean(scores)), float(np.std(scores))


# ---------------------------------------------------------------------------------------------------------
# Nearest neighbours


def neighbour_scores(
    real: Array, fake: Array, k_precision: int = K_PRECISION, k_density: int = K_DENSITY
) -> dict[str, float]:
    """Precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020).

    Each image has a closed ball whose radius is the distance to its k-th nearest neighbour in the same set.

    - precision: share of fake images inside the ball of a real one,
    - recall: share of real images inside the ball of a fake one,
    - density: mean number of real balls that a fake image is inside, over k,
    - coverage: share of real images with a fake one inside their ball.

    All four share the distances between the sets, which are computed in blocks: they take about 0.3 GB, beside the
    features.

    Args:
        real, fake: features [N, D] and [M, D].
        k_precision: k of precision and recall.
        k_density: k of density and coverage.

    Returns:
        `precision`, `recall`, `density`, `coverage`.

    Raises:
        UserError: a set has no more than k images, or holds NaN or infinity.
    """
    real, fake = checked_pair(real, fake)
    largest = max(k_precision, k_density)
    for name, features, k in [("real", real, largest), ("generated", fake, k_precision)]:
        if len(features) <= k:
            raise UserError(f"{k} nearest neighbours need more than {k} {name} images; there are {len(features)}")
    near_real, _ = nearest(real, real, largest, itself=False)
    radius, density_radius = near_real[:, k_precision - 1], near_real[:, k_density - 1]
    fake_radius = nearest(fake, fake, k_precision, itself=False)[0][:, -1]

    precise = torch.zeros(len(fake), dtype=torch.bool, device=fake.device)
    recalled, covered = (torch.zeros(len(real), dtype=torch.bool, device=real.device) for _ in range(2))
    inside = 0
    for rows, columns, squares in blocks(real, fake):
        precise[columns] |= (squares <= radius[rows, None]).any(dim=0)
        recalled[rows] |= (squares <= fake_radius[columns]).any(dim=1)
        in_ball = squares <= density_radius[rows, None]
        covered[rows] |= in_ball.any(dim=1)
        inside += int(in_ball.sum())
    return {
        "precision": float(precise.double().mean()),
        "recall": float(recalled.double().mean()),
        "density": inside / (k_density * len(fake)),
        "coverage": float(covered.double().mean()),
    }
