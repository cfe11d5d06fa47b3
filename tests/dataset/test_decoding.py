"""PNG files, other images and arrays, whole and damaged."""

import io

import numpy as np
import PIL.Image
import pytest
from conftest import make_dataset, npy, png, random_images

import training.dataset.decoding
from dnnlib.errors import UserError
from training.dataset.images import ImageFolderDataset

PNGS = [(mode, size) for mode in ("L", "LA", "RGB", "RGBA") for size in ((1, 1), (7, 7), (64, 64))]


@pytest.mark.parametrize("decoder", ["pyspng", "Pillow"])
@pytest.mark.parametrize(("mode", "size"), PNGS)
def test_both_png_decoders(decoder, mode, size, tmp_path, monkeypatch):
    if decoder == "pyspng":
        pytest.importorskip("pyspng")
    else:
        monkeypatch.setattr(training.dataset.decoding, "pyspng", None)
    shape = [*size, {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4}[mode]]
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    pixels[::2] //= 16  # rows of both kinds of filters
    path = make_dataset(tmp_path / "d", {"0.png": png(pixels[:, :, 0] if mode == "L" else pixels)})
    np.testing.assert_array_equal(ImageFolderDataset(path)[0][0], pixels.transpose(2, 0, 1))
    data = (path / "0.png").read_bytes()
    middle = data.index(b"IDAT") + 8
    for damaged in (data[:middle], data[:30], data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]):
        (path / "0.png").write_bytes(damaged)
        with pytest.raises(UserError, match=r"cannot read 0.png"):
            ImageFolderDataset(path)


def test_palette_and_bilevel_images(tmp_path):

    files = {}
    for name, mode in [("palette", "P"), ("cmyk", "CMYK")]:
        f = io.BytesIO()
        PIL.Image.new("RGB", (8, 8), (255, 0, 0)).convert(mode).save(f, format="tiff")
        files[f"{name}.tiff"] = f.getvalue()
    dataset = ImageFolderDataset(make_dataset(tmp_path / "data", files))
    for i in range(2):
        assert dataset[i][0][:, 0, 0].tolist() == [255, 0, 0]


def test_deep_pixels_are_refused(tmp_path):
    path = make_dataset(tmp_path / "data", {"a.png": png(np.zeros([8, 8], np.uint16))})
    with pytest.raises(UserError, match="more than 8 bits"):
        ImageFolderDataset(path)


@pytest.mark.parametrize("keep", [10, 60, 200])
def test_truncated_image_is_named(tmp_path, keep):
    files = random_images(3)
    files["00000/img00000001.png"] = files["00000/img00000001.png"][:keep]
    dataset = ImageFolderDataset(make_dataset(tmp_path / "data.zip", files))
    with pytest.raises(UserError, match=r"data.zip: cannot read 00000/img00000001.png: "):
        dataset[1]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full([1, 4, 4], np.nan, np.float32), "a.npy: the latents hold NaN"),
        (np.zeros([0, 4, 4], np.float32), r"shape \[0, 4, 4\]"),
        (np.zeros([4, 4], np.float32), r"shape \[4, 4\]"),
        (np.zeros([4, 4, 4], np.int32), "found int32"),
        (np.array([{}]), "cannot read"),
    ],
)
def test_bad_latents(tmp_path, array, message):
    with pytest.raises(UserError, match=message):
        ImageFolderDataset(make_dataset(tmp_path / "data", {"a.npy": npy(array)}))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x93NUMPY",
        b"PK\x03\x04",
        b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (99999999, 99999, 9999), }"
        + b" " * 40
        + b"\n",
    ],
)
def test_damaged_arrays(tmp_path, data):
    with pytest.raises(UserError, match="cannot read a.NPY: "):
        ImageFolderDataset(make_dataset(tmp_path / "data", {"a.NPY": data}))
