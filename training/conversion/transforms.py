"""Encoded images -> pixels of the size that training wants."""

import functools
from dataclasses import dataclass

import numpy as np
import PIL.Image

from dnnlib.errors import UserError
from training.conversion.depth import ValueRange, to_8_bits
from training.dataset.decoding import Transform, on_white, open_picture

LANCZOS, BICUBIC, BOX = PIL.Image.Resampling.LANCZOS, PIL.Image.Resampling.BICUBIC, PIL.Image.Resampling.BOX
BILINEAR = PIL.Image.Resampling.BILINEAR
CELEBA_BOX = (15, 40, 163, 188)  # left, upper, right, lower edge of the part of a CelebA image that is kept
CELEBA_CROP = 140


def decode_image(data: bytes | np.ndarray, channels: int = 3, value_range: ValueRange | None = None) -> np.ndarray:
    """uint8 [H, W, channels], 1 (gray) or 3 (RGB), as `open_picture` reads it; transparent parts become white.

    Args:
        value_range: of images of more than 8 bits, see `to_8_bits`.

    Raises:
        ValueError, OSError and others of Pillow: the data is damaged, or no image.
    """
    if isinstance(data, np.ndarray):
        image = PIL.Image.fromarray(data)
    else:
        image = open_picture(data, functools.partial(to_8_bits, value_range=value_range))
    if image.mode in ("LA", "RGBA"):
        image = on_white(image)
    mode = "L" if channels == 1 else "RGB"
    pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    if pixels.size == 0:
        raise ValueError("it has no pixels")
    return pixels[:, :, None] if channels == 1 else pixels


def resize(image: np.ndarray, width: int, height: int, how: PIL.Image.Resampling = LANCZOS) -> np.ndarray:
    """uint8 [H, W, C] -> [height, width, C]."""
    if image.shape[:2] == (height, width):
        return image
    flat = image[:, :, 0] if image.shape[2] == 1 else image
    resized = np.asarray(PIL.Image.fromarray(flat).resize((width, height), how))
    return resized.reshape(height, width, image.shape[2])


def center_crop(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """The largest centred square, resized: uint8 [H, W, C] -> [height, width, C]."""
    size = min(image.shape[:2])
    y, x = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
    return resize(image[y : y + size, x : x + size], width, height)


def center_crop_wide(image: np.ndarray, width: int, height: int) -> np.ndarray | None:
    """Rows around the middle, resized to width x height, in the middle of a black square [width, width, C].

    None if the image is too small.
    """
    rows = round(width * image.shape[0] / image.shape[1])
    if image.shape[1] < width or rows < height:
        return None
    image = resize(image[(image.shape[0] - rows) // 2 : (image.shape[0] + rows) // 2], width, height)
    canvas = np.zeros([width, width, image.shape[2]], dtype=np.uint8)
    canvas[(width - height) // 2 : (width + height) // 2] = image
    return canvas


def center_crop_dhariwal(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """As in ADM (Dhariwal and Nichol, 2021): halved while twice too large, bicubic to size, centre crop.

    uint8 [H, W, C] -> [height, width, C].
    """
    while min(image.shape[:2]) >= 2 * width:
        image = resize(image, image.shape[1] // 2, image.shape[0] // 2, BOX)
    scale = width / min(image.shape[:2])
    image = resize(image, round(image.shape[1] * scale), round(image.shape[0] * scale), BICUBIC)
    y, x = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return image[y : y + height, x : x + width]


def crop_celeba(image: np.ndarray) -> np.ndarray:
    """The face of a CelebA image: [218, 178, C] -> [148, 148, C].

    Raises:
        UserError: it is of another size.
    """
    left, upper, right, lower = CELEBA_BOX
    if image.shape[0] < lower or image.shape[1] < right:
        raise UserError(f"CelebA images are 178x218, this one is {image.shape[1]}x{image.shape[0]}")
    return image[upper:lower, left:right]


def resize_shorter(image: np.ndarray, size: int) -> np.ndarray:
    """[H, W, C] with the shorter side resized to `size`, bilinearly, and the other one in proportion."""
    height, width = image.shape[:2]
    shorter = min(height, width)
    return resize(image, size * width // shorter, size * height // shorter, BILINEAR)


def resize_and_crop(image: np.ndarray, size: int) -> np.ndarray:
    """The middle [size, size, C] of `resize_shorter`, as LSUN's images are evaluated."""
    image = resize_shorter(image, size)
    y, x = (round((n - size) / 2) for n in image.shape[:2])
    return image[y : y + size, x : x + size]


def center_crop_celeba(image: np.ndarray, width: int, height: int) -> np.ndarray | None:
    """The middle 140x140 pixels, resized bilinearly, as score_sde (Song et al. 2021) learns CelebA at 64x64.

    uint8 [H, W, C] -> [height, width, C]; None if the image is too small.
    """
    y, x = ((n - CELEBA_CROP) // 2 for n in image.shape[:2])
    if min(y, x) < 0:
        return None
    return resize(image[y : y + CELEBA_CROP, x : x + CELEBA_CROP], width, height, BILINEAR)


def enlarged_from(name: str | None, image: np.ndarray, width: int | None, height: int | None) -> int:
    """Shorter side of the part of an image that a transform keeps, if it makes more pixels of it; else 0."""
    if width is None or height is None:
        return 0
    rows, columns = image.shape[:2]
    if name is None:
        return min(rows, columns) if width > columns or height > rows else 0
    if name == "center-crop-wide":  # leaves smaller images out
        return 0
    boxes = {"celeba": CELEBA_BOX[2] - CELEBA_BOX[0], "center-crop-celeba": CELEBA_CROP}
    kept = boxes[name] if name in boxes else min(rows, columns)
    return kept if width > kept else 0


@dataclass(frozen=True)
class Fit:
    """A transform by name, as `make_transform` makes it, that loader processes can take over.

    Raises:
        UserError: when it is made, if the transform and the size do not go together.
    """

    name: str | None
    width: int
    height: int

    def __post_init__(self) -> None:
        make_transform(self.name, self.width, self.height)

    def __call__(self, image: np.ndarray) -> np.ndarray | None:
        return make_transform(self.name, self.width, self.height)(image)

    def describe(self) -> str:
        return f"{self.name or 'resized'} to {self.width}x{self.height}"


def make_transform(name: str | None, width: int | None, height: int | None) -> Transform:
    """The transform of that name (None: resize only) to width x height (None: the image's own size).

    It maps uint8 [H, W, C] to a square, or to None where the image is too small.

    Raises:
        UserError: the transform and the size do not go together.
    """
    if name is None:
        if width is None or height is None:
            return lambda image: image
        return lambda image: resize(image, width, height)
    if width is None or height is None:
        raise UserError(f"--transform={name} needs --resolution=WxH")
    if name != "center-crop-wide" and width != height:
        raise UserError(f"--transform={name} makes squares: --resolution must be NxN, not {width}x{height}")
    if name == "center-crop-wide" and width < height:
        raise UserError(f"--transform={name} is for wide images: --resolution={width}x{height} is a tall one")
    function = {
        "center-crop": center_crop,
        "center-crop-wide": center_crop_wide,
        "center-crop-dhariwal": center_crop_dhariwal,
        "celeba": lambda image, width, _height: resize_shorter(crop_celeba(image), width),
        "shorter-side": lambda image, width, _height: resize_and_crop(image, width),
        "center-crop-celeba": center_crop_celeba,
    }[name]
    return lambda image: function(image, width, height)
