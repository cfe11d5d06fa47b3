"""Files of reference statistics: published ones are read, hostile and damaged ones refused."""

import contextlib
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import GOLDEN, npy

from dnnlib.errors import UserError
from dnnlib.util import EasyDict
from torch_utils import safe_pickle
from training.metrics.files import load_stats, save_stats

NETWORK = GOLDEN / "official" / "network-snapshot-0008388-0.050.pkl"


def write(tmp_path: Path, data) -> Path:
    safe_pickle.save(tmp_path / "file.pkl", data)
    return tmp_path / "file.pkl"


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_reference_statistics(dtype, tmp_path):
    mu, sigma = np.arange(3).astype(dtype), np.eye(3).astype(dtype) * 2
    other = dict(mu=mu[:2], sigma=sigma[:2, :2])
    path = write(tmp_path, EasyDict(fid=EasyDict(mu=mu, sigma=sigma), fd_dinov2=other, num_images=5))
    np.savez(tmp_path / "old.npz", mu=mu, sigma=sigma)
    stats = load_stats(path)
    assert stats.keys() == {"fid", "fd_dinov2", "num_images"} and stats.num_images == 5
    for entry in (stats["fid"], load_stats(tmp_path / "old.npz")["fid"]):
        assert entry["mu"].dtype == entry["sigma"].dtype == np.float64
        np.testing.assert_array_equal(entry["mu"], mu)
        np.testing.assert_array_equal(entry["sigma"], sigma)
    assert stats["fd_dinov2"]["sigma"].shape == (2, 2)


def test_bad_statistics(tmp_path):
    with pytest.raises(UserError, match="holds no statistics"):
        load_stats(NETWORK)
    with pytest.raises(UserError, match="must be finite"):
        load_stats(write(tmp_path, dict(fid=dict(mu=np.array([np.nan]), sigma=np.eye(1)))))
    with pytest.raises(UserError, match="must be of shapes"):
        load_stats(write(tmp_path, dict(fid=dict(mu=np.zeros(2), sigma=np.eye(3)))))
    np.savez(tmp_path / "other.npz", a=np.zeros(2))
    with pytest.raises(UserError, match="other.npz: holds no statistics"):
        load_stats(tmp_path / "other.npz")
    np.savez(tmp_path / "objects.npz", mu=np.array([{}], dtype=object), sigma=np.zeros(2))
    with pytest.raises(UserError, match="objects.npz: cannot be read"):
        load_stats(tmp_path / "objects.npz")
    with pytest.raises(UserError, match="no such file"):
        load_stats(tmp_path / "nowhere.npz")


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("classes", [np.arange(4), np.zeros(5), np.zeros([5, 1], int), None])
def test_classes_of_images(classes, suffix, tmp_path):
    """One whole number for each image, or none."""
    features = np.zeros([5, 3], np.float32)
    stats = {
        "fd_pixels": {"features": features},
        "num_images": 5,
        "classes": np.arange(5) if classes is None else classes,
    }
    save_stats(tmp_path / f"a{suffix}", stats)
    if classes is None:
        assert load_stats(tmp_path / f"a{suffix}").classes.tolist() == [0, 1, 2, 3, 4]
    else:
        with pytest.raises(UserError, match="classes is not one whole number for each image"):
            load_stats(tmp_path / f"a{suffix}")


def npz_member(name: str, data: bytes, path: Path, compression=zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("mu.npy", npy(np.zeros(2)))
        archive.writestr("sigma.npy", npy(np.eye(2)))
        archive.writestr(name, data)
    return path


def npy_file(header: str, data: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + data


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    "member",
    [
        b"abc",
        npy(np.array(["a"])),
        npy(np.zeros(2, dtype=[("a", "f4")])),
        npy(np.zeros(2, dtype=complex)),
        npy(np.array([0x7FA00000, 0], dtype=np.uint32).view(np.float32)),
        npy(np.zeros([2, 2])),
        npy(np.zeros(2))[:-1],
        npy_file("{'descr': '<f8', 'fortran_order': False, 'shape': (10000000000000,), }"),
        npy_file(f"{{'descr': '<f8', 'fortran_order': False, 'shape': ({2**70},), }}"),
        npy_file("{'descr': '<f8', 'fortran_order': False, 'shape': (2L,), }"),
        npy_file("((((((2,"),
        npy_file("-" * 9000 + "1"),
    ],
)
def test_hostile_npz(member, tmp_path):
    with pytest.raises(UserError, match="a.npz") as err:
        load_stats(npz_member("mu.npy", member, tmp_path / "a.npz"))
    assert "\n" not in str(err.value)


@pytest.mark.parametrize("position", [6, 8, 20, 60])
def test_damaged_npz(position, tmp_path):
    path = npz_member("other", b"", tmp_path / "a.npz")
    data = bytearray(path.read_bytes())
    directory = data.index(b"PK\x01\x02")
    for start in (position, directory + position % 40):
        changed = data.copy()
        changed[start] ^= 0xFF
        path.write_bytes(changed)
        with contextlib.suppress(UserError):
            load_stats(path)
