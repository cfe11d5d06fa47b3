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
    "fd_clip": [
        "hf://openai/clip-vit-large-patch14-336/config.json",
        "hf://openai/clip-vit-large-patch14-336/pytorch_model.bin",
    ],
}
DETECTORS = ("inception", "dinov2", "clip", "pixels")
RESIZABLE = ("dinov2", "clip")  # the detectors that know both resize modes
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
        return self.kind not in ("inception score", "vendi")

    @property
    def needs_classes(self) -> bool:
        """Whether the reference must say of which class its images are."""
        return self.kind == "balance"

    @property
    def needs_held_out(self) -> bool:
        """Whether it also takes images that training has not seen."""
        return self.kind == "copying"


SUFFIXES = {"fid": "", "fd_dinov2": "_dinov2", "fd_clip": "_clip", "fd_pixels": "_pixels"}  # of metrics, by their entry
_OF_ALL_FEATURES = {
    "prdc": "neighbours",
    "vendi": "vendi",
    "memorisation": "memorisation",
    "ct": "copying",
    "balance": "balance",
}

METRICS = {
    **{name: Metric(name, "frechet") for name in SUFFIXES},
    "kid": Metric("fid", "kernel"),
    "kd_dinov2": Metric("fd_dinov2", "kernel"),
    "kd_pixels": Metric("fd_pixels", "kernel"),
    "cmmd": Metric("fd_clip", "gaussian kernel"),
    "is": Metric("fid", "inception score"),
    **{
        f"{name}{suffix}": Metric(entry, kind)
        for name, kind in _OF_ALL_FEATURES.items()
        for entry, suffix in SUFFIXES.items()
    },
}


def parse_weights(values: Iterable[str]) -> dict[str, str]:
    """Files of weights by detector, from NAME=PATH.

    Raises:
        UserError: an unknown detector, or no path.
    """
    weights = {}
    for value in values:
        name, _, path = value.partition("=")
        if name not in DETECTORS or not path:
            raise UserError(f"--detector-weights: {value!r} is not NAME=PATH with a NAME of {', '.join(DETECTORS)}")
        weights[name] = path
    return weights


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
