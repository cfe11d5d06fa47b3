"""What tests of metrics share: images, statistics, and the command."""

import hashlib
import json
import re
from pathlib import Path

import torch
from click.testing import Result
from conftest import run_cli

from calculate_metrics import main as calculate_metrics
from dnnlib.util import EasyDict
from training.metrics.statistics import calculate_stats_for_iterable, last_stats

PIXELS = ["fd_pixels", "kd_pixels", "prdc_pixels"]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def uint8_images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def random_batches(count: int = 3, size: int = 50, seed: int = 0) -> list[torch.Tensor]:
    return list(uint8_images(count * size, 3, 8, 8, seed=seed).split(size))


def stats_of(images, metrics=("fd_pixels",), **kwargs) -> EasyDict:
    return last_stats(calculate_stats_for_iterable(images, metrics, **kwargs))


def tool(*args, ok: bool = True) -> Result:
    """Run calculate_metrics.py in this process; records are printed, too."""
    result = run_cli(calculate_metrics, *args, *(["--json"] if args[0] != "ref" else []))
    assert not ok or result.exit_code == 0, result.output
    return result


def values_of(output: str) -> dict[str, float]:
    """The table: name and value of the first run."""
    lines = [line.split() for line in output.splitlines() if re.match(r"[a-z_0-9]+ +[-0-9]", line)]
    return {name: float(value) for name, value, *_ in lines}


def records_of(output: str) -> list[dict]:
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def records_in(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
