"""Values of metrics, from the statistics of images and of a reference."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dnnlib.errors import UserError
from training.config.metrics import DEFAULT_METRICS, METRICS, SUFFIXES, check_metrics
from training.metrics.distances import (
    K_DENSITY,
    K_PRECISION,
    SPLITS,
    SUBSET_SIZE,
    frechet_distance,
    frechet_error,
    gaussian_mmd,
    inception_score,
    kernel_distance,
    neighbour_scores,
)
from training.metrics.diversity import class_balance, vendi_score
from training.metrics.memorisation import CELLS, FEWEST_IN_CELL, NEIGHBOURS, copying_score, memorisation

HELD_OUT = "the set of held-out images"  # in messages


def calculate_metrics_from_stats(
    stats: Mapping[str, Any],
    ref: Mapping[str, Any],
    metrics: Sequence[str] = DEFAULT_METRICS,
    verbose: bool = False,
    force: bool = False,
    held_out: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Metrics of images against a reference.

    A Frechet distance of too few images causes a warning. Under torchrun, only the first process has all features.

    Args:
        stats: statistics of the images, of `calculate_stats_for_iterable` or `load_stats`.
        ref: statistics of the reference.
        metrics: names of METRICS.
        verbose: print each value.
        force: compare even if another detector or resolution makes the figures incomparable.
        held_out: statistics of real images that training has not seen, for 'ct'.

    Returns:
        Values by name: each metric under its own, its error as `{metric}_std` where there is one; 'prdc' gives
        'precision', 'recall', 'density' and 'coverage', 'memorisation' 'memorised' and 'calibrated', 'balance'
        'imbalance' and 'rarest', 'cmmd' also 'cmmd_biased'.

    Raises:
        UserError: an unknown metric, statistics that lack what a metric needs, or that are not comparable.
    """
    results = metric_values(stats, ref, metrics, force, held_out)
    if verbose:
        for name, value in results.items():
            print(f"{name + ':':24s}{value:g}")
    for note in filter(None, (small_sample_note(metric, stats, ref) for metric in metrics)):
        warnings.warn(note, stacklevel=2)
    return results


def metric_values(
    stats: Mapping[str, Any],
    ref: Mapping[str, Any],
    metrics: Sequence[str],
    force: bool = False,
    held_out: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Metrics as `calculate_metrics_from_stats` returns them, without its warnings.

    Raises:
        UserError: as `calculate_metrics_from_stats`.
    """
    check_metrics(metrics)
    for metric in metrics:
        check_reference(metric, ref)
        if METRICS[metric].needs_held_out:
            check_reference(metric, {} if held_out is None else held_out, what=HELD_OUT)
        entry = stats.get(METRICS[metric].entry, {})
        needed = "logits" if METRICS[metric].kind == "inception score" else METRICS[metric].array
        if needed not in entry:
            raise UserError(
                f"the statistics have no {needed} for {metric}: calculate them from the images, with {metric}"
            )
        if not force:
            refuse(mismatches(metric, entry.get("detector"), stats.get("resolution"), ref))
            if held_out is not None and METRICS[metric].needs_held_out:
                refuse(mismatches(metric, entry.get("detector"), stats.get("resolution"), held_out, HELD_OUT))
    results: dict[str, float] = {}
    for metric in metrics:
        given = Given(metric, stats[METRICS[metric].entry], ref, held_out)
        results.update(KINDS[METRICS[metric].kind].calculate(given))
    return results


def small_sample_note(metric: str, stats: Mapping[str, Any] | None = None, ref: Mapping[str, Any] | None = None) -> str:
    """A caution about a Frechet distance of no more images than features; '' if there are more, or it is not known.

    Args:
        stats, ref: statistics of the images and of the reference; None = none.
    """
    if METRICS[metric].kind != "frechet":
        return ""
    D, few = 0, []
    for given, what in [(stats, "of"), (ref, "against a reference of")]:
        if given is not None and given.get("num_images") is not None:
            D = len(given[METRICS[metric].entry]["mu"])
            if given["num_images"] <= D:
                few.append(f" {what} {given['num_images']} images")
    return f"{metric}{''.join(few)} in {D} dimensions mostly reflects the small sample: use far more" if few else ""


# ---------------------------------------------------------------------------------------------------------
# Whether metrics can be calculated


def check_reference(
    metric: str, ref: Mapping[str, Any], feature_dim: int | None = None, what: str = "the reference"
) -> None:
    """Refuse a reference that a metric cannot use.

    Args:
        feature_dim: number of features of the images; None = not known yet.
        what: the reference is, for messages.

    Raises:
        UserError: the reference lacks what the metric needs, or has another number of features.
    """
    if not METRICS[metric].compares:
        return
    entry, array = METRICS[metric].entry, METRICS[metric].array
    lacking = "" if array in ref.get(entry, {}) else "statistics" if array == "mu" else "features"
    if not lacking and METRICS[metric].needs_classes and "classes" not in ref:
        lacking = "classes"
    if lacking:
        raise UserError(
            f"{what} has no {lacking} for {metric}: make one that has (calculate_metrics.py ref --metrics={metric})"
        )
    dim = ref[entry][array].shape[-1]
    if feature_dim is not None and dim != feature_dim:
        raise UserError(
            f"{what} for {metric} has {dim} features, the images have {feature_dim}: make one with this detector"
        )


def check_numbers(metric: str, num_images: int, ref: Mapping[str, Any], groups: int = 1) -> None:
    """Refuse numbers of images that a metric cannot be calculated from.

    Args:
        num_images: how many are compared with the reference `ref`.
        groups: of images, for an error bar; 1 = no error bar.

    Raises:
        UserError: too few images, or too few in the reference.
    """
    kind = KINDS[METRICS[metric].kind]
    fewest = max(kind.fewest, 2 * groups if METRICS[metric].array == "mu" and groups > 1 else 0)
    if num_images < fewest:
        what = metric if fewest == kind.fewest else f"an error bar of {metric}"
        raise UserError(f"{what} needs {fewest} or more images, not {num_images}")
    if kind.fewest_ref > 0 and len(ref[METRICS[metric].entry]["features"]) < kind.fewest_ref:
        there = len(ref[METRICS[metric].entry]["features"])
        raise UserError(f"{metric} needs a reference of {kind.fewest_ref} or more images, not {there}")


def mismatches(
    metric: str,
    detector: Mapping[str, Any] | None,
    resolution: int | None,
    ref: Mapping[str, Any],
    what: str = "the reference",
) -> list[str]:
    """Differences between images and reference that make their figures incomparable, one message each.

    Args:
        detector: description of the detector of the images (`Detector.describe`); None = not known.
        resolution: of the images; None = not known.
        what: the reference is, for messages.
    """
    if not METRICS[metric].compares:
        return []
    found = []
    theirs = ref[METRICS[metric].entry].get("detector")
    if detector and theirs:
        found = [
            f"{what} for {metric} was made with {key} {theirs.get(key)!r}, the images are measured with {ours!r}"
            for key, ours in detector.items()
            if ours != theirs.get(key)
        ]
    size = ref.get("resolution")
    if None not in (resolution, size) and resolution != size:
        found.append(f"the images are {resolution}x{resolution}, those of {what} {size}x{size}")
    return found


def refuse(found: Sequence[str]) -> None:
    """Refuse a comparison in spite of mismatches.

    Raises:
        UserError: there are any.
    """
    if found:
        raise UserError(f"{found[0]}: not comparable (calculate_metrics.py --force compares them anyway)")


# ---------------------------------------------------------------------------------------------------------
# Kinds of metrics


@dataclass(frozen=True)
class Given:
    """What a metric is calculated from.

    Args:
        metric: its name.
        stats: the entry of the images that it needs.
        ref: statistics of the reference, with all entries.
        held_out: the same of images that training has not seen; None = there are none.
    """

    metric: str
    stats: Mapping[str, Any]
    ref: Mapping[str, Any]
    held_out: Mapping[str, Any] | None

    @property
    def entry(self) -> str:
        return METRICS[self.metric].entry

    def features(self) -> tuple[Any, Any]:
        """Those of the images, and of the reference."""
        return self.stats["features"], self.ref[self.entry]["features"]

    def named(self, scores: Mapping[str, float]) -> dict[str, float]:
        """Scores, with the suffix that says of which features they are."""
        return {f"{name}{SUFFIXES[self.entry]}": value for name, value in scores.items()}


def _frechet(given: Given) -> dict[str, float]:
    stats, theirs = given.stats, given.ref[given.entry]
    values = {given.metric: frechet_distance(stats["mu"], stats["sigma"], theirs["mu"], theirs["sigma"])}
    groups = stats.get("groups", [])
    if len(groups) > 1:
        values[f"{given.metric}_std"] = frechet_error(groups, theirs["mu"], theirs["sigma"])
    return values


def _kernel(given: Given) -> dict[str, float]:
    value, error = kernel_distance(*given.features())
    return {given.metric: value, f"{given.metric}_std": error}


def _gaussian_kernel(given: Given) -> dict[str, float]:
    unbiased, biased = gaussian_mmd(*given.features())
    return {given.metric: unbiased, f"{given.metric}_biased": biased}


def _inception_score(given: Given) -> dict[str, float]:
    value, deviation = inception_score(given.stats["logits"])
    return {given.metric: value, f"{given.metric}_std": deviation}


def _neighbours(given: Given) -> dict[str, float]:
    ours, theirs = given.features()
    return given.named(neighbour_scores(theirs, ours))


def _vendi(given: Given) -> dict[str, float]:
    return {given.metric: vendi_score(given.stats["features"])}


def _memorisation(given: Given) -> dict[str, float]:
    ours, theirs = given.features()
    return given.named(memorisation(theirs, ours))


def _copying(given: Given) -> dict[str, float]:
    ours, theirs = given.features()
    assert given.held_out is not None
    return {given.metric: copying_score(theirs, given.held_out[given.entry]["features"], ours)}


def _balance(given: Given) -> dict[str, float]:
    ours, theirs = given.features()
    return given.named(class_balance(theirs, given.ref["classes"], ours))


@dataclass(frozen=True)
class Kind:
    """How metrics of a kind are calculated.

    Args:
        calculate: what it is calculated from -> values by name.
        fewest, fewest_ref: the smallest numbers of images, and of images of the reference, that it works with.
    """

    calculate: Callable[[Given], dict[str, float]]
    fewest: int
    fewest_ref: int = 0


KINDS = {
    "frechet": Kind(_frechet, 2),
    "kernel": Kind(_kernel, SUBSET_SIZE + 1, SUBSET_SIZE + 1),
    "gaussian kernel": Kind(_gaussian_kernel, 2, 2),
    "inception score": Kind(_inception_score, SPLITS),
    "neighbours": Kind(_neighbours, K_PRECISION + 1, K_DENSITY + 1),
    "vendi": Kind(_vendi, 2),
    "memorisation": Kind(_memorisation, 2, NEIGHBOURS),
    "copying": Kind(_copying, FEWEST_IN_CELL, CELLS),
    "balance": Kind(_balance, 2, 2),
}
