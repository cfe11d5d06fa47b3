"""Values of metrics from statistics, and warnings of small samples."""

import numpy as np
import pytest
import torch
from measuring import PIXELS, random_batches, stats_of

from dnnlib.errors import UserError
from dnnlib.util import EasyDict
from training.config.metrics import METRICS
from training.metrics import calculate_metrics_from_stats
from training.metrics.detectors import load_detectors
from training.metrics.distances import (
    frechet_distance,
    frechet_error,
    inception_score,
    kernel_distance,
    neighbour_scores,
)
from training.metrics.diversity import vendi_score
from training.metrics.memorisation import copying_score, memorisation


def test_each_metric_is_its_distance(monkeypatch):
    monkeypatch.setattr(kernel_distance, "__defaults__", (10, 50, 0))
    stats, ref = stats_of(random_batches(4), PIXELS, groups=5), stats_of(random_batches(5, seed=1), PIXELS)
    a, b = stats.fd_pixels, ref.fd_pixels
    kid = kernel_distance(a.features, b.features)
    assert calculate_metrics_from_stats(stats, ref, PIXELS) == {
        "fd_pixels": frechet_distance(a.mu, a.sigma, b.mu, b.sigma),
        "fd_pixels_std": frechet_error(a.groups, b.mu, b.sigma),
        "kd_pixels": kid[0],
        "kd_pixels_std": kid[1],
        **{f"{name}_pixels": value for name, value in neighbour_scores(b.features, a.features).items()},
    }


def test_all_metrics_in_one_pass(inception_file, dinov2_folder, clip_folder, monkeypatch):
    monkeypatch.setattr(kernel_distance, "__defaults__", (3, 10, 0))
    monkeypatch.setattr(memorisation, "__defaults__", (5, 0.5))
    monkeypatch.setattr(copying_score, "__defaults__", (2, 5, 0))
    weights = {"inception": inception_file, "dinov2": dinov2_folder, "clip": clip_folder}
    detectors = load_detectors(METRICS, weights=weights)
    passes = 0

    def images():
        nonlocal passes
        passes += 1
        for i, part in enumerate(random_batches(2, 10)):
            yield EasyDict(images=part, classes=torch.arange(10) % 2, indices=range(10 * i, 10 * i + 10))

    stats = stats_of(images(), list(METRICS), detectors=detectors)
    assert passes == 1 and set(detectors) == {"fid", "fd_dinov2", "fd_clip", "fd_pixels"}
    few = np.s_[:100]  # of the 2048 features, whose distance takes long
    stats.fid.update(mu=stats.fid.mu[few], sigma=stats.fid.sigma[few, few], features=stats.fid.features[:, few])
    with pytest.warns(UserWarning, match="mostly reflects the small sample"):
        results = calculate_metrics_from_stats(stats, stats, list(METRICS), held_out=stats)
    assert results["fid"] == pytest.approx(0, abs=1e-5) and results["recall_dinov2"] == 1
    assert (results["is"], results["is_std"]) == inception_score(stats.fid.logits)
    assert results["vendi_clip"] == vendi_score(stats.fd_clip.features)
    assert results["cmmd"] < 0 and results["cmmd_biased"] == pytest.approx(0, abs=1e-9)
    assert results["memorised"] == 1 and results["imbalance_pixels"] == 0 and results["rarest_clip"] == 1
    assert results["ct"] == pytest.approx(0, abs=1e-6)  # all are copies, the held-out images, too
    assert len(results) == 4 + 3 * 2 + 2 + 2 + 4 * (4 + 1 + 2 + 1 + 2)


@pytest.mark.parametrize("verbose", [False, True])
def test_few_images_are_warned_of(verbose):
    def warning_of(stats, ref) -> str:
        with pytest.warns(UserWarning, match="fd_pixels") as caught:
            calculate_metrics_from_stats(stats, ref, ["fd_pixels", "prdc_pixels"], verbose=verbose)
        (warning,) = caught
        assert warning.filename == __file__
        return str(warning.message)

    def sized(count: int) -> EasyDict:
        return stats_of(random_batches(1, count), ["fd_pixels", "prdc_pixels"])

    few, fewer, many = sized(192), sized(40), sized(193)
    caution = "in 192 dimensions mostly reflects the small sample: use far more"
    assert warning_of(few, many) == f"fd_pixels of 192 images {caution}"
    assert warning_of(many, fewer) == f"fd_pixels against a reference of 40 images {caution}"
    assert warning_of(few, fewer) == f"fd_pixels of 192 images against a reference of 40 images {caution}"
    # What is not known is not warned of: warnings are errors here.
    unknown = {"fd_pixels": fewer.fd_pixels}
    for stats, ref in [(many, many), (many, unknown), (unknown, many), (unknown, unknown)]:
        calculate_metrics_from_stats(stats, ref, ["fd_pixels"], verbose=verbose)


@pytest.mark.parametrize(
    ("metrics", "fragment"),
    [
        (["prdc_pixels"], "no features for prdc_pixels"),
        (["is"], "no logits for is"),
        (["fid"], "no statistics for fid"),
        (["balance_pixels"], "the reference has no classes for balance_pixels"),
        (["ct_pixels"], "the set of held-out images has no features for ct_pixels"),
    ],
)
def test_statistics_that_lack_something(metrics, fragment):
    """What files hold is enough for all metrics but the inception score."""
    means = stats_of(random_batches())
    both = {**stats_of(random_batches(), ["prdc_pixels"]), "fid": {"features": means.fd_pixels.sigma}}
    with pytest.raises(UserError, match=fragment):
        calculate_metrics_from_stats({**means, "fid": both["fid"]}, both, metrics)
