"""What a file holds, for `snapshot_tool.py inspect`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dnnlib.download import open_url
from torch_utils import safe_pickle
from training.flops import count_parameters
from training.metrics.files import ENTRIES, SUFFIXES, is_statistics, load_stats, published_stats
from training.snapshot.files import open_snapshot
from training.snapshot.layout import build_for, weights_dtype


def facts_of(source: str, arch: str | None = None) -> dict[str, Any]:
    """Facts about a snapshot or a file of reference statistics, as plain JSON values.

    Args:
        source: file, folder or URL.
        arch: training preset that names the architecture, for layouts that do not say it.

    Raises:
        UserError: there is no such file, it is damaged, or it is neither.
    """
    return _facts_of_statistics(source) or _facts_of_network(source, arch)


def _facts_of_network(source: str, arch: str | None) -> dict[str, Any]:
    file = open_snapshot(source, preset=arch)
    net, _ = build_for(file)
    measured = {
        "file": str(file.path),
        "bytes": file.path.stat().st_size,
        "parameters": count_parameters(net),
        "tensors": len(file.names),
        "dtype": str(weights_dtype(file, net)).removeprefix("torch."),
    }
    return measured | {key: value for key, value in file.metadata.items() if key not in measured}


def _facts_of_statistics(source: str) -> dict[str, Any] | None:
    """None if the file is something else."""
    if Path(source).is_dir() or not source.partition("#")[0].endswith(SUFFIXES):
        return None
    path = Path(open_url(source, return_filename=True))
    if path.suffix == ".pkl" and not ENTRIES.keys() & published_stats(safe_pickle.load(path), str(path)).keys():
        return None
    if path.suffix == ".safetensors" and not is_statistics(path):
        return None
    stats = load_stats(path)
    facts = {key: stats[key] for key in ("num_images", "resolution", "facts") if stats.get(key) is not None}
    features = {name: _held(stats[name]) for name in ENTRIES if name in stats}
    return {"file": str(path), "bytes": path.stat().st_size, **features, **facts}


def _held(entry: Mapping[str, Any]) -> str:
    """Such as 'mean and covariance of 192 features'; some metrics need the features of each image instead."""
    held = [f"mean and covariance of {len(entry['mu'])} features"] if "mu" in entry else []
    if "features" in entry:
        held.append("{} features of {} images".format(*entry["features"].shape[::-1]))
    return ", ".join(held)
