"""Encoded images and arrays -> numbers: PNG by the shortest way, everything else by Pillow and NumPy."""

import io
import struct
import warnings
import zlib
from collections.abc import Callable

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps

from dnnlib.errors import one_line
from training.config.data import HUGE
from training.dataset.listing import is_array
from training.dataset.storage import inflate

try:
    import pyspng  # decodes PNG files that other tools wrote about twice as fast as Pillow (benchmarks/dataset.py)
except ImportError:
    pyspng = None

# Pixels [H, W, C] -> pixels of another size, or None where there are too few.
Transform = Callable[[np.ndarray], np.ndarray | None]
MAX_PIXELS = 100_000_000  # of images that are decoded here; beyond, Pillow has limits of its own
HEADER_BYTES = 256  # enough for the headers of PNG and .npy
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Signature, length of the first chunk (skipped), its type, width, height, bits per sample, colour type.
PNG_HEADER = struct.Struct(">8s4x4sIIBB")
# The same without the type, then whether interlaced, checksum (skipped), length and type of the second chunk.
PNG_DATA = struct.Struct(">8s8xIIBB2xB4xI4s")
WITH_ALPHA = (2, 4)  # channels of images that have an alpha channel
PNG_CHANNELS = {0: 1, 2: 3, 3: 3, 4: 2, 6: 4}  # by colour type; palettes become RGB
# Chunks that say nothing about pixels or orientation; in texts some tools keep EXIF or XMP data.
PNG_NEUTRAL_CHUNKS = frozenset(
    [b"IHDR", b"IDAT", b"IEND", b"gAMA", b"cHRM", b"sRGB", b"iCCP", b"sBIT", b"bKGD", b"pHYs", b"hIST", b"tIME"]
)


def decode(name: str, data: bytes | memoryview, opaque: bool = False) -> np.ndarray:
    """uint8 pixels or float32 latents [C, H, W] of a file; pixels as `open_picture` says.

    Args:
        opaque: put images with an alpha channel on white, as conversions do.

    Raises:
        ValueError, OSError and others of Pillow and NumPy: the file is damaged, or holds something else.
    """
    if is_array(name):
        return _decode_npy(data)
    image = _decode_image(data)
    if opaque and len(image) in WITH_ALPHA:
        image = _channels_first(np.asarray(on_white(PIL.Image.fromarray(image.transpose(1, 2, 0)))))
    return image


def fitted(image: np.ndarray, fit: Transform) -> np.ndarray:
    """An image as RGB, uint8 [C, H, W], that a function of [H, W, 3] has brought to its size.

    Raises:
        ValueError: it is too small for that.
    """
    pixels = fit(np.repeat(image, 3, axis=0).transpose(1, 2, 0) if len(image) == 1 else image.transpose(1, 2, 0))
    if pixels is None:
        raise ValueError("it is too small: give a lower --resolution")
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def read_header(name: str, start: bytes | memoryview, opaque: bool = False) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of what `decode` would return, from the first `HEADER_BYTES` of a file.

    Raises:
        ValueError: they do not tell, as in formats other than PNG and .npy, or are damaged.
    """
    try:
        if is_array(name):
            return _npy_header(start)
        (channels, height, width), dtype = _png_header(start)
        return (channels - (opaque and channels in WITH_ALPHA), height, width), dtype
    except Exception as err:  # NumPy parses its headers as Python text, and lets the parser's errors through
        raise ValueError(one_line(err)) from None


# ---------------------------------------------------------------------------------------------------------
# Images


def _png_header(data: bytes | memoryview) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of the pixels of a PNG file with at most 8 bits per channel, from its start."""
    if len(data) < PNG_HEADER.size:
        raise ValueError("too short")
    signature, chunk, width, height, bits, color = PNG_HEADER.unpack_from(data)
    if signature != PNG_SIGNATURE or chunk != b"IHDR" or bits > 8 or color not in PNG_CHANNELS:
        raise ValueError("not a PNG file of 8 bits per channel")
    return (PNG_CHANNELS[color], height, width), np.dtype(np.uint8)


def open_picture(data: bytes | memoryview, deep: Callable[[PIL.Image.Image], PIL.Image.Image]) -> PIL.Image.Image:
    """An image in mode L, LA, RGB or RGBA, upright as the camera was held (EXIF).

    Palettes, CMYK and the like become RGB. Alpha channels stay; colours that a palette or a single colour key declares
    transparent become white.

    Args:
        deep: brings images of more than 8 bits per channel (mode I or F) to mode L.

    Raises:
        ValueError, OSError and others of Pillow: the data is damaged, or no image.
    """
    with warnings.catch_warnings():
        # Large images are welcome; Pillow refuses those beyond twice its limit.
        warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
        image = PIL.Image.open(io.BytesIO(data))
        if _is_turned(image):
            PIL.ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith(("I", "F")):
            return deep(image)
        if image.mode == "PA" or "transparency" in image.info:
            return on_white(image)
        if image.mode in ("La", "RGBa"):
            return image.convert(image.mode.upper())
        if image.mode not in ("L", "LA", "RGB", "RGBA"):
            image = image.convert("L" if image.mode == "1" else "RGB")
        image.load()
        return image


def _is_turned(image: PIL.Image.Image) -> bool:
    """Whether the camera was held otherwise than upright; damaged EXIF data says nothing."""
    try:
        return image.getexif().get(PIL.ExifTags.Base.Orientation, 1) != 1
    except Exception:  # Pillow's readers of TIFF fail in many ways
        return False


def on_white(image: PIL.Image.Image) -> PIL.Image.Image:
    """An image whose transparent parts are white: mode L stays L, all others become RGB."""
    mode = "L" if image.mode in ("1", "L", "LA") else "RGB"
    image = image.convert("RGBA")
    return PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image).convert(mode)


def _decode_image(data: bytes | memoryview) -> np.ndarray:
    """uint8 [C, H, W] of an encoded image."""
    plain = _decode_plain_png(data)
    if plain is not None:
        return plain
    if pyspng is not None and _is_simple_png(data):
        return _channels_first(pyspng.load(bytes(data)))
    return _channels_first(np.asarray(open_picture(data, _refuse_deep)))


def _refuse_deep(image: PIL.Image.Image) -> PIL.Image.Image:
    raise ValueError(f"{image.mode} pixels have more than 8 bits: convert the images first (dataset_tool.py convert)")


def _decode_plain_png(data: bytes | memoryview) -> np.ndarray | None:
    """uint8 [C, H, W] of a PNG file of one data chunk and unfiltered rows, as `dataset_tool.py` writes them; else None.

    Several times as fast as Pillow, most of whose time goes into its own bookkeeping.
    """
    if len(data) < PNG_DATA.size:
        return None
    signature, width, height, bits, color, interlaced, size, chunk = PNG_DATA.unpack_from(data)
    rest = data[PNG_DATA.size + size + 8 : PNG_DATA.size + size + 12]
    plain = signature == PNG_SIGNATURE and bits == 8 and color in (0, 2, 4, 6) and interlaced == 0
    if not plain or chunk != b"IDAT" or rest != b"IEND" or width * height > MAX_PIXELS:
        return None
    channels = PNG_CHANNELS[color]
    row_bytes = 1 + width * channels
    pixels = inflate(data[PNG_DATA.size : PNG_DATA.size + size], height * row_bytes, zlib.MAX_WBITS)
    rows = np.frombuffer(pixels, np.uint8).reshape(height, row_bytes)
    if rows[:, 0].any():
        return None
    return rows[:, 1:].reshape(height, width, channels).transpose(2, 0, 1)


def _is_simple_png(data: bytes | memoryview) -> bool:
    """Whether pyspng reads this as `open_picture` does: a PNG file of 8-bit grayscale, RGB or RGBA, not interlaced,
    without transparent colours or EXIF.

    Raises:
        ValueError: it is, but damaged; pyspng itself does not compare checksums.
    """
    if len(data) < PNG_DATA.size:
        return False
    signature, width, height, bits, color, interlaced, _size, _chunk = PNG_DATA.unpack_from(data)
    if signature != PNG_SIGNATURE or bits != 8 or color not in (0, 2, 6) or interlaced != 0:
        return False
    if width * height > MAX_PIXELS:
        return False
    position, kind = len(PNG_SIGNATURE), b""
    while kind != b"IEND":
        if len(data) < position + 8:
            raise ValueError("the image is truncated")
        size, kind = struct.unpack_from(">I4s", data, position)
        if kind not in PNG_NEUTRAL_CHUNKS:
            return False
        end = position + 8 + size
        if data[end : end + 4] != zlib.crc32(data[position + 4 : end]).to_bytes(4, "big"):
            raise ValueError("the image is truncated or damaged (checksum mismatch)")
        position = end + 4
    return True


def _channels_first(pixels: np.ndarray) -> np.ndarray:
    """[H, W] or [H, W, C] -> [C, H, W]."""
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


# ---------------------------------------------------------------------------------------------------------
# Arrays


def _npy_header(data: bytes | memoryview) -> tuple[tuple[int, ...], np.dtype]:
    """Shape of an array file, and the dtype that `_decode_npy` turns it into, from its start."""
    f = io.BytesIO(data)
    if np.lib.format.read_magic(f) != (1, 0):
        raise ValueError("another version")
    shape, _fortran_order, dtype = np.lib.format.read_array_header_1_0(f)
    if len(shape) != 3 or not (dtype == np.uint8 or np.issubdtype(dtype, np.floating)):
        raise ValueError("not an image")
    return shape, dtype if dtype == np.uint8 else np.dtype(np.float32)


def plain_npy_header(data: bytes | memoryview, shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """The header of an array file whose numbers can be used as they lie in it; b'' if they cannot.

    Array files of one dataset have equal headers, so that it is parsed once for all of them.
    """
    f = io.BytesIO(data)
    if np.lib.format.read_magic(f) != (1, 0):
        return b""
    stored_shape, fortran_order, stored_dtype = np.lib.format.read_array_header_1_0(f)
    return bytes(data[: f.tell()]) if (stored_shape, fortran_order, stored_dtype) == (shape, False, dtype) else b""


def _decode_npy(data: bytes | memoryview) -> np.ndarray:
    array = np.load(io.BytesIO(data), allow_pickle=False)
    if array.ndim != 3 or array.size == 0:
        raise ValueError(f"expected an array [C, H, W], found shape {list(array.shape)}")
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"expected floating point latents or uint8 pixels, found {array.dtype}")
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    if not are_moderate(array):
        raise ValueError(f"the latents hold NaN or infinity, or numbers beyond {HUGE:g}: encode them again")
    return array


def are_moderate(array: np.ndarray) -> bool:
    """Whether all numbers are of a size that snapshots can hold statistics of; NaN is none."""
    return bool(np.abs(array).max() <= HUGE)
