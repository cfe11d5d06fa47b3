"""The Frechet distance of 2048 features, against the matrix root of SciPy.

Features are random, with a spectrum that falls over seven decades, as that of image features does.
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.harness import Job
from benchmarks.textbook import frechet_by_matrix_root
from training.metrics.distances import frechet_distance

DIM = 2048


def features(count: int, dim: int, seed: int) -> np.ndarray:
    """float64 [count, dim], mean 0, scaled so that the covariance is x^T x."""
    rng = np.random.default_rng(seed)
    shared = np.linalg.qr(np.random.default_rng(0).standard_normal([dim, dim]))[0]
    x = rng.standard_normal([count, dim]) * np.logspace(0.5, -3.0, dim) @ shared
    return (x - x.mean(axis=0)) / np.sqrt(count - 1)


def distance(function: Callable[..., float], counts: tuple[int, int]) -> Callable[[], float]:
    """`function` on statistics of so many features."""
    x1, x2 = features(counts[0], DIM, seed=1), features(counts[1], DIM, seed=2)
    stats = (np.zeros(DIM), x1.T @ x1, np.ones(DIM) / DIM, x2.T @ x2)
    return functools.partial(function, *stats)


MANY, FEW = 5 * DIM // 2, DIM // 2
JOBS = [
    Job(
        f"Frechet distance, {case}",
        functools.partial(distance, frechet_by_matrix_root, counts),
        functools.partial(distance, frechet_distance, counts),
        bar,
        tolerance=1e-4,
    )
    for case, counts, bar in [
        ("full rank", (MANY, MANY), 12),
        ("one of half rank", (MANY, FEW), 7),
        ("both of half rank", (FEW, FEW), 7),
    ]
]
