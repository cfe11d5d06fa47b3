"""Post-hoc EMA on files: stored averages -> averages of other widths."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dnnlib.cli import format_bytes
from dnnlib.errors import UserError, one_line
from dnnlib.files import allow_open_files, clear_leftovers_of
from dnnlib.progress import Progress
from training.config.ema import MAX_STD, MIN_STD
from training.phema import solve_posthoc_coefficients
from training.snapshot.files import open_snapshot
from training.snapshot.layout import SnapshotFile, build_for
from training.snapshot.results import Results, results_like
from training.snapshot.state_dicts import StateDictFile, is_state_dict
from training.snapshot.sums import MAX_THREADS, SLICE, Shares, weighted_sums

SUFFIXES = (".safetensors", ".pkl", ".pt", ".pth")
NAME = re.compile(rf"(.+)-(\d+)-(\d*\.\d+)({'|'.join(map(re.escape, SUFFIXES))})")  # prefix, thousands of images, width
SHOWN = 3  # names in a line
OTHER_FILES = 256  # that a process has open beside snapshots, and more
RUNS = MAX_THREADS + 2  # of tensors that are under way at a time, at most


@dataclass(frozen=True)
class StoredAverage:
    """A file and the profile that it holds."""

    path: Path
    nimg: int
    std: float
    file: SnapshotFile

    def parameters(self) -> set[str]:
        """Names of what is averaged; the rest are buffers."""
        if isinstance(self.file, StateDictFile):
            return self.file.summed()
        return {name for name, _ in build_for(self.file)[0].named_parameters()}


def list_averages(indir: Path, prefix: str | None = None, stds: Sequence[float] | None = None) -> list[StoredAverage]:
    """The files `{prefix}-{kimg}-{std}` of a directory, oldest first.

    They are snapshots of networks, native or pickles, or plain state dicts, `.pt`, `.pth` or `.safetensors`.

    Args:
        prefix: start of their names; None = any, of files that are no reconstructions.
        stds: widths to use; None = all.

    Raises:
        UserError: none found, one of them is damaged, or they are of several kinds.
    """
    if not indir.is_dir():
        raise UserError(f"--indir={indir}: no such directory")
    paths = sorted(path for path in indir.iterdir() if path.is_file())
    allow_open_files(2 * len(paths) + OTHER_FILES)  # pickles stay open twice
    found: list[StoredAverage] = []
    left_out: list[str] = []
    for path in paths:
        match = NAME.fullmatch(path.name)
        if match is None or (prefix is not None and match[1] != prefix):
            continue
        if path.suffix == ".pkl" and path.with_suffix(".safetensors").is_file():
            continue  # its converted copy is there
        average, reconstructed = _open(path, match)
        if prefix is None and reconstructed:
            left_out.append(path.name)
            continue
        twin = next((avg for avg in found if (avg.nimg, avg.std) == (average.nimg, average.std)), None)
        if twin is not None:
            raise UserError(
                f"{twin.path} and {path} are of the same time and width: keep one of them, or choose by --inprefix"
            )
        found.append(average)
    if not found and left_out:
        raise UserError(
            f"--indir={indir}: only reconstructions ({_some(left_out, '')}): give the folder of the snapshots that "
            f"they were made of"
        )
    if not found:
        names = [path.name for path in paths]
        there, name = _some([name for name in names if name.endswith(SUFFIXES)] or names, "no files"), prefix or "NAME"
        raise UserError(
            f"--indir={indir}: no snapshots named {name}-KIMG-WIDTH.safetensors, .pkl, .pt or .pth (found: {there})"
        )
    other = next((avg for avg in found if _is_plain(avg) != _is_plain(found[0])), None)
    if other is not None:
        plain, network = (other, found[0]) if _is_plain(other) else (found[0], other)
        raise UserError(f"{plain.path} is a plain state dict, and {network.path} a snapshot: choose by --inprefix")
    prefixes = sorted({NAME.fullmatch(avg.path.name)[1] for avg in found})  # type: ignore[index]
    if _is_plain(found[0]) and len(prefixes) > 1:
        raise UserError(f"--indir={indir}: state dicts of several names, {_some(prefixes, '')}: choose by --inprefix")
    if stds is not None:
        missing = [std for std in stds if not any(np.isclose(std, avg.std) for avg in found)]
        if missing:
            there = ", ".join(f"{std:.3f}" for std in sorted({avg.std for avg in found}))
            raise UserError(f"--instd: no snapshots of width {missing[0]:.3f} in {indir} (there are {there})")
        found = [avg for avg in found if any(np.isclose(std, avg.std) for std in stds)]
    return sorted(found, key=lambda avg: (avg.nimg, avg.std))


def _is_plain(avg: StoredAverage) -> bool:
    return isinstance(avg.file, StateDictFile)


def _some(names: Sequence[str], none: str) -> str:
    """The first of some names, and how many others there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return one_line(", ".join(names[:SHOWN])) + more if names else none


def _open(path: Path, match: re.Match[str]) -> tuple[StoredAverage, bool]:
    """The average in a file whose name matches `NAME`, and whether it is a reconstruction.

    Raises:
        UserError: it is damaged, or does not say its time and width.
    """
    if is_state_dict(path):
        file: SnapshotFile = StateDictFile(path)
        nimg, std = 1000 * int(match[2]), float(match[3])
        if not nimg > 0 or not MIN_STD <= std < MAX_STD:
            raise UserError(
                f"{path}: time and width in its name must be more than 0, and the width from {MIN_STD} to {MAX_STD:.3f}"
            )
        return StoredAverage(path, nimg, std, file), file.reconstructed_from is not None
    file = open_snapshot(path)
    nimg, std = file.description.nimg, file.description.ema_std
    reconstructed = file.description.reconstructed_from is not None
    if nimg is None or not nimg > 0 or std is None or not MIN_STD <= std < MAX_STD:
        raise UserError(f"{path}: the file does not say its training time and EMA width")
    return StoredAverage(path, nimg, std, file), reconstructed


def inputs_until(inputs: Sequence[StoredAverage], outkimg: int | None) -> tuple[list[StoredAverage], int]:
    """The averages up to a time in thousands of images (None = all of them), and that time in images.

    Raises:
        UserError: none is of that time.
    """
    times = sorted({avg.nimg for avg in inputs})
    if outkimg is not None and outkimg not in [nimg // 1000 for nimg in times]:
        kimgs = [nimg // 1000 for nimg in times]
        nearest = sorted(sorted(kimgs, key=lambda kimg: abs(kimg - outkimg))[:2])
        raise UserError(
            f"--outkimg={outkimg}: there is no snapshot of that time (nearest: {', '.join(map(str, nearest))}; "
            f"{len(kimgs)} in all, from {kimgs[0]} to {kimgs[-1]})"
        )
    out_nimg = times[-1] if outkimg is None else max(nimg for nimg in times if nimg // 1000 == outkimg)
    return [avg for avg in inputs if avg.nimg <= out_nimg], out_nimg


def coefficients(inputs: Sequence[StoredAverage], out_nimg: int, stds: Sequence[float]) -> np.ndarray:
    """`solve_posthoc_coefficients` of stored averages, float64 [inputs, stds].

    Raises:
        UserError: they are too alike to be told apart.
    """
    try:
        return solve_posthoc_coefficients([a.nimg for a in inputs], [a.std for a in inputs], out_nimg, stds)
    except ValueError as err:
        raise UserError(f"{inputs[0].path.parent}: {err}: choose fewer widths by --instd") from None


def reconstruct_phema(
    inputs: Sequence[StoredAverage],
    outdir: Path,
    outprefix: str,
    outstds: Sequence[float],
    outkimg: int | None = None,
    skip: bool = False,
    batch: int = 8,
    suffix: str | None = None,
    memory: int | None = None,
    latest: Sequence[str] | None = None,
    log: Callable[[str], object] = lambda _line: None,
) -> list[Path]:
    """Write the averages of widths `outstds` (EDM2, Algorithm 3).

    Args:
        outkimg: training time of the output in thousands of images, one of the inputs'; None = the latest.
            Later inputs are ignored.
        skip: leave out what exists already.
        batch: widths made in one pass over the inputs, if memory allows.
        suffix: '.safetensors', '.pkl' for networks, '.pt' or '.pth' for state dicts; None = that of the inputs if they
            share one, else '.safetensors'.
        memory: bytes that values may take at a time; None = what is fastest.
        latest: patterns of names of tensors that state dicts take from the newest input, in place of a sum; None =
            running statistics. What is no floating-point number is taken from there in any case.
        log: takes lines about what is done.

    Returns:
        All output files, `{outprefix}-{kimg:07d}-{std:.3f}` and suffix.

    Raises:
        UserError: `outkimg` is no input's time, the inputs are not of one network or too alike, or `memory` is too
            little.
    """
    inputs, out_nimg = inputs_until(inputs, outkimg)
    newest = next(avg for avg in inputs if avg.nimg == out_nimg)
    for avg in inputs:
        _check_same_network(avg, newest)
    results = results_like(newest.file, {avg.path.suffix for avg in inputs}, suffix, out_nimg, latest)
    paths = {std: outdir / f"{outprefix}-{out_nimg // 1000:07d}-{std:.3f}{results.suffix}" for std in outstds}
    if len(set(paths.values())) < len(outstds):
        raise UserError("--outstd: two widths share a file name (three decimals count)")
    for path in paths.values():
        if path.is_file() and not skip and not results.may_replace(path):
            raise UserError(
                f"{path} exists, and does not say that it is a reconstruction: choose another --outprefix or --outdir, "
                f"remove it, or --skip it"
            )
    todo = [std for std in outstds if not (skip and paths[std].is_file())]
    if not todo:
        return list(paths.values())
    coefs = torch.from_numpy(coefficients(inputs, out_nimg, todo)).float()
    batch, held = min(batch, len(todo)), None
    if memory is not None:
        held = _Held(results, newest.file, [avg.file for avg in inputs])
        batch = held.largest_batch(batch, memory)
    removed = clear_leftovers_of(outdir, f"{outprefix}-") if outdir.is_dir() else []
    if removed:
        log(f"Removed {len(removed)} half-written files of commands that were killed: {_some(removed, '')}")
    passes = -(-len(todo) // batch)
    total = sum(_bytes(avg.file, results.parameters) for avg in inputs)
    log(f"Reading {format_bytes(total)} of {len(inputs)} snapshots{f', {passes} times' if passes > 1 else ''}")
    others = [name for name in newest.file.names if name not in results.parameters]
    if isinstance(newest.file, StateDictFile) and others:
        log(f"As in {newest.path.name}, not summed: {_some(others, '')}")
    files, names = [avg.file for avg in inputs], [avg.path.name for avg in inputs]
    with Progress(unit="B", unit_scale=True, total=total * passes) as progress:
        for start in range(0, len(todo), batch):
            stds, columns = todo[start : start + batch], coefs[:, start : start + batch]
            rest = None if memory is None or held is None else memory - held.beside_sums(len(stds))
            with weighted_sums(
                files, newest.file, columns, results.parameters, results.dtype, rest, progress.update
            ) as get_pieces:
                results.write({paths[std]: std for std in stds}, get_pieces, names)
    return list(paths.values())


def _check_same_network(avg: StoredAverage, newest: StoredAverage) -> None:
    """Check that two files hold tensors of the same names and shapes.

    Raises:
        UserError: names the first one that differs.
    """
    ours, others = (dict.fromkeys(average.file.names) for average in (avg, newest))
    for name in (*others, *ours):
        if name in ours and name in others and avg.file.shape(name) == newest.file.shape(name):
            continue
        shape, other = (
            f"{list(average.file.shape(name))}" if name in names else "missing"
            for average, names in ((avg, ours), (newest, others))
        )
        raise UserError(
            f"{avg.path} holds another network than {newest.path} ({one_line(name)[:100]} is {shape}, there {other}): "
            "keep one run per directory"
        )


def _bytes(file: SnapshotFile, names: set[str]) -> int:
    """That the values of these tensors take in a file."""
    dtypes = {name: file.dtype(name) for name in names}
    return sum(math.prod(file.shape(name)) * dtype.itemsize for name, dtype in dtypes.items() if dtype is not None)


class _Held:
    """Bytes that reconstructions keep in memory at a time."""

    def __init__(self, results: Results, newest: SnapshotFile, files: Sequence[SnapshotFile]):
        self.whole, self.num_files, self.itemsize = results.whole, len(files), results.dtype.itemsize
        self.network = _bytes(newest, set(newest.names))
        self.largest = max(math.prod(newest.shape(name)) for name in newest.names) * torch.float32.itemsize
        # Tensors whose elements are stored in another order are loaded, those of all files at a time.
        self.loaded = RUNS * max(
            sum(_bytes(file, {name}) for file in files if file.is_loaded_to_read(name)) for name in results.parameters
        )

    def beside_sums(self, count: int) -> int:
        """Of so many results: all of their values if they are written whole, and copies of the largest tensor then."""
        return self.loaded + (count * self.network + 3 * self.largest if self.whole else 0)

    def largest_batch(self, wanted: int, memory: int) -> int:
        """How many results, up to those that are wanted, fit into memory.

        Raises:
            UserError: none does.
        """
        for count in range(wanted, 0, -1):
            needed = self.beside_sums(count) + Shares(1, SLICE).memory(self.num_files, count, self.itemsize)
            if needed <= memory:
                return count
        less = "; --format=safetensors needs less" if self.whole else ""
        raise UserError(f"--memory={format_bytes(memory)}: a result takes {format_bytes(needed)}{less}")
