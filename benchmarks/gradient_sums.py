"""How much of a training step the sum of gradients over processes takes: what an overlap with the backward passes could
gain at most. Of two processes on this machine:

torchrun --standalone --nproc_per_node=2 benchmarks/gradient_sums.py
"""

import importlib
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import training.optimizers
from benchmarks.scaling import ROOT, TRAINED
from torch_utils import distributed
from training.training_loop import TrainingRun

STEPS = 12
BATCH = 128


def main() -> None:
    torch.set_num_threads(1)
    sums: list[float] = []
    steps: list[float] = []
    step = TrainingRun.step

    def timed_sum(gradients: torch.Tensor) -> None:
        distributed.barrier()  # waiting for the other process is no part of it
        start = time.perf_counter()
        distributed.all_reduce_sum_(gradients)
        sums.append(time.perf_counter() - start)

    def timed_step(run: TrainingRun, batches: Iterator[Any]) -> None:
        start = time.perf_counter()
        step(run, batches)
        steps.append(time.perf_counter() - start)

    training.optimizers.distributed.sum_gradients_ = timed_sum
    TrainingRun.step = timed_step
    quiet = ["--status=0", "--snapshot=0", "--checkpoint=0", "--preview=0", "--device=cpu"]
    for name, (family, options, _) in TRAINED.items():
        with tempfile.TemporaryDirectory() as folder:
            distributed.init()
            first = distributed.get_rank() == 0
            outdir = distributed.from_first(folder)
            command = [f"--outdir={outdir}/run", f"--data={ROOT / 'datasets' / 'digits.zip'}", *options, *quiet]
            length = [f"--batch={BATCH}", f"--duration={STEPS * BATCH}"]
            sums.clear(), steps.clear()
            importlib.import_module(f"train_{family}").main([*command, *length], standalone_mode=False)
        if first:
            share = statistics.median(sums) / statistics.median(steps)
            print(
                f"{name}: {1000 * statistics.median(sums):.1f} of {1000 * statistics.median(steps):.0f} ms, {share:.1%}"
            )


if __name__ == "__main__":
    main()
