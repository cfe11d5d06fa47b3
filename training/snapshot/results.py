"""What reconstructions are written as: snapshots of networks, or plain state dicts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from dnnlib.errors import UserError
from training.snapshot.description import Description
from training.snapshot.files import open_snapshot, write_snapshot
from training.snapshot.layout import SnapshotFile, build_for, weights_dtype
from training.snapshot.native import GetPieces, write_native_files
from training.snapshot.state_dicts import StateDictFile, common_dtype, gathered, write_state_dicts


class Results(Protocol):
    """What the sums of tensors become.

    Attributes:
        suffix: of the files.
        parameters: names of the tensors that are summed.
        dtype: in which the sums come.
        whole: whether a file is written when all of its values are in memory, and not piece by piece.
    """

    suffix: str
    parameters: set[str]
    dtype: torch.dtype
    whole: bool

    def may_replace(self, path: Path) -> bool:
        """Whether a file that is there may be overwritten: it is a reconstruction, too."""
        ...

    def write(self, paths: Mapping[Path, float], get_pieces: GetPieces, made_from: Sequence[str]) -> None:
        """Write files of these paths, whose averages have these widths, each complete or not at all."""
        ...


@dataclass
class NetworkResults:
    """Snapshots of networks, of a time, that differ from that of `file` in their weights."""

    file: SnapshotFile
    suffix: str
    nimg: int

    def __post_init__(self) -> None:
        self.net, _ = build_for(self.file)
        self.parameters = {name for name, _ in self.net.named_parameters()}
        self.dtype = weights_dtype(self.file, self.net)
        self.whole = self.suffix != ".safetensors"

    def may_replace(self, path: Path) -> bool:
        return open_snapshot(path).description.reconstructed_from is not None

    def write(self, paths: Mapping[Path, float], get_pieces: GetPieces, made_from: Sequence[str]) -> None:
        described = self.file.description.with_data(self.net)
        described = replace(described, nimg=self.nimg, reconstructed_from=list(made_from))
        descriptions: dict[Path, Description] = {
            path: replace(described, ema_std=float(std)) for path, std in paths.items()
        }
        if not self.whole:
            write_native_files(descriptions, self.net, get_pieces, self.dtype)
            return
        names = list(self.net.state_dict())
        dtypes = {name: self.dtype if name in self.parameters else _dtype(self.file, name) for name in names}
        outputs = gathered(dtypes, {name: self.file.shape(name) for name in names}, get_pieces, len(paths))
        for (path, description), tensors in zip(descriptions.items(), outputs, strict=True):
            write_snapshot(path, self.net, tensors.__getitem__, self.dtype, description)


def _dtype(file: SnapshotFile, name: str) -> torch.dtype:
    dtype = file.dtype(name)
    assert dtype is not None  # build_for has looked
    return dtype


@dataclass
class StateDictResults:
    """State dicts that differ from `file` in those of their tensors that are summed."""

    file: StateDictFile
    suffix: str
    parameters: set[str]

    def __post_init__(self) -> None:
        self.dtype = common_dtype(self.file, sorted(self.parameters))
        self.whole = self.suffix != ".safetensors"

    def may_replace(self, path: Path) -> bool:
        return path.suffix == ".safetensors" and StateDictFile(path).reconstructed_from is not None

    def write(self, paths: Mapping[Path, float], get_pieces: GetPieces, made_from: Sequence[str]) -> None:
        write_state_dicts(list(paths), self.file, get_pieces, made_from)


def results_like(
    file: SnapshotFile, suffixes: set[str], wanted: str | None, nimg: int, latest: Sequence[str] | None
) -> Results:
    """What the averages of some files become.

    Args:
        file: the newest of them.
        suffixes: of them all.
        wanted: suffix of the results; None = '.safetensors', unless the files are all of another.
        nimg: training time of the results.
        latest: patterns of names, see `StateDictFile.summed`; None = its default.

    Raises:
        UserError: the files can become no such results.
    """
    suffix = wanted or (suffixes.copy().pop() if len(suffixes) == 1 else ".safetensors")
    if not isinstance(file, StateDictFile):
        if latest is not None:
            raise UserError("--latest is for plain state dicts: snapshots of networks say themselves what is averaged")
        if suffix not in (".safetensors", ".pkl"):
            raise UserError(
                f"--format={suffix[1:]} is for plain state dicts, and {file.path} is a snapshot of a network"
            )
        return NetworkResults(file, suffix, nimg)
    if suffix == ".pkl":
        raise UserError(f"--format=pkl is for snapshots of networks, and {file.path} is a plain state dict")
    parameters = file.summed() if latest is None else file.summed(latest)
    if not parameters:
        raise UserError(f"{file.path}: nothing in it is averaged: see --latest")
    return StateDictResults(file, suffix, parameters)
