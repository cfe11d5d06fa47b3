"""NVAE's data against golden values (data.npz, and the archives in data/)."""

import re

import numpy as np
import pytest
import torch
from conftest import GOLDEN, Golden
from nvae_golden import skip_without

from training.conversion.nvae_data import read_omniglot
from training.conversion.opening import open_source
from training.conversion.transforms import crop_celeba, decode_image, resize, resize_and_crop, resize_shorter
from training.losses_vae import binarize, image_values
from training.networks.nvae_distributions import BernoulliDecoder, LogisticMixtureDecoder

skip_without("data")
DATA, ARCHIVES = Golden("nvae/data"), GOLDEN / "nvae" / "data"
JPEG = 2 / 255  # between builds of the decoder
BITS = sorted(name for name in DATA.arrays.files if name.startswith("bits/"))
LMDBS = sorted(name.removesuffix("/items") for name in DATA.arrays.files if re.fullmatch(r"lmdb/.*/items", name))


def tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image.transpose(2, 0, 1) / np.float32(255))


def image(name: str) -> np.ndarray:
    return DATA.arrays[name]


def test_there_are_entries():
    assert BITS and LMDBS


@pytest.mark.parametrize("name", BITS)
def test_bits(name):
    levels = 2 ** int(name.split("/")[1])
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    values = (
        image_values(LogisticMixtureDecoder(1, 1, max(levels, 3)), images) if levels > 2 else (images >= 128).float()
    )
    assert torch.equal(values.flatten(), DATA[name])


def test_binarisation():
    padded = torch.nn.functional.pad(DATA["mnist/in_u8"], [2] * 4).float() / 255
    assert torch.equal(padded.unsqueeze(0), DATA["mnist/padded_prob"])
    assert torch.equal(binarize(DATA["mnist/padded_prob"], DATA["mnist/uniform"]), DATA["mnist/binarised"])
    draws = torch.cat([image_values(BernoulliDecoder(), DATA["mnist/in_u8"][None, None], pad=2) for _ in range(500)])
    assert (draws.mean(dim=0) - DATA["mnist/mean_of_2000_reference_draws"]).abs().max() < 0.15  # 5 standard deviations


def test_celeba():
    cropped = crop_celeba(image("celeba64/in_hwc_u8"))
    assert np.array_equal(cropped, image("celeba64/cropped_u8"))
    small = resize_shorter(cropped, image("celeba64/valid_u8").shape[0])
    assert np.array_equal(small, image("celeba64/valid_u8"))
    assert torch.equal(tensor(small), DATA["celeba64/valid"])


def test_resizing():
    for name in [name for name in DATA.arrays.files if re.fullmatch(r"generic/valid\d+", name)]:
        size = min(DATA[name].shape[1:])
        assert torch.equal(tensor(resize_shorter(image("generic/in_hwc_u8"), size)), DATA[name])
    for name in [name for name in DATA.arrays.files if re.fullmatch(r"lsun/valid\d+", name)]:
        assert torch.equal(tensor(resize_and_crop(image("lsun/in_hwc_u8"), DATA[name].shape[1])), DATA[name])
    expected = image("ffhq/bilinear_quarter_u8")
    assert np.array_equal(resize_shorter(image("ffhq/in_hwc_u8"), expected.shape[0]), expected)
    assert np.array_equal(resize(expected, *expected.shape[:2]), expected)


def test_omniglot():
    for split in ("train", "test"):
        assert np.array_equal(read_omniglot(ARCHIVES / "chardata.mat", split), image(f"omniglot/{split}_u8"))


@pytest.mark.parametrize("name", LMDBS)
def test_lmdb(name):
    pytest.importorskip("lmdb")
    _, kind, split = name.split("/")
    source = open_source(ARCHIVES / f"lmdb_{kind}" / f"{split}.lmdb")
    expected = DATA[f"{name}/items"]
    assert source.count == len(expected) == int(DATA[f"{name}/actual_len"])
    for item, value in zip(source.images(), expected, strict=True):
        pixels = decode_image(item.data)
        if kind.startswith("encoded"):
            found = tensor(resize_shorter(crop_celeba(pixels), value.shape[1]))
            assert (found - value).abs().max() <= JPEG
        else:
            assert torch.equal(tensor(pixels), value)


def test_lsun():
    pytest.importorskip("lmdb")
    (folder,) = (ARCHIVES / "lsun").iterdir()
    expected = DATA["lsun/lmdb_items_valid64"]
    for item, value in zip(open_source(folder).images(), expected, strict=True):
        assert torch.equal(tensor(resize_and_crop(decode_image(item.data), value.shape[1])), value)
