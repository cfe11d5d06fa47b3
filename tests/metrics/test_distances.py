"""Distances and scores of features: closed forms, brute force, and error bars against the spread of repetitions."""

import io
import itertools
import math
import time

import numpy as np
import pytest
import torch

from dnnlib.errors import UserError
from training.metrics import arrays, distances
from training.metrics.distances import (
    frechet_distance,
    frechet_error,
    gaussian_mmd,
    inception_score,
    kernel_distance,
    neighbour_scores,
    unbiased_mmd,
)

# ---------------------------------------------------------------------------------------------------------
# Frechet distance


def covariance(rng: np.random.Generator, dim: int, rank: int | None = None) -> np.ndarray:
    x = rng.standard_normal([dim, rank or 2 * dim])
    return x @ x.T / dim


def test_closed_forms():
    rng = np.random.default_rng(0)
    sigma, mu, shift = covariance(rng, 20), rng.standard_normal(20), rng.standard_normal(20)
    assert frechet_distance(mu, sigma, mu, sigma) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(mu, sigma, mu + shift, sigma) == pytest.approx(shift @ shift, rel=1e-9)
    # Covariances that commute: the distance is that between the roots of their eigenvalues.
    q = np.linalg.qr(rng.standard_normal([20, 20]))[0]
    a, b = rng.random(20), rng.random(20)
    expected = np.square(a - b).sum()
    assert frechet_distance(mu, q * a**2 @ q.T, mu, q * b**2 @ q.T) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("ranks", [(None, 5), (5, None), (5, 7), (7, 5), (1, 1), (None, 0), (0, 0)])
def test_singular_covariances(ranks):
    # tr((S1 S2)^(1/2)) is the sum of the singular values of X1^T X2 where S1 = X1 X1^T and S2 = X2 X2^T.
    rng = np.random.default_rng(1)
    x1, x2 = (rng.standard_normal([30, 60 if rank is None else rank]) for rank in ranks)
    sigma1, sigma2 = x1 @ x1.T, x2 @ x2.T
    trace_of_root = np.linalg.svd(x1.T @ x2, compute_uv=False).sum() if min(x1.shape[1], x2.shape[1]) else 0
    traces = np.trace(sigma1) + np.trace(sigma2)
    mu = np.zeros(30)
    assert frechet_distance(mu, sigma1, mu, sigma2) == pytest.approx(traces - 2 * trace_of_root, abs=1e-12 * traces)


def test_scale_and_order():
    rng = np.random.default_rng(2)
    mu1, mu2 = rng.standard_normal([2, 10])
    sigma1, sigma2 = covariance(rng, 10), covariance(rng, 10)
    d = frechet_distance(mu1, sigma1, mu2, sigma2)
    assert frechet_distance(mu2, sigma2, mu1, sigma1) == pytest.approx(d, rel=1e-9)
    for c in (1e-4, 1e4):
        assert frechet_distance(c * mu1, c**2 * sigma1, c * mu2, c**2 * sigma2) == pytest.approx(c**2 * d, rel=1e-9)


@pytest.mark.parametrize("position", range(4))
def test_wrong_statistics(position):
    stats = [np.zeros(3), np.eye(3), np.zeros(3), np.eye(3)]
    stats[position] = stats[position] * math.nan
    with pytest.raises(UserError, match="NaN or infinity"):
        frechet_distance(*stats)
    stats[position] = np.zeros([4] * stats[position].ndim)
    with pytest.raises(UserError, match="different features"):
        frechet_distance(*stats)


def sums_of(x: np.ndarray, groups: int) -> list[tuple[int, np.ndarray, np.ndarray]]:
    parts = [x[i::groups] for i in range(groups)]
    return [(len(part), part.sum(axis=0), part.T @ part) for part in parts]


@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_error_of_the_frechet_distance(shift):
    # Against the spread of distances of independent sets.
    rng = np.random.default_rng(3)
    scale = np.linspace(0.5, 2.0, 8)
    mu, sigma = np.zeros(8), np.eye(8)
    found, errors = [], []
    for _ in range(200):
        x = rng.standard_normal([500, 8]) * scale + shift
        found.append(frechet_distance(x.mean(axis=0), np.cov(x, rowvar=False), mu, sigma))
        errors.append(frechet_error(sums_of(x, groups=10), mu, sigma))
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(found), rel=0.15)


@pytest.mark.parametrize("rank", [None, 2])
def test_error_by_its_definition(rank):
    rng = np.random.default_rng(4)
    x, mu, sigma = rng.standard_normal([23, 4]) + 5, np.zeros(4), covariance(rng, 4, rank)
    without = [np.delete(x, np.s_[i::5], axis=0) for i in range(5)]
    d = np.array([frechet_distance(y.mean(axis=0), np.cov(y, rowvar=False), mu, sigma) for y in without])
    expected = math.sqrt(4 / 5 * np.square(d - d.mean()).sum())
    assert frechet_error(sums_of(x, groups=5), mu, sigma) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("rank", [None, 3])
def test_error_takes_one_root_of_the_reference(rank, monkeypatch):
    roots, original = [], torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda sigma: roots.append(sigma) or original(sigma))
    rng = np.random.default_rng(11)
    sigma = covariance(rng, 8, rank)
    frechet_error(sums_of(rng.standard_normal([40, 8]), groups=10), np.zeros(8), sigma)
    (root_of,) = roots
    np.testing.assert_array_equal(root_of, sigma)


@pytest.mark.parametrize(("terminal", "delay", "shown"), [(True, 1e-9, True), (True, 60, False), (False, 1e-9, False)])
def test_error_shows_its_progress(terminal, delay, shown, monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setattr(distances, "PROGRESS_DELAY", delay)
    original = torch.linalg.eigvalsh  # once per group
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda matrix: time.sleep(0.03) or original(matrix))
    frechet_error(sums_of(np.random.default_rng(12).standard_normal([40, 8]), groups=10), np.zeros(8), np.eye(8))
    assert ("Error bar" in screen.getvalue()) == shown and (shown or not screen.getvalue())


@pytest.mark.parametrize(("images", "groups"), [(10, 1), (2, 2), (1, 3), (4, 5)])
def test_error_of_too_few(images, groups):
    with pytest.raises(UserError, match="2 or more groups"):
        frechet_error(sums_of(np.ones([images, 2]), groups), np.zeros(2), np.eye(2))


# ---------------------------------------------------------------------------------------------------------
# Kernel distance


def test_mmd_by_double_loop():
    rng = np.random.default_rng(5)
    x, y = rng.standard_normal([7, 3]), rng.standard_normal([7, 3]) + 1

    def k(a, b):
        return (a @ b / 3 + 1) ** 3

    pairs = list(itertools.permutations(range(7), 2))
    xx = sum(k(x[i], x[j]) for i, j in pairs) / len(pairs)
    yy = sum(k(y[i], y[j]) for i, j in pairs) / len(pairs)
    xy = sum(k(a, b) for a, b in itertools.product(x, y)) / 49
    found = unbiased_mmd(torch.from_numpy(x), torch.from_numpy(y))
    assert found == pytest.approx(xx + yy - 2 * xy, rel=1e-9)


def test_kernel_distance_is_the_mean_over_subsets(monkeypatch):
    drawn = []
    monkeypatch.setattr(distances, "unbiased_mmd", lambda x, y: drawn.append((x, y)) or float(len(drawn)))
    x, y = torch.arange(50.0)[:, None], torch.arange(100.0, 140.0)[:, None]
    mean, error = kernel_distance(x, y, subsets=5, subset_size=10)
    assert mean == 3
    assert error == pytest.approx(math.sqrt(2.5 * (10 / 30 + 1 / 5)))
    for a, b in drawn:
        assert a.dtype == b.dtype == torch.float64
        assert len(set(a.flatten().tolist())) == len(set(b.flatten().tolist())) == 10
        assert a.max() < 50 and b.min() >= 100
    assert len({tuple(sorted(a.flatten().tolist())) for a, _ in drawn}) == 5


def test_kernel_distance_of_seeds():
    x, y = torch.randn(2, 60, 4, generator=torch.Generator().manual_seed(0))
    results = [kernel_distance(x, y, subsets=3, subset_size=20, seed=seed) for seed in (0, 0, 1)]
    assert results[0] == results[1] != results[2]


def test_error_of_the_kernel_distance():
    rng = np.random.default_rng(6)
    found, errors = [], []
    for _ in range(100):
        x, y = rng.standard_normal([2, 400, 4])
        mean, error = kernel_distance(x, y + 0.5, subsets=50, subset_size=80)
        found.append(mean)
        errors.append(error)
    assert np.mean(found) == pytest.approx(expected_mmd(0.5, 4), abs=4 * np.std(found) / math.sqrt(100))
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(found), rel=0.2)


def expected_mmd(shift: float, dim: int) -> float:
    """Squared maximum mean discrepancy of N(0, 1) and N(shift, 1) in each of `dim` coordinates."""

    def mean_kernel(m: float, n: float) -> float:
        # a ~ N(m, 1), b ~ N(n, 1): a.b is a sum of independent products with moments e1, e2, e3. t = a.b / dim.
        e1, e2, e3 = m * n, (m**2 + 1) * (n**2 + 1), (m**3 + 3 * m) * (n**3 + 3 * n)
        t1, t2 = e1, (e2 + (dim - 1) * e1**2) / dim
        t3 = (e3 + 3 * (dim - 1) * e2 * e1 + (dim - 1) * (dim - 2) * e1**3) / dim**2
        return 1 + 3 * t1 + 3 * t2 + t3

    return mean_kernel(0, 0) + mean_kernel(shift, shift) - 2 * mean_kernel(0, shift)


@pytest.mark.parametrize(("n", "m"), [(1000, 2000), (2000, 1000), (5, 5)])
def test_kernel_distance_of_too_few(n, m):
    with pytest.raises(UserError, match=f"more than 1000; there are {min(n, m)}"):
        kernel_distance(np.zeros([n, 2]), np.zeros([m, 2]))


# ---------------------------------------------------------------------------------------------------------
# CMMD


@pytest.mark.parametrize("blocks", [(1024, 4096), (3, 2)])
def test_cmmd_by_double_loop(blocks, monkeypatch):
    """Both estimates, of sets of different sizes."""
    monkeypatch.setattr(arrays, "ROWS", blocks[0])
    monkeypatch.setattr(arrays, "COLUMNS", blocks[1])
    rng = np.random.default_rng(13)
    x, y = rng.standard_normal([7, 3]), 2 * rng.standard_normal([5, 3]) + 1

    def k(a, b):
        return math.exp(-np.square(a - b).sum() / (2 * 1.5**2))

    def mean(pairs):
        return np.mean([k(a, b) for a, b in pairs])

    between = mean(itertools.product(x, y))
    unbiased = mean(itertools.permutations(x, 2)) + mean(itertools.permutations(y, 2)) - 2 * between
    biased = mean(itertools.product(x, x)) + mean(itertools.product(y, y)) - 2 * between
    assert gaussian_mmd(x, y, bandwidth=1.5, scale=10) == pytest.approx((10 * unbiased, 10 * biased), rel=1e-9)


def test_cmmd_in_closed_form():
    """Of two points, and on average over draws of two normal distributions: E k(a, b) for a - b ~ N(m, v I) is
    (1 + v / s^2)^(-D / 2) exp(-|m|^2 / (2 (s^2 + v)))."""
    a, b = np.zeros([3, 4]), np.full([2, 4], 5.0)
    expected = 1000 * (2 - 2 * math.exp(-100 / 200))  # |a - b|^2 = 100, sigma = 10
    assert gaussian_mmd(a, b) == pytest.approx((expected, expected), rel=1e-12)
    s, m, D = 2.0, 1.0, 3
    within, between = (1 + 2 / s**2) ** (-D / 2), (1 + 2 / s**2) ** (-D / 2) * math.exp(-D * m**2 / (2 * (s**2 + 2)))
    rng = np.random.default_rng(14)
    draws = [gaussian_mmd(rng.standard_normal([20, D]), m + rng.standard_normal([30, D]), s, 1) for _ in range(300)]
    unbiased, biased = np.array(draws).T
    error = unbiased.std() / math.sqrt(len(draws))
    assert abs(unbiased.mean() - 2 * (within - between)) < 4 * error < (biased - unbiased).mean()
    assert (biased - unbiased).mean() == pytest.approx((1 - within) * (1 / 20 + 1 / 30), rel=0.02)


def test_cmmd_of_too_few():
    with pytest.raises(UserError, match="2 or more images of each set; there are 5 and 1"):
        gaussian_mmd(np.zeros([5, 2]), np.zeros([1, 2]))


# ---------------------------------------------------------------------------------------------------------
# Inception score


def test_inception_score():
    # Certain of one of 4 classes, all equally frequent: 4. The same for every image: 1.
    logits = torch.eye(4).repeat(10, 1) * 1000
    assert inception_score(logits) == pytest.approx((4, 0))
    assert inception_score(torch.ones(20, 4)) == pytest.approx((1, 0))
    assert inception_score(torch.cat([logits, torch.ones(40, 4)]), splits=2) == pytest.approx((2.5, 1.5))
    # Uniform over 2 of 4 classes, either the first or the last two: log 4 - log 2.
    halves = torch.tensor([[0, 0, -math.inf, -math.inf], [-math.inf, -math.inf, 0, 0]]).clamp(min=-1e4)
    assert inception_score(halves, splits=1) == pytest.approx((2, 0))


def test_inception_score_by_its_definition():
    logits = np.random.default_rng(7).standard_normal([23, 5])
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    scores = [np.exp(np.mean(np.sum(q * np.log(q / q.mean(axis=0)), axis=1))) for q in np.array_split(p, 4)]
    assert inception_score(logits, splits=4) == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-9)
    assert inception_score(logits + 100, splits=4) == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-9)


def test_inception_score_of_too_few():
    with pytest.raises(UserError, match="10 splits needs 10 or more images, not 9"):
        inception_score(np.zeros([9, 4]))
    with pytest.raises(UserError, match="NaN"):
        inception_score(np.full([10, 4], math.nan))


# ---------------------------------------------------------------------------------------------------------
# Nearest neighbours


def brute_force(real: np.ndarray, fake: np.ndarray, k_precision: int, k_density: int) -> dict[str, float]:
    def radius(x, i, k):
        return sorted(np.linalg.norm(x[i] - x[j]) for j in range(len(x)) if j != i)[k - 1]

    def inside(p, x, i, k):
        return np.linalg.norm(p - x[i]) <= radius(x, i, k)

    R, F = range(len(real)), range(len(fake))
    return {
        "precision": np.mean([any(inside(fake[j], real, i, k_precision) for i in R) for j in F]),
        "recall": np.mean([any(inside(real[i], fake, j, k_precision) for j in F) for i in R]),
        "density": np.mean([sum(inside(fake[j], real, i, k_density) for i in R) / k_density for j in F]),
        "coverage": np.mean([any(inside(fake[j], real, i, k_density) for j in F) for i in R]),
    }


@pytest.mark.parametrize("ks", [(3, 5), (2, 1)])
@pytest.mark.parametrize("blocks", [(1024, 4096), (7, 5), (5, 12), (1, 1)])
def test_neighbours_by_brute_force(blocks, ks, monkeypatch):
    monkeypatch.setattr(arrays, "ROWS", blocks[0])
    monkeypatch.setattr(arrays, "COLUMNS", blocks[1])
    rng = np.random.default_rng(8)
    real, fake = rng.standard_normal([30, 3]), rng.standard_normal([23, 3]) * 1.5 + 0.7
    expected = brute_force(real, fake, *ks)
    assert min(expected.values()) > 0 and len(set(expected.values())) == 4  # else the case would prove little
    assert neighbour_scores(real, fake, *ks) == pytest.approx(expected)


def test_neighbours_of_extremes():
    rng = np.random.default_rng(9)
    real = rng.standard_normal([50, 4])
    same = neighbour_scores(real, real)
    assert (same["precision"], same["recall"], same["coverage"]) == (1, 1, 1)
    assert same["density"] == pytest.approx(6 / 5)  # each ball holds its centre and 5 others
    assert set(neighbour_scores(real, real + 100).values()) == {0}
    collapsed = neighbour_scores(real, real[:1] + 1e-3 * rng.standard_normal([50, 4]))
    assert collapsed["precision"] == 1 and collapsed["recall"] <= 0.02 and collapsed["coverage"] < 0.5


def test_neighbours_of_float32():
    rng = np.random.default_rng(10)
    real, fake = (rng.standard_normal([40, 6]).astype(np.float32) + 1000 for _ in range(2))
    expected = neighbour_scores(real.astype(np.float64), fake.astype(np.float64))
    assert neighbour_scores(torch.from_numpy(real), torch.from_numpy(fake)) == expected


def test_neighbours_of_too_few():
    many, few = np.zeros([10, 2]), np.zeros([5, 2])
    with pytest.raises(UserError, match="more than 5 real images; there are 5"):
        neighbour_scores(few, many)
    with pytest.raises(UserError, match="more than 3 generated images; there are 3"):
        neighbour_scores(many, few[:3])
    neighbour_scores(many, few)


@pytest.mark.parametrize("function", [kernel_distance, neighbour_scores, gaussian_mmd])
def test_wrong_features(function):
    with pytest.raises(UserError, match=r"\[1001, 2\] and \[1001, 3\]"):
        function(np.zeros([1001, 2]), np.zeros([1001, 3]))
    with pytest.raises(UserError, match="NaN"):
        function(np.full([1001, 2], math.nan), np.zeros([1001, 2]))
