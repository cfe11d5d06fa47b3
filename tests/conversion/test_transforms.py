"""Decoding and transforms: exact pixels."""

import io

import numpy as np
import PIL.Image
import pytest
from conftest import GOLDEN
from sources import (
    encoded,
    image,
)

from training.conversion.transforms import decode_image, make_transform


@pytest.mark.parametrize(
    ("name", "transform", "width", "height"),
    [
        ("resize32", None, 32, 32),
        ("center-crop_32", "center-crop", 32, 32),
        ("center-crop-dhariwal_32", "center-crop-dhariwal", 32, 32),
        ("center-crop-wide_32x16", "center-crop-wide", 32, 16),
    ],
)
def test_golden_transforms(name, transform, width, height):
    golden = np.load(GOLDEN / "dataset_tool.npz")
    for i in range(5):
        made = make_transform(transform, width, height)(golden[f"source{i}"])
        # Pillow 13 rounds otherwise when width and height change by different factors; the golden values are its.
        older = int(PIL.__version__.split(".")[0]) < 13
        np.testing.assert_allclose(made.astype(int), golden[f"{name}_{i}"].astype(int), rtol=0, atol=2 if older else 0)


def test_too_small_for_wide():
    assert make_transform("center-crop-wide", 64, 32)(image(20, 30)) is None


GRAY = image(4, 4, channels=None)


def with_exif(orientation: int) -> bytes:
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    return encoded(image(4, 6), exif=exif)


KINDS = {
    "rgb": (encoded(image(4, 6)), image(4, 6)),
    "gray": (encoded(GRAY), np.repeat(GRAY[:, :, None], 3, axis=2)),
    "16 bits": (encoded(GRAY.astype(np.uint16) * 256 + 255), np.repeat(GRAY[:, :, None], 3, axis=2)),
    "lying on its side": (with_exif(6), np.rot90(image(4, 6), -1)),
    "upside down": (with_exif(3), image(4, 6)[::-1, ::-1]),
    "transparent": (encoded(np.zeros([2, 2, 4], dtype=np.uint8)), np.full([2, 2, 3], 255)),
    "opaque": (encoded(np.dstack([image(4, 6), np.full([4, 6], 255, np.uint8)])), image(4, 6)),
    "pixels": (image(4, 6), image(4, 6)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_images(kind):
    data, expected = KINDS[kind]
    np.testing.assert_array_equal(decode_image(data), expected)


def test_palettes_and_cmyk():
    f = io.BytesIO()
    PIL.Image.fromarray(image(4, 6)).quantize(4).save(f, format="png")
    expected = np.asarray(PIL.Image.fromarray(image(4, 6)).quantize(4).convert("RGB"))
    np.testing.assert_array_equal(decode_image(f.getvalue()), expected)
    f = io.BytesIO()
    PIL.Image.fromarray(image(16, 16)).convert("CMYK").save(f, format="jpeg", quality=100)
    assert decode_image(f.getvalue()).shape == (16, 16, 3)


@pytest.mark.parametrize("kind", ["png", "jpeg", "tiff", "webp", "gif"])
def test_large_images_are_no_warning(kind, monkeypatch):
    data = encoded(image(20, 30), kind)
    expected = decode_image(data)
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 400)  # warnings are errors here
    np.testing.assert_array_equal(decode_image(data), expected)
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 200)
    with pytest.raises(PIL.Image.DecompressionBombError):
        decode_image(data)


def test_gray_stays_gray():
    np.testing.assert_array_equal(decode_image(encoded(GRAY), channels=1), GRAY[:, :, None])
