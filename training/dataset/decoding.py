"""Encoded images and arrays -> numbers: PNG by the shortest way, everything else by Pillow and NumPy."""

import functools
import io
import os
import struct
import zlib

import numpy as np
import PIL.Image

try:
    import pyspng  # decodes PNG files that other tools wrote about twice as fast as Pillow (benchmarks/dataset.py)
except ImportError:
    pyspng = None

HEADER_BYTES = 256  # enough for the headers of PNG and .npy
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Signature, length of the first chunk (skipped), its type, width, height, bits per sample, colour type.
PNG_HEADER = struct.Struct(">8s4x4sIIBB")
# The same without the type, then whether interlaced, checksum (skipped), length and type of the second chunk.
PNG_DATA = struct.Struct(">8s8xIIBB2xB4xI4s")
PNG_CHANNELS = {0: 1, 2: 3, 3: 3, 4: 2, 6: 4}  # by colour type; palettes become RGB


@functools.cache
def image_suffixes() -> frozenset[str]:
    """File types that Pillow opens, such as '.png'."""
    return frozenset(ext for ext, kind in PIL.Image.registered_extensions().items() if kind in PIL.Image.OPEN)


def is_readable(name: str) -> bool:
    """Whether a file is an image or an array by its name."""
    suffix = os.path.splitext(name)[1].lower()
    return suffix in image_suffixes() or suffix == ".npy"


def is_array(name: str) -> bool:
    """Whether a file is an array by its name."""
    return name.lower().endswith(".npy")


def decode(name: str, data: bytes | memoryview) -> np.ndarray:
    """uint8 pixels or float32 latents [C, H, W] of a file; palettes and CMYK become RGB.

    Raises:
        ValueError, OSError and others of Pillow and NumPy: the file is damaged, or holds something else.
    """
    return _decode_npy(data) if is_array(name) else _decode_image(data)


def read_header(name: str, start: bytes | memoryview) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of what `decode` would return, from the first `HEADER_BYTES` of a file.

    Raises:
        ValueError: they do not tell, as in formats other than PNG and .npy.
    """
    return _npy_header(start) if is_array(name) else _png_header(start)


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


def _decode_image(data: bytes | memoryview) -> np.ndarray:
    """uint8 [C, H, W] of an encoded image."""
    plain = _decode_plain_png(data)
    if plain is not None:
        return plain
    if pyspng is not None and _is_simple_png(data):
        return _channels_first(pyspng.load(bytes(data)))
    with PIL.Image.open(io.BytesIO(data)) as image:
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"{image.mode} pixels have more than 8 bits: convert the image first")
        if image.mode not in ("L", "LA", "RGB", "RGBA"):
            image = image.convert("L" if image.mode == "1" else "RGB")
        return _channels_first(np.asarray(image))


def _decode_plain_png(data: bytes | memoryview) -> np.ndarray | None:
    """uint8 [C, H, W] of a PNG file of one data chunk and unfiltered rows, as `dataset_tool.py` writes them; else None.

    Several times as fast as Pillow, most of whose time goes into its own bookkeeping.
    """
    if len(data) < PNG_DATA.size:
        return None
    signature, width, height, bits, color, interlaced, size, chunk = PNG_DATA.unpack_from(data)
    rest = data[PNG_DATA.size + size + 8 : PNG_DATA.size + size + 12]
    plain = signature == PNG_SIGNATURE and bits == 8 and color in (0, 2, 4, 6) and interlaced == 0
    if not plain or chunk != b"IDAT" or rest != b"IEND":
        return None
    channels = PNG_CHANNELS[color]
    rows = np.frombuffer(zlib.decompress(data[PNG_DATA.size : PNG_DATA.size + size]), np.uint8)
    if rows.size != height * (1 + width * channels):
        raise ValueError("the image is truncated")
    rows = rows.reshape(height, 1 + width * channels)
    if rows[:, 0].any():
        return None
    return rows[:, 1:].reshape(height, width, channels).transpose(2, 0, 1)


def _is_simple_png(data: bytes | memoryview) -> bool:
    """Whether this is a PNG file that pyspng reads as Pillow does: 8-bit grayscale, RGB or RGBA, not interlaced.

    Raises:
        ValueError: it is, but damaged; pyspng itself does not compare checksums.
    """
    if len(data) < PNG_DATA.size:
        return False
    signature, _width, _height, bits, color, interlaced, _size, _chunk = PNG_DATA.unpack_from(data)
    if signature != PNG_SIGNATURE or bits != 8 or color not in (0, 2, 6) or interlaced != 0:
        return False
    position, kind = len(PNG_SIGNATURE), b""
    while kind != b"IEND":
        if len(data) < position + 8:
            raise ValueError("the image is truncated")
        size, kind = struct.unpack_from(">I4s", data, position)
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
    if not np.isfinite(array).all():
        raise ValueError("the latents hold NaN or infinity (as float32)")
    return array
