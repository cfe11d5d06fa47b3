"""Images as PNG files and grids."""

import numpy as np
import PIL.Image
import pytest
import torch

from torch_utils.pictures import GRID_GAP, GRID_GRAY, drawable, image_grid, save_image


def random_pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (2, "LA"), (3, "RGB"), (4, "RGBA")])
def test_saved_images(channels, mode, tmp_path):
    pixels = random_pixels(channels, 5, 7)
    save_image(tmp_path / "new" / "a.png", pixels)
    with PIL.Image.open(tmp_path / "new" / "a.png") as image:
        assert image.mode == mode
        read = np.asarray(image)
    assert np.array_equal(read if channels == 1 else read.transpose(2, 0, 1), pixels if channels > 1 else pixels[0])


def test_grid_of_large_images():
    images = random_pixels(5, 3, 64, 80)
    grid = image_grid(images, columns=2)
    assert grid.shape == (3, 3 * 64, 2 * 80)
    for index, image in enumerate(images):
        row, column = divmod(index, 2)
        assert np.array_equal(grid[:, row * 64 : (row + 1) * 64, column * 80 : (column + 1) * 80], image)
    assert not grid[:, 128:, 80:].any()  # no sixth image


def test_small_images_are_enlarged_and_set_apart():
    images = random_pixels(2, 1, 20, 20)
    grid = image_grid(images, columns=2)
    assert grid.shape == (1, 80, 80 + GRID_GAP + 80)
    assert np.array_equal(grid[:, ::4, :80:4], images[0])
    assert np.array_equal(grid[:, 3::4, 80 + GRID_GAP + 3 :: 4], images[1])
    assert (grid[:, :, 80 : 80 + GRID_GAP] == GRID_GRAY).all()


@pytest.mark.parametrize(("channels", "drawn"), [(1, 1), (2, 1), (3, 3), (4, 4), (8, 3)])
def test_drawable_channels(channels, drawn):
    pixels = torch.from_numpy(random_pixels(2, channels, 4, 4))
    assert np.array_equal(drawable(pixels), pixels[:, :drawn].numpy())


def test_drawable_latents():
    latents = torch.linspace(-3, 7, 32).reshape(1, 2, 4, 4)
    shown = drawable(latents)
    assert shown.dtype == np.uint8 and shown.shape == (1, 1, 4, 4)
    assert shown.min() == 0 and shown.max() == int(255 * 15 / 31)
    assert not drawable(torch.full([1, 1, 4, 4], 5.0)).any()
