"""Metrics of images against a reference, with a record of what produced each figure."""

import datetime
import json
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dnnlib.download import open_url
from dnnlib.errors import UserError
from dnnlib.files import append_line, file_sha256
from dnnlib.util import EasyDict, code_version
from torch_utils import distributed
from training.metrics.detectors import Detector
from training.metrics.statistics import (
    METRICS,
    calculate_stats_for_files,
    calculate_stats_for_iterable,
    check_numbers,
    check_reference,
    load_detectors,
    load_stats,
    metric_values,
    mismatches,
    refuse,
    small_sample_note,
)


class Evaluation:
    """Metrics of sets of images against one reference.

    Args:
        metrics: names of METRICS.
        ref: statistics, as a file or URL (see `load_stats`), or an .npz file of images as ADM publishes them.
        device: where the detectors compute.
        weights, resize: of the detectors, see `load_detectors`.
        groups: of images, for error bars (see `frechet_error`); 1 = none.
        force: compare even with references that were made otherwise.

    Raises:
        UserError: the reference lacks what a metric needs, or something cannot be loaded.
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
    ):
        self.metrics, self.ref, self.groups, self.force = metrics, ref, groups, force
        lacking: list[str] = []
        with distributed.fail_together():
            path = Path(open_url(ref, return_filename=True))
            self.ref_sha256 = file_sha256(path)
            arrays = _arrays_of_npz(path)
            holds_images = "arr_0.npy" in arrays
            # ADM's own tool, too, prefers the statistics in such a file: they may be of more images than it holds.
            self.stats = EasyDict() if holds_images and "mu.npy" not in arrays else load_stats(path)
            for metric in metrics:
                try:
                    check_reference(metric, self.stats)
                except UserError:
                    if not holds_images:
                        raise
                    lacking.append(metric)
            self.detectors: dict[str, Detector] = load_detectors(metrics, device, weights, resize)
        self.stored = {metric for metric in metrics if metric not in lacking and METRICS[metric].compares}
        if lacking:
            detectors = {METRICS[metric].entry: self.detectors[METRICS[metric].entry] for metric in lacking}
            computed = last_stats(calculate_stats_for_files(path, metrics=lacking, detectors=detectors))
            if self.stored:
                del computed["num_images"]  # stored statistics may be of more images than the file holds
            for entry in detectors:
                computed[entry] = EasyDict({**computed[entry], **self.stats.get(entry, {})})
            self.stats.update(computed)

    def check(self, num_images: int, resolution: int) -> None:
        """To be called before the images are there, to know early.

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
        """Records, one per metric, of what `calculate_stats_for_iterable` takes; on the first process only.

        Raises:
            UserError: images and reference do not go together.
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
                "ref_sha256": self.ref_sha256,
                "ref_statistics": "stored" if metric in self.stored else "computed from its images",
                "ref_detector": self.stats[entry].get("detector"),
            }
            different = mismatches(metric, stats[entry]["detector"], stats["resolution"], self.stats)
            if different:
                record["forced"] = different
        record["date"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        record["code_version"] = code_version()
        return record


def last_stats(batches: Iterable[Any]) -> EasyDict:
    """Go through all batches; the statistics that the last one brings."""
    stats = None
    for r in batches:
        stats = r.stats
    assert stats is not None
    return stats


def _arrays_of_npz(path: Path) -> set[str]:
    """Names in an .npz file; none of another file, or of a damaged one."""
    try:
        with zipfile.ZipFile(path) as archive:
            return set(archive.namelist())
    except Exception:  # zipfile has many ways to say that a file is no archive, or a damaged one
        return set()


def save_records(outdir: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Add each record to metric-{name}.jsonl.

    Raises:
        OSError: it could not be written.
    """
    for record in records:
        outdir.mkdir(parents=True, exist_ok=True)
        append_line(outdir / f"metric-{record['metric']}.jsonl", json.dumps(record, allow_nan=False))


def format_results(runs: Sequence[Sequence[Mapping[str, Any]]]) -> str:
    """Values of one or several runs, a line per value; of several runs also the mean and the minimum.

    The minimum of three runs is what the papers publish (Karras et al. 2024).
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
