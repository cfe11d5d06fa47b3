"""Weighted sums of the tensors of many files, read piece by piece by several threads."""

import itertools
import math
import queue
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from dnnlib.errors import UserError
from training.preconditioning import PRECISIONS
from training.snapshot.checksums import MODULUS, WORD, mismatch, word_sum
from training.snapshot.layout import SnapshotFile, finite_tensor
from training.snapshot.native import GetPieces

GROUP = 32  # files that a thread reads from before it sums up
MEMORY = 1 << 23  # bytes that it holds then, of float16 inputs and of sums and results
MAX_THREADS = 8  # more would mostly wait for each other and the disk
SLICE = 1 << 13  # elements of each file that are converted and summed up at a time: these stay in the cache


class Shares(NamedTuple):
    """How the work is cut: threads, and elements of each file that one of them has at a time."""

    threads: int
    part_size: int

    def memory(self, num_files: int, num_outputs: int, itemsize: int) -> int:
        """Bytes that these take at most, with results of so many bytes per element."""
        stored = min(GROUP, num_files) * (self.part_size + SLICE) * torch.float32.itemsize
        sums = num_outputs * self.part_size * torch.float32.itemsize
        results = num_outputs * self.part_size * itemsize
        return self.threads * (stored + sums) + (self.threads + 2) * results  # of which some wait to be written


def shares(num_files: int, num_outputs: int, itemsize: int, memory: int | None = None) -> Shares:
    """The shares that are fastest, or that take no more than so many bytes, if the smallest do not."""
    threads = min(torch.get_num_threads(), MAX_THREADS)
    part_size = max(MEMORY // (2 * GROUP + 12 * num_outputs) // SLICE, 1) * SLICE
    while memory is not None and Shares(threads, part_size).memory(num_files, num_outputs, itemsize) > memory:
        if part_size > SLICE:
            part_size = max(part_size // 2 // SLICE, 1) * SLICE
        elif threads > 1:
            threads -= 1
        else:
            break
    return Shares(threads, part_size)


Piece = tuple[str, torch.Tensor]  # some elements of a tensor of each result, [m, elements]


class Place(NamedTuple):
    """Where the elements of a tensor are in a run of tensors."""

    name: str
    start: int
    stop: int


def _runs(files: Sequence[SnapshotFile], names: Iterable[str]) -> Iterator[list[Place]]:
    """Tensors that lie one after the other in every file, so that they can be read as one."""
    run: list[Place] = []
    for name in names:
        if run and not all(file.is_followed(run[-1].name, name) for file in files):
            yield run
            run = []
        start = run[-1].stop if run else 0
        run.append(Place(name, start, start + math.prod(files[0].shape(name))))
    yield run


class _Checksums:
    """Compares a run of tensors in some files with their checksums, once the last part of it has been read."""

    def __init__(self, files: Sequence[SnapshotFile], run: Sequence[Place]):
        self.files, self.run, self._left, self._lock = files, run, run[-1].stop, threading.Lock()
        sums = [[file.checksum(place.name) for place in run] for file in files]
        self._expected = [None if None in row else sum(filter(None, row)) % MODULUS for row in sums]
        self._found = np.zeros(len(files), np.uint64)
        self.wanted = any(total is not None for total in self._expected)

    def add(self, found: np.ndarray, count: int) -> None:
        """Take note of what `count` elements of each file add.

        Raises:
            UserError: these were the last ones, and a file is damaged.
        """
        with self._lock:
            self._found += found
            self._left -= count
        if self._left > 0:
            return
        for file, expected, total in zip(self.files, self._expected, self._found, strict=True):
            if expected not in (None, int(total)):
                for place in self.run:
                    file.get_tensor(place.name)  # says which it is
                raise mismatch(file.path, self.run[0].name)


class Group(NamedTuple):
    """Up to GROUP files in which a run of tensors has the same type, with their coefficients [outputs, files]."""

    dtype: torch.dtype
    weights: torch.Tensor
    readers: list[Callable[[int, memoryview], None]]
    checksums: _Checksums


def _groups(files: Sequence[SnapshotFile], run: Sequence[Place], coefs: torch.Tensor) -> list[Group]:
    """The files, in groups in which the run has the same type."""
    indices: dict[torch.dtype, list[int]] = {}
    name = run[0].name
    for idx, file in enumerate(files):
        dtype = file.dtype(name)
        if dtype is None or dtype not in PRECISIONS.values():
            raise UserError(f"{file.path}: {name} is not of type float32, float16 or bfloat16")
        indices.setdefault(dtype, []).append(idx)
    groups = []
    for dtype, found in indices.items():
        for part in (found[i : i + GROUP] for i in range(0, len(found), GROUP)):
            some = [files[idx] for idx in part]
            groups.append(Group(dtype, coefs[part].t(), [file.reader(name) for file in some], _Checksums(some, run)))
    return groups


class Views(NamedTuple):
    """Of a workspace: the bytes of each file's elements, also as words [files, n] if they are whole ones; and by slice,
    these elements [files, n], where float32 ones of them go [files, n], and their sums [outputs, n]."""

    rows: list[memoryview]
    words: np.ndarray | None
    slices: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]

    def word_sums(self) -> np.ndarray:
        """What the elements add to the checksum of each file: uint64 [files]."""
        if self.words is not None:
            return self.words.sum(axis=1)
        return np.array([word_sum(row) for row in self.rows], np.uint64)


class _Workspace:
    """What a thread works in: stored elements of up to GROUP files, and float32 sums per output."""

    def __init__(self, num_files: int, num_outputs: int, part_size: int):
        self.stored = torch.empty(num_files * part_size * torch.float32.itemsize, dtype=torch.uint8)
        self.values = torch.empty(num_files * SLICE)
        self.sums = torch.empty(num_outputs, part_size)
        self._views: dict[tuple[torch.dtype, int, int], Views] = {}

    def views(self, dtype: torch.dtype, num_files: int, count: int) -> Views:
        """For `count` elements of each file. They are kept, since threads that make many wait for each other."""
        key = (dtype, num_files, count)
        if key not in self._views:
            stored = self.stored[: num_files * count * dtype.itemsize].view(num_files, -1)
            slices = zip(stored.view(dtype).split(SLICE, dim=1), self.sums[:, :count].split(SLICE, dim=1), strict=True)
            self._views[key] = Views(
                [row.data for row in stored.numpy()],
                stored.numpy().view("<u8") if stored.shape[1] % WORD == 0 else None,
                [(x, self.values[: x.numel()].view_as(x), sums) for x, sums in slices],
            )
        return self._views[key]


def _in_order(
    pool: ThreadPoolExecutor,
    jobs: Iterable[tuple[Callable[[], list[Piece]], int]],
    ahead: int,
    read: Callable[[int], object],
) -> Iterator[Piece]:
    """The pieces of jobs, in the order of these, of which up to `ahead` are worked at before they are asked for.

    Args:
        jobs: what makes pieces, and the bytes that it reads.
        read: called with these when it has.
    """
    under_way: deque[tuple[Future[list[Piece]], int]] = deque()

    def finished() -> list[Piece]:
        future, size = under_way.popleft()
        pieces = future.result()
        read(size)
        return pieces

    for job, size in jobs:
        under_way.append((pool.submit(job), size))
        if len(under_way) > ahead:
            yield from finished()
    while under_way:
        yield from finished()


@contextmanager
def weighted_sums(
    files: Sequence[SnapshotFile],
    newest: SnapshotFile,
    coefs: torch.Tensor,
    parameters: Collection[str],
    dtype: torch.dtype,
    memory: int | None = None,
    read: Callable[[int], object] = lambda _bytes: None,
) -> Iterator[GetPieces]:
    """A function that gives weighted sums of the files' tensors of some names, one per column of `coefs` [n, m].

    They come as (name, [m, elements]) in `dtype`, a part of a tensor at a time, in the order of names and elements.
    Only parameters are summed; the rest are those of `newest`, as they are there.

    Args:
        memory: bytes that are held at a time, as far as `shares` can; None = as many as are fastest.
        read: called with numbers of bytes that have been read.
    """
    torch_threads = torch.get_num_threads()
    num_outputs = coefs.shape[1]
    num_threads, part_size = shares(len(files), num_outputs, dtype.itemsize, memory)
    workspaces: queue.SimpleQueue[_Workspace] = queue.SimpleQueue()
    for _ in range(num_threads):
        workspaces.put(_Workspace(min(GROUP, len(files)), num_outputs, part_size))

    def part_of(run: Sequence[Place], groups: Sequence[Group], start: int, stop: int) -> list[Piece]:
        inside = [place for place in run if place.start < stop and place.stop > start]
        workspace = workspaces.get()
        try:
            sums = workspace.sums[:, : stop - start].zero_()
            for group in groups:
                views = workspace.views(group.dtype, len(group.readers), stop - start)
                for read_into, row in zip(group.readers, views.rows, strict=True):
                    read_into(start, row)
                if group.checksums.wanted:
                    group.checksums.add(views.word_sums(), stop - start)
                for stored, values, part in views.slices:
                    part.addmm_(group.weights, values.copy_(stored))
            results, total = sums.to(dtype, copy=True), sums.sum()
        finally:
            workspaces.put(workspace)
        # NaN and infinity of any input stay in the sums; those that merely overflow are looked at again.
        if not math.isfinite(total):
            for file, place in itertools.product(files, inside):
                finite_tensor(file, place.name)
        return [(place.name, results[:, max(place.start - start, 0) : place.stop - start]) for place in inside]

    def buffer_of(name: str) -> list[Piece]:
        return [(name, finite_tensor(newest, name).reshape(1, -1).expand(num_outputs, -1))]

    def jobs(names: Iterable[str]) -> Iterator[tuple[Callable[[], list[Piece]], int]]:
        """What threads do, and the bytes that they read in it."""
        for is_parameter, some in itertools.groupby(names, lambda name: name in parameters):
            if not is_parameter:
                yield from ((partial(buffer_of, name), 0) for name in some)
                continue
            for run in _runs(files, some):
                groups = _groups(files, run, coefs)
                row_bytes = sum(len(group.readers) * group.dtype.itemsize for group in groups)
                for start in range(0, run[-1].stop, part_size):
                    stop = min(start + part_size, run[-1].stop)
                    yield partial(part_of, run, groups, start, stop), row_bytes * (stop - start)

    # One thread per part, and not several as torch would: they would wait for each other after every operation.
    with ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            yield lambda names: _in_order(pool, jobs(names), num_threads, read)
        finally:
            torch.set_num_threads(torch_threads)  # which threads that start later take over
