"""State dicts of published code: files of tensors by name, read without executing anything in them."""

import pickle
from pathlib import Path

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
        raise UserError(f"{path}: not plain tensors ({one_line(err)[:150]}); nothing in the file was run") from None
    except Exception as err:  # torch has many ways to say that a file is damaged
        raise DamagedFileError(f"{path}: damaged ({one_line(err)[:150]}): copy it again") from None
    if not isinstance(state, dict) or not state:
        raise UserError(f"{path}: holds no weights by name, but a {type(state).__name__}")
    for name, tensor in state.items():
        is_weight = isinstance(tensor, torch.Tensor) and tensor.dtype in TYPES and tensor.numel() > 0
        if not isinstance(name, str) or not is_weight:
            raise UserError(f"{path}: {one_line(name)[:50]!r} in it is no tensor of floating-point weights")
    # Overlapping elements would make a large network of a small file.
    if sum(t.numel() * t.itemsize for t in state.values()) > path.stat().st_size:
        raise UserError(f"{path}: its tensors share their values, which no published file needs")
    return dict(state)
