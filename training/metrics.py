"""Statistics of image features that metrics compare."""

import io
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from dnnlib.util import UserError, one_line, open_url
from torch_utils import safe_pickle
from torch_utils.safe_pickle import StoredArray

MAX_METRICS, MAX_FEATURES = 16, 1 << 13
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
    stats = _read_npz(path) if is_npz else published_stats(safe_pickle.load(path), str(path))
    if not stats:
        raise UserError(f"{path}: holds no statistics (mu and sigma)")
    return stats


def published_stats(data: Any, source: str) -> Stats:
    """The entries with `mu` and `sigma` of what was read from the pickle `source`; none if it is something else.

    Raises:
        UserError: they are not statistics.
    """
    stats: Stats = {}
    for metric, entry in data.items() if type(data) is dict else ():
        if type(metric) is str and type(entry) is dict and {"mu", "sigma"} <= entry.keys():
            if len(stats) == MAX_METRICS:
                raise UserError(f"{source}: holds statistics of more than {MAX_METRICS} metrics")
            arrays = {key: entry[key] for key in ("mu", "sigma")}
            if not all(type(array) is StoredArray for array in arrays.values()):
                raise UserError(f"{source}: mu and sigma of {one_line(metric)[:50]} are not arrays")
            _check_shapes(arrays["mu"].shape, arrays["sigma"].shape, source)
            stats[metric] = {key: _finite(array.load(), source) for key, array in arrays.items()}
    return stats


def _read_npz(path: Path) -> Stats:
    """`mu` and `sigma` of an .npz file, {} if it has none, read with a limit on the memory they take."""
    try:
        with warnings.catch_warnings(), zipfile.ZipFile(path) as archive:
            warnings.simplefilter("error")
            if not {"mu.npy", "sigma.npy"} <= set(archive.namelist()):
                return {}
            mu, sigma = (_read_npy(archive, name) for name in ("mu.npy", "sigma.npy"))
    except Exception as err:  # zipfile, its decompressors and NumPy have many ways to say that a file is damaged
        raise UserError(f"{path}: cannot be read ({one_line(err)[:200]}): copy it again") from None
    _check_shapes(mu.shape, sigma.shape, str(path))
    return {"fid": {"mu": _finite(mu, str(path)), "sigma": _finite(sigma, str(path))}}


def _read_npy(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    if archive.getinfo(name).file_size > MAX_FEATURES**2 * 8 + 4096:
        raise ValueError(f"{name} is too large")
    array = np.lib.format.read_array(io.BytesIO(archive.read(name)), allow_pickle=False)
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{name} is not an array of real numbers")
    return array


def _check_shapes(mu: tuple[int, ...], sigma: tuple[int, ...], source: str) -> None:
    if not (len(mu) == 1 and 1 <= mu[0] <= MAX_FEATURES and sigma == mu * 2):
        raise UserError(f"{source}: mu and sigma must be of shapes [D] and [D, D], D up to {MAX_FEATURES}")


def _finite(array: np.ndarray, source: str) -> np.ndarray:
    with np.errstate(all="ignore"):
        array = array.astype(np.float64)
    if not np.isfinite(array).all():
        raise UserError(f"{source}: mu and sigma must be finite")
    return array
