"""Conformance of the metrics: each stage against its definition, within the tolerances of docs/metrics.md."""

import numpy as np
import PIL.Image
import pytest
from conftest import Golden, make_dataset, png
from measuring import stats_of, uint8_images

from training.metrics import calculate_stats_for_files, frechet_distance
from training.metrics.detectors import load_detector
from training.metrics.dinov2 import DINOv2Detector
from training.metrics.inception import resize_tf1
from training.metrics.statistics import last_stats

RESIZE, FEATURES, STATISTICS, DISTANCE = 1e-6, 1e-4, 1e-12, 1e-9


# ---------------------------------------------------------------------------------------------------------
# Resizing


@pytest.mark.parametrize("shape", [(5, 7), (40, 33), (1, 1)])
def test_resize_of_inception(shape, check):
    """Output pixel (i, j) is the bilinear interpolation at (i H / n, j W / n), computed one by one."""
    image, n = uint8_images(1, 3, *shape), 24
    pixels = image[0].double().numpy()
    expected = np.zeros([3, n, n])
    for i in range(n):
        for j in range(n):
            y, x = i * shape[0] / n, j * shape[1] / n
            for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
                weight = abs(1 - row - y % 1) * abs(1 - column - x % 1)
                at = min(int(y) + row, shape[0] - 1), min(int(x) + column, shape[1] - 1)
                expected[:, i, j] += weight * pixels[:, at[0], at[1]]
    check(resize_tf1(image.float(), n)[0], expected, RESIZE)


@pytest.mark.parametrize("size", [(64, 64), (300, 260)])
def test_resizes_of_dinov2(size, dinov2_folder):
    image = uint8_images(1, 3, *size) // 4 + 96  # nothing is clipped, which Pillow does after each of its two passes
    detector = {mode: load_detector("dinov2", "cpu", dinov2_folder, mode) for mode in ("torch", "pil")}
    resized = {}
    for mode, d in detector.items():
        assert isinstance(d, DINOv2Detector)
        resized[mode] = d.resized(image)[0].permute(1, 2, 0).numpy()
    pillow = PIL.Image.fromarray(image[0].permute(1, 2, 0).numpy()).resize((224, 224), PIL.Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(resized["pil"], np.asarray(pillow))
    # The same filter (a = -1/2) in floating point, without Pillow's rounding after each pass. The absolute values of its
    # weights sum to 5/4.
    assert np.abs(resized["torch"] - np.asarray(pillow)).max() < 0.5 * 5 / 4 + 0.5


# ---------------------------------------------------------------------------------------------------------
# Network


def images_in(golden: Golden) -> int:
    """How many images a golden file holds: image0, image1, ..."""
    count = sum(name.startswith("image") for name in golden.arrays.files)
    assert count > 0
    return count


def test_inception(inception_file, check):
    golden = Golden("inception")
    detector = load_detector("inception", "cpu", inception_file)
    for i in range(images_in(golden)):
        features = detector(golden[f"image{i}"][None])
        check(features[0], golden[f"pool2048_{i}"], FEATURES, f"features {i}")
        check(detector.logits(features)[0], golden[f"logits_unbiased_{i}"], FEATURES, f"logits {i}")


@pytest.mark.parametrize("resize", ["torch", "pil"])
def test_dinov2(dinov2_folder, resize, check):
    golden = Golden("dinov2_tiny")
    detector = load_detector("dinov2", "cpu", dinov2_folder, resize)
    for i in range(images_in(golden)):
        check(detector(golden[f"image{i}"][None])[0], golden[f"features_{resize}_{i}"], FEATURES, f"image {i}")


# ---------------------------------------------------------------------------------------------------------
# Statistics


@pytest.mark.parametrize("batch", [1, 7, 64, 1000])
def test_statistics(batch, check):
    images = uint8_images(150, 3, 8, 8)
    stats = stats_of(images.split(batch), groups=4)
    features = load_detector("pixels", "cpu")(images).double().numpy()
    check(stats.fd_pixels.mu, features.mean(axis=0), STATISTICS)
    check(stats.fd_pixels.sigma, np.cov(features.T), STATISTICS)
    assert stats.num_images == 150
    assert [count for count, _, _ in stats.fd_pixels.groups] == [38, 38, 37, 37]


def test_statistics_of_files(tmp_path, check):
    images = uint8_images(20, 3, 8, 8)
    files = {f"{i:02d}.png": png(image.permute(1, 2, 0).numpy()) for i, image in enumerate(images)}
    path = make_dataset(tmp_path / "x.zip", files)
    batches = calculate_stats_for_files(path, metrics=["fd_pixels", "kd_pixels"], num_workers=0, max_batch_size=6)
    stats = last_stats(batches)
    features = load_detector("pixels", "cpu")(images)
    np.testing.assert_array_equal(stats.fd_pixels.features, features.numpy())
    check(stats.fd_pixels.sigma, np.cov(features.double().numpy().T), STATISTICS)


# ---------------------------------------------------------------------------------------------------------
# Distance


def test_golden_distances(check):
    g = Golden("frechet")
    names = [key.removesuffix("_fd") for key in g.arrays.files if key.endswith("_fd")]
    assert names
    for name in names:
        mu1, sigma1, mu2, sigma2 = (g[f"{name}_{key}"] for key in ("mu1", "sigma1", "mu2", "sigma2"))
        check(frechet_distance(mu1, sigma1, mu2, sigma2), g[f"{name}_fd"], DISTANCE, name)
        swapped = frechet_distance(mu2.numpy(), sigma2.numpy(), mu1.numpy(), sigma1.numpy())
        check(swapped, g[f"{name}_fd"], DISTANCE, name)
