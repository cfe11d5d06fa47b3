"""Which arguments of networks and encoders are believed when a file names them.

The largest values are a few times those of the largest published network: a hostile file could otherwise ask for one
that takes hours to build.
"""

from collections.abc import Callable, Mapping
from typing import Any

Check = Callable[[Any], bool]  # whether a value from a file is believed
TINY, HUGE = 1e-12, 1e12


def whole(low: int, high: int) -> Check:
    """Check for an integer from `low` to `high`."""
    return lambda value: type(value) is int and low <= value <= high


def number(low: float, high: float) -> Check:
    """Check for a number from `low` to `high`."""
    return lambda value: type(value) in (int, float) and low <= value <= high


def optional(check: Check) -> Check:
    """Check for None, or for what `check` accepts."""
    return lambda value: value is None or check(value)


def list_of(check: Check, low: int, high: int) -> Check:
    """Check for a list of `low` to `high` items that `check` accepts."""
    return lambda value: type(value) is list and low <= len(value) <= high and all(map(check, value))


def text(value: Any) -> bool:
    """Whether a value is a printable text of a sensible length."""
    return type(value) is str and 0 < len(value) <= 500 and value.isprintable()


def filter_taps(value: Any) -> bool:
    """Whether a value is a resampling filter: an even number of taps whose sum is not 0."""
    return list_of(number(-1e6, 1e6), 2, 64)(value) and len(value) % 2 == 0 and abs(sum(value)) > 1e-6


def check_arguments(kwargs: Mapping[str, Any], known: Mapping[str, Check]) -> None:
    """Check arguments from a file.

    Raises:
        ValueError: one is unknown, or its value is of the wrong type or out of bounds.
    """
    for name, value in kwargs.items():
        if name not in known:
            raise ValueError(f"unknown argument {name[:50]!r}")
        if not known[name](value):
            shown = repr(value)[:50] if isinstance(value, (int, float, str)) else f"a {type(value).__name__}"
            raise ValueError(f"{name} cannot be {shown}")
