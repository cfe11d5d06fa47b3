"""Images of more than 8 bits: never black or white without a word."""

import io

import numpy as np
import PIL.Image
import pytest
from conftest import fails_with, make_dataset, png
from sources import convert, image

from dnnlib.errors import UserError
from training.dataset.images import ImageFolderDataset

VALUES = np.linspace(0, 1, 64).reshape(8, 8)


def tiff(pixels: np.ndarray) -> bytes:
    f = io.BytesIO()
    PIL.Image.fromarray(pixels).save(f, format="tiff")
    return f.getvalue()


KINDS = {
    "16 bits": (png((VALUES * 65535).astype(np.uint16)), 65535, None),
    "12 bits in 16": (png((VALUES * 4095).astype(np.uint16)), 4095, "its pixels reach only 4095 of 65535"),
    "8 bits in 16": (png((VALUES * 255).astype(np.uint16)), 255, "its pixels reach only 255 of 65535"),
    "32 bits": (tiff((VALUES * 100000).astype(np.int32)), 100000, "its pixels are int32, from 0 to 100000"),
    "float": (tiff(VALUES.astype(np.float32)), 1, "its pixels are float32, from 0 to 1"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_ranges(kind, tmp_path):
    data, highest, reason = KINDS[kind]
    source = make_dataset(tmp_path / "src", {"0.tiff": data, "1.png": png(image(8, 8, channels=None))})
    options = ["--channels=1", "--workers=1"]
    result = convert(tmp_path, source, ok=False, options=options)
    if reason is None:
        assert result.exit_code == 0
        expected = (VALUES * 65535).astype(np.uint16) >> 8
        np.testing.assert_array_equal(ImageFolderDataset(tmp_path / "out.zip")[0][0][0], expected)
    else:
        fails_with(result, f"0.tiff: cannot be read: {reason}", "say what black and white are (--range=LO,HI or auto)")
    for choice in (f"0,{highest}", "auto"):
        dataset = convert(tmp_path, source, dest=f"{choice}.zip", options=[f"--range={choice}", *options])
        assert np.abs(dataset[0][0][0] - VALUES * 255).max() <= 0.5 + 255 / highest * (highest > 1)
        np.testing.assert_array_equal(dataset[1][0][0], image(8, 8, channels=None))  # of 8 bits: as it is
    dataset = convert(tmp_path, source, dest="half.zip", options=[f"--range={highest / 4},{highest / 2}", *options])
    clipped = np.clip(VALUES * 4 - 1, 0, 1) * 255
    assert np.abs(dataset[0][0][0] - clipped).max() <= 0.5 + 4 * 255 / highest * (highest > 1)


def test_one_range_for_all_images(tmp_path):
    files = {f"{i}.tiff": tiff(np.array([[i, i + 1]], np.float32).repeat(2, axis=0)) for i in range(3)}
    files["3.tiff"] = b"broken"
    options = ["--range=auto", "--channels=1", "--on-error=skip", "--workers=2"]
    result = convert(tmp_path, make_dataset(tmp_path / "src", files), ok=False, options=options)
    assert result.exit_code == 0 and "--range=auto: 0,3\n" in result.output
    pixels = [picture[0, 0].tolist() for picture, _ in ImageFolderDataset(tmp_path / "out.zip")]
    assert pixels == [[0, 85], [85, 170], [170, 255]]


def test_no_numbers(tmp_path):
    source = make_dataset(tmp_path / "src", {"0.tiff": tiff(np.full([8, 8], np.nan, np.float32))})
    fails_with(
        convert(tmp_path, source, ok=False, options=["--range=auto"]), "0.tiff: cannot be read: its pixels hold NaN"
    )


def test_black_images_stay_black(tmp_path):
    source = make_dataset(tmp_path / "src", {"0.png": png(np.zeros([8, 8], np.uint16))})
    assert convert(tmp_path, source)[0][0].max() == 0


def test_training_says_what_to_do(tmp_path):
    path = make_dataset(tmp_path / "src", {"0.png": KINDS["16 bits"][0]})
    with pytest.raises(UserError, match=r"0.png: .* more than 8 bits: convert the images first"):
        ImageFolderDataset(path)
