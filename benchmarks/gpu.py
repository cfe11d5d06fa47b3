"""Sampling and training of the img512 networks on a GPU: throughput per batch size, share of the peak, and memory.

The textbook variant computes in float16, as published. Run it where nothing else uses the GPU:

    python benchmarks/gpu.py [--preset NAME] [--batch N] [--json FILE]
"""

import functools
import gc
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
from dnnlib.util import atomic_write, one_line
from torch_utils.misc import channels_last_views, flat_gradients, replace_nonfinite_, set_up_device, use_channels_last
from training.compiled_inference import CompiledDenoiser, with_fixed_weights
from training.flops import count_operations
from training.losses import EDM2Loss
from training.networks_edm2 import Precond, effective_weights
from training.phema import PowerFunctionEMA
from training.presets import TRAINING_PRESETS

RESOLUTION, IMG_CHANNELS, LABEL_DIM = 64, 4, 1000
STDS = (0.05, 0.10)
WARM_UP, SECONDS = 3, 2.0  # calls, and time to measure for
Run = Callable[[], torch.Tensor]  # returns what variants are compared by


def network(channels: int, precision: str) -> Precond:
    torch.manual_seed(0)
    net = Precond(RESOLUTION, IMG_CHANNELS, LABEL_DIM, precision, model_channels=channels)
    for parameter in net.parameters():
        if parameter.ndim == 0:
            parameter.data.fill_(0.5)  # gains: zero before training, which would hide most of the network
    return net


def plain_network(channels: int, device: torch.device) -> textbook.Precond:
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    net = textbook.Precond(RESOLUTION, IMG_CHANNELS, LABEL_DIM, dtype=dtype, model_channels=channels)
    net.load_state_dict(network(channels, "fp32").state_dict())
    return net.to(device)


def batch_of(batch: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    labels = torch.eye(LABEL_DIM)[torch.arange(batch) % LABEL_DIM]
    return torch.randn(batch, IMG_CHANNELS, RESOLUTION, RESOLUTION).to(device), labels.to(device)


def sampling(variant: str, precision: str, channels: int, batch: int, device: torch.device) -> Run:
    x, labels = batch_of(batch, device)
    sigma = torch.ones([], device=device)
    if variant == "textbook":
        denoiser = plain_network(channels, device).eval().requires_grad_(False)
    else:
        net = network(channels, precision).to(device)
        denoiser = CompiledDenoiser(net, batch) if variant == "compiled" else with_fixed_weights(net)
    return torch.inference_mode()(lambda: denoiser(x, sigma, labels))


def training(variant: str, precision: str, channels: int, batch: int, device: torch.device) -> Run:
    images, labels = batch_of(batch, device)
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

    net = network(channels, precision).to(device).train()
    use_channels_last(net)
    net.unet.checkpoint_activations = variant == "checkpointed"
    if variant == "compiled":
        net.unet.compile(dynamic=False)
    flat = flat_gradients(net.parameters())
    optimizer = torch.optim.Adam(channels_last_views(net.parameters()), lr=1e-4, betas=(0.9, 0.99), fused=True)
    ema = PowerFunctionEMA(net, STDS)

    def step() -> torch.Tensor:
        flat.zero_()
        with effective_weights(net, normalize_first=True):
            loss = gradients(net)
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
    for preset in presets if channels is None else ("",):
        width = channels or TRAINING_PRESETS[f"edm2-img512-{preset}"]["channels"]
        with torch.device("meta"):
            counts = count_operations(network(width, "fp32"))
        flops = 2 * sum(
            count for kind, count in counts.items() if "convolution" in kind or kind in ("linear", "attention")
        )
        for job in jobs:
            for batch in batches:
                baseline, expected = math.nan, torch.full([], math.nan)  # without a textbook
                for variant in ("textbook", *VARIANTS[job]):
                    try:
                        set_up = functools.partial(JOBS[job], variant, precision, width, batch, where)
                        seconds, first, memory = measure_alone(set_up, where)
                    except RuntimeError as err:  # out of memory, or what the compiler makes of that
                        print(f"{job} {preset or width}, batch {batch}, {variant}: {one_line(err)[:100]}")
                        continue
                    if variant == "textbook":
                        baseline, expected = seconds, first
                    share = flops * batch * (3 if job == "training" else 1) / seconds / facts["peak_flops"]
                    difference = float(np.linalg.norm(first - expected) / np.linalg.norm(expected))
                    result = {
                        "job": job, "preset": preset or width, "batch": batch, "variant": variant,
                        "seconds": seconds, "share_of_peak": share, "memory_gb": memory,
                    }  # fmt: skip
                    print(
                        f"{f'{job} {preset or width}, batch {batch}, {variant}':40s}{batch / seconds:9.2f}"
                        f"{baseline / seconds:8.2f}{share:9.2f}  {memory:6.2f}    {difference:.0e}",
                        flush=True,
                    )
                    results.append(result)
    if json_path is not None:
        with atomic_write(json_path, "w") as f:
            f.write(json.dumps({"machine": facts, "jobs": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
