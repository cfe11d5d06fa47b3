"""Datasets: shapes, subsets, mirrored and cached images, and those that do not fit."""

import pickle
import shlex

import numpy as np
import pytest
import torch
from conftest import DIGITS, GOLDEN, make_dataset, npy, png, random_images, run_cli

from dataset_tool import main as dataset_tool
from dnnlib.errors import UserError
from training.dataset.images import ImageFolderDataset

GOLDEN_SUBSETS = np.load(GOLDEN / "dataset_tool.npz")


def test_digits():
    dataset = ImageFolderDataset(DIGITS)
    assert (len(dataset), dataset.resolution, dataset.num_channels, dataset.label_dim) == (1797, 8, 1, 10)
    assert dataset.has_labels
    image, label = dataset[0]
    assert image.shape == (1, 8, 8)
    assert image.dtype == np.uint8
    assert label.tolist() == [1] + [0] * 9
    # Every stroke value of the source survives: 0..16 as 0..255.
    values = np.unique(np.stack([dataset[i][0] for i in range(100)]))
    assert values.tolist() == [round(v * 255 / 16) for v in range(17)]


@pytest.mark.parametrize("name", ["data.zip", "data"])
@pytest.mark.parametrize("channels", [None, 3, 4])
def test_pixels(tmp_path, name, channels):
    files = random_images(3, channels=channels)
    dataset = ImageFolderDataset(make_dataset(tmp_path / name, files))
    rng = np.random.default_rng(0)
    expected = rng.integers(0, 256, [8, 8] if channels is None else [8, 8, channels], dtype=np.uint8)
    expected = expected[None] if channels is None else expected.transpose(2, 0, 1)
    np.testing.assert_array_equal(dataset[0][0], expected)
    assert dataset.num_channels == (channels or 1)


def test_latents(tmp_path):
    latents = np.random.default_rng(0).normal(size=[3, 8, 4, 4]).astype(np.float32)
    files = {f"00000/img-mean-std-{i:08d}.npy": npy(x) for i, x in enumerate(latents)}
    for name in ("data.zip", "data"):
        dataset = ImageFolderDataset(make_dataset(tmp_path / name, files))
        assert dataset.dtype == np.float32
        np.testing.assert_array_equal(dataset[1][0], latents[1])


def test_folder_and_zip_are_the_same_dataset(tmp_path):
    files = random_images(5)
    labels = {name: i for i, name in enumerate(files)}
    folder = ImageFolderDataset(make_dataset(tmp_path / "data", files, labels))
    archive = ImageFolderDataset(make_dataset(tmp_path / "data.zip", files, labels))
    assert folder.info() == archive.info()
    changed = {**files, "00000/img00000002.png": random_images(1, seed=9)["00000/img00000000.png"]}
    assert ImageFolderDataset(make_dataset(tmp_path / "changed", changed, labels)).info() != folder.info()
    assert ImageFolderDataset(make_dataset(tmp_path / "unlabeled", files)).info() != folder.info()


@pytest.mark.parametrize(("count", "size", "seed"), [(100, 10, 0), (100, 10, 3), (50000, 20, 0), (7, 7, 0)])
def test_subsets(tmp_path, count, size, seed):
    # A dataset of `count` names whose pixels are never read but for the chosen ones.
    image = random_images(1)["00000/img00000000.png"]
    path = make_dataset(tmp_path / "data.zip", {f"{i:05d}.png": image for i in range(count)})
    dataset = ImageFolderDataset(path, max_size=size, random_seed=seed)
    chosen = [int(dataset.name(i).split(".")[0]) for i in range(size)]
    assert chosen == GOLDEN_SUBSETS[f"subset_of{count}_max{size}_seed{seed}"].tolist()
    assert len(dataset) == size


def test_xflip():
    plain, both = ImageFolderDataset(DIGITS), ImageFolderDataset(DIGITS, xflip=True)
    assert len(both) == 2 * len(plain)
    np.testing.assert_array_equal(both[5][0], plain[5][0])
    np.testing.assert_array_equal(both[1797 + 5][0], plain[5][0][:, :, ::-1])
    np.testing.assert_array_equal(both[1797 + 5][1], plain[5][1])
    with pytest.raises(IndexError):
        both[2 * 1797]


def test_cache_returns_the_same_images():
    cached, plain = ImageFolderDataset(DIGITS, cache=True), ImageFolderDataset(DIGITS)
    first = cached[3][0]
    first[:] = 0  # must not reach the cache
    np.testing.assert_array_equal(cached[3][0], plain[3][0])


def test_can_be_sent_to_another_process():
    dataset = ImageFolderDataset(DIGITS)
    dataset[0]  # the memory map is open
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(dataset))[7][0], dataset[7][0])


def test_missing_and_empty(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such dataset"):
        ImageFolderDataset(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images found"):
        ImageFolderDataset(tmp_path / "empty")


def test_not_square(tmp_path):
    path = make_dataset(tmp_path / "data", {"a.png": png(np.zeros([8, 12, 3], np.uint8))})
    with pytest.raises(UserError, match="a.png is 12x8 with 3 channels, not square"):
        ImageFolderDataset(path)


def test_wrong_resolution(tmp_path):
    with pytest.raises(UserError, match="the images are 8x8 with 1 channel, not 16x16"):
        ImageFolderDataset(DIGITS, resolution=16)


@pytest.mark.parametrize("other", [np.zeros([16, 16, 3], np.uint8), np.zeros([8, 8], np.uint8)])
def test_unequal_images(tmp_path, other):
    files = {**random_images(2), "odd.png": png(other)}
    dataset = ImageFolderDataset(make_dataset(tmp_path / "data.zip", files))
    with pytest.raises(UserError, match="odd.png is .* but 00000/img00000000.png is 8x8 with 3 channels"):
        dataset[2]


def test_pixels_and_latents_do_not_mix(tmp_path):
    files = {**random_images(1), "b.npy": npy(np.zeros([3, 8, 8], np.float32))}
    dataset = ImageFolderDataset(make_dataset(tmp_path / "data", files))
    with pytest.raises(UserError, match="b.npy holds float32, but 00000/img00000000.png uint8"):
        dataset.verify()


def test_verify_finds_unequal_sizes_without_decoding(tmp_path):
    good = ImageFolderDataset(make_dataset(tmp_path / "good.zip", random_images(3)))
    good.verify()
    files = {**random_images(2), "odd.png": png(np.zeros([16, 16, 3], np.uint8))}
    dataset = ImageFolderDataset(make_dataset(tmp_path / "data.zip", files))
    with pytest.raises(UserError, match="odd.png is 16x16"):
        dataset.verify()


def test_verify_finds_other_kinds_of_pixels(tmp_path):
    for i, odd in enumerate([np.zeros([8, 8], np.uint8), np.zeros([8, 8], np.uint16)]):
        dataset = ImageFolderDataset(make_dataset(tmp_path / f"{i}.zip", {**random_images(1), "odd.png": png(odd)}))
        with pytest.raises(UserError, match="odd.png"):
            dataset.verify()


def test_verify_reads_headers_only(tmp_path):
    latents = {f"{i}.npy": npy(np.zeros([8, 4, 4], np.float32)) for i in range(3)}
    for name, files in (("latents", latents), ("pixels", random_images(3, size=32))):
        last = max(files)
        files[last] = files[last][:-50]  # which reading all of it would find
        dataset = ImageFolderDataset(make_dataset(tmp_path / f"{name}.zip", files))
        dataset.verify()
        with pytest.raises(UserError, match=f"cannot read {last}"):
            dataset[2]
    odd = {**latents, "odd.npy": npy(np.zeros([8, 5, 5], np.float32))}
    with pytest.raises(UserError, match="odd.npy is 5x5 with 8 channels"):
        ImageFolderDataset(make_dataset(tmp_path / "odd.zip", odd)).verify()


@pytest.mark.parametrize(("gpu", "size"), [(False, 32), (True, 64)])
def test_raw_photos_get_a_ready_command(tmp_path, monkeypatch, gpu, size):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    folder = tmp_path / "my photos"
    make_dataset(
        folder, {"a.png": png(np.zeros([90, 120, 3], np.uint8)), "b.png": png(np.zeros([70, 80, 3], np.uint8))}
    )
    with pytest.raises(UserError, match="a.png is 120x90 with 3 channels, not square; make a dataset") as err:
        ImageFolderDataset(folder)
    words = shlex.split(str(err.value).partition("by python dataset_tool.py ")[2])
    result = run_cli(dataset_tool, *words, "--workers=1")
    assert result.exit_code == 0, result.output
    assert ImageFolderDataset(tmp_path / f"my photos-{size}x{size}.zip").image_shape == (3, size, size)
    # Some gray ones among the rest: only the channels differ.
    make_dataset(
        tmp_path / "b", {"a.png": png(np.zeros([9, 9, 3], np.uint8)), "b.png": png(np.zeros([9, 9], np.uint8))}
    )
    with pytest.raises(UserError, match="b.png is 9x9 with 1 channel.*--resolution=9x9"):
        ImageFolderDataset(tmp_path / "b").verify()
