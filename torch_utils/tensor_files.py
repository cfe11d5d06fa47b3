"""State dicts of published code: files of tensors by name, read without executing anything in them."""

import os
import pickle
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from dnnlib.errors import DamagedFileError, UserError, one_line
from torch_utils.checkpoint import load_checked

TYPES = (torch.float32, torch.float16, torch.bfloat16)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a published state dict by name, on the CPU.

    Raises:
        UserError: no such file, a damaged one, or one that asks for more than tensors.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        state = load_checked(path, mmap=True)
    except pickle.UnpicklingError as err:
        raise refused(path, err) from None
    except Exception as err:  # torch has many ways to say that a file is damaged
        raise DamagedFileError(f"{path}: damaged ({one_line(err)[:150]}): copy it again") from None
    if not isinstance(state, dict) or not state:
        raise UserError(f"{path}: holds no weights by name, but a {type(state).__name__}")
    check_weights(path, state, TYPES)
    return dict(state)


def refused(path: str | os.PathLike, err: pickle.UnpicklingError) -> UserError:
    """The error for a stranger's file that torch did not read since it asks for more than data."""
    asked = re.search(r"(?i:unsupported) (?i:global|class)[^\n]*?(?:GLOBAL )?(\w+(?:\.\w+)+)", str(err))
    what = f"it asks for {asked[1][:100]!r}, which no published file needs" if asked else one_line(err)[:150]
    return UserError(f"{os.fspath(path)}: {what}; nothing in the file was run")


def check_weights(path: Path, weights: Mapping[Any, Any], types: Collection[torch.dtype]) -> None:
    """Check that what a stranger's file gives for weights is tensors by name, no larger than the file.

    Args:
        types: of floating-point numbers that they may have.

    Raises:
        UserError: something is no such tensor, or tensors share their values, by which a small file would make a large
            network.
    """
    for name, tensor in weights.items():
        plain = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not isinstance(name, str) or not plain or tensor.dtype not in types or tensor.numel() == 0:
            raise UserError(f"{path}: {one_line(name)[:50]!r} in it is no tensor of floating-point weights")
    if sum(t.numel() * t.itemsize for t in weights.values()) > path.stat().st_size:
        raise UserError(f"{path}: its tensors share their values, which no published file needs")
