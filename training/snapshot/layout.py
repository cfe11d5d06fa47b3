"""What all layouts of snapshot files have in common: requests, open files, readers and writers."""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dnnlib.download import is_url, open_url
from dnnlib.errors import UserError
from training.encoders import Encoder
from training.preconditioning import PRECISIONS
from training.snapshot.description import Description, misfit

FOLDER = "folder"  # stands for the suffix of a directory
GetTensor = Callable[[str], torch.Tensor]  # the values of a name


@dataclass(frozen=True)
class Request:
    """A snapshot that somebody asks for.

    Args:
        address: path or URL.
        which: the network to take from files that hold several.
        preset: training preset that names the architecture, for layouts that do not say it.
    """

    address: str
    which: str = "ema"
    preset: str | None = None

    @property
    def path(self) -> str:
        """The address without what only a URL has: query and checksum."""
        return self.address.partition("#")[0].partition("?")[0] if is_url(self.address) else self.address

    @property
    def suffix(self) -> str:
        """The suffix of the file, or `FOLDER`."""
        if Path(self.address).is_dir() or re.fullmatch(r"hf://[^/]+/[^/]+/?", self.address):
            return FOLDER
        return Path(self.path).suffix

    def fetch(self, name: str | None = None) -> Path:
        """Where the file is on this machine, or the file `name` of the folder, fetched if the address is a URL.

        Raises:
            UserError: there is no such file.
            RunError: it could not be fetched now.
        """
        address = self.address if name is None else f"{self.address.rstrip('/')}/{name}"
        return Path(open_url(address, return_filename=True))

    def check_which(self, path: Path, held: Collection[str] = ("ema",)) -> None:
        """Check that the file holds the network that is asked for.

        Raises:
            UserError: it does not.
        """
        if self.which not in held:
            raise UserError(f"{path}: holds no network {self.which!r}, only {', '.join(map(repr, held))}")


RUN_SNAPSHOT = re.compile(r"network-snapshot-([0-9]+)(.*)\.(safetensors|pkl)")


def newest_of_run(folder: str) -> Path | None:
    """The newest snapshot in the folder of a training run: of several EMA profiles, the widest.

    None = this is no folder of a run, or it has no snapshot yet.
    """
    if not Path(folder).is_dir() or Path(folder, "config.json").is_file():
        return None
    found = [(match, path) for path in Path(folder).iterdir() if (match := RUN_SNAPSHOT.fullmatch(path.name))]
    # Where there is a copy for the published tools, ours is preferred.
    return max(found, key=lambda pair: (int(pair[0][1]), pair[0][2], pair[0][3]), default=(None, None))[1]


class SnapshotFile(ABC):
    """An open snapshot, whose tensors are read when they are asked for."""

    path: Path
    description: Description
    names: list[str]  # of the tensors: those of the network's state dict
    says_architecture = True  # whether the file itself says what network it holds
    note = ""  # what the user should know about how the file was understood

    @property
    def metadata(self) -> dict[str, Any]:
        """What the file says of itself, see `Description.metadata`."""
        return self.description.metadata

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype | None:
        """Type of a tensor; None = one that torch lacks or no network has."""

    @abstractmethod
    def get_tensor(self, name: str) -> torch.Tensor:
        """A tensor as it is stored, on the CPU.

        Raises:
            UserError: it cannot be read.
        """

    def checksum(self, name: str) -> int | None:
        """What `training.snapshot.checksums.word_sum` of a tensor's bytes must be; None = the file does not say."""
        return None

    def is_followed(self, name: str, other: str) -> bool:
        """Whether `reader(name)` reads on into the tensor `other`. Here: no, each is loaded by itself."""
        return False

    def is_loaded_to_read(self, name: str) -> bool:
        """Whether what `reader(name)` gives keeps all of the tensor in memory."""
        return True

    def reader(self, name: str) -> Callable[[int, memoryview], None]:
        """A function (start, out) that fills a buffer with the bytes of a tensor's elements from `start` on.

        Threads may share it. It does not compare checksums.
        """
        values = self.get_tensor(name).contiguous().flatten()
        data = values.view(torch.uint8).numpy().data

        def read(start: int, out: memoryview) -> None:
            position = start * values.itemsize
            out[:] = data[position : position + len(out)]

        return read


def is_training_state(path: Path) -> bool:
    """Whether a file is one of our own training states, which stand beside snapshots."""
    return path.name.startswith("training-state-") and path.suffix == ".pt"


class LoadedFile(SnapshotFile):
    """A snapshot whose tensors are in memory, in `_tensors`."""

    _tensors: dict[str, torch.Tensor]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def get_tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name]


@dataclass(frozen=True)
class Reader:
    """How a layout is read.

    Args:
        suffix: of its files, or `FOLDER`.
        open: opens one. Raises `UserError` for a damaged file, or one of another kind.
        recognises: whether what is asked for is of this layout, where layouts share a suffix.
    """

    suffix: str
    open: Callable[[Request], SnapshotFile]
    recognises: Callable[[Request], bool] = lambda _request: True


@dataclass(frozen=True)
class Writer:
    """How a layout is written.

    Args:
        suffix: of its files.
        write: writes one, complete or not at all: (path, net, get_tensor, dtype, description). The values of `net` do
            not matter, it says names and shapes.
        architectures: names of those that it can hold; None = all.
    """

    suffix: str
    write: Callable[[Path, nn.Module, GetTensor, torch.dtype, Description], None]
    architectures: Collection[str] | None = None


def build_for(file: SnapshotFile) -> tuple[nn.Module, Encoder]:
    """Network (on the meta device) and encoder of a file whose tensors have the names and shapes that it needs.

    Raises:
        UserError: they have not, or the description makes no network.
    """
    source = str(file.path)
    net, encoder = file.description.build(source)
    wanted = net.state_dict()
    for what, names in [("lack", wanted.keys() - set(file.names)), ("also hold", set(file.names) - wanted.keys())]:
        if names:
            raise misfit(source, f"they {what} {', '.join(sorted(names)[:3])} ({len(names)} in all)")
    for name in file.names:
        shape, dtype = wanted[name].shape, wanted[name].dtype
        if file.shape(name) != shape:
            raise misfit(source, f"{name} is {list(file.shape(name))} instead of {list(shape)}")
        if dtype != torch.float32 and file.dtype(name) != dtype:
            raise misfit(source, f"{name} is not of type {str(dtype).removeprefix('torch.')}")
        if dtype == torch.float32 and file.dtype(name) not in PRECISIONS.values():
            raise misfit(source, f"{name} is not of type float32, float16 or bfloat16")
    return net, encoder


def finite_tensor(file: SnapshotFile, name: str) -> torch.Tensor:
    """A tensor as it is stored, all of whose values are finite.

    Raises:
        UserError: it holds NaN or infinity, or cannot be read.
    """
    tensor = file.get_tensor(name)
    if not is_finite(tensor):
        raise UserError(f"{file.path}: {name} holds NaN or infinity: use an earlier snapshot")
    return tensor


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    # The sum is quick and finds each of them; one that merely overflows is looked at again.
    return math.isfinite(tensor.sum(dtype=torch.float32)) or bool(tensor.isfinite().all())


def check_storable(path: str | Path, name: str, tensor: torch.Tensor) -> None:
    """Check that no reader will refuse what is about to be written.

    Raises:
        UserError: a value is NaN or infinite. `path` and `name` say where.
    """
    if not is_finite(tensor):
        kind = str(tensor.dtype).removeprefix("torch.")
        raise UserError(
            f"{path}: not written, {name} would hold NaN or infinity as {kind}: choose a wider type or another snapshot"
        )


def weights_dtype(file: SnapshotFile, net: nn.Module) -> torch.dtype:
    """The type of the parameters in a file that `build_for` has made `net` of."""
    dtype = file.dtype(next(name for name, _ in net.named_parameters()))
    assert dtype is not None  # build_for has looked
    return dtype
