"""Metrics of images, by the features that a detector finds in them: FID and its relatives."""

from training.metrics.distances import frechet_distance
from training.metrics.files import load_stats, save_stats
from training.metrics.statistics import calculate_stats_for_files, calculate_stats_for_iterable
from training.metrics.values import calculate_metrics_from_stats

__all__ = [
    "calculate_metrics_from_stats",
    "calculate_stats_for_files",
    "calculate_stats_for_iterable",
    "frechet_distance",
    "load_stats",
    "save_stats",
]
