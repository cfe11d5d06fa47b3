"""Metrics of images against a reference, with a record of what produced each figure."""

import datetime
import json
import os
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dnnlib.download import is_url, open_url
from dnnlib.errors import UserError
from dnnlib.files import append_line, file_sha256
from dnnlib.util import EasyDict, code_version
from torch_utils import distributed
from training.config.metrics import METRICS
from training.dataset.decoding import Transform
from training.metrics.detectors import load_detectors
from training.metrics.files import load_stats
from training.metrics.images import FileBatches, content_hash, open_images
from training.metrics.statistics import calculate_stats_for_iterable, last_stats
from training.metrics.values import (
    check_numbers,
    check_reference,
    metric_values,
    mismatches,
    refuse,
    small_sample_note,
)


class Evaluation:
    """Metrics of sets of images against one reference.

    Args:
        metrics: names of METRICS.
        ref: statistics, as a file or URL (see `load_stats`), or images: a folder, a ZIP file, or an .npz file of images
            as ADM publishes them.
        device: where the detectors compute.
        weights, resize: of the detectors, see `load_detectors`.
        groups: number of groups of images for error bars (see `frechet_error`); 1 = no error bars.
        force: compare even if another detector or resolution makes the figures incomparable.
        fit: of the images of the reference, see `open_images`.
        workers: processes that load these.

    Raises:
        UserError: the reference lacks what a metric needs, or a file is missing or damaged.
        RunError: a download failed.
    """

    def __init__(
        self,
        metrics: Sequence[str],
        ref: str,
        device: torch.device,
        weights: Mapping[str, str | Path] | None = None,
        resize: str = "torch",
        groups: int = 1,
        force: bool = False,
        fit: Transform | None = None,
        workers: int = 2,
    ):
        self.metrics, self.ref, self.groups, self.force = metrics, ref, groups, force
        with distributed.fail_together():
            is_dataset = os.path.isdir(ref) or (ref.lower().endswith(".zip") and not is_url(ref))
            path = Path(ref) if is_dataset else Path(open_url(ref, return_filename=True))
            arrays = _arrays_of_npz(path)
            holds_images = is_dataset or "arr_0.npy" in arrays
            # Like ADM's own tool, prefer statistics in such a file to its images: they may be of more images.
            self.stats = EasyDict() if holds_images and "mu.npy" not in arrays else load_stats(ref)
            images = open_images(path, fit=fit) if is_dataset else None
            self.ref_identity: dict[str, Any] = (
                {"ref_sha256": file_sha256(path)}
                if images is None
                else {"ref_hash": content_hash(images), "ref_found": images.summary()}
            )
            lacking = [metric for metric in metrics if not self._is_stored(metric, holds_images)]
            self.detectors = load_detectors(metrics, device, weights, resize)
        self.stored = {metric for metric in metrics if metric not in lacking and METRICS[metric].compares}
        if lacking:
            self._measure_reference(FileBatches(images or open_images(path), num_workers=workers), lacking)

    def _is_stored(self, metric: str, holds_images: bool) -> bool:
        """Whether the file of the reference holds what a metric needs; if not, it must hold images."""
        try:
            check_reference(metric, self.stats)
        except UserError:
            if not holds_images:
                raise
            return False
        return True

    def _measure_reference(self, images: FileBatches, lacking: Sequence[str]) -> None:
        """Add what metrics need and the file does not store, from its images."""
        detectors = {METRICS[metric].entry: self.detectors[METRICS[metric].entry] for metric in lacking}
        computed = last_stats(calculate_stats_for_iterable(images, lacking, detectors=detectors))
        if self.stored:
            del computed["num_images"]  # stored statistics may be of more images than the file holds
        for entry in detectors:
            computed[entry] = EasyDict({**computed[entry], **self.stats.get(entry, {})})
        self.stats.update(computed)

    def check(self, num_images: int, resolution: int) -> None:
        """Refuse images that cannot be compared, before they are generated or read.

        Raises:
            UserError: so many images of that resolution cannot be compared with the reference.
        """
        with distributed.fail_together():
            if distributed.get_rank() == 0:  # the others have no features
                for metric in self.metrics:
                    detector = self.detectors[METRICS[metric].entry]
                    check_reference(metric, self.stats, detector.feature_dim)
                    check_numbers(metric, num_images, self.stats, self.groups)
                    if not self.force:
                        refuse(mismatches(metric, detector.describe(), resolution, self.stats))

    def __call__(self, images: Iterable[Any], provenance: Mapping[str, Any], verbose: bool = True) -> list[dict]:
        """Records of the results, one per metric, on the first process; none on the others.

        Args:
            images: batches, as for `calculate_stats_for_iterable`.
            provenance: what produced the images, for the records.
            verbose: show a progress bar on terminals.

        Raises:
            UserError: images and reference are not comparable, or there are too few images.
        """
        kwargs: dict[str, Any] = dict(detectors=self.detectors, groups=self.groups, verbose=verbose)
        stats = last_stats(calculate_stats_for_iterable(images, self.metrics, **kwargs))
        records = []
        with distributed.fail_together():
            if distributed.get_rank() == 0:
                records = [self._record(metric, stats, provenance) for metric in self.metrics]
        return records

    def _record(self, metric: str, stats: Mapping[str, Any], provenance: Mapping[str, Any]) -> dict[str, Any]:
        results = metric_values(stats, self.stats, [metric], self.force)
        entry = METRICS[metric].entry
        record = {"metric": metric, "results": results, "num_images": stats["num_images"]}
        note = small_sample_note(metric, stats, self.stats)
        if note:
            record["note"] = note
        record |= {**provenance, "resolution": stats["resolution"], **stats[entry]["detector"]}
        if METRICS[metric].compares:
            record |= {
                "ref": self.ref,
                **self.ref_identity,
                "ref_statistics": "stored" if metric in self.stored else "computed from its images",
                "ref_detector": self.stats[entry].get("detector"),
            }
            different = mismatches(metric, stats[entry]["detector"], stats["resolution"], self.stats)
            if different:
                record["forced"] = different
        record["date"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        record["code_version"] = code_version()
        return record


def _arrays_of_npz(path: Path) -> set[str]:
    """Names of the files in an .npz archive; empty for any other file, or a damaged archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            return set(archive.namelist())
    except Exception:  # zipfile raises all kinds of errors for damaged archives
        return set()


def save_records(outdir: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Append each record to metric-{name}.jsonl in a folder, which is created.

    Raises:
        OSError: a file could not be written.
    """
    for record in records:
        outdir.mkdir(parents=True, exist_ok=True)
        append_line(outdir / f"metric-{record['metric']}.jsonl", json.dumps(record, allow_nan=False))


def format_results(runs: Sequence[Sequence[Mapping[str, Any]]]) -> str:
    """A table of the values of one or several runs, one value per line; of several runs with mean and minimum.

    The minimum of three runs is what the papers publish (Karras et al. 2024).

    Args:
        runs: the records of each run.
    """
    names = [name for record in runs[0] for name in record["results"]]
    values = {
        name: [record["results"][name] for run in runs for record in run if name in record["results"]] for name in names
    }
    lines = []
    for name, row in values.items():
        text = "".join(f"{value:14.6g}" for value in row)
        summary = f"   mean {sum(row) / len(row):.6g}, minimum {min(row):.6g}" if len(row) > 1 else ""
        lines.append(f"{name:20s}{text}{summary}")
    lines += [f"Note: {record['note']}" for record in runs[0] if "note" in record]
    return "\n".join(lines)
