"""Memorisation: calibrated distances and the three-sample test, on copies, on fresh draws, and by their definitions."""

import itertools
import math

import numpy as np
import pytest
import torch

from dnnlib.errors import UserError
from training.metrics.memorisation import copying_score, k_means, mann_whitney, memorisation


def draws(count: int, seed: int, dim: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal([count, dim])


# ---------------------------------------------------------------------------------------------------------
# Calibrated distances


def test_calibrated_distances_by_their_definition():
    train, fake = draws(40, 0), draws(25, 1)
    distances = np.sort(np.linalg.norm(fake[:, None] - train, axis=2), axis=1)[:, :7]
    calibrated = distances[:, 0] / (0.8 * distances.mean(axis=1))
    found = memorisation(train, fake, neighbours=7, alpha=0.8)
    assert 0.1 < found["memorised"] < 0.9  # else the case would prove little
    assert found == pytest.approx({"memorised": (calibrated < 1).mean(), "calibrated": np.median(calibrated)})


def test_copies_stand_out():
    """Copies with a little noise count; fresh images do not, and images copied 50 times are no rarity."""
    train = draws(500, 0, 32)
    copies = train[:60] + 0.05 * draws(60, 1, 32)
    assert memorisation(train, draws(200, 2, 32))["memorised"] == 0
    assert memorisation(train, copies)["memorised"] == 1
    mixed = memorisation(train, np.concatenate([copies, draws(140, 2, 32)]))
    assert mixed["memorised"] == pytest.approx(0.3) and 1 < mixed["calibrated"] < 2
    assert memorisation(np.zeros([50, 8]), np.zeros([3, 8])) == {"memorised": 1, "calibrated": 0}


def test_too_few_training_images():
    with pytest.raises(UserError, match="to 50 neighbours need as many training images; there are 49"):
        memorisation(draws(49, 0), draws(5, 1))


# ---------------------------------------------------------------------------------------------------------
# C_T


def test_mann_whitney_by_pairs():
    """Ties count as a half."""
    rng = np.random.default_rng(3)
    p, q = rng.integers(0, 6, 13), rng.integers(1, 8, 9)
    U = sum((b > a) + (b == a) / 2 for a, b in itertools.product(p, q))
    expected = (U - 13 * 9 / 2) / math.sqrt(13 * 9 * 23 / 12)
    assert mann_whitney(torch.from_numpy(p).double(), torch.from_numpy(q).double()) == pytest.approx(expected)


def test_copying_score_of_one_cell():
    """Then it is the statistic of all distances."""
    train, held_out, fake = draws(50, 0), draws(30, 1), 1.1 * draws(40, 2)

    def distances(x):
        return torch.from_numpy(np.linalg.norm(x[:, None] - train, axis=2).min(axis=1))

    expected = mann_whitney(distances(held_out), distances(fake))
    assert copying_score(train, held_out, fake, cells=1) == pytest.approx(expected, rel=1e-9)


def test_copying_score_tells_copies_from_fresh_images():
    train, held_out = draws(600, 0), draws(300, 1)
    fresh = [copying_score(train, held_out, draws(300, seed)) for seed in range(10, 20)]
    assert np.abs(fresh).max() < 3 and np.std(fresh) < 1.5
    assert copying_score(train, held_out, train[:300] + 0.3 * draws(300, 2)) < -5
    assert copying_score(train, held_out, 2 * draws(300, 3)) > 5


def test_copying_in_a_part_of_the_space():
    """What the cells are for: copies in one half outweigh images in the other half that are far off."""
    centre = np.zeros(8)
    centre[0] = 20
    train, held_out = (np.concatenate([draws(300, i), centre + draws(300, i + 1)]) for i in (0, 2))
    fake = np.concatenate([train[:200] + 0.3 * draws(200, 5), centre + draws(400, 6)])
    score = copying_score(train, held_out, fake, cells=2)
    # Of the cell of copies alone, and of the other one, whose images are as they should be.
    parts = [copying_score(train[i], held_out[i], fake[j], cells=1) for i, j in [
        (slice(0, 300), slice(0, 200)), (slice(300, 600), slice(200, 600))]]  # fmt: skip
    assert parts[0] < -5 < parts[1] and score == pytest.approx(np.mean(parts), rel=1e-9)


def test_cells_of_k_means():
    """Clusters that are far apart are found, whatever their sizes; and equal images end it."""
    centres = np.array([[0.0, 0], [100, 0], [0, 100], [50, 200]])
    x = torch.from_numpy(np.concatenate([c + draws(n, n, 2) for c, n in zip(centres, (5, 50, 200, 20), strict=True)]))
    found = k_means(x, 4)
    means = torch.stack([part.mean(dim=0) for part in x.split([5, 50, 200, 20])])
    torch.testing.assert_close(found[found[:, 0].argsort()], means[means[:, 0].argsort()])
    assert k_means(torch.ones(7, 3), 3).tolist() == [[1.0] * 3] * 3


def test_too_few_for_the_test():
    with pytest.raises(UserError, match="needs as many training images; there are 9"):
        copying_score(draws(9, 0), draws(20, 1), draws(20, 2))
    with pytest.raises(UserError, match="no part of the space has 20 generated images and a held-out one"):
        copying_score(draws(100, 0), draws(20, 1), draws(19, 2))
