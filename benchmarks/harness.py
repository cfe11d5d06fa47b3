"""Times one computation in two variants, in turns: as a textbook would write it, and ours.

Each variant lives in a process of its own, so that neither sees the other's memory allocator, thread settings or
caches; both are set up first and then called alternately.
"""

import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

# Builds what is to be timed, in its own process: a call of it returns the function that is timed. It must be a
# function at the top of a module, or a functools.partial of one. The timed function returns an array or a number, the
# same in both variants.
SetUp = Callable[[], Callable[[], Any]]


class Job(NamedTuple):
    """A comparison.

    Args:
        name: of the computation.
        textbook, ours: its variants.
        bar: how many times as fast ours is to be; None = only reported.
        tolerance: largest relative difference ||ours - textbook|| / ||textbook|| of what they return.
        precision: what ours computes in, as `--precision` has it.
    """

    name: str
    textbook: SetUp
    ours: SetUp
    bar: float | None
    tolerance: float
    precision: str = "fp32"


class Timing(NamedTuple):
    """Seconds per call of each repeat, and the difference of the results."""

    textbook: list[float]
    ours: list[float]
    difference: float

    @property
    def ratio(self) -> float:
        """How many times as fast ours is: the median over pairs of neighbouring calls."""
        return statistics.median(a / b for a, b in zip(self.textbook, self.ours, strict=True))


def _serve(set_up: SetUp, pipe: Connection) -> None:
    run = set_up()
    pipe.send(np.asarray(run(), dtype=np.float64))  # the first call also warms up
    while pipe.recv():
        start = time.perf_counter()
        run()
        pipe.send(time.perf_counter() - start)


@contextmanager
def _variant(set_up: SetUp) -> Iterator[Connection]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(set_up, there))
    process.start()
    there.close()  # so that the end of the process is seen
    try:
        yield here
        here.send(False)
        process.join()
    finally:
        process.kill()


def measure(job: Job, repeats: int) -> Timing:
    """Time both variants `repeats` times.

    Raises:
        ArithmeticError: they compute different things.
    """
    with _variant(job.textbook) as textbook, _variant(job.ours) as ours:
        expected, result = textbook.recv(), ours.recv()
        difference = float(np.linalg.norm(result - expected) / np.linalg.norm(expected))
        if not difference <= job.tolerance:
            raise ArithmeticError(f"{job.name}: the variants differ by {difference:.1e}, more than {job.tolerance:g}")
        timing = Timing([], [], difference)
        for _ in range(repeats):
            for pipe, seconds in [(textbook, timing.textbook), (ours, timing.ours)]:
                pipe.send(True)
                seconds.append(pipe.recv())
    return timing
