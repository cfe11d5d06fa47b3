"""What `--plan` prints: memory by batch and precision."""

from collections.abc import Iterator

from training.conditioning import DataSpec
from training.config.training import TrainConfig
from training.flops import count_parameters
from training.planning.memory import Rehearsal
from training.rounds import round_size

COLUMNS = 5  # batches, at most
GROUPS = (2, 4, 8)  # processes that share weights out
PRECISIONS = {"fp32": "fp32", "bf16": "bf16 or fp16"}  # 16 bits are 16 bits


def gigabytes(count: float) -> str:
    """Bytes as '6.093 GB'."""
    return f"{count / 1e9:.3f} GB"


def plan_lines(config: TrainConfig, spec: DataSpec, device: str, processes: int) -> Iterator[str]:
    """The memory that each process of a run takes, a line each, as they are found.

    Args:
        config: what is trained; its `batch_gpu` is the largest batch of the table.
        spec: what its data look like.
        device: 'cpu', 'cuda' or 'mps'.
        processes: that share a batch.
    """
    rehearsal = Rehearsal(config, spec, device)
    kept = rehearsal.kept
    sharing = f", which share out weights in groups of {config.run.shard}," if config.run.shard > 1 else ""
    yield (
        f"Memory of each process{sharing} on {device}, by a rehearsal of a step of {config.preset or 'the network'}, "
        f"{count_parameters(rehearsal.net) / 1e6:.2f} million parameters:"
    )
    for what, count in {
        "weights": kept.weights,
        "gradients": kept.gradients,
        "moments of the optimiser": kept.moments,
        "averages of the weights": kept.averages,
        "kept all the time": kept.total,
    }.items():
        yield f"  {what:<44s}{count / 1e9:10.3f} GB"
    batches = batch_columns(round_size(config, processes))
    yield f"  {'with a round of --batch-gpu images, in GB:':<44s}" + "".join(f"{batch:>10d}" for batch in batches)
    ways = (False, True) if rehearsal.can_checkpoint_activations else (False,)
    for precision, name in PRECISIONS.items():
        for checkpointed in ways:
            row = f"  {name}{', --checkpoint-activations=1' * checkpointed}"
            totals = (kept.total + rehearsal.step(batch, precision, checkpointed) for batch in batches)
            yield f"{row:<46s}" + "".join(f"{total / 1e9:10.3f}" for total in totals)
    where = "to that" if device == "cpu" else "in the memory of the host"
    if config.run.shard > 1:
        yield f"Each process writes its {gigabytes(kept.state)} of a training state, while training waits."
    else:
        yield f"A training state is copied while it is written: {gigabytes(kept.state)} {where}, on the first process."
        if rehearsal.architecture.sharing is not None:
            in_pieces = (f"{n}: {gigabytes(rehearsal.kept_in_pieces(n).total)}" for n in GROUPS)
            yield f"Kept all the time with --shard={', '.join(in_pieces)}."


def batch_columns(largest: int) -> list[int]:
    """Batches of a table: a few, of which each is half or a quarter of the next."""
    factor = 2 if largest <= 1 << COLUMNS else 4
    return [b for b in (largest // factor**i for i in reversed(range(COLUMNS))) if b > 0]
