"""Snapshots of all layouts, opened, loaded and written in the same way."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dnnlib.download import is_url, with_good_copy
from dnnlib.errors import UserError
from training.config.consistency import ConsistencyTraining
from training.config.names import unknown_preset
from training.encoders import Encoder
from training.families import ARCHITECTURES, preset_network
from training.snapshot.description import Description, describe
from training.snapshot.hub import open_folder
from training.snapshot.layout import (
    FOLDER,
    GetTensor,
    Reader,
    Request,
    SnapshotFile,
    Writer,
    build_for,
    finite_tensor,
    newest_of_run,
)
from training.snapshot.native import open_native, write_native
from training.snapshot.published_edm2 import PUBLISHED_ARCHITECTURES, PublishedFile, write_published
from training.snapshot.published_nvae import ARCHITECTURE as NVAE
from training.snapshot.published_nvae import PublishedNVAEFile, may_be_nvae, write_nvae
from training.snapshot.published_score_sde import ARCHITECTURE as SCORE_SDE
from training.snapshot.published_score_sde import PublishedScoreFile, is_checkpoint, write_checkpoint
from training.snapshot.published_uvit import ARCHITECTURE as UVIT
from training.snapshot.published_uvit import PublishedUViT, is_checkpoint_folder, write_state_dict

# A layout is an entry in these tables. Of readers that share a suffix, the first that recognises a file opens it.
READERS = [
    Reader(".safetensors", open_native),
    Reader(".pkl", PublishedFile),
    Reader(FOLDER, PublishedUViT, is_checkpoint_folder),
    Reader(FOLDER, open_folder),
    Reader(".pth", PublishedScoreFile, is_checkpoint),
    Reader(".pt", PublishedNVAEFile, may_be_nvae),
    Reader(".pth", PublishedUViT),
]
WRITERS = [
    Writer(".safetensors", write_native),
    Writer(".pkl", write_published, architectures=PUBLISHED_ARCHITECTURES),
    Writer(".pth", write_checkpoint, architectures=[SCORE_SDE]),
    Writer(".pth", write_state_dict, architectures=[UVIT]),
    Writer(".pt", write_nvae, architectures=[NVAE]),
]


@dataclass(frozen=True)
class Snapshot:
    """A network ready for sampling, the encoder that goes with it, and what is known about it.

    `metadata` are plain JSON values: those of `training.snapshot.description.Description`, notes among them.
    `path` is where the file is on this machine. `note` says what the user should know about how the file was
    understood; '' = nothing.
    """

    net: Any  # of a class in `families.ARCHITECTURES`
    encoder: Encoder
    metadata: dict[str, Any]
    path: Path
    note: str = ""

    @property
    def is_consistency_model(self) -> bool:
        """Whether the network was tuned to jump to the end of its paths, and is no denoiser any more."""
        return (self.metadata.get("config") or {}).get("family") == ConsistencyTraining.family


def load_network(
    path_or_url: str | Path, device: torch.device | str = "cpu", which: str = "ema", preset: str | None = None
) -> Snapshot:
    """The network of a snapshot, ready for sampling: float32 weights, eval mode, no gradients.

    Runs nothing named in the file.

    Args:
        path_or_url: see `open_snapshot`.
        which: the network to load from files that hold several.
        preset: training preset that names the architecture, for published layouts that do not say it. A file that does
            must hold the network of that preset.

    Raises:
        UserError: a missing or damaged file, unknown names in it, weights that do not fit the architecture, or a preset
            of another network.
    """
    return with_good_copy(path_or_url, lambda: _load(path_or_url, device, which, preset))


def _load(path_or_url: str | Path, device: torch.device | str, which: str, preset: str | None) -> Snapshot:
    """As `load_network`, of the copy that is kept."""
    file = _open(Request(os.fspath(path_or_url), which, preset))
    net, encoder = build_for(file)
    if preset is not None and file.says_architecture:
        _check_preset(file, net, preset)
    dtypes = {name: tensor.dtype for name, tensor in net.state_dict().items()}
    state = {name: finite_tensor(file, name).to(device, dtypes[name]) for name in file.names}
    net.load_state_dict(state, assign=True)
    return Snapshot(
        net.eval().requires_grad_(False), encoder, file.description.with_data(net).metadata, file.path, file.note
    )


def save_network(
    path: str | Path, net: nn.Module, encoder: Encoder, metadata: dict[str, Any], dtype: torch.dtype = torch.float16
) -> None:
    """Write a snapshot, complete or not at all. The suffix chooses the layout.

    Args:
        path: '.safetensors', or '.pkl' for what the published tools read.
        metadata: plain JSON values: `nimg`, `ema_std`, `config`, `dataset` where known, and notes of any other name.
        dtype: of the weights; in native files, buffers (Fourier features) stay float32.

    Raises:
        UserError: another suffix, a network of an unknown class, metadata of the wrong type, or an encoder that the
            published tools do not know.
        OSError: it could not be written.
    """
    description = describe(net, encoder, metadata, source=str(path))
    write_snapshot(path, net, net.state_dict().__getitem__, dtype, description)


def write_snapshot(
    path: str | Path, net: nn.Module, get_tensor: GetTensor, dtype: torch.dtype, description: Description
) -> None:
    """As `save_network`, one tensor at a time.

    Args:
        net: says names and shapes; its values do not matter.
        get_tensor: gives the values of a name.
        description: of the network, as `describe` or an open snapshot gives it.

    Raises:
        UserError: another suffix, a network or encoder that the layout cannot hold, or values that are not finite.
        OSError: it could not be written.
    """
    suffix, name = check_suffix(path), description.architecture.name
    description.build_encoder(str(path))  # no reader would take one that fails
    for writer in WRITERS:
        if writer.suffix == suffix and (writer.architectures is None or name in writer.architectures):
            writer.write(Path(path), net, get_tensor, dtype, description.with_data(net))
            return
    raise UserError(f"{path}: {suffix} files cannot hold a network of {name}: keep it as .safetensors")


def open_snapshot(path_or_url: str | Path, which: str = "ema", preset: str | None = None) -> SnapshotFile:
    """An open snapshot, whose weights are not read yet: `metadata`, `names`, `shape(name)` and `get_tensor(name)`.

    Args:
        path_or_url: a file, a folder with config.json and model.safetensors, the folder of a training run, which stands
            for its newest snapshot, or a URL (http, https, file, hf) of a file; hf://owner/repo is a folder.
        which: the network to take from files that hold several.
        preset: training preset that names the architecture, for layouts that do not say it.

    Raises:
        UserError: no such file, a damaged one, or one of another kind.
    """
    return with_good_copy(path_or_url, lambda: _open(Request(os.fspath(path_or_url), which, preset)))


def _open(request: Request) -> SnapshotFile:
    """As `open_snapshot`, of the copy that is kept."""
    newest = newest_of_run(request.address)
    if newest is not None:
        file = _open(replace(request, address=str(newest)))
        file.note = "; ".join(filter(None, [f"its newest snapshot is {newest.name}", file.note]))
        return file
    suffixes = [reader.suffix for reader in READERS]
    if request.suffix not in suffixes:
        if not is_url(request.address):
            request.fetch()  # fails for a missing file, which is the likelier mistake
        raise UserError(f"{request.path}: snapshots are {_listed(suffixes)} files")
    for reader in READERS:
        if reader.suffix == request.suffix and reader.recognises(request):
            return reader.open(request)
    raise UserError(f"{request.path}: a {request.suffix} of no layout that is known here")


def read_metadata(path_or_url: str | Path) -> dict[str, Any]:
    """What a snapshot says of itself, as plain JSON values. Arguments and errors as for `open_snapshot`."""
    return open_snapshot(path_or_url).metadata


def check_suffix(path: str | Path) -> str:
    """The suffix of a snapshot file that is to be written.

    Raises:
        UserError: no layout that is written has it.
    """
    suffix, suffixes = Path(path).suffix, [writer.suffix for writer in WRITERS]
    if suffix not in suffixes:
        raise UserError(f"{path}: snapshots are {_listed(suffixes)} files")
    return suffix


def _listed(suffixes: list[str]) -> str:
    return " or ".join(dict.fromkeys(suffix for suffix in suffixes if suffix != FOLDER))


def _check_preset(file: SnapshotFile, net: nn.Module, preset: str) -> None:
    """Check that a network is that of a training preset.

    Raises:
        UserError: it is another, or there is no such preset.
    """
    presets = {name: preset for architecture in ARCHITECTURES.values() for name, preset in architecture.presets.items()}
    if preset not in presets:
        raise unknown_preset("preset", preset, presets)
    with torch.device("meta"):
        wanted = preset_network(presets[preset])
    shapes, wanted_shapes = (
        {key: tensor.shape for key, tensor in network.state_dict().items()} for network in (net, wanted)
    )
    if shapes != wanted_shapes:
        raise UserError(
            f"{file.path}: holds another network than that of preset {preset!r}: leave the preset out, "
            f"the file says itself what it holds"
        )
