"""Metrics of images against a reference, with a record of what produced each figure."""

import datetime
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dnnlib.errors import UserError
from dnnlib.files import append_line
from dnnlib.util import code_version
from torch_utils import distributed
from training.config.metrics import METRICS
from training.dataset.decoding import Transform
from training.metrics.detectors import load_detectors
from training.metrics.reference import Reference
from training.metrics.statistics import calculate_stats_for_iterable, last_stats
from training.metrics.values import (
    HELD_OUT,
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
        ref: statistics, as a file or URL, or images (see `Reference`).
        device: where the detectors compute.
        weights, resize: of the detectors, see `load_detectors`.
        groups: number of groups of images for error bars (see `frechet_error`); 1 = no error bars.
        force: compare even if another detector or resolution makes the figures incomparable.
        fit: of the images of the reference, see `open_images`.
        workers: processes that load these.
        held_out: images that training has not seen, as `ref`; None = there are none.

    Raises:
        UserError: a reference lacks what a metric needs, there is none where one needs it, or a file is missing or
            damaged.
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
        held_out: str | None = None,
    ):
        self.metrics, self.groups, self.force = metrics, groups, force
        with distributed.fail_together():
            unseen = _that_need_held_out(metrics, held_out)
            self.reference = Reference(ref, metrics, "the reference", fit)
            self.held_out = None if held_out is None else Reference(held_out, unseen, HELD_OUT, fit)
            self.detectors = load_detectors(metrics, device, weights, resize)
        for reference in filter(None, (self.reference, self.held_out)):
            reference.measure(self.detectors, workers)

    def check(self, num_images: int, resolution: int) -> None:
        """Refuse images that cannot be compared, before they are generated or read.

        Raises:
            UserError: so many images of that resolution cannot be compared with the reference.
        """
        with distributed.fail_together():
            if distributed.get_rank() == 0:  # the others have no features
                for metric in self.metrics:
                    detector = self.detectors[METRICS[metric].entry]
                    for reference in self._references(metric):
                        check_reference(metric, reference.stats, detector.feature_dim, reference.what)
                    check_numbers(metric, num_images, self.reference.stats, self.groups)
                    for reference in self._references(metric):
                        found = mismatches(metric, detector.describe(), resolution, reference.stats, reference.what)
                        refuse([] if self.force else found)

    def _references(self, metric: str) -> list[Reference]:
        """All that a metric compares images with."""
        held_out = [self.held_out] if self.held_out is not None and METRICS[metric].needs_held_out else []
        return [self.reference, *held_out]

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
        held_out = None if self.held_out is None else self.held_out.stats
        results = metric_values(stats, self.reference.stats, [metric], self.force, held_out)
        entry = METRICS[metric].entry
        record = {"metric": metric, "results": results, "num_images": stats["num_images"]}
        note = small_sample_note(metric, stats, self.reference.stats)
        if note:
            record["note"] = note
        record |= {**provenance, "resolution": stats["resolution"], **stats[entry]["detector"]}
        different = []
        for reference in self._references(metric) if METRICS[metric].compares else []:
            facts = reference.describe(metric)
            if reference is self.held_out:
                facts = {key.replace("ref", "held_out", 1): value for key, value in facts.items()}
            record |= facts
            different += mismatches(
                metric, stats[entry]["detector"], stats["resolution"], reference.stats, reference.what
            )
        if different:
            record["forced"] = different
        record["date"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        record["code_version"] = code_version()
        return record


def _that_need_held_out(metrics: Sequence[str], held_out: str | None) -> list[str]:
    """The metrics that compare images with held-out ones, too.

    Raises:
        UserError: there are some without such images, or such images without them.
    """
    unseen = [metric for metric in metrics if METRICS[metric].needs_held_out]
    if unseen and held_out is None:
        raise UserError(f"{unseen[0]} needs images that training has not seen: calculate_metrics.py --held-out")
    if held_out is not None and not unseen:
        raise UserError("--held-out: no metric of --metrics uses it: leave it out")
    return unseen


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
