"""Data of NVAE's published code that is damaged, or not what it is taken for."""

import struct
import zlib

import numpy as np
import pytest
from conftest import fails_with, make_dataset, png, run_cli

from dataset_tool import main as dataset_tool
from dnnlib.errors import UserError
from training.conversion.nvae_data import fixed_split, read_mat, read_omniglot
from training.conversion.opening import open_source
from training.conversion.transforms import crop_celeba
from training.dataset.images import ImageFolderDataset


def element(kind: int, content: bytes) -> bytes:
    return struct.pack("<II", kind, len(content)) + content + bytes(-len(content) % 8)


def mat_file(compressed: bool, **arrays: np.ndarray) -> bytes:
    data = b"MATLAB 5.0 MAT-file".ljust(124) + b"\x00\x01IM"
    for name, array in arrays.items():
        flags = element(6, struct.pack("<II", 6, 0))
        dims = element(5, struct.pack("<ii", *array.shape))
        short = (
            struct.pack("<I", len(name) << 16 | 1) + name.encode().ljust(4)
            if len(name) <= 4
            else element(1, name.encode())
        )
        matrix = element(14, flags + dims + short + element(9, array.astype("<f8").tobytes(order="F")))
        if compressed:
            packed = zlib.compress(matrix)
            matrix = struct.pack("<II", 15, len(packed)) + packed
        data += matrix
    return data


@pytest.mark.parametrize("compressed", [False, True])
def test_matlab_files(compressed):
    arrays = {"data": np.arange(6.0).reshape(2, 3), "testdata": np.ones([1, 5])}
    found = dict(read_mat(mat_file(compressed, **arrays)))
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert np.array_equal(found[name], array)


@pytest.mark.parametrize("compressed", [False, True])
def test_damaged_matlab_files(compressed, tmp_path):
    data = mat_file(compressed, data=np.ones([784, 2]), testdata=np.ones([784, 1]))
    path = tmp_path / "chardata.mat"
    path.write_bytes(data)
    assert read_omniglot(path).shape == (2, 28, 28) and (read_omniglot(path, "test") == 255).all()
    for damaged in (
        b"",
        data[:100],
        data[:300],
        data[:-9],
        data.replace(b"MATLAB", b"OCTAVE"),
        mat_file(False, other=np.ones([1, 1])),
    ):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"chardata\.mat"):
            read_omniglot(path, "test")
    with pytest.raises(UserError, match="no such file"):
        read_omniglot(tmp_path / "none.mat")


def test_lmdb_with_other_keys(tmp_path):
    lmdb = pytest.importorskip("lmdb")
    with lmdb.open(str(tmp_path / "db")) as env, env.begin(write=True) as transaction:
        transaction.put(b"a", b"x")
        transaction.put(b"0", bytes(range(12)))
    iterator = open_source(tmp_path / "db").images()
    first = next(iterator)
    assert first.data.shape == (2, 2, 3)
    with pytest.raises(UserError, match="entry 1 of 2"):
        next(iterator)


def test_conversion(tmp_path):
    """Omniglot, CelebA and LSUN through the command."""
    (tmp_path / "chardata.mat").write_bytes(mat_file(True, data=np.ones([784, 3]), testdata=np.zeros([784, 2])))
    for split, count in [("train", 3), ("test", 2), ("all", 5)]:
        dest = tmp_path / f"{split}.zip"
        args = [f"--source={tmp_path / 'chardata.mat'}", f"--dest={dest}", "--channels=1", f"--split={split}"]
        result = run_cli(dataset_tool, "convert", *args, "--workers=1")
        assert result.exit_code == 0, result.output
        dataset = ImageFolderDataset(dest)
        assert (len(dataset), dataset.resolution, dataset.num_channels) == (count, 28, 1)
    fails_with(run_cli(dataset_tool, "convert", *args[:3], "--split=validation"), "parts train and test")
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, [218, 178, 3], dtype=np.uint8)
    data = make_dataset(tmp_path / "faces.zip", {"a.png": png(image)})
    for transform in ("celeba", "shorter-side"):
        dest = tmp_path / f"{transform}.zip"
        options = [f"--transform={transform}", "--resolution=64x64", "--workers=1"]
        result = run_cli(dataset_tool, "convert", f"--source={data}", f"--dest={dest}", *options)
        assert result.exit_code == 0, result.output
        assert ImageFolderDataset(dest).image_shape == (3, 64, 64)


def test_crop_of_other_images():
    with pytest.raises(UserError, match="178x218"):
        crop_celeba(np.zeros([64, 64, 3], np.uint8))


def test_fixed_split():
    train, validation = fixed_split(70, 7)
    assert len(train) == 63 and len(validation) == 7
    assert sorted([*train, *validation]) == list(range(70))
    assert np.array_equal(validation, fixed_split(70, 7)[1])
    assert not np.array_equal(validation, fixed_split(70, 7, seed=1)[1])
    with pytest.raises(UserError, match="cannot be taken"):
        fixed_split(5, 6)


def test_images_set_aside(tmp_path):
    """As NVAE's published code does with FFHQ."""
    files = {f"{i:02d}.png": png(np.full([4, 4, 3], i, np.uint8)) for i in range(20)}
    args = ["convert", f"--source={make_dataset(tmp_path / 'images.zip', files)}", "--workers=1", "--validation=3"]
    found = {}
    for split in ("train", "validation"):
        dest = tmp_path / f"{split}.zip"
        result = run_cli(dataset_tool, *args, f"--dest={dest}", f"--split={split}")
        assert result.exit_code == 0, result.output
        found[split] = [int(image.flat[0]) for image, _ in ImageFolderDataset(dest)]
        assert f"{len(found[split])} of its 20 images: --split={split} of --validation=3" in result.output
    train, validation = fixed_split(20, 3)
    assert found == {"train": train.tolist(), "validation": validation.tolist()}
    fails_with(run_cli(dataset_tool, *args, f"--dest={tmp_path / 'x.zip'}", "--split=test"), "not test: see --split")
    args[-1] = "--validation=21"
    fails_with(run_cli(dataset_tool, *args, f"--dest={tmp_path / 'x.zip'}"), "21 validation images cannot be taken")
