"""Python names of NVIDIA's EDM2 release, for scripts that import them from its commands.

`generate_images`, `train_edm2`, `reconstruct_phema` and `calculate_metrics` offer them (docs/migration.md). Arguments
have the published names and meaning; what they return is of this project.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from dnnlib import EasyDict
from training.config.edm2 import GENERATION_PRESETS, TRAINING_PRESETS, EDM2Training
from training.config.metrics import METRICS, parse_metrics
from training.config.training import Preset
from training.launch import make_config
from training.metrics.base import Detector
from training.metrics.detectors import load_detectors
from training.metrics.files import save_stats as write_stats
from training.snapshot.reconstruction import StoredAverage, list_averages
from training.snapshot.reconstruction import reconstruct_phema as write_averages
from training.training_loop import training_loop

# ---------------------------------------------------------------------------------------------------------
# generate_images and train_edm2

# name -> net and, where there is one, gnet (URLs) and guidance
generation_presets = {
    name: EasyDict(net=preset.net, **({"gnet": preset.gnet, "guidance": preset.guidance} if preset.gnet else {}))
    for name, preset in GENERATION_PRESETS.items()
}


def _training_preset(preset: Preset) -> EasyDict:
    options = preset.config.flat()
    names = ("duration", "batch", "channels", "lr", "decay", "dropout", "P_mean", "P_std")
    return EasyDict((name, options[name]) for name in names)


# name -> what tells the published training configurations apart
training_presets = {name: _training_preset(preset) for name, preset in TRAINING_PRESETS.items()}


def setup_training_config(preset: str = "edm2-img512-s", **opts: Any) -> EasyDict:
    """What `launch_training` takes: `config` (`EDM2Training`) and `dataset`.

    Args:
        opts: options of `train_edm2.py` by their names, such as data, cond, batch_gpu; None = not given.

    Raises:
        UserError: an option or the data does not fit.
    """
    config, dataset = make_config(EDM2Training, TRAINING_PRESETS, {"preset": preset, **opts})
    return EasyDict(config=config, dataset=dataset)


def launch_training(run_dir: str | os.PathLike, c: EasyDict) -> None:
    """Train, or continue, in a folder; raises what `training_loop` raises."""
    training_loop(c.config, c.dataset, Path(run_dir))


# ---------------------------------------------------------------------------------------------------------
# reconstruct_phema


def list_input_pickles(
    in_dir: str | os.PathLike, in_prefix: str | None = None, in_std: Sequence[float] | None = None
) -> list[StoredAverage]:
    """Snapshots of a run, pickles or native files, each with `path`, `nimg` and `std`; raises as `list_averages`."""
    return list_averages(Path(in_dir), in_prefix, in_std)


def pkl_path(dir: str | os.PathLike, prefix: str, nimg: int, std: float) -> str:
    """Path of a snapshot as the release names it."""
    return os.path.join(dir, f"{prefix}-{nimg // 1000:07d}-{std:.3f}.pkl")


def reconstruct_phema(
    in_pkls: Sequence[StoredAverage],
    out_std: Sequence[float],
    out_nimg: int | None = None,
    out_dir: str | os.PathLike | None = None,
    out_prefix: str = "phema",
    skip_existing: bool = False,
    max_batch_size: int = 8,
    verbose: bool = True,
) -> list[Path]:
    """Post-hoc EMA of `list_input_pickles`; raises as `reconstruction.reconstruct_phema`.

    Args:
        out_nimg: training time of the results, that of a snapshot; None = the latest.
        out_dir: folder of the results; None = that of the snapshots.
        verbose: not used; progress is shown on terminals.

    Returns:
        The files of the results, all written.
    """
    kimg = None if out_nimg is None else out_nimg // 1000
    folder = in_pkls[0].path.parent if out_dir is None else Path(out_dir)
    return write_averages(in_pkls, folder, out_prefix, out_std, kimg, skip_existing, max_batch_size)


# ---------------------------------------------------------------------------------------------------------
# calculate_metrics

# name -> the entry of statistics that a metric needs
metric_specs = {name: EasyDict(entry=metric.entry, kind=metric.kind) for name, metric in METRICS.items()}


def get_detector(metric: str, verbose: bool = True) -> Detector:
    """The feature detector of a metric, on a GPU if there is one; raises as `load_detectors`.

    Args:
        verbose: not used; downloads show their progress on terminals.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return load_detectors([metric], device)[METRICS[metric].entry]


def save_stats(stats: Any, path: str | os.PathLike, verbose: bool = True) -> None:
    """Write statistics; raises as `metrics.save_stats`.

    Args:
        verbose: print where.
    """
    if verbose:
        print(f"Saving feature statistics to {path} ...")
    write_stats(os.fspath(path), stats)


def parse_metric_list(s: str | Iterable[str]) -> list[str]:
    """Names of metrics from a list or its text; raises as `parse_metrics`."""
    return parse_metrics(s if isinstance(s, str) else ",".join(s))
