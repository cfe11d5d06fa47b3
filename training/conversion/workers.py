"""A function applied by worker processes, its results in order."""

import concurrent.futures
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator
from typing import TypeVar

from dnnlib.errors import RunError

Item = TypeVar("Item")
Result = TypeVar("Result")
AHEAD = 4  # items per worker that may be in progress


def default_workers() -> int:
    """The number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_in_order(
    function: Callable[[Item], Result], items: Iterator[Item], workers: int
) -> Generator[Result, None, None]:
    """Results of `function` for each item, in order, with no more than a few in progress.

    Args:
        function: can be sent to another process.
        workers: processes; 1 = this one.

    Raises:
        RunError: a worker was killed.
    """
    if workers <= 1:
        yield from map(function, items)
        return
    # Forking is quick, and safe here: no thread of this process holds a lock that a worker needs.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with (
        warnings.catch_warnings(),
        concurrent.futures.ProcessPoolExecutor(
            workers, context, initializer=_begin_worker, initargs=(os.getpid(),)
        ) as pool,
    ):
        warnings.filterwarnings("ignore", ".*fork.*", DeprecationWarning)
        in_progress: deque[concurrent.futures.Future[Result]] = deque()
        try:
            for item in items:
                in_progress.append(pool.submit(function, item))
                if len(in_progress) >= AHEAD * workers:
                    yield in_progress.popleft().result()
            while in_progress:
                yield in_progress.popleft().result()
        except concurrent.futures.process.BrokenProcessPool:
            raise RunError(
                "a worker process was killed (out of memory?): repeat the command with fewer --workers and --resume"
            ) from None
        finally:
            for future in in_progress:
                future.cancel()


def _begin_worker(parent: int) -> None:
    """Prepares a worker: Ctrl-C is left to the main process, and the worker exits when that process is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
