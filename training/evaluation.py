"""Metrics of images against a reference, with a record of what produced each figure."""

import copy
import datetime
import json
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dnnlib.util import EasyDict, append_line, code_version, file_sha256, open_url
from torch_utils import distributed
from training.detectors import Detector
from training.encoders import Encoder
from training.generation import generate_images
from training.metrics import (
    METRICS,
    calculate_metrics_from_stats,
    calculate_stats_for_files,
    calculate_stats_for_iterable,
    check_reference,
    load_detectors,
    load_stats,
    small_sample_note,
)
from training.networks_edm2 import Precond

SNAPSHOT_BATCH, SNAPSHOT_STEPS = 64, 32


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
        with distributed.fail_together():
            path = Path(open_url(ref, return_filename=True))
            self.ref_sha256 = file_sha256(path)
            needs_images = _holds_images(path) and set(metrics) != {"fid"}
            self.stats = EasyDict() if needs_images else load_stats(path)
            for metric in metrics if not needs_images else ():
                check_reference(metric, None, self.stats)
            self.detectors: dict[str, Detector] = load_detectors(metrics, device, weights, resize)
        if needs_images:
            self.stats = last_stats(calculate_stats_for_files(path, metrics=metrics, detectors=self.detectors))

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
                for metric in self.metrics:
                    results = calculate_metrics_from_stats(stats, self.stats, [metric], force=self.force)
                    note = small_sample_note(metric, stats)
                    records.append(
                        {
                            "metric": metric,
                            "results": results,
                            "num_images": stats.num_images,
                            **({"note": note} if note else {}),
                            **provenance,
                            "ref": self.ref,
                            "ref_sha256": self.ref_sha256,
                            **stats[METRICS[metric].entry].detector,
                            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
                            "code_version": code_version(),
                        }
                    )
        return records


def last_stats(batches: Iterable[Any]) -> EasyDict:
    """Go through all batches; the statistics that the last one brings."""
    stats = None
    for r in batches:
        stats = r.stats
    assert stats is not None
    return stats


def _holds_images(path: Path) -> bool:
    return path.suffix == ".npz" and zipfile.is_zipfile(path) and "arr_0.npy" in zipfile.ZipFile(path).namelist()


def save_records(outdir: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Add each record to metric-{name}.jsonl.

    Raises:
        OSError: it could not be written.
    """
    for record in records:
        outdir.mkdir(parents=True, exist_ok=True)
        append_line(outdir / f"metric-{record['metric']}.jsonl", json.dumps(record))


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


class SnapshotEvaluation:
    """Metrics of the snapshots of a training run: of the same seeds each time.

    Args:
        num_images: how many to generate.

    Raises:
        UserError: as `Evaluation`, or the encoder cannot make pixels.
    """

    def __init__(self, metrics: Sequence[str], ref: str, num_images: int, encoder: Encoder, device: torch.device):
        self.evaluation = Evaluation(metrics, ref, device)
        self.num_images, self.encoder, self.device = num_images, encoder, device
        with distributed.fail_together():
            encoder.prepare(device)

    def __call__(self, net: Precond, path: Path, nimg: int) -> dict[str, float]:
        """Results of a network that was saved at `path`, recorded beside it; on the first process only."""
        saved = copy.deepcopy(net)
        for parameter in saved.parameters():
            parameter.copy_(parameter.half())  # as in the file, so that the file gives the same results
        images = generate_images(
            saved,
            encoder=self.encoder,
            seeds=range(self.num_images),
            max_batch_size=SNAPSHOT_BATCH,
            device=self.device,
            num_steps=SNAPSHOT_STEPS,
            verbose=False,
        )
        provenance = {
            "nimg": nimg,
            "net": path.name,
            "net_sha256": file_sha256(path) if distributed.get_rank() == 0 else "",
            "seeds": f"0-{self.num_images - 1}",
            "labels": "drawn from the seed" if net.label_dim > 0 else "none",
            "sampler": {"solver": "heun", "num_steps": SNAPSHOT_STEPS},
            "precision": net.precision,
        }
        records = self.evaluation(images, provenance)
        save_records(path.parent, records)
        return {name: value for record in records for name, value in record["results"].items()}
