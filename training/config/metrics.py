"""What options choose from. Knows no tensors, so that a command's help needs no torch."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from dnnlib.errors import UserError

PRECISIONS = ("fp32", "bf16", "fp16")
# What is in the names of files that hold a part of a dataset: of CIFAR, MNIST and the Hugging Face hub.
SPLITS = {"train": "train|data_batch", "validation": "val", "test": "test|t10k"}
TOY_CLASSES = ("A", "B", "AB")
METRIC_FILES = {
    "fid": [
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
    ],
    "fd_dinov2": ["hf://facebook/dinov2-large/config.json", "hf://facebook/dinov2-large/model.safetensors"],
}
DETECTORS = ("inception", "dinov2", "pixels")
RESIZE_MODES = ("torch", "pil")
DEFAULT_METRICS = ("fid", "fd_dinov2")


@dataclass(frozen=True)
class Metric:
    """A metric.

    Args:
        entry: the statistics that it needs (see `metrics.files`), which say the detector.
        kind: 'frechet' needs means and covariances, all others the features of all images.
    """

    entry: str
    kind: str

    @property
    def array(self) -> str:
        return "mu" if self.kind == "frechet" else "features"

    @property
    def compares(self) -> bool:
        """Whether it takes a reference."""
        return self.kind != "inception score"


METRICS = {
    "fid": Metric("fid", "frechet"),
    "fd_dinov2": Metric("fd_dinov2", "frechet"),
    "fd_pixels": Metric("fd_pixels", "frechet"),
    "kid": Metric("fid", "kernel"),
    "kd_dinov2": Metric("fd_dinov2", "kernel"),
    "kd_pixels": Metric("fd_pixels", "kernel"),
    "is": Metric("fid", "inception score"),
    "prdc": Metric("fid", "neighbours"),
    "prdc_dinov2": Metric("fd_dinov2", "neighbours"),
    "prdc_pixels": Metric("fd_pixels", "neighbours"),
}


def parse_metrics(text: str) -> list[str]:
    """Names of metrics, such as 'fid,fd_dinov2'.

    Raises:
        UserError: there is no such metric, or none.
    """
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    check_metrics(names)
    return names


def check_metrics(names: Iterable[str]) -> None:
    """Check that metrics of these names exist.

    Raises:
        UserError: there is no such metric.
    """
    for name in names:
        if name not in METRICS:
            near = difflib.get_close_matches(name.lower(), METRICS, n=1, cutoff=0.3)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UserError(f"no such metric: {name!r}; {hint}There are {', '.join(METRICS)}")
