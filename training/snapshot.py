"""Network snapshots: one safetensors file of weights with a JSON block that says what they are.

Other formats (the suffix chooses) have their place in `load_network` and `save_network`.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from dnnlib.util import UserError, atomic_write, code_version
from training.encoders import ENCODERS, Encoder
from training.networks_edm2 import Precond

FORMAT_VERSION = 1
METADATA_KEY = "openedm2"
ARCHITECTURES: dict[str, type[Precond]] = {"edm2.Precond": Precond}


@dataclass(frozen=True)
class Snapshot:
    """A network ready for sampling, the encoder that goes with it, and what is known about it."""

    net: Precond
    encoder: Encoder
    metadata: dict[str, Any]


def save_network(
    path: str | Path, net: Precond, encoder: Encoder, metadata: dict[str, Any], dtype: torch.dtype = torch.float16
) -> None:
    """Write a snapshot, complete or not at all.

    Args:
        path: file name ending in '.safetensors'.
        metadata: plain JSON values: `nimg`, `ema_std`, `config`, `dataset` where known.
        dtype: of the weights; buffers (Fourier features) stay float32.

    Raises:
        OSError: it could not be written.
    """
    _check_suffix(path)
    state = net.state_dict()
    parameters = {name for name, _ in net.named_parameters()}
    tensors = {
        name: tensor.detach().to("cpu", dtype if name in parameters else torch.float32).contiguous()
        for name, tensor in state.items()
    }
    save_tensors(path, tensors, describe(net, encoder, metadata))


def describe(net: Precond, encoder: Encoder, metadata: dict[str, Any]) -> dict[str, Any]:
    """The JSON block of a snapshot: `metadata` and what it takes to build network and encoder again."""
    architecture = next(name for name, cls in ARCHITECTURES.items() if type(net) is cls)
    return {
        **metadata,
        "format_version": FORMAT_VERSION,
        "architecture": {"name": architecture, "kwargs": net.init_kwargs},
        "encoder": {"name": type(encoder).__name__, "kwargs": encoder.init_kwargs},
        "code_version": code_version(),
    }


def save_tensors(path: str | Path, tensors: dict[str, torch.Tensor], metadata: dict[str, Any]) -> None:
    """Write tensors with a complete JSON block, as `read_metadata` gives it."""
    data = safetensors.torch.save(tensors, {METADATA_KEY: json.dumps(metadata)})
    with atomic_write(path) as f:
        f.write(data)


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The JSON block of a snapshot, without reading its weights.

    Raises:
        UserError: no such file, a damaged one, or one of another kind.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such snapshot")
    _check_suffix(path)
    try:
        with safetensors.safe_open(path, framework="pt") as f:
            text = (f.metadata() or {}).get(METADATA_KEY)
        metadata = None if text is None else json.loads(text)
    except (safetensors.SafetensorError, ValueError, RecursionError) as err:
        raise UserError(f"{path}: damaged or truncated snapshot ({err}): copy it again") from None
    if not isinstance(metadata, dict):
        raise UserError(f"{path}: a safetensors file, but not a snapshot of this project")
    if metadata.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{path}: format version {metadata.get('format_version')} is unknown: update this code")
    return metadata


def load_network(path_or_url: str | Path, device: torch.device | str = "cpu", which: str = "ema") -> Snapshot:
    """Load a snapshot for sampling: float32 weights, eval mode, no gradients. Runs nothing named in the file.

    Args:
        which: the network to load from files that hold several; native snapshots hold 'ema' only.

    Raises:
        UserError: a missing or damaged file, unknown names in it, or weights that do not fit the architecture.
    """
    path = Path(path_or_url)
    metadata = read_metadata(path)
    if which != "ema":
        raise UserError(f"{path}: holds no network {which!r}, only 'ema'")
    net, encoder = build(path, metadata)
    tensors = safetensors.torch.load_file(path, device=str(device))
    spoiled = next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None)
    if spoiled is not None:
        raise UserError(f"{path}: {spoiled} holds NaN or infinity: use an earlier snapshot")
    try:
        net.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    except RuntimeError as err:
        raise _misfit(path, err) from None
    return Snapshot(net.eval().requires_grad_(False), encoder, metadata)


def build(path: Path, metadata: dict[str, Any]) -> tuple[Precond, Encoder]:
    """The network, still without values (on the meta device), and the encoder that a snapshot's JSON block describes.

    Raises:
        UserError: unknown names, or arguments that do not make a network.
    """
    try:
        architecture, encoder = metadata["architecture"], metadata["encoder"]
        net_class, net_kwargs = ARCHITECTURES.get(architecture["name"]), architecture["kwargs"]
        encoder_class, encoder_kwargs = ENCODERS.get(encoder["name"]), encoder["kwargs"]
    except (KeyError, TypeError) as err:
        raise UserError(f"{path}: its description is incomplete ({err!r})") from None
    if net_class is None:
        raise UserError(f"{path}: unknown architecture {architecture['name']!r} (known: {', '.join(ARCHITECTURES)})")
    if encoder_class is None:
        raise UserError(f"{path}: unknown encoder {encoder['name']!r} (known: {', '.join(ENCODERS)})")
    try:
        with torch.device("meta"):
            return net_class(**net_kwargs, precision="fp32"), encoder_class(**encoder_kwargs)
    except Exception as err:  # what a damaged or foreign description asks for can fail in any way
        raise _misfit(path, err) from None


def _misfit(path: Path, err: Exception) -> UserError:
    reason = " ".join(str(err).split())[:300]
    return UserError(f"{path}: the weights do not fit the architecture: {reason}")


def _check_suffix(path: str | Path) -> None:
    if Path(path).suffix != ".safetensors":
        raise UserError(f"{path}: snapshots are .safetensors files")
