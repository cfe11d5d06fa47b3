"""A run of calculate_metrics.py: its device, its evaluation, and what becomes of the results."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from torch_utils import distributed
from torch_utils.device import select_device, set_up_device
from training.dataset.decoding import Transform
from training.metrics.evaluation import Evaluation, format_results, save_records
from training.metrics.images import StoredImages

GROUPS = 15  # of images, for error bars


def set_up(opts: Mapping[str, Any]) -> torch.device:
    """The device of --device, ready for use."""
    device = select_device(opts["device"])
    set_up_device(device)
    return device


def show_summary(images: StoredImages) -> None:
    """Print what was found where the images are, and how it was understood."""
    for line in images.summary():
        distributed.print0(line)


def begin(opts: Mapping[str, Any], fit: Transform | None = None, workers: int = 2) -> Evaluation:
    """The evaluation that the options describe, with its references and detectors loaded.

    Args:
        fit, workers: for references that are folders of images.
    """
    distributed.init()
    with distributed.fail_together():
        device = set_up(opts)
        if opts["outdir"] is not None:
            opts["outdir"].mkdir(parents=True, exist_ok=True)
    groups = GROUPS if opts["error_bars"] else 1
    return Evaluation(
        opts["metrics"], opts["ref"], device, opts["detector_weights"], opts["resize"], groups, opts["force"], fit,
        workers, opts["held_out"],
    )  # fmt: skip


def keep(records: list[dict[str, Any]], opts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The records of a run, saved in --outdir before the next run begins."""
    with distributed.fail_together():
        if opts["outdir"] is not None:
            save_records(opts["outdir"], records)
    return records


def finish(runs: Sequence[Sequence[Mapping[str, Any]]], opts: Mapping[str, Any]) -> None:
    """Print the results as a table, with --json also their records, and end the distributed session."""
    if distributed.get_rank() == 0:
        print(format_results(runs))
        for record in (record for run in runs for record in run if opts["as_json"]):
            print(json.dumps(record))
    distributed.shutdown()
