"""All comparisons with the textbook variants: times, ratios, and the bars they are to reach."""

import datetime
import importlib
import json
import os
import platform
import statistics
import sys
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.harness import Job, Timing, measure
from dnnlib.files import atomic_write
from dnnlib.util import code_version
from torch_utils.device import slowdown_of_bf16

# Each has a list JOBS.
MODULES = (
    "sampling",
    "training_step",
    "uvit",
    "score_sde",
    "nvae",
    "frechet",
    "dataset",
    "conversion",
    "reconstruction",
    "toy",
)


def all_jobs() -> list[Job]:
    return [job for module in MODULES for job in importlib.import_module(f"benchmarks.{module}").JOBS]


def machine_facts() -> dict[str, str | int]:
    """What the figures depend on."""
    import torch

    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line[:10] == "model name"]
        model = names[0] if names else model
    return {
        "date": datetime.date.today().isoformat(),
        "code_version": code_version(),
        "processor": model,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def row(job: Job, timing: Timing) -> str:
    def span(seconds: list[float]) -> str:
        median, low, high = (f(seconds) * 1e3 for f in (statistics.median, min, max))
        return f"{median:9.1f} ({low:.1f}-{high:.1f})"

    bar = "" if job.bar is None else f"  bar {job.bar:<5g}{'reached' if timing.ratio >= job.bar else 'MISSED'}"
    return (
        f"{job.name:58s}{span(timing.textbook):>28s}{span(timing.ours):>28s}"
        f"{timing.ratio:7.2f}   {timing.difference:.0e}{bar}"
    )


@click.command()
@click.option("--only", help="Run what has this text in its name; may be repeated", metavar="NAME", multiple=True)
@click.option("--repeats", type=click.IntRange(min=1), default=7, show_default=True)
@click.option(
    "--json", "json_path", help="Also write the figures to this file", metavar="FILE", type=click.Path(path_type=Path)
)
@click.option("--list", "list_only", help="Only list the names", is_flag=True)
def main(only: tuple[str, ...], repeats: int, json_path: Path | None, list_only: bool) -> None:
    """Compare with the textbook variants. Nothing else should run on the machine meanwhile."""
    jobs = [job for job in all_jobs() if not only or any(text in job.name for text in only)]
    if not jobs:
        raise click.ClickException(f"--only: no name has {' or '.join(only)} in it; --list shows them")
    if list_only:
        print("\n".join(job.name for job in jobs))
        return
    facts = machine_facts()
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print(f"{'':58s}{'textbook, ms':>28s}{'ours, ms':>28s}  ratio   difference")
    results = []
    slowdown = slowdown_of_bf16()
    for job in jobs:
        if job.precision == "bf16" and slowdown is not None:
            # Some take minutes per call, and nobody is led to them: --precision=bf16 says this factor.
            print(f"{job.name:58s}  left out: a convolution in bf16 takes {slowdown:.1f} times as long as in fp32 here")
            results.append({"name": job.name, "bar": job.bar, "slowdown_of_bf16": slowdown})
            continue
        timing = measure(job, repeats)
        print(row(job, timing), flush=True)
        results.append({"name": job.name, "bar": job.bar, "ratio": timing.ratio} | timing._asdict())
    if json_path is not None:
        with atomic_write(json_path, "w") as f:
            f.write(json.dumps({"machine": facts, "jobs": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
