"""What images are compared with: statistics in a file, images, or both."""

import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dnnlib.download import is_url, open_url
from dnnlib.errors import UserError
from dnnlib.files import file_sha256
from dnnlib.util import EasyDict
from training.config.metrics import METRICS
from training.dataset.decoding import Transform
from training.metrics.base import Detector
from training.metrics.files import load_stats
from training.metrics.images import FileBatches, content_hash, open_images
from training.metrics.statistics import calculate_stats_for_iterable, last_stats
from training.metrics.values import check_reference


class Reference:
    """The statistics that metrics compare images with, from a file as far as it has them, else from its images.

    Args:
        source: statistics, as a file or URL (see `load_stats`), or images: a folder, a ZIP file, or an .npz file of
            images as ADM publishes them.
        metrics: names of METRICS.
        what: the reference is, for messages.
        fit: of its images, see `open_images`.

    `stats` are complete once `measure` has been called. `identity` says what the reference is, as plain JSON values.

    Raises:
        UserError: the reference lacks what a metric needs, or a file is missing or damaged.
        RunError: a download failed.
    """

    def __init__(self, source: str, metrics: Sequence[str], what: str, fit: Transform | None = None):
        self.source, self.what, self.fit = source, what, fit
        self.is_dataset = os.path.isdir(source) or (source.lower().endswith(".zip") and not is_url(source))
        self.path = Path(source) if self.is_dataset else Path(open_url(source, return_filename=True))
        arrays = _arrays_of_npz(self.path)
        holds_images = self.is_dataset or "arr_0.npy" in arrays
        # Like ADM's own tool, prefer statistics in such a file to its images: they may be of more images.
        self.stats = EasyDict() if holds_images and "mu.npy" not in arrays else load_stats(source)
        self.lacking = [metric for metric in metrics if not self._is_stored(metric, holds_images)]
        self.stored = {metric for metric in metrics if metric not in self.lacking and METRICS[metric].compares}
        with_classes = any(METRICS[metric].needs_classes for metric in self.lacking)
        opened = self.is_dataset or bool(self.lacking)
        self.images = open_images(self.path, fit=fit, classes=with_classes) if opened else None
        self.identity: dict[str, Any] = {"ref_sha256": file_sha256(self.path)} if not self.is_dataset else {}
        if self.is_dataset and self.images is not None:
            self.identity = {"ref_hash": content_hash(self.images), "ref_found": self.images.summary()}

    def _is_stored(self, metric: str, holds_images: bool) -> bool:
        """Whether the file holds what a metric needs; if not, it must hold images."""
        try:
            check_reference(metric, self.stats, what=self.what)
        except UserError:
            if not holds_images:
                raise
            return False
        return True

    def measure(self, detectors: Mapping[str, Detector], workers: int = 2) -> None:
        """Add what metrics need and the file does not store, from its images.

        Args:
            detectors: by entry of the statistics.
            workers: processes that load the images.
        """
        if not self.lacking:
            return
        assert self.images is not None
        chosen = {METRICS[metric].entry: detectors[METRICS[metric].entry] for metric in self.lacking}
        batches = FileBatches(self.images, num_workers=workers)
        computed = last_stats(calculate_stats_for_iterable(batches, self.lacking, detectors=chosen))
        if self.stored:
            del computed["num_images"]  # stored statistics may be of more images than the file holds
        for entry in chosen:
            computed[entry] = EasyDict({**computed[entry], **self.stats.get(entry, {})})
        self.stats.update(computed)

    def describe(self, metric: str) -> dict[str, Any]:
        """What a record of a metric says of it."""
        return {
            "ref": self.source,
            **self.identity,
            "ref_statistics": "stored" if metric in self.stored else "computed from its images",
            "ref_detector": self.stats[METRICS[metric].entry].get("detector"),
        }


def _arrays_of_npz(path: Path) -> set[str]:
    """Names of the files in an .npz archive; empty for any other file, or a damaged archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            return set(archive.namelist())
    except Exception:  # zipfile raises all kinds of errors for damaged archives
        return set()
