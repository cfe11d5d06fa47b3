"""How far a long job is: a bar on terminals, and a line every half minute elsewhere, as in log files."""

import sys
from collections.abc import Iterable, Iterator
from time import monotonic
from typing import Generic, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
INTERVAL = 30.0  # seconds


def format_time(seconds: float) -> str:
    """A duration as '42s', '3m 07s', '2h 05m' or '4d 03h'."""
    s = round(seconds)
    if s < 60:
        return f"{s}s"
    if s < 3600:
        return f"{s // 60}m {s % 60:02d}s"
    if s < 86400:
        return f"{s // 3600}h {s // 60 % 60:02d}m"
    return f"{s // 86400}d {s // 3600 % 24:02d}h"


class Lines:
    """Lines such as '1280/50000 img  elapsed 30s  left 19m 01s  42.7 img/s', one for each `INTERVAL` without any.

    Args:
        unit: what is counted.
        total: how many there are; None = it is not known.
        initial: how many of them were done before.
        desc: what is being done; '' = that is plain.
        unit_scale: whether numbers are shortened, such as '1.28k'.
    """

    def __init__(self, unit: str, total: int | None = None, initial: int = 0, desc: str = "", unit_scale: bool = False):
        self.unit, self.total, self.initial, self.desc, self.unit_scale = unit, total, initial, desc, unit_scale
        self.n = initial
        self._start = self._last = monotonic()

    def update(self, count: int = 1) -> None:
        """Count, and print a line if it is time."""
        self.n += count
        now = monotonic()
        if now - self._last >= INTERVAL:
            self._last = now
            print(self.text(now - self._start), file=sys.stderr, flush=True)

    def postpone(self) -> None:
        """Say that a line of another kind has been printed."""
        self._last = monotonic()

    def text(self, seconds: float) -> str:
        """The line after so many seconds."""
        rate = (self.n - self.initial) / seconds
        show = tqdm.format_sizeof if self.unit_scale else "{:.4g}".format
        count = "/".join(show(n) if self.unit_scale else str(n) for n in (self.n, self.total) if n is not None)
        left = f"  left {format_time((self.total - self.n) / rate)}" if self.total is not None and rate > 0 else ""
        desc = f"{self.desc}: " if self.desc else ""
        return f"{desc}{count} {self.unit}  elapsed {format_time(seconds)}{left}  {show(rate)} {self.unit}/s"


class Progress(Generic[Item]):
    """A job's progress; to be iterated over, or used in a `with` block and updated.

    Args:
        items: what is iterated over.
        unit, total, initial, desc: as for `Lines`; by default the total is the length of `items`.
        hidden: show nothing, as on all processes but the first.
        delay: seconds before a bar appears.
        unit_scale: whether numbers are shortened.
    """

    def __init__(
        self,
        items: Iterable[Item] = (),
        *,
        unit: str,
        total: int | None = None,
        initial: int = 0,
        desc: str = "",
        hidden: bool = False,
        delay: float = 0,
        unit_scale: bool = False,
    ):
        self.items = items
        if total is None and hasattr(items, "__len__"):
            total = len(items) or None  # type: ignore[arg-type]
        terminal = sys.stderr.isatty()
        self.bar = tqdm(
            desc=desc or None, total=total, initial=initial, unit=unit, unit_scale=unit_scale, delay=delay,
            leave=delay == 0, disable=hidden or not terminal, dynamic_ncols=True,
        )  # fmt: skip
        self.lines = None if hidden or terminal else Lines(unit, total, initial, desc, unit_scale)

    def update(self, count: int = 1) -> None:
        """Say that so many more are done."""
        self.bar.update(count)
        if self.lines is not None:
            self.lines.update(count)

    def write(self, message: str) -> None:
        """Print a line above the bar."""
        self.bar.write(message)

    def __iter__(self) -> Iterator[Item]:
        with self:
            for item in self.items:
                yield item
                self.update()

    def __enter__(self) -> "Progress[Item]":
        return self

    def __exit__(self, *exc_info) -> None:
        self.bar.close()
