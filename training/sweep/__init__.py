"""Sweeps: metrics of the networks of a run over EMA widths, guidance and whatever else generation can vary.

Which EMA length is best depends on guidance, sampler and metric, and is found after the training (EDM2, Section 3;
arXiv 2312.02696). Every setting uses the same seeds, so that differences are those of the settings.
"""

from training.sweep.measuring import Room, Sweep, read_options
from training.sweep.report import TOLERANCE, is_better_larger, run
from training.sweep.searches import by_coordinates, by_golden_section, grid
from training.sweep.settings import Axis

__all__ = [
    "TOLERANCE",
    "Axis",
    "Room",
    "Sweep",
    "by_coordinates",
    "by_golden_section",
    "grid",
    "is_better_larger",
    "read_options",
    "run",
]
