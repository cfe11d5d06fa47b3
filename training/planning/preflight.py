"""What `--dry-run=timed` prints: whether a run fits and gets through, how long it takes, and what that costs."""

from collections.abc import Iterator

import torch

from dnnlib.errors import OUT_OF_MEMORY, RunError, UserError
from dnnlib.progress import format_time
from torch_utils import distributed
from torch_utils.device import free_memory, resolve_precision, select_device
from training.config.training import TrainConfig
from training.dataset.images import ImageFolderDataset
from training.dataset.listing import many
from training.metrics.reference import Reference
from training.planning.batch import MARGIN_TEXT, planned
from training.planning.memory import Rehearsal, spec_of
from training.planning.report import gigabytes
from training.planning.timing import images_per_second
from training.rounds import round_size


def preflight_lines(config: TrainConfig, dataset: ImageFolderDataset) -> Iterator[str]:
    """Memory, time and cost of a run, and warnings of what it will fail at, a line each; to be called by all processes.

    Args:
        config: of the run.
        dataset: its images.
    """
    yield from _missing_files(config)
    yield _memory_line(config, dataset)
    device, processes = select_device(config.run.device), distributed.get_world_size()
    try:
        speed, steps, images = images_per_second(config, dataset)
    except (MemoryError, torch.OutOfMemoryError):
        if processes > 1:  # the others are in the middle of a step, and cannot go on without this one
            raise
        yield f"Warning: {OUT_OF_MEMORY}"
        return
    seconds = config.run.duration / speed
    yield f"Speed:            {speed:.4g} images per second in {steps} timed steps of {many(images, 'image')}"
    yield (
        f"Time:             {format_time(seconds)} for {config.run.duration} images, without previews, metrics and the "
        "writing of files"
    )
    if device.type == "cpu":
        yield f"Cost:             {seconds * processes * torch.get_num_threads() / 3600:.4g} core-hours"
    else:
        yield f"Cost:             {seconds * processes / 3600:.4g} GPU-hours"


def _memory_line(config: TrainConfig, dataset: ImageFolderDataset) -> str:
    """Memory of the first process beside what is free."""
    device, processes = select_device(config.run.device), distributed.get_world_size()
    rehearsal, batch = Rehearsal(config, spec_of(config, dataset), device.type), round_size(config, processes)
    step = rehearsal.step(batch, resolve_precision(config.run.precision, device), config.run.checkpoint_activations)
    free = free_memory(device)
    text = (
        f"Memory:           {gigabytes(rehearsal.kept.total)} all the time, and {gigabytes(step)} more in a round of "
        f"{many(batch, 'image')}, by a rehearsal; {gigabytes(free)} are free"
    )
    if planned(rehearsal.kept, step, device.type, config.run.shard) <= free:
        return text
    advice = "try --batch-gpu=auto, --checkpoint-activations=1 or --shard"
    return f"{text}. Warning: that is not enough {MARGIN_TEXT}: {advice}"


def _missing_files(config: TrainConfig) -> Iterator[str]:
    """Warnings of what the run would need later and cannot read."""
    run = config.run
    try:
        if run.metrics:
            Reference(run.metrics_ref, run.metrics, "the reference")
    except (UserError, RunError, OSError) as err:
        yield f"Warning: --metrics-ref={run.metrics_ref}: {err}"
    try:
        if run.val_data:
            ImageFolderDataset(run.val_data)
    except (UserError, OSError) as err:
        yield f"Warning: --val-data={run.val_data}: {err}"
