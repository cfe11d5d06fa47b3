"""Native snapshots: safetensors files with a JSON block."""

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch

from dnnlib.util import UserError, atomic_write, one_line
from training.snapshot.description import METADATA_KEY, checked_metadata

DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class NativeFile:
    """A snapshot whose tensors are read when asked for.

    Args:
        metadata: the JSON block, where it is kept beside the file.

    Raises:
        UserError: a damaged file, or one of another kind.
    """

    def __init__(self, path: Path, metadata: dict[str, Any] | None = None):
        self.path = path
        try:
            self._file = safetensors.safe_open(path, framework="pt")
            if metadata is None:
                text = (self._file.metadata() or {}).get(METADATA_KEY)
                metadata = None if text is None else json.loads(text)
        except (safetensors.SafetensorError, ValueError, RecursionError) as err:
            raise UserError(f"{path}: damaged or truncated snapshot ({one_line(err)}): copy it again") from None
        if metadata is None:
            raise UserError(f"{path}: a safetensors file, but not a snapshot of this project")
        self.metadata = checked_metadata(str(path), metadata)
        self.names = list(self._file.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype | None:
        """One of `DTYPE_NAMES`; None = another."""
        stored = self._file.get_slice(name).get_dtype()
        return next((dtype for dtype, dtype_name in DTYPE_NAMES.items() if dtype_name == stored), None)

    def get_tensor(self, name: str) -> torch.Tensor:
        try:
            return self._file.get_tensor(name)
        except (safetensors.SafetensorError, RuntimeError, ValueError) as err:
            raise UserError(
                f"{self.path}: tensor {name} cannot be read ({one_line(err)}): copy the file again"
            ) from None


def write_native(
    path: str | Path,
    net: torch.nn.Module,
    get_tensor: Callable[[str], torch.Tensor],
    dtype: torch.dtype,
    metadata: Mapping,
) -> None:
    """Write a snapshot, complete or not at all, one tensor at a time.

    Args:
        net: network that says names and shapes; its values do not matter.
        get_tensor: the values of a name.
        dtype: of the weights; buffers (Fourier features) are float32.
        metadata: the complete JSON block.

    Raises:
        OSError: it could not be written.
    """
    parameters = {name for name, _ in net.named_parameters()}
    header: dict[str, Any] = {"__metadata__": {METADATA_KEY: json.dumps(metadata)}}
    position = 0
    state = net.state_dict()
    dtypes = {name: dtype if name in parameters else torch.float32 for name in state}
    # Wider types first, as the format wants its tensors aligned.
    names = sorted(state, key=lambda name: -dtypes[name].itemsize)
    for name in names:
        end = position + state[name].numel() * dtypes[name].itemsize
        header[name] = dict(
            dtype=DTYPE_NAMES[dtypes[name]], shape=list(state[name].shape), data_offsets=[position, end]
        )
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_write(path) as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            tensor = get_tensor(name).detach().to("cpu", dtypes[name]).contiguous()
            f.write(tensor.flatten().view(torch.uint8).numpy().data)
