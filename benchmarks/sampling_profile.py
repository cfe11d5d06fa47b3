"""Shares of one call of the denoiser by kind of operation, and its arithmetic rate against that of a matrix product."""

import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import click
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.sampling import set_up_ours, set_up_textbook

# By the first that matches the name of the operation. The transforms of Winograd's convolutions are `bmm`, as is
# the attention of the textbook variant.
KINDS = {
    "convolutions": ("conv", "slow_conv"),
    "attention": ("softmax", "attention"),
    "bmm: attention or Winograd transforms": ("bmm",),
    "copies": ("copy_", "cat", "clone", "contiguous", "fill_", "zero_"),
    "embedding": ("mm", "addmm", "cos"),
}


def kind_of(name: str) -> str:
    return next((kind for kind, words in KINDS.items() if any(word in name for word in words)), "elementwise and norms")


def peak(dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product."""
    a, b = (torch.randn(2048, 2048).to(dtype) for _ in range(2))
    return 2 * 2048**3 / median_seconds(lambda: a @ b)


def median_seconds(run: Callable[[], object], repeats: int = 7) -> float:
    seconds = []
    for _ in range(repeats + 1):  # the first warms up
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def report(name: str, run: Callable[[], object], flops: float) -> None:
    seconds = median_seconds(run)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    times = Counter[str]()
    for event in profiler.key_averages():
        times[kind_of(event.key)] += event.self_cpu_time_total
    shares = ", ".join(f"{kind} {t / times.total():.0%}" for kind, t in times.most_common())
    print(f"{name:16s} {seconds * 1e3:7.1f} ms, {flops / seconds / 1e9:5.0f} GFLOP/s: {shares}")


@click.command()
@click.option("--channels", type=click.Choice(["64", "128"]), default="64", show_default=True)
@click.option("--batch", type=click.IntRange(min=1), default=4, show_default=True)
def main(channels: str, batch: int) -> None:
    C = int(channels)
    for dtype in (torch.float32, torch.bfloat16):
        print(f"matrix product of {dtype}: {peak(dtype) / 1e9:.0f} GFLOP/s")
    textbook = set_up_textbook(C, batch)
    with FlopCounterMode(display=False) as counter:
        textbook()
    flops = counter.get_total_flops()  # of direct convolutions, whatever is done instead of them
    report("textbook", textbook, flops)
    for precision in ("fp32", "bf16"):
        report(f"ours, {precision}", set_up_ours(C, batch, precision), flops)


if __name__ == "__main__":
    main()
