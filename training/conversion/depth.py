"""Images of more than 8 bits per pixel (16-bit, int32 and float grayscale) to 8 bits, by a stated rule."""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
import PIL.Image

from training.conversion.sources import Source, SourceImage
from training.conversion.workers import map_in_order
from training.dataset.decoding import open_picture

ValueRange = tuple[float, float]  # values that become 0 and 255
CHUNK = 16  # images that a worker gets at a time
MAX_16, MAX_12 = 0xFFFF, 0xFFF
REMEDY = "say what black and white are (--range=LO,HI or auto)"


def to_8_bits(image: PIL.Image.Image, value_range: ValueRange | None = None) -> PIL.Image.Image:
    """An image of mode I or F as mode L.

    With a range, values from its low to its high end become 0 to 255, rounded, and values beyond are clipped. Without
    one, 16-bit values keep their upper 8 bits; where that would leave next to nothing of 12-bit or 8-bit data, and for
    other types, a range must be given.

    Raises:
        ValueError: the values have no meaning without a range, or are not numbers.
    """
    values = np.asarray(image)
    if not np.isfinite(values).all():
        raise ValueError("its pixels hold NaN or infinity")
    if value_range is not None:
        low, high = value_range
        scaled = (values.astype(np.float64) - low) * (255 / (high - low))
        return PIL.Image.fromarray(scaled.round().clip(0, 255).astype(np.uint8))
    lowest, highest = values.min(initial=0), values.max(initial=0)
    if image.mode == "F" or not 0 <= lowest <= highest <= MAX_16:
        raise ValueError(f"its pixels are {values.dtype}, from {lowest:g} to {highest:g}: {REMEDY}")
    if 0 < highest <= MAX_12:
        raise ValueError(f"its pixels reach only {highest} of {MAX_16}, and would be almost black: {REMEDY}")
    return PIL.Image.fromarray((values >> 8).astype(np.uint8))


def measure_range(sources: Sequence[Source], max_images: int | None, workers: int) -> ValueRange | None:
    """The lowest and highest pixel of all deep images of some sources; None if there are none, or all are constant.

    Images that cannot be read are left to the conversion.
    """
    images = itertools.islice(itertools.chain.from_iterable(source.images() for source in sources), max_images)
    low, high = math.inf, -math.inf
    for found in map_in_order(_extremes, _chunks(images), workers):
        low, high = min(low, found[0]), max(high, found[1])
    return (low, high) if low < high else None


def _chunks(images: Iterator[SourceImage]) -> Iterator[list[SourceImage]]:
    while chunk := list(itertools.islice(images, CHUNK)):
        yield chunk


def _extremes(chunk: list[SourceImage]) -> ValueRange:
    found: list[float] = []
    for image in chunk:
        if isinstance(image.data, bytes):
            try:
                open_picture(image.data, functools.partial(_note_extremes, found))
            except Exception:  # a broken image can fail in any way
                continue
    return min(found, default=math.inf), max(found, default=-math.inf)


def _note_extremes(found: list[float], image: PIL.Image.Image) -> PIL.Image.Image:
    values = np.asarray(image)
    if values.size > 0 and np.isfinite(values).all():
        found += [float(values.min()), float(values.max())]
    return image
