"""Files of feature statistics: ours, the published ones, and those of other tools.

As in the published tools, statistics are a dictionary with an entry for each of 'fid' (Inception-v3), 'fd_dinov2'
(DINOv2), 'fd_clip' (CLIP) and 'fd_pixels', which holds, as far as known or asked for:

- `mu`, `sigma`: mean [D] and unbiased covariance [D, D] of the features, float64,
- `features`: of all images, float32 [N, D],
- `logits`: of Inception-v3 without biases, float32 [N, 1008]; never in files,
- `detector`: what determines the features (`Detector.describe`),
- `groups`: for each group of images its size, the sum of x [D] and of x x^T [D, D]; for error bars, never in files.

Beside the entries are `num_images`, `resolution` (height and width), `facts` about the origin of the images, and, where
a metric needs them, `classes` of all images, int64 [N].
"""

import io
import json
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from dnnlib.download import open_url, with_good_copy
from dnnlib.errors import DamagedFileError, UserError, one_line
from dnnlib.files import atomic_write
from dnnlib.util import EasyDict
from torch_utils import safe_pickle
from torch_utils.safe_pickle import StoredArray

FORMAT, VERSION = "OpenEDM2 feature statistics", 1
MAX_FEATURES = 1 << 13
# Detector of each entry.
ENTRIES = {"fid": "inception", "fd_dinov2": "dinov2", "fd_clip": "clip", "fd_pixels": "pixels"}
ARRAYS = {"mu": 1, "sigma": 2, "features": 2}  # number of dimensions
DESCRIPTION = {"detector", "resize", "weights"}  # see `Detector.describe`
POOL = "pool_3.npy"  # features in the files of score_sde
SUFFIXES = (".safetensors", ".npz", ".pkl")


def save_stats(path: str | Path, stats: Mapping[str, Any]) -> None:
    """Write statistics: .safetensors or .npz for everything, or .pkl for the published tools.

    Args:
        stats: as `calculate_stats_for_iterable` returns them; plain dictionaries of arrays will do.

    Raises:
        UserError: another suffix, or features, which the published layout cannot hold.
        OSError: the file could not be written.
    """
    path = Path(path)
    check_destination(path, any("features" in stats[name] for name in ENTRIES if name in stats))
    if path.suffix == ".pkl":
        _write_published(path, stats)
        return
    entries = {name: stats[name] for name in ENTRIES if name in stats}
    arrays = {
        f"{name}/{key}": np.ascontiguousarray(entry[key])
        for name, entry in entries.items()
        for key in ARRAYS
        if key in entry
    }
    if "classes" in stats:
        arrays["classes"] = np.ascontiguousarray(stats["classes"])
    metadata = json.dumps(
        {
            "format": FORMAT,
            "version": VERSION,
            "detectors": {name: entry.get("detector") for name, entry in entries.items()},
            **{key: stats.get(key) for key in ("num_images", "resolution", "facts")},
        }
    )
    with atomic_write(path) as f:
        if path.suffix == ".npz":
            np.savez(f, metadata=np.array(metadata), **arrays)  # type: ignore[arg-type]
        else:
            f.write(safetensors.numpy.save(arrays, {"openedm2": metadata}))


def check_destination(path: Path, with_features: bool) -> None:
    """Refuse a name under which statistics cannot be saved.

    Args:
        with_features: whether the statistics include features.

    Raises:
        UserError: another suffix, or features, which the published layout cannot hold.
    """
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: statistics are saved as {', '.join(SUFFIXES)}")
    if path.suffix == ".pkl" and with_features:
        raise UserError(f"{path}: the published layout holds means and covariances only: choose .safetensors")


def _write_published(path: Path, stats: Mapping[str, Any]) -> None:
    entries = {name: stats[name] for name in ENTRIES if name in stats}
    data: dict[str, Any] = {name: {"mu": entry["mu"], "sigma": entry["sigma"]} for name, entry in entries.items()}
    safe_pickle.save(path, {**data, "num_images": stats["num_images"]})


# ---------------------------------------------------------------------------------------------------------
# Reading


def load_stats(path_or_url: str | Path) -> EasyDict:
    """The statistics in a file: ours (.safetensors, .npz), a published pickle, or an .npz file of `mu` and `sigma`
    (older releases, pytorch-fid, ADM) or of `pool_3`, Inception's features of all images (score_sde).

    Both kinds of .npz files are taken to be for FID. Nothing in a file is executed.

    Raises:
        UserError: the file is missing or damaged, or holds no statistics.
        RunError: a download failed.
    """
    return with_good_copy(path_or_url, lambda: _load(Path(open_url(path_or_url, return_filename=True))))


def _load(path: Path) -> EasyDict:
    """As `load_stats`, of a file."""
    with open(path, "rb") as f:
        start = f.read(9)
    if start[:2] == b"PK":
        stats = _read_npz(path)
    elif start[8:9] == b"{":
        stats = _read_safetensors(path)
    elif start[:1] in (pickle.PROTO, b""):
        stats = published_stats(safe_pickle.load(path), str(path))
    else:
        stats = EasyDict()
    if not ENTRIES.keys() & stats.keys():
        raise UserError(
            f"{path}: holds no statistics of features: give a file of calculate_metrics.py ref, a published pickle, or "
            f"an .npz file of mu and sigma"
        )
    return stats


def is_statistics(path: Path) -> bool:
    """Whether a safetensors file says that it holds statistics; a damaged one does not."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return json.loads((file.metadata() or {}).get("openedm2", ""))["format"] == FORMAT
    except (safetensors.SafetensorError, ValueError, LookupError, TypeError, RecursionError):
        return False


def published_stats(data: Any, source: str) -> EasyDict:
    """The statistics in the contents of a published pickle; empty if it holds something else.

    Args:
        data: what `safe_pickle.load` read.
        source: name of the file, for messages.

    Raises:
        UserError: an entry is damaged.
    """
    stats = EasyDict()
    for name, entry in data.items() if isinstance(data, dict) else ():
        if name == "num_images" and type(entry) is int:
            stats.num_images = entry
        if name in ENTRIES and isinstance(entry, dict) and {"mu", "sigma"} <= entry.keys():
            arrays = {key: entry[key] for key in ("mu", "sigma")}
            if not all(type(array) is StoredArray for array in arrays.values()):
                raise UserError(f"{source}: mu and sigma of {name} are not arrays")
            _check_shapes({key: array.shape for key, array in arrays.items()}, source)
            stats[name] = EasyDict({key: _finite(array.load(), source) for key, array in arrays.items()})
    return stats


def _read_safetensors(path: Path) -> EasyDict:
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = (file.metadata() or {}).get("openedm2", "")
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
            return _ours(path, metadata, shapes, file.get_tensor)
    except (safetensors.SafetensorError, ValueError, TypeError) as err:
        if isinstance(err, UserError):
            raise
        raise DamagedFileError(f"{path}: cannot be read ({one_line(err)[:200]}): copy it again") from None


def _ours(path: Path, text: str, shapes: Mapping[str, tuple[int, ...]], read: Any) -> EasyDict:
    """The statistics in a file of ours.

    Args:
        text: its metadata, JSON.
        shapes: of its arrays, by name.
        read: name -> array.

    Raises:
        UserError: the file holds something else, or is damaged.
    """
    try:
        metadata = json.loads(text)
        if metadata["format"] != FORMAT:
            raise ValueError("another format")
        if metadata["version"] != VERSION:
            raise UserError(f"{path}: has format version {metadata['version']}, not {VERSION}: use a newer release")
        detectors = {name: metadata["detectors"][name] for name in ENTRIES if name in metadata["detectors"]}
        stats = EasyDict({key: metadata[key] for key in ("num_images", "resolution", "facts")})
        described = all(isinstance(d, dict) and d.keys() >= DESCRIPTION for d in detectors.values() if d is not None)
        if not described or any(type(stats[key]) not in (int, type(None)) for key in ("num_images", "resolution")):
            raise ValueError("its metadata is damaged")
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as err:
        raise UserError(f"{path}: holds no feature statistics ({one_line(err)[:100]})") from None
    for name, detector in detectors.items():
        present = {key: shapes[f"{name}/{key}"] for key in ARRAYS if f"{name}/{key}" in shapes}
        _check_shapes(present, str(path))
        stats[name] = EasyDict(detector=detector)
        for key in present:
            array = read(f"{name}/{key}")
            if array.dtype.kind != "f":
                raise UserError(f"{path}: {name}/{key} is not an array of real numbers")
            stats[name][key] = array if key == "features" else _finite(array, str(path))
    if "classes" in shapes:
        stats.classes = read("classes")
        if stats.classes.dtype.kind != "i" or stats.classes.shape != (stats.num_images,):
            raise UserError(f"{path}: classes is not one whole number for each image")
    return stats


def _read_npz(path: Path) -> EasyDict:
    """The statistics in an .npz file: ours, with `mu` and `sigma`, or of `pool_3`; empty if it holds something else.

    Arrays that would take too much memory are refused.
    """
    try:
        with warnings.catch_warnings(), zipfile.ZipFile(path) as archive:
            warnings.simplefilter("error")
            names = set(archive.namelist())
            if "metadata.npy" in names:
                shapes = {name.removesuffix(".npy"): _npy_shape(archive, name) for name in names - {"metadata.npy"}}
                text = str(_read_npy(archive, "metadata.npy", kinds="U"))
                return _ours(path, text, shapes, lambda name: _read_npy(archive, f"{name}.npy"))
            if POOL in names:
                return _of_features(path, _read_npy(archive, POOL))
            if not {"mu.npy", "sigma.npy"} <= names:
                return EasyDict()
            arrays = {key: _read_npy(archive, f"{key}.npy") for key in ("mu", "sigma")}
    except UserError:
        raise
    except Exception as err:  # damaged files raise all kinds of errors, from zipfile, its decompressors and NumPy
        raise DamagedFileError(f"{path}: cannot be read ({one_line(err)[:200]}): copy it again") from None
    _check_shapes({key: array.shape for key, array in arrays.items()}, str(path))
    return EasyDict(fid=EasyDict({key: _finite(array, str(path)) for key, array in arrays.items()}))


def _of_features(path: Path, features: np.ndarray) -> EasyDict:
    """The statistics of Inception's features [N, D] of all images, as score_sde (Song et al. 2021) publishes them."""
    _check_shapes({"features": features.shape}, str(path))
    if len(features) < 2:
        raise UserError(f"{path}: {POOL} holds the features of {len(features)} image, which have no covariance")
    values = _finite(features.astype(np.float64), str(path))
    stats = {"mu": values.mean(axis=0), "sigma": np.cov(values, rowvar=False)}
    return EasyDict(fid=EasyDict(stats), num_images=len(values))


def _npy_shape(archive: zipfile.ZipFile, name: str) -> tuple[int, ...]:
    with archive.open(name) as f:
        np.lib.format.read_magic(f)
        return np.lib.format.read_array_header_1_0(f)[0]


def _read_npy(archive: zipfile.ZipFile, name: str, kinds: str = "fiu") -> np.ndarray:
    if not name.endswith(("/features.npy", POOL)) and archive.getinfo(name).file_size > MAX_FEATURES**2 * 8 + 4096:
        raise ValueError(f"{name} is too large")
    array = np.lib.format.read_array(io.BytesIO(archive.read(name)), allow_pickle=False)
    if array.dtype.kind not in kinds:
        raise ValueError(f"{name} is not an array of real numbers")
    return array


def _check_shapes(shapes: Mapping[str, tuple[int, ...]], source: str) -> None:
    if any(len(shape) != ARRAYS[key] for key, shape in shapes.items()) or len({s[-1] for s in shapes.values()}) > 1:
        raise UserError(f"{source}: mu and sigma must be of shapes [D] and [D, D], features of [N, D]")
    if ("mu" in shapes) != ("sigma" in shapes) or ("sigma" in shapes and len(set(shapes["sigma"])) != 1):
        raise UserError(f"{source}: mu and sigma must be of shapes [D] and [D, D]")
    if not all(1 <= shape[-1] <= MAX_FEATURES for shape in shapes.values()):
        raise UserError(f"{source}: mu and sigma must be of shapes [D] and [D, D], D from 1 to {MAX_FEATURES}")


def _finite(array: np.ndarray, source: str) -> np.ndarray:
    with np.errstate(all="ignore"):
        array = array.astype(np.float64)
    if not np.isfinite(array).all():
        raise UserError(f"{source}: mu and sigma must be finite")
    return array
