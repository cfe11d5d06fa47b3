"""The largest round of images that fits into memory."""

import torch

from dnnlib.errors import UserError
from torch_utils.device import resolve_precision
from training.conditioning import DataSpec
from training.config.training import TrainConfig
from training.planning.memory import Kept, Rehearsal
from training.planning.report import gigabytes

MARGIN = 1.1  # what is planned for, over what the rehearsal finds: libraries and gaps take some, too
MARGIN_TEXT = f"with a margin of {100 * (MARGIN - 1):.0f} %"


def planned(kept: Kept, step: int, device: str, shard: int) -> float:
    """Bytes of a device that a run is planned to take; on a CPU, the copy of a training state is among them, unless
    processes share out the weights.

    Args:
        step: most bytes of a round, beside what is kept.
        device: 'cpu', 'cuda' or 'mps'.
        shard: processes that share out the weights.
    """
    return MARGIN * (kept.total + step + (kept.state if device == "cpu" and shard == 1 else 0))


def fitting_batch_gpu(config: TrainConfig, spec: DataSpec, device: str, processes: int, free: int) -> tuple[int, str]:
    """Images per round for `--batch-gpu=auto`, and why so many.

    It is the largest divisor of a process's share of the batch with which a step fits.

    Args:
        config: what is trained.
        spec: what its data look like.
        device: 'cpu', 'cuda' or 'mps'.
        processes: that share a batch.
        free: bytes of the device that a process may fill.

    Raises:
        UserError: not even a single image fits.
    """
    rehearsal, run = Rehearsal(config, spec, device), config.run
    precision = resolve_precision(run.precision, torch.device(device))

    def needs(batch: int) -> float:
        return planned(rehearsal.kept, rehearsal.step(batch, precision, run.checkpoint_activations), device, run.shard)

    share = run.batch // processes
    divisors = [n for n in range(1, share + 1) if share % n == 0]
    low, high = 0, len(divisors)  # as many of them fit: from low to high
    found: dict[int, float] = {}
    while low < high:
        middle = (low + high + 1) // 2
        batch = divisors[middle - 1]
        found[batch] = needs(batch)
        low, high = (middle, high) if found[batch] <= free else (low, middle - 1)
    if low == 0:
        raise UserError(
            f"--batch-gpu=auto: a single image needs {gigabytes(found[1])} {MARGIN_TEXT}, and {gigabytes(free)} of the "
            f"{device} are free: try --checkpoint-activations=1, --shard or a smaller network, or see --plan"
        )
    chosen = divisors[low - 1]
    more = f"; {divisors[low]} would need {gigabytes(found[divisors[low]])}" if low < len(divisors) else ""
    return chosen, (
        f"--batch-gpu=auto: {chosen}, which needs {gigabytes(found[chosen])} {MARGIN_TEXT}, of {gigabytes(free)} that "
        f"are free{more}"
    )
