"""Statistics of image features that metrics compare."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from dnnlib.util import UserError, open_url
from torch_utils import safe_pickle
from torch_utils.safe_pickle import StoredArray

Stats = dict[str, dict[str, np.ndarray]]


def load_stats(path_or_url: str | Path) -> Stats:
    """Reference statistics: for each metric ('fid', 'fd_dinov2') the mean `mu` [D] and covariance `sigma` [D, D].

    Reads the published pickles, and .npz files of `mu` and `sigma`, which are for FID.

    Raises:
        UserError: no such file, or one that holds no statistics.
    """
    path = Path(open_url(path_or_url, return_filename=True))
    with open(path, "rb") as f:
        is_npz = f.read(2) == b"PK"
    entries = _read_npz(path) if is_npz else published_stats(safe_pickle.load(path))
    stats: Stats = {}
    for metric, entry in entries.items():
        mu, sigma = (np.asarray(entry[key], dtype=np.float64) for key in ("mu", "sigma"))
        if mu.ndim != 1 or sigma.shape != mu.shape * 2 or not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise UserError(f"{path}: mu and sigma of {metric} must be finite, of shapes [D] and [D, D]")
        stats[metric] = dict(mu=mu, sigma=sigma)
    if not stats:
        raise UserError(f"{path}: holds no statistics (mu and sigma)")
    return stats


def published_stats(data: Any) -> dict[str, dict[str, np.ndarray]]:
    """The entries with `mu` and `sigma` of what was read from a pickle; none if it is something else."""
    found = {}
    for metric, entry in data.items() if isinstance(data, dict) else ():
        if isinstance(entry, dict) and all(isinstance(entry.get(key), StoredArray) for key in ("mu", "sigma")):
            found[metric] = {key: entry[key].load() for key in ("mu", "sigma")}
    return found


def _read_npz(path: Path) -> dict[str, dict[str, np.ndarray]]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {"fid": {key: arrays[key] for key in ("mu", "sigma")}} if {"mu", "sigma"} <= set(arrays) else {}
    except (ValueError, OSError, KeyError, zipfile.BadZipFile) as err:
        raise UserError(f"{path}: cannot be read ({err}): copy it again") from None
