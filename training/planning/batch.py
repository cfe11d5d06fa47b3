"""The largest round of images that fits into memory."""

from dnnlib.errors import UserError
from training.conditioning import DataSpec
from training.config.training import TrainConfig
from training.planning.memory import Rehearsal
from training.planning.report import gigabytes

MARGIN = 1.1  # what is planned for, over what the rehearsal finds: libraries and gaps take some, too


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
    precision = run.precision if run.precision != "auto" else "fp32" if device == "cpu" else "fp16"
    copied = device == "cpu" and run.shard == 1  # while a training state is written
    fixed = rehearsal.kept.total + (rehearsal.kept.state if copied else 0)

    def needs(batch: int) -> float:
        return MARGIN * (fixed + rehearsal.step(batch, precision, run.checkpoint_activations))

    share = run.batch // processes
    divisors = [n for n in range(1, share + 1) if share % n == 0]
    low, high = 0, len(divisors)  # as many of them fit: from low to high
    found: dict[int, float] = {}
    while low < high:
        middle = (low + high + 1) // 2
        batch = divisors[middle - 1]
        found[batch] = needs(batch)
        low, high = (middle, high) if found[batch] <= free else (low, middle - 1)
    margin = f"with a margin of {100 * (MARGIN - 1):.0f} %"
    if low == 0:
        raise UserError(
            f"--batch-gpu=auto: a single image needs {gigabytes(found[1])} {margin}, and {gigabytes(free)} of the "
            f"{device} are free: try --checkpoint-activations=1, --shard or a smaller network, or see --plan"
        )
    chosen = divisors[low - 1]
    more = f"; {divisors[low]} would need {gigabytes(found[divisors[low]])}" if low < len(divisors) else ""
    return chosen, (
        f"--batch-gpu=auto: {chosen}, which needs {gigabytes(found[chosen])} {margin}, of {gigabytes(free)} that are "
        f"free{more}"
    )
