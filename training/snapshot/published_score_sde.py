"""Checkpoints of the published score_sde code (`checkpoint_8.pth`), read without executing anything, and written.

They hold the weights of a network, their averages as a list in the order of the parameters, the state of Adam, and the
number of steps. Learning rates in them are numbers of NumPy, for which plain ones are taken here.
"""

import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dnnlib.errors import DamagedFileError, UserError, one_line
from dnnlib.files import atomic_write
from torch_utils.checkpoint import load_checked
from torch_utils.tensor_files import check_weights, refused
from training.conditioning import DataSpec
from training.config.score_sde_presets import SCORE_PRESETS
from training.snapshot.description import FORMAT_VERSION, Description
from training.snapshot.layout import GetTensor, LoadedFile, Request, check_storable
from training.snapshot.score_sde_shapes import architecture_for

ARCHITECTURE = "score_sde.ScoreSDE"
PREFIX = "module."  # of all names, from torch.nn.DataParallel
# Tensors that are not trained, so that the list of averages leaves them out: a buffer, and the frequencies of labels.
UNTRAINED = re.compile(r"sigmas|all_modules\.\d+\.W")
TYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
NUMBERS = {
    **{f"f{size}": {2: "e", 4: "f", 8: "d"}[size] for size in (2, 4, 8)},
    **{f"i{size}": {1: "b", 2: "h", 4: "i", 8: "q"}[size] for size in (1, 2, 4, 8)},
    **{f"u{size}": {1: "B", 2: "H", 4: "I", 8: "Q"}[size] for size in (1, 2, 4, 8)},
    "b1": "?",
}


@dataclass
class Checkpoint:
    """A published checkpoint.

    Attributes:
        state: the weights by name, in the order of the file, as `load_state_dict` of our networks takes them.
        ema: the same with averages in place of the trained weights.
        step: optimiser steps; those of published files are one more than their name says.
        decay, num_updates: of the averages.
        optimizer: state of Adam; empty if the file has none.
    """

    state: dict[str, torch.Tensor]
    ema: dict[str, torch.Tensor]
    step: int
    decay: float
    num_updates: int
    optimizer: dict[str, Any] = field(default_factory=dict)


def trained(names: Mapping[str, Any]) -> list[str]:
    """Names of the trained tensors, in the order in which averages are listed."""
    return [name for name in names if not UNTRAINED.fullmatch(name)]


def read(path: str | os.PathLike) -> Checkpoint:
    """The contents of a published checkpoint, on the CPU.

    Raises:
        UserError: no such file, a damaged one, one that asks for more than data, or one whose parts do not fit.
    """
    data = _load(path)
    try:
        state = {name.removeprefix(PREFIX): tensor for name, tensor in data["model"].items()}
        average = data["ema"]
        shadow, names = average["shadow_params"], trained(state)
        listed = {f"average {i}": tensor for i, tensor in enumerate(shadow)}
        check_weights(Path(path), state | listed, TYPES)
        if [tuple(t.shape) for t in shadow] != [tuple(state[name].shape) for name in names]:
            raise UserError(
                f"{os.fspath(path)}: its {len(shadow)} averages do not belong to its {len(names)} trained weights: "
                f"not a checkpoint of a score_sde network"
            )
        ema = {**state, **dict(zip(names, shadow, strict=True))}
        numbers = int(data["step"]), float(average["decay"]), int(average["num_updates"])
        optimizer = data.get("optimizer") or {}
        return Checkpoint(state, ema, *numbers, optimizer=dict(optimizer))
    except (KeyError, TypeError, ValueError, AttributeError) as err:
        raise UserError(
            f"{os.fspath(path)}: not a checkpoint of score_sde, with 'model', 'ema' and 'step' ({one_line(err)})"
        ) from None


# What a file of this layout has in its pickle, and where the pickle of an older file begins.
MARK, HEAD = b"shadow_params", 1 << 24


def is_checkpoint(request: Request) -> bool:
    """Whether a file looks like a published checkpoint, or is said to be one."""
    path = request.fetch()
    if request.preset in SCORE_PRESETS:
        return True
    try:
        with zipfile.ZipFile(path) as file:
            name = next(name for name in file.namelist() if name.endswith("/data.pkl"))
            with file.open(name) as pickled:
                return MARK in pickled.read(HEAD)
    except Exception:  # no archive, or a damaged one, which can fail in any way
        with open(path, "rb") as f:
            return MARK in f.read(HEAD)


class PublishedScoreFile(LoadedFile):
    """A published checkpoint as a snapshot: `which` is 'ema' for the averages, 'model' for the weights in training.

    Raises:
        UserError: a damaged file, or one whose architecture is not known.
    """

    says_architecture = False

    def __init__(self, request: Request):
        self.path = request.fetch()
        request.check_which(self.path, ("ema", "model"))
        checkpoint = read(self.path)
        state = checkpoint.ema if request.which == "ema" else checkpoint.state
        try:
            found = architecture_for(state, request.preset)
        except UserError as err:
            raise UserError(f"{self.path}: {err}") from None
        if not found.is_preset:
            self.note = f"sizes of its network are those of its weights, the rest is that of preset {found.like}"
        self._tensors = {f"net.{name}": tensor for name, tensor in state.items()}
        self.names = list(self._tensors)
        span = found.network.pixel_range
        data = DataSpec(channels=found.channels, resolution=found.resolution, pixel_range=span)
        block = {
            "format_version": FORMAT_VERSION,
            "architecture": {"name": ARCHITECTURE, "kwargs": found.network.to_json()},
            "encoder": {"name": "StandardRGBEncoder", "kwargs": {"low": span[0], "high": span[1]}},
            "data": data.to_json(),
            "source": self.path.name,
            "notes": {"step": checkpoint.step, "ema_rate": checkpoint.decay, "preset": found.like},
        }
        self.description = Description.from_json(str(self.path), block)


def write_checkpoint(
    path: Path, net: nn.Module, get_tensor: GetTensor, dtype: torch.dtype, description: Description
) -> None:
    """Write a snapshot as a checkpoint that the published code restores, complete or not at all.

    Args: as `training.snapshot.native.write_native`. Weights are float32 there, so `dtype` changes nothing. The weights
        stand for their averages, too.

    Raises:
        UserError: a value is NaN or infinite.
        OSError: it could not be written.
    """
    state = {}
    for name, wanted in net.state_dict().items():
        state[name.removeprefix("net.")] = tensor = get_tensor(name).to(wanted.dtype)
        check_storable(path, name, tensor)
    notes, config = description.notes, description.config or {}
    batch = config.get("batch")
    step = description.nimg // batch if description.nimg and batch else 0
    decay = notes.get("ema_rate", config.get("ema_rate", 0.999))
    step = notes.get("step", step)
    write(path, Checkpoint(state, state, step, decay, step))


def write(path: str | os.PathLike, checkpoint: Checkpoint) -> None:
    """Write a checkpoint that the published code restores and `read` reads.

    Tensors must be in the order of the network's state dict. Without a state of Adam, it gets a fresh one.

    Raises:
        OSError: it could not be written.
    """
    names = trained(checkpoint.state)
    parameters = [name for name in checkpoint.state if name != "sigmas"]
    data = {
        "optimizer": checkpoint.optimizer or _fresh_adam(len(parameters)),
        "model": OrderedDict((PREFIX + name, _stored(tensor)) for name, tensor in checkpoint.state.items()),
        "ema": {
            "decay": checkpoint.decay,
            "num_updates": checkpoint.num_updates,
            "shadow_params": [_stored(checkpoint.ema[name]) for name in names],
        },
        "step": checkpoint.step,
    }
    with atomic_write(path) as f:
        torch.save(data, f)


def _stored(tensor: torch.Tensor) -> torch.Tensor:
    """The values in a storage of their own, in PyTorch's usual order."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _fresh_adam(count: int) -> dict[str, Any]:
    """State of Adam before its first step, with the published constants."""
    group = dict(lr=2e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0, amsgrad=False, params=list(range(count)))
    return {"state": {}, "param_groups": [group]}


# ---------------------------------------------------------------------------------------------------------
# What a file may ask for beside tensors and containers, and what it gets: nothing of NumPy's is called


class _DType:
    """A NumPy type of numbers, such as 'f8'."""

    def __init__(self, kind: str, _align: bool = False, _copy: bool = False):
        self.kind, self.order = kind, "<"

    def __setstate__(self, state: tuple) -> None:
        self.order = ">" if state[1] == ">" else "<"


def _number(dtype: _DType, data: bytes) -> float | int | bool:
    """The number that bytes stand for."""
    value = memoryview(data if dtype.order == "<" else data[::-1]).cast(NUMBERS[dtype.kind])  # type: ignore[call-overload]
    if len(value) != 1:
        raise ValueError("a number of another size")
    return value[0]


def _encoded(text: str, _encoding: str) -> bytes:
    return text.encode("latin-1")


ALLOWED: list[Callable | tuple[Callable, str]] = [
    (_DType, "numpy.dtype"),
    (_number, "numpy.core.multiarray.scalar"),
    (_number, "numpy._core.multiarray.scalar"),
    (_encoded, "_codecs.encode"),
]


def _load(path: str | os.PathLike) -> dict[str, Any]:
    if not os.path.isfile(path):
        raise UserError(f"{os.fspath(path)}: no such file")
    try:
        with torch.serialization.safe_globals(ALLOWED):
            data = load_checked(path, mmap=True)
    except pickle.UnpicklingError as err:
        raise refused(path, err) from None
    except Exception as err:  # torch has many ways to say that a file is damaged
        raise DamagedFileError(f"{os.fspath(path)}: damaged checkpoint ({one_line(err)}): copy it again") from None
    if not isinstance(data, dict):
        raise UserError(f"{os.fspath(path)}: not a checkpoint of score_sde, but a {type(data).__name__}")
    return data
