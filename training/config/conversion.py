"""What the options of dataset_tool.py hold."""

import math

from dnnlib.errors import UserError


def parse_range(text: str) -> tuple[float, float] | str:
    if text == "auto":
        return text
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"{text!r} is not of the form LO,HI, such as 0,4095, nor auto") from None
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UserError(f"{text!r}: the first number must be below the second, both finite")
    return low, high


def parse_scale(text: str) -> float | str:
    if text in ("config", "published", "measured"):
        return text
    try:
        scale = float(text)
    except ValueError:
        raise UserError(f"{text!r} is neither a number nor config, published or measured") from None
    if not 0 < scale < math.inf:
        raise UserError(f"{text!r}: a scale is positive and finite")
    return scale
