"""Memory of training as `--plan` finds it by a rehearsal, beside what training allocates, and what the process takes.

    python benchmarks/memory.py                   # all cases, each in a process of its own
    python benchmarks/memory.py edm2-img512-xs 4  # a preset with that --batch-gpu, on a CPU in float32

Allocated: what torch's allocator hands out, counted by its profiler. Resident: what the operating system counts
(Linux), from before the network is made; the code of kernels and what the allocator keeps comes to it.
"""

import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parent.parent))

from torch_utils.device import set_up_device
from training.config.training import Preset
from training.families import ARCHITECTURES, spec_of_preset, trained_by
from training.holding import Shared, Whole
from training.networks.dropout import ImageMasks
from training.planning.memory import Rehearsal
from training.samplers.noise import StackedRandomGenerator

# Preset, --batch-gpu, whether activations are computed twice.
CASES = [
    ("pixels32-cpu", 16, False),
    ("pixels32-cpu", 16, True),
    ("pixels32-vp-cpu", 16, False),
    ("pixels32-vp-cpu", 16, True),
    ("pixels32-uvit-cpu", 16, False),
    ("pixels32-uvit-cpu", 16, True),
    ("pixels32-nvae-cpu", 16, False),
    ("edm2-img512-xs", 4, False),
]


class Measured(NamedTuple):
    """Bytes that two steps of a run take at most, planned and measured."""

    planned: int
    allocated: int
    resident: int


def preset_of(name: str) -> Preset:
    return next(entry.presets[name] for entry in ARCHITECTURES.values() if name in entry.presets)


def train(preset: Preset, batch: int, checkpoint_activations: bool, steps: int = 2, shard: int = 1) -> None:
    """A network of a preset, its averages and optimiser, and a few steps on noise, on the CPU in float32.

    With `shard`, as many processes are to call it.
    """
    config = preset.config
    spec, entry = spec_of_preset(preset, config.data.cond), trained_by(config)
    assert entry.ema is not None and entry.objective is not None and entry.optimizer is not None
    net = entry.build(config.network, spec).train()
    core: Any = entry.core(net)
    core.checkpoint_activations = checkpoint_activations
    holding = Whole(entry, net) if shard == 1 else Shared(entry, net, shard)
    ema, objective = entry.ema(holding.held, config), entry.objective(net, config)
    optimizer = entry.optimizer(holding.held, config)
    holding.attach(optimizer)
    for nimg in range(0, steps * batch, batch):
        optimizer.zero_gradients()
        rnd = StackedRandomGenerator("cpu", range(batch))
        images, cond = rnd.randn([batch, *spec.shape]), torch.ones([batch, *spec.conditioning.shape])
        ImageMasks(net)(np.arange(nimg, nimg + batch), torch.device("cpu"))
        with holding.step():
            objective(net, images, cond, rnd=rnd, nimg=nimg).sum().backward()
        optimizer.step(nimg)
        ema.update(nimg + batch, batch)


def measure(name: str, batch: int, checkpoint_activations: bool) -> Measured:
    """What training by a preset takes, in this process."""
    preset = preset_of(name)
    spec = spec_of_preset(preset, preset.config.data.cond)
    rehearsal = Rehearsal(preset.config, spec, "cpu")
    planned = rehearsal.kept.total + rehearsal.step(batch, "fp32", checkpoint_activations)
    set_up_device(torch.device("cpu"))
    before = resident("VmRSS")
    train(preset, batch, checkpoint_activations)
    grown = resident("VmHWM") - before
    return Measured(planned, allocated(lambda: train(preset, batch, checkpoint_activations)), grown)


def allocated(run: Callable[[], None]) -> int:
    """The most bytes that a function has of torch's allocator at a time, on a CPU."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    now = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def resident(what: str) -> int:
    """Bytes of this process in physical memory: VmRSS = now, VmHWM = at most so far; 0 where that is not known."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(what)), 0)


def main(cases: list[tuple[str, int, bool]]) -> None:
    print(f"{'preset':<20s}{'batch':>6s}{'twice':>7s}{'planned':>12s}{'allocated':>12s}{'resident':>12s}")
    context = multiprocessing.get_context("spawn")
    for case in cases:
        with context.Pool(1) as pool:
            found = pool.apply(measure, case)
        megabytes = "".join(f"{count / 1e6:>9.1f} MB" for count in found)
        ratios = ", ".join(f"{count / found.planned:.3f}" for count in found[1:])
        print(
            f"{case[0]:<20s}{case[1]:>6d}{'yes' if case[2] else 'no':>7s}{megabytes}   of the plan: {ratios}",
            flush=True,
        )


if __name__ == "__main__":
    main([(sys.argv[1], int(sys.argv[2]), False)] if len(sys.argv) > 2 else CASES)
