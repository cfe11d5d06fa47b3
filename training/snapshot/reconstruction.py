"""Post-hoc EMA on snapshot files: stored averages -> averages of other widths."""

import itertools
import math
import queue
import re
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from dnnlib.errors import UserError
from dnnlib.progress import Progress
from training.config.ema import MAX_STD, MIN_STD
from training.phema import solve_posthoc_coefficients
from training.preconditioning import PRECISIONS
from training.snapshot.checksums import MODULUS, WORD, mismatch, word_sum
from training.snapshot.description import Description
from training.snapshot.files import open_snapshot, write_snapshot
from training.snapshot.layout import SnapshotFile, build_for, finite_tensor, weights_dtype
from training.snapshot.native import GetPieces, write_native_files

GROUP = 32  # files that a thread reads from before it sums up
MEMORY = 1 << 23  # bytes that it holds then, of float16 inputs and of sums and results
MAX_THREADS = 8  # more would mostly wait for each other and the disk
SLICE = 1 << 13  # elements of each file that are converted and summed up at a time: these stay in the cache


@dataclass(frozen=True)
class StoredAverage:
    """A snapshot file and the profile that it holds."""

    path: Path
    nimg: int
    std: float
    file: SnapshotFile

    def parameters(self) -> set[str]:
        """Names of what is averaged; the rest are buffers."""
        return {name for name, _ in build_for(self.file)[0].named_parameters()}


def list_averages(indir: Path, prefix: str | None = None, stds: Sequence[float] | None = None) -> list[StoredAverage]:
    """The snapshots `{prefix}-{kimg:07d}-{std:.3f}` of a directory, native files and pickles, oldest first.

    Args:
        prefix: start of their names; None = any, of files that are no reconstructions.
        stds: widths to use; None = all.

    Raises:
        UserError: none found, or one of them is damaged.
    """
    if not indir.is_dir():
        raise UserError(f"--indir={indir}: no such directory")
    pattern = re.compile((".+" if prefix is None else re.escape(prefix)) + r"-\d+-\d\.\d{3}\.(safetensors|pkl)")
    found = []
    for path in sorted(path for path in indir.iterdir() if pattern.fullmatch(path.name)):
        if path.suffix == ".pkl" and path.with_suffix(".safetensors").is_file():
            continue  # its converted copy is there
        file = open_snapshot(path)
        if prefix is None and file.description.reconstructed_from is not None:
            continue
        nimg, std = file.description.nimg, file.description.ema_std
        if nimg is None or not nimg > 0 or std is None or not MIN_STD <= std < MAX_STD:
            raise UserError(f"{path}: the file does not say its training time and EMA width")
        twin = next((avg for avg in found if (avg.nimg, avg.std) == (nimg, std)), None)
        if twin is not None:
            raise UserError(f"{twin.path} and {path} are of the same time and width: keep one of them")
        found.append(StoredAverage(path, nimg, std, file))
    if not found:
        raise UserError(f"--indir={indir}: no snapshots named {prefix or '*'}-*-*.safetensors or .pkl")
    if stds is not None:
        missing = [std for std in stds if not any(np.isclose(std, avg.std) for avg in found)]
        if missing:
            there = ", ".join(f"{std:.3f}" for std in sorted({avg.std for avg in found}))
            raise UserError(f"--instd: no snapshots of width {missing[0]:.3f} in {indir} (there are {there})")
        found = [avg for avg in found if any(np.isclose(std, avg.std) for std in stds)]
    return sorted(found, key=lambda avg: (avg.nimg, avg.std))


def reconstruct_phema(
    inputs: Sequence[StoredAverage],
    outdir: Path,
    outprefix: str,
    outstds: Sequence[float],
    outkimg: int | None = None,
    skip: bool = False,
    batch: int = 8,
    suffix: str | None = None,
) -> list[Path]:
    """Write the averages of widths `outstds` (EDM2, Algorithm 3).

    Args:
        outkimg: training time of the output in thousands of images, one of the inputs'; None = the latest.
            Later inputs are ignored.
        skip: leave out what exists already.
        batch: widths made in one pass over the inputs.
        suffix: '.safetensors' or '.pkl'; None = '.pkl' if all inputs are.

    Returns:
        All output files, `{outprefix}-{kimg:07d}-{std:.3f}` and suffix.

    Raises:
        UserError: `outkimg` is no input's time, or the inputs are not of one network.
    """
    inputs, out_nimg = inputs_until(inputs, outkimg)
    newest = next(avg for avg in inputs if avg.nimg == out_nimg)
    shapes = _shapes(newest)
    for avg in inputs:
        if _shapes(avg) != shapes:
            raise UserError(f"{avg.path} holds another network than {newest.path}: keep one run per directory")
    net, _ = build_for(newest.file)
    parameters = {name for name, _ in net.named_parameters()}

    if suffix is None:
        suffix = ".pkl" if all(avg.path.suffix == ".pkl" for avg in inputs) else ".safetensors"
    paths = {std: outdir / f"{outprefix}-{out_nimg // 1000:07d}-{std:.3f}{suffix}" for std in outstds}
    if len(set(paths.values())) < len(outstds):
        raise UserError("--outstd: two widths share a file name (three decimals count)")
    for path in paths.values():
        if path.is_file() and not skip and open_snapshot(path).description.reconstructed_from is None:
            raise UserError(f"{path} exists and is no reconstruction: choose another --outprefix or --outdir")
    todo = [std for std in outstds if not (skip and paths[std].is_file())]
    for start in Progress(range(0, len(todo), batch), unit="pass"):
        stds = todo[start : start + batch]
        coefs = solve_posthoc_coefficients([a.nimg for a in inputs], [a.std for a in inputs], out_nimg, stds)
        names = [avg.path.name for avg in inputs]
        described = replace(newest.file.description.with_data(net), nimg=out_nimg, reconstructed_from=names)
        descriptions = {paths[std]: replace(described, ema_std=float(std)) for std in stds}
        dtype = weights_dtype(newest.file, net)
        with weighted_sums(inputs, newest, torch.from_numpy(coefs).float(), parameters, dtype) as get_pieces:
            _write(descriptions, net, get_pieces, dtype)
    return list(paths.values())


def inputs_until(inputs: Sequence[StoredAverage], outkimg: int | None) -> tuple[list[StoredAverage], int]:
    """The averages up to a time in thousands of images (None = all of them), and that time in images.

    Raises:
        UserError: none is of that time.
    """
    times = sorted({avg.nimg for avg in inputs})
    if outkimg is not None and outkimg not in [nimg // 1000 for nimg in times]:
        there = ", ".join(str(nimg // 1000) for nimg in times)
        raise UserError(f"--outkimg={outkimg}: there is no snapshot of that time (there are {there})")
    out_nimg = times[-1] if outkimg is None else max(nimg for nimg in times if nimg // 1000 == outkimg)
    return [avg for avg in inputs if avg.nimg <= out_nimg], out_nimg


def _shapes(avg: StoredAverage) -> dict[str, tuple[int, ...]]:
    return {name: avg.file.shape(name) for name in avg.file.names}


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

    def __init__(self, num_outputs: int, part_size: int):
        self.stored = torch.empty(GROUP * part_size * torch.float32.itemsize, dtype=torch.uint8)
        self.values = torch.empty(GROUP * SLICE)
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


@contextmanager
def weighted_sums(
    inputs: Sequence[StoredAverage],
    newest: StoredAverage,
    coefs: torch.Tensor,
    parameters: set[str],
    dtype: torch.dtype,
) -> Iterator[GetPieces]:
    """A function that gives weighted sums of the inputs' tensors of some names, one per column of `coefs` [n, m].

    They come as (name, [m, elements]) in `dtype`, a part of a tensor at a time, in the order of names and elements.
    Only parameters are summed; buffers are those of `newest`, in float32.
    """
    files = [avg.file for avg in inputs]
    torch_threads = torch.get_num_threads()
    num_threads = min(torch_threads, MAX_THREADS)
    num_outputs = coefs.shape[1]
    part_size = max(MEMORY // (2 * GROUP + 12 * num_outputs) // SLICE, 1) * SLICE  # elements of each file
    workspaces: queue.SimpleQueue[_Workspace] = queue.SimpleQueue()
    for _ in range(num_threads):
        workspaces.put(_Workspace(num_outputs, part_size))

    def part_of(run: Sequence[Place], groups: Sequence[Group], start: int, stop: int) -> list[Piece]:
        inside = [place for place in run if place.start < stop and place.stop > start]
        workspace = workspaces.get()
        try:
            sums = workspace.sums[:, : stop - start].zero_()
            for group in groups:
                views = workspace.views(group.dtype, len(group.readers), stop - start)
                for read, row in zip(group.readers, views.rows, strict=True):
                    read(start, row)
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
        return [(name, finite_tensor(newest.file, name).reshape(1, -1).expand(num_outputs, -1))]

    def jobs(names: Iterable[str]) -> Iterator[Callable[[], list[Piece]]]:
        for is_parameter, some in itertools.groupby(names, lambda name: name in parameters):
            if not is_parameter:
                yield from (partial(buffer_of, name) for name in some)
                continue
            for run in _runs(files, some):
                groups = _groups(files, run, coefs)
                for start in range(0, run[-1].stop, part_size):
                    yield partial(part_of, run, groups, start, min(start + part_size, run[-1].stop))

    def get_pieces(names: Iterable[str]) -> Iterator[Piece]:
        under_way: deque[Future[list[Piece]]] = deque()
        for job in jobs(names):
            under_way.append(pool.submit(job))
            if len(under_way) > num_threads:
                yield from under_way.popleft().result()
        for future in under_way:
            yield from future.result()

    # One thread per part, and not several as torch would: they would wait for each other after every operation.
    with ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            yield get_pieces
        finally:
            torch.set_num_threads(torch_threads)  # which threads that start later take over


def _write(
    descriptions: Mapping[Path, Description], net: torch.nn.Module, get_pieces: GetPieces, dtype: torch.dtype
) -> None:
    """Write the snapshots of these descriptions: native ones as their values come."""
    if all(path.suffix == ".safetensors" for path in descriptions):
        write_native_files(descriptions, net, get_pieces, dtype)
        return
    outputs: list[dict[str, torch.Tensor]] = [{} for _ in descriptions]
    state = net.state_dict()
    for name, pieces in itertools.groupby(get_pieces(state), key=lambda item: item[0]):
        values = torch.cat([piece for _, piece in pieces], dim=1)
        for tensors, row in zip(outputs, values, strict=True):
            tensors[name] = row.reshape(state[name].shape)
    for (path, description), tensors in zip(descriptions.items(), outputs, strict=True):
        write_snapshot(path, net, tensors.__getitem__, dtype, description)
