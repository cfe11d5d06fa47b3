"""Accumulating statistics: batches, records, order, subsets."""

import numpy as np
import pytest
import torch
from conftest import DIGITS, tiny_network
from measuring import PIXELS, random_batches, stats_of

from dnnlib.errors import UserError
from dnnlib.util import EasyDict
from training.generation import generate_images
from training.metrics import calculate_stats_for_files, calculate_stats_for_iterable
from training.metrics.detectors import load_detectors
from training.metrics.statistics import last_stats


def test_statistics_come_with_the_last_batch():
    batches = list(calculate_stats_for_iterable(random_batches(), ["fd_pixels"]))
    assert [r.stats is not None for r in batches] == [False, False, True]
    assert [len(r.images) for r in batches] == [50, 50, 50]
    assert batches[-1].stats.num_images == 150 and batches[-1].stats.resolution == 8


def test_of_generated_images():
    seeds = list(range(12))
    images = generate_images(tiny_network(), seeds=seeds, max_batch_size=5, num_steps=2)
    batches = list(calculate_stats_for_iterable(images, PIXELS))
    assert [index for r in batches for index in r.indices] == seeds
    stored = torch.cat([r.images for r in batches])
    expected = load_detectors(["fd_pixels"])["fd_pixels"](stored)
    np.testing.assert_array_equal(batches[-1].stats.fd_pixels.features, expected.numpy())


def test_features_are_in_the_order_of_the_images():
    (images,) = random_batches(1)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    shuffled = [EasyDict(images=images[part], indices=part) for part in order.split(20)]
    a, b = stats_of([images], PIXELS), stats_of(shuffled, PIXELS)
    np.testing.assert_array_equal(a.fd_pixels.features, b.fd_pixels.features)


def test_subset_of_files():
    def features(seed: int) -> np.ndarray:
        stats = calculate_stats_for_files(DIGITS, 50, seed, ["kd_pixels"], num_workers=0, max_batch_size=9)
        return last_stats(stats).fd_pixels.features

    np.testing.assert_array_equal(features(0), features(0))
    assert not np.array_equal(features(0), features(1))


def test_too_few_images():
    with pytest.raises(UserError, match="statistics need 2 or more images, not 1"):
        stats_of(random_batches(1, 1))
    with pytest.raises(UserError, match="statistics need 2 or more images, not 0"):
        stats_of([])
