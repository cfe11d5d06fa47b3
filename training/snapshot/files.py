"""Snapshots of all formats, opened, loaded and written in the same way."""

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dnnlib.download import is_url, open_url
from dnnlib.errors import UserError, one_line
from training.encoders import Encoder
from training.preconditioning import PRECISIONS
from training.snapshot.description import build, checked_metadata, describe, misfit
from training.snapshot.native import NativeFile, write_native
from training.snapshot.published_edm2 import PublishedFile, write_published

FOLDER_FILES = ("config.json", "model.safetensors")  # of a Hugging Face folder
WRITERS: dict[str, Callable[..., None]] = {".safetensors": write_native, ".pkl": write_published}
SnapshotFile = NativeFile | PublishedFile


@dataclass(frozen=True)
class Snapshot:
    """A network ready for sampling, the encoder that goes with it, and what is known about it."""

    net: Any  # a Precond, or a ToyModel
    encoder: Encoder
    metadata: dict[str, Any]


def load_network(path_or_url: str | Path, device: torch.device | str = "cpu", which: str = "ema") -> Snapshot:
    """Load a snapshot for sampling: float32 weights, eval mode, no gradients. Runs nothing named in the file.

    Args:
        path_or_url: see `open_snapshot`.
        which: the network to load from files that hold several.

    Raises:
        UserError: a missing or damaged file, unknown names in it, or weights that do not fit the architecture.
    """
    file = open_snapshot(path_or_url, which)
    net, encoder = build_for(file)
    state = {name: finite_tensor(file, name).to(device, torch.float32) for name in file.names}
    net.load_state_dict(state, assign=True)
    return Snapshot(net.eval().requires_grad_(False), encoder, file.metadata)


def save_network(
    path: str | Path, net: nn.Module, encoder: Encoder, metadata: dict[str, Any], dtype: torch.dtype = torch.float16
) -> None:
    """Write a snapshot, complete or not at all. The suffix chooses the format.

    Args:
        path: '.safetensors', or '.pkl' for what the published tools read.
        metadata: plain JSON values: `nimg`, `ema_std`, `config`, `dataset` where known.
        dtype: of the weights; in native files, buffers (Fourier features) stay float32.

    Raises:
        UserError: another suffix, or an encoder that the published tools do not know.
        OSError: it could not be written.
    """
    write_snapshot(path, net, net.state_dict().__getitem__, dtype, describe(net, encoder, metadata))


def write_snapshot(
    path: str | Path, net: nn.Module, get_tensor: Callable[[str], torch.Tensor], dtype: torch.dtype, metadata: Mapping
) -> None:
    """As `save_network`, one tensor at a time.

    Args:
        net: says names and shapes; its values do not matter.
        get_tensor: gives the values of a name.
        metadata: the complete JSON block, as `describe` or `read_metadata` give it.
    """
    WRITERS[check_suffix(path)](path, net, get_tensor, dtype, metadata)


def open_snapshot(path_or_url: str | Path, which: str = "ema") -> SnapshotFile:
    """Open a snapshot without reading its weights: `metadata`, `names`, `shape(name)` and `get_tensor(name)`.

    Args:
        path_or_url: a file, a folder with config.json and model.safetensors, or a URL (http, https, file, hf) of a
            file; hf://owner/repo is a folder.
        which: the network to take from files that hold several.

    Raises:
        UserError: no such file, a damaged one, or one of another kind.
    """
    text = os.fspath(path_or_url)
    if Path(text).is_dir() or re.fullmatch(r"hf://[^/]+/[^/]+/?", text):
        return _open_folder(text, which)
    address = text.partition("#")[0].partition("?")[0] if is_url(text) else text
    if is_url(text):
        check_suffix(address)  # before it is fetched
    path = Path(open_url(text, return_filename=True))
    if check_suffix(address) == ".pkl":
        return PublishedFile(path, address, which)
    _check_which(path, which)
    return NativeFile(path)


def read_metadata(path_or_url: str | Path) -> dict[str, Any]:
    """The JSON block of a snapshot. Arguments and errors as `open_snapshot`."""
    return open_snapshot(path_or_url).metadata


def build_for(file: SnapshotFile) -> tuple[nn.Module, Encoder]:
    """Network (on the meta device) and encoder of a file whose tensors have the names and shapes that it needs.

    Raises:
        UserError: they have not, or the description makes no network.
    """
    net, encoder = build(str(file.path), file.metadata)
    wanted = {name: tensor.shape for name, tensor in net.state_dict().items()}
    for what, names in [("lack", wanted.keys() - set(file.names)), ("hold besides", set(file.names) - wanted.keys())]:
        if names:
            raise misfit(str(file.path), f"they {what} {', '.join(sorted(names)[:3])} ({len(names)} in all)")
    for name in file.names:
        if file.shape(name) != wanted[name]:
            raise misfit(str(file.path), f"{name} is {list(file.shape(name))} instead of {list(wanted[name])}")
        if file.dtype(name) not in PRECISIONS.values():
            raise misfit(str(file.path), f"{name} is not of type float32, float16 or bfloat16")
    return net, encoder


def finite_tensor(file: SnapshotFile, name: str) -> torch.Tensor:
    """A tensor as it is stored.

    Raises:
        UserError: it holds NaN or infinity, or cannot be read.
    """
    tensor = file.get_tensor(name)
    # The sum is quick and finds every NaN and infinity; a sum that merely overflows is looked at again.
    if not math.isfinite(tensor.sum(dtype=torch.float32)) and not tensor.isfinite().all():
        raise UserError(f"{file.path}: {name} holds NaN or infinity: use an earlier snapshot")
    return tensor


def weights_dtype(file: SnapshotFile, net: nn.Module) -> torch.dtype:
    """The type of the parameters in a file that `build_for` has made `net` of."""
    dtype = file.dtype(next(name for name, _ in net.named_parameters()))
    assert dtype is not None  # build_for has looked
    return dtype


def check_suffix(path: str | Path) -> str:
    """The suffix of a snapshot file.

    Raises:
        UserError: it is none.
    """
    suffix = Path(path).suffix
    if suffix not in WRITERS:
        raise UserError(f"{path}: snapshots are {' or '.join(WRITERS)} files")
    return suffix


def _open_folder(folder: str, which: str) -> NativeFile:
    missing = [name for name in FOLDER_FILES if not is_url(folder) and not Path(folder, name).is_file()]
    if missing:
        raise UserError(
            f"{folder}: a folder without {missing[0]} is no snapshot (it needs {' and '.join(FOLDER_FILES)})"
        )
    config, weights = (Path(open_url(f"{folder.rstrip('/')}/{name}", return_filename=True)) for name in FOLDER_FILES)
    try:
        metadata = json.loads(config.read_text())
    except (ValueError, RecursionError) as err:
        raise UserError(f"{config}: not JSON ({one_line(err)})") from None
    _check_which(weights, which)
    return NativeFile(weights, checked_metadata(str(config), metadata))


def _check_which(path: Path, which: str) -> None:
    if which != "ema":
        raise UserError(f"{path}: holds no network {which!r}, only 'ema'")
