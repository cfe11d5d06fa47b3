"""Files of statistics: round trips, the published layout, damaged files."""

import contextlib
import pickle

import numpy as np
import pytest
from measuring import PIXELS, random_batches, stats_of

from dnnlib.errors import UserError
from training.metrics import load_stats, save_stats


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_round_trip(suffix, tmp_path):
    stats = stats_of(random_batches(), PIXELS)
    stats.facts = {"data": "here"}
    save_stats(tmp_path / f"a{suffix}", stats)
    loaded = load_stats(tmp_path / f"a{suffix}")
    assert (loaded.num_images, loaded.resolution, loaded.facts) == (150, 8, {"data": "here"})
    assert loaded.fd_pixels.detector == stats.fd_pixels.detector
    for key in ("mu", "sigma", "features"):
        np.testing.assert_array_equal(loaded.fd_pixels[key], stats.fd_pixels[key])
    for position in range(0, 2000, 97):
        data = bytearray((tmp_path / f"a{suffix}").read_bytes())
        data[position] ^= 0xFF
        (tmp_path / f"b{suffix}").write_bytes(data)
        with contextlib.suppress(UserError):  # the change may be in a number
            load_stats(tmp_path / f"b{suffix}")


def test_published_pickle(tmp_path):
    stats = stats_of(random_batches())
    save_stats(tmp_path / "a.pkl", stats)
    with open(tmp_path / "a.pkl", "rb") as f:
        plain = pickle.load(f)  # what the published tools do
    assert plain.keys() == {"fd_pixels", "num_images"} and plain["num_images"] == 150
    np.testing.assert_array_equal(plain["fd_pixels"]["sigma"], stats.fd_pixels.sigma)
    np.testing.assert_array_equal(load_stats(tmp_path / "a.pkl").fd_pixels.mu, stats.fd_pixels.mu)
    with pytest.raises(UserError, match="means and covariances only"):
        save_stats(tmp_path / "b.pkl", stats_of(random_batches(), PIXELS))
    with pytest.raises(UserError, match=r"c.txt: statistics are saved as .safetensors, .npz, .pkl"):
        save_stats(tmp_path / "c.txt", stats)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pkl"]


def test_other_safetensors_files(tmp_path, snapshot_file):
    with pytest.raises(UserError, match="holds no feature statistics"):
        load_stats(snapshot_file)


@pytest.mark.parametrize("detector", [{}, [], "pixels", 1])
def test_damaged_description_of_the_detector(detector, tmp_path):
    stats = stats_of(random_batches())
    stats.fd_pixels.detector = detector
    save_stats(tmp_path / "a.safetensors", stats)
    with pytest.raises(UserError, match="its metadata is damaged"):
        load_stats(tmp_path / "a.safetensors")


def test_features_of_score_sde(tmp_path):
    """Its files hold Inception's features of all images; mean and covariance are made of them."""
    features = np.random.default_rng(0).normal(size=[50, 16]).astype(np.float32)
    np.savez_compressed(tmp_path / "cifar10_stats.npz", pool_3=features)
    stats = load_stats(tmp_path / "cifar10_stats.npz")
    assert stats.num_images == 50
    np.testing.assert_allclose(stats.fid.mu, features.astype(np.float64).mean(axis=0))
    np.testing.assert_allclose(stats.fid.sigma, np.cov(features.astype(np.float64), rowvar=False))
    for damaged, message in [
        (features[:1], "1 image, which have no covariance"),
        (features[0], "shapes .D. and .D, D., features of .N, D."),
    ]:
        np.savez(tmp_path / "damaged.npz", pool_3=damaged)
        with pytest.raises(UserError, match=message):
            load_stats(tmp_path / "damaged.npz")
    features[3, 4] = np.nan
    np.savez(tmp_path / "nan.npz", pool_3=features)
    with pytest.raises(UserError, match="nan.npz: mu and sigma must be finite"):
        load_stats(tmp_path / "nan.npz")
