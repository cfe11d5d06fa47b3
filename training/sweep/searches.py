"""Which settings a sweep measures, and in which order."""

import itertools
from collections.abc import Callable, Iterator, Sequence

from dnnlib.errors import UserError
from training.sweep.settings import KIMG, NETWORKS, Axis, Setting

GOLDEN = (5**0.5 - 1) / 2  # of a range, what each step of golden-section search leaves
ROUND = 0.4  # of ranges, what each round over several axes leaves

# What is to be small: of a setting that has been measured.
Measure = Callable[[Setting], float]


def grid(axes: Sequence[Axis]) -> Iterator[Setting]:
    """All settings, those of one network after the other."""
    order = sorted(axes, key=lambda axis: axis.name not in NETWORKS and axis.name != KIMG)
    for values in itertools.product(*(axis.values for axis in order)):
        chosen = {axis.name: value for axis, value in zip(order, values, strict=True)}
        yield {axis.name: chosen[axis.name] for axis in axes}


def by_coordinates(axes: Sequence[Axis], measure: Measure) -> Iterator[Setting]:
    """Settings of a search from the middle of all axes along one axis after the other, until none improves."""
    best = {axis.name: axis.values[len(axis.values) // 2] for axis in axes}
    yield best
    while True:
        before = dict(best)
        for axis in axes:
            tried = [best | {axis.name: value} for value in axis.values]
            yield from tried
            best = min(tried, key=measure)
        if best == before:
            return


def by_golden_section(axes: Sequence[Axis], measure: Measure, tolerance: float) -> Iterator[Setting]:
    """Settings of a search along one axis after the other: within ranges by golden sections, else among the values.

    It begins in the middle of all axes. The only axis is searched down to `tolerance` times its range. Of several, each
    round searches one after the other, coarsely, in ranges around the best so far that become narrower until
    `tolerance` is reached.

    Raises:
        UserError: no axis is a range.
    """
    if not any(axis.is_range for axis in axes):
        raise UserError("--search=golden: give the ends of a range, such as --vary=ema-std=0.02,0.25")
    middle = {axis.name: axis.between(0.5) if axis.is_range else axis.values[len(axis.values) // 2] for axis in axes}
    shares = {axis.name: 0.5 for axis in axes if axis.is_range}  # where on their ranges the best values are
    best, width = middle, 1.0
    yield best
    while True:
        for axis in axes:
            if axis.is_range:
                low = min(max(shares[axis.name] - width / 2, 0), 1 - width)
                found = tolerance if len(axes) == 1 else max(tolerance, ROUND * width)
                share = yield from _golden(axis, best, measure, low, low + width, found)
                tried = [best, best | {axis.name: axis.between(share)}]
                best = min(tried, key=measure)
                shares[axis.name] = share if best is tried[1] else shares[axis.name]
            else:
                tried = [best | {axis.name: value} for value in axis.values]
                yield from tried
                best = min(tried, key=measure)
        width *= ROUND
        if len(axes) == 1 or width <= tolerance:
            return


def _golden(
    axis: Axis, best: Setting, measure: Measure, low: float, high: float, tolerance: float
) -> Iterator[Setting]:
    """Golden-section search (Kiefer 1953) between two shares of a range, for a function with one minimum there.

    Returns (as a generator does): the best share that was tried.
    """

    def setting(share: float) -> Setting:
        return best | {axis.name: axis.between(share)}

    left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    yield setting(left)
    yield setting(right)
    while high - low > tolerance and setting(left) != setting(right):
        if measure(setting(left)) <= measure(setting(right)):
            high, right = right, left
            left = high - GOLDEN * (high - low)
            yield setting(left)
        else:
            low, left = left, right
            right = low + GOLDEN * (high - low)
            yield setting(right)
    return min((left, right), key=lambda share: measure(setting(share)))
