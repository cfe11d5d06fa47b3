"""Time and error of the Frechet distance, against the matrix root of SciPy.

The variants take turns. Features are random, with a spectrum that falls over seven decades, as that of image features
does. The reference for the errors is the sum of singular values of X1 X2^T of the features themselves, which is
tr((S1 S2)^(1/2)) without rounding errors under a root.
"""

import statistics
import sys
import time
from pathlib import Path

import click
import numpy as np
import scipy.linalg
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from training.distances import frechet_distance


def features(count: int, dim: int, seed: int) -> np.ndarray:
    """float64 [count, dim], mean 0, scaled so that the covariance is x^T x."""
    rng = np.random.default_rng(seed)
    shared = np.linalg.qr(np.random.default_rng(0).standard_normal([dim, dim]))[0]
    x = rng.standard_normal([count, dim]) * np.logspace(0.5, -3.0, dim) @ shared
    return (x - x.mean(axis=0)) / np.sqrt(count - 1)


def by_matrix_root(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """The textbook formula."""
    root = scipy.linalg.sqrtm(sigma1 @ sigma2).real
    return float(np.square(mu1 - mu2).sum() + np.trace(sigma1 + sigma2 - 2 * root))


@click.command()
@click.option("--dim", type=click.IntRange(min=2), default=2048, show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True)
def main(dim: int, repeats: int) -> None:
    print(f"{dim} features, torch {torch.__version__}, SciPy {scipy.__version__}, {torch.get_num_threads()} threads")
    many, few = 5 * dim // 2, dim // 2
    for case, counts in {
        "full rank": (many, many),
        "one of half rank": (many, few),
        "both of half rank": (few, few),
    }.items():
        x1, x2 = features(counts[0], dim, seed=1), features(counts[1], dim, seed=2)
        stats = (np.zeros(dim), x1.T @ x1, np.ones(dim) / dim, x2.T @ x2)
        trace = np.trace(stats[1]) + np.trace(stats[3])
        exact = 1 / dim + trace - 2 * np.linalg.svd(x1 @ x2.T, compute_uv=False).sum()
        seconds: dict[str, list[float]] = {"sqrtm": [], "ours": []}
        values: dict[str, float] = {}
        for _ in range(repeats):
            for name, function in {"sqrtm": by_matrix_root, "ours": frechet_distance}.items():
                start = time.perf_counter()
                values[name] = function(*stats)
                seconds[name].append(time.perf_counter() - start)
        ratio = statistics.median(seconds["sqrtm"]) / statistics.median(seconds["ours"])
        print(f"{case}: distance {exact:.6f}, {ratio:.1f} x as fast")
        for name, times in seconds.items():
            error = abs(values[name] - exact)
            print(
                f"  {name:6s} {statistics.median(times):6.2f} s ({min(times):.2f}-{max(times):.2f}), "
                f"error {error:.0e} = {error / trace:.0e} of the traces"
            )
            assert error <= 1e-6 * trace


if __name__ == "__main__":
    main()
