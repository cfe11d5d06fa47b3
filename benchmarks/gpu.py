"""Sampling and training of the img512 networks on a GPU: throughput per batch size, share of the peak, and memory.

The textbook variant computes in float16, as published. Run it where nothing else uses the GPU:

    python benchmarks/gpu.py [--preset NAME] [--batch N] [--json FILE]
"""

import functools
import gc
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import textbook
from benchmarks.run import machine_facts
from benchmarks.sampling import IMG_CHANNELS, LABEL_DIM, RESOLUTION, call, inputs, network
from dnnlib.errors import one_line
from dnnlib.files import atomic_write
from torch_utils.device import set_up_device
from torch_utils.gradients import (
    channels_last_views,
    count_nonfinite,
    flat_gradients,
    replace_nonfinite_,
    use_channels_last,
)
from training.config.edm2 import TRAINING_PRESETS
from training.families import denoiser_inputs
from training.flops import count_operations
from training.losses import EDM2Loss
from training.networks.edm2_gpu import CompiledDenoiser, with_fixed_weights
from training.networks.edm2_layers import effective_weights
from training.phema import PowerFunctionEMA

STDS = (0.05, 0.10)
WARM_UP, SECONDS = 3, 2.0  # calls, and time to measure for
Run = Callable[[], torch.Tensor]  # returns what variants are compared by


def plain_network(channels: int, device: torch.device) -> textbook.Precond:
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    net = textbook.Precond(RESOLUTION, IMG_CHANNELS, LABEL_DIM, dtype=dtype, model_channels=channels)
    net.load_state_dict(network(channels, "fp32").state_dict())
    return net.to(device)


def sampling(variant: str, precision: str, channels: int, batch: int, device: torch.device) -> Run:
    if variant == "textbook":
        denoiser = plain_network(channels, device).eval().requires_grad_(False)
    else:
        net = network(channels, precision).to(device)
        denoiser = CompiledDenoiser(net, batch) if variant == "compiled" else with_fixed_weights(net)
    return call(denoiser, batch, device)


def training(variant: str, precision: str, channels: int, batch: int, device: torch.device) -> Run:
    images, labels = inputs(batch, device)
    loss_fn = EDM2Loss()

    def gradients(net: torch.nn.Module) -> torch.Tensor:
        loss = loss_fn(net, images, labels).sum() / batch
        loss.backward()
        return loss.detach()

    if variant == "textbook":
        plain = plain_network(channels, device).train()
        rest = textbook.PlainOptimization(plain, 1e-4, STDS)

        def plain_step() -> torch.Tensor:
            plain.zero_grad(set_to_none=True)
            loss = gradients(plain)
            rest.step(batch, batch)
            return loss

        return plain_step

    net = network(channels, precision).to(device).train().requires_grad_(True)
    use_channels_last(net)
    net.unet.checkpoint_activations = variant == "checkpointed"
    if variant == "compiled":
        net.unet.compile(dynamic=False)
    flat = flat_gradients(net.parameters())
    optimizer = torch.optim.Adam(channels_last_views(net.parameters()), lr=1e-4, betas=(0.9, 0.99), fused=True)
    ema = PowerFunctionEMA(net, STDS)
    nonfinite = torch.zeros([], dtype=torch.int64, device=flat.device)

    def step() -> torch.Tensor:
        flat.zero_()
        with effective_weights(net, normalize_first=True):
            loss = gradients(net)
        nonfinite.add_(count_nonfinite(flat))
        replace_nonfinite_(flat)
        optimizer.step()
        ema.update(batch, batch)
        return loss

    return step


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(run: Run, device: torch.device) -> tuple[float, torch.Tensor]:
    """Median seconds of a call, and what the first one returns."""
    first = run().float().cpu()
    for _ in range(WARM_UP):
        run()
    seconds, end = [], time.perf_counter() + SECONDS
    while not seconds or time.perf_counter() < end:
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), first


def measure_alone(set_up: Callable[[], Run], device: torch.device) -> tuple[float, torch.Tensor, float]:
    """As `measure`, and the peak of allocated memory in GB, set-up and weights included."""
    torch.compiler.reset()  # which frees what graphs hold
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    seconds, first = measure(set_up(), device)
    return seconds, first, torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0


@functools.cache
def forward_flops(channels: int) -> int:
    """Operations of one evaluation of one image, without elementwise ones and the normalisation of weights."""
    with torch.device("meta"):
        counts = count_operations(net := network(channels, "fp32"), denoiser_inputs(net, 1, "meta"))
    return 2 * sum(n for kind, n in counts.items() if "convolution" in kind or kind in ("linear", "attention"))


def peak_flops(device: torch.device) -> float:
    """Operations per second of a product of matrices, which count as two per multiplication."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a = torch.randn(size, size, device=device, dtype=dtype)
    seconds, _ = measure(lambda: a @ a, device)
    return 2 * size**3 / seconds


JOBS = {"sampling": sampling, "training": training}
VARIANTS = {"sampling": ("eager", "compiled"), "training": ("eager", "compiled", "checkpointed")}


@click.command()
@click.option(
    "--preset",
    "presets",
    help="Of img512; may be repeated",
    multiple=True,
    type=click.Choice(["xxs", "xs", "s", "m", "l", "xl", "xxl"]),
    default=("xs", "s", "m", "xxl"),
)
@click.option("--batch", "batches", help="May be repeated", multiple=True, type=int, default=(1, 8, 32, 128))
@click.option("--job", "jobs", help="May be repeated", multiple=True, type=click.Choice(list(JOBS)), default=list(JOBS))
@click.option(
    "--precision", help="Of ours", type=click.Choice(["bf16", "fp16", "fp32"]), default="fp16", show_default=True
)
@click.option("--channels", help="In place of the presets', to try this program", type=int)
@click.option("--device", help="A CPU is only for trying", default="cuda")
@click.option("--json", "json_path", help="Also write the figures to this file", type=click.Path(path_type=Path))
def main(
    presets: tuple[str, ...],
    batches: tuple[int, ...],
    jobs: tuple[str, ...],
    precision: str,
    channels: int | None,
    device: str,
    json_path: Path | None,
) -> None:
    """Measure every preset with every batch size."""
    if device == "cuda" and not torch.cuda.is_available():
        raise click.ClickException("there is no CUDA device; --device=cpu --channels=32 --batch=2 tries the program")
    where = torch.device(device)
    set_up_device(where)
    facts: dict[str, Any] = {**machine_facts(), "peak_flops": peak_flops(where)}
    if where.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(where)
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print(f"{'':40s}images/s    ratio  of peak  GB        difference")
    results = []
    for preset, job, batch in itertools.product(presets if channels is None else ("",), jobs, batches):
        width = channels or TRAINING_PRESETS[f"edm2-img512-{preset}"].config.network.model_channels
        passes = 3 if job == "training" else 1  # forward, and backward twice as much
        flops = passes * batch * forward_flops(width)
        baseline, expected = math.nan, torch.full([], math.nan)  # without a textbook
        for variant in ("textbook", *VARIANTS[job]):
            name = f"{job} {preset or width}, batch {batch}, {variant}"
            try:
                set_up = functools.partial(JOBS[job], variant, precision, width, batch, where)
                seconds, first, memory = measure_alone(set_up, where)
            except RuntimeError as err:  # out of memory, or what the compiler makes of that
                print(f"{name}: {one_line(err)[:100]}")
                continue
            if variant == "textbook":
                baseline, expected = seconds, first
            share = flops / seconds / facts["peak_flops"]
            difference = float(np.linalg.norm(first - expected) / np.linalg.norm(expected))
            print(
                f"{name:40s}{batch / seconds:9.2f}{baseline / seconds:8.2f}{share:9.2f}  {memory:6.2f}"
                f"    {difference:.0e}",
                flush=True,
            )
            results.append({"name": name, "seconds": seconds, "share_of_peak": share, "memory_gb": memory})
    if json_path is not None:
        with atomic_write(json_path, "w") as f:
            f.write(json.dumps({"machine": facts, "jobs": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
