"""Weights of detectors: fetched once, read without executing anything, and checked against the network."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from dnnlib.download import offline, open_url
from dnnlib.errors import DamagedFileError, UserError, one_line
from torch_utils.checkpoint import load_checked
from training.config.metrics import METRIC_FILES


def fetch_weights(metric: str) -> list[Path]:
    """Local copies of the published files that a metric needs, in the order of `METRIC_FILES`.

    Raises:
        UserError: a file does not exist, or is not in the cache and the user wants no network.
        RunError: a download failed.
    """
    try:
        return [Path(open_url(url, return_filename=True)) for url in METRIC_FILES[metric]]
    except UserError as err:
        hint = f"; all files at once: python snapshot_tool.py prefetch {metric}" if offline() else ""
        raise UserError(f"{err}{hint}") from None


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The state dict in a file of `torch.save`.

    Raises:
        UserError: the file is damaged, or holds something else.
    """
    try:
        state = load_checked(path, mmap=True)
    except Exception:  # damaged files and files with code raise all kinds of errors, few of them readable
        raise DamagedFileError(
            f"{path}: not weights saved by torch.save, or damaged: copy or download it again"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{path}: not weights saved by torch.save: it holds more than named tensors")
    return state


def read_state(path: Path, wanted: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict in a file of `torch.save`, with the names and shapes of `wanted`.

    Raises:
        UserError: the file is damaged, holds something else, or other names or shapes.
    """
    state = read_tensors(path)
    shapes = {name: list(tensor.shape) for name, tensor in wanted.items()}
    wrong = [
        f"{name} is {list(state[name].shape)} instead of {shape}"
        for name, shape in shapes.items()
        if name in state and list(state[name].shape) != shape
    ]
    check_fit(path, shapes.keys() - state.keys(), state.keys() - shapes.keys(), wrong)
    return state


def check_fit(path: Path, missing: Iterable[str], unexpected: Iterable[str], wrong: Sequence[str]) -> None:
    """Refuse weights whose names or shapes are not those of the network.

    Args:
        missing, unexpected: names that only the network has, and only the file.
        wrong: messages about shapes.

    Raises:
        UserError: one of them is not empty.
    """
    lists = {"missing ": sorted(missing), "unexpected ": sorted(unexpected), "": sorted(wrong)}
    for what, names in lists.items():
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{path}: not the weights of this network ({what}{one_line(names[0])}{more})")


def check_finite(path: Path, net: nn.Module) -> None:
    """Refuse weights that are not finite numbers.

    Raises:
        UserError: a weight is NaN or infinite.
    """
    for name, tensor in net.state_dict().items():
        if not tensor.isfinite().all():
            raise DamagedFileError(f"{path}: {name} holds NaN or infinity: copy it again")
