"""The comparisons of benchmarks/: that they can be run, and that nothing became much slower."""

import itertools
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import AVX2_ALONE, ROOT

sys.path.insert(0, str(ROOT))

from benchmarks import phema_science, solvers
from benchmarks.harness import Job, measure
from benchmarks.run import all_jobs
from training.config.samplers import SOLVERS
from training.phema import power_function_response

SLACK = 0.85


# Bars that are not reached, or not every day, on the machine of docs/performance.md: ratios that were, held instead.
MISSED = {
    "sampling forward, fp32, 64 channels, batch 1": 1.65,
    "reading latents 8x64x64, batches of 32": 5.2,
}


def test_names_are_listed():
    result = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "run.py", "--list"], capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines() == [job.name for job in all_jobs()]
    assert MISSED.keys() <= set(result.stdout.splitlines())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_benchmark_needs_a_gpu():
    result = subprocess.run([sys.executable, ROOT / "benchmarks" / "gpu.py"], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("Error: there is no CUDA device") and result.stderr.count("\n") == 1


def test_solvers_are_compared(monkeypatch, tmp_path):
    """All of them, on a denoiser that is known exactly; without networks, there is no fd_pixels."""
    for name, value in {"COMPARED": 4, "EVALUATIONS": solvers.SHOWN, "TOLERANCES": (0.1,)}.items():
        monkeypatch.setattr(solvers, name, value)
    noise = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    results = {"exact": solvers.measure(solvers.Case("exact", solvers.mixture, noise), ref=None)}
    used = {name.split()[0] for name in results["exact"]}
    assert used == set(SOLVERS) - {"pc", "consistency"}  # of which one draws noise, and the other follows no flow
    assert all(points[-1].rms < points[0].rms for name, points in results["exact"].items() if name in solvers.BY_STEPS)
    for name, points in results["exact"].items():
        if name in solvers.BY_STEPS:
            assert tuple(point.evaluations for point in points) == solvers.SHOWN, name
    assert "| `sqrt-3m` | " in solvers.table(results)
    solvers.draw(tmp_path / "solvers.png", results, floor=0.1)
    with PIL.Image.open(tmp_path / "solvers.png") as picture:
        assert picture.size[0] > 100


def test_reconstructions_are_compared_with_tracked_averages(tmp_path):
    """Of weights that grow as powers of time."""
    for index in range(1, phema_science.TIMES + 1):
        end = index == phema_science.TIMES
        for std in (*phema_science.STORED, *(phema_science.OTHERS if end else ())):
            steps = np.arange(40 * index + 1)
            response = power_function_response(40 * index, std, 40 * index + 1)
            weights = [response @ steps**k for k in (0.25, 0.5, 1.0)]
            state = {"weight": torch.tensor(weights, dtype=torch.float32)}
            torch.save(state, tmp_path / f"net-{index}-{std:.3f}.pt")
    errors = phema_science.measure("EDM2", tmp_path)
    assert len(errors) == len(phema_science.COUNTS) * len(phema_science.OTHERS)
    assert all(e.true < e.predicted for e in errors)
    for fewer, more in itertools.pairwise(phema_science.COUNTS):
        a, b = ([e.predicted for e in errors if e.times == count] for count in (fewer, more))
        assert all(np.array(b) < a)
    (low, high) = phema_science.ratios(errors)["EDM2"]
    assert 0 < low < high < 1
    text = phema_science.table(errors)
    assert text.count("\n") == len(phema_science.OTHERS) + 2 and "| 0.250 | " in text
    phema_science.draw(tmp_path / "science.png", errors)
    with PIL.Image.open(tmp_path / "science.png") as picture:
        assert picture.size[0] > 500


@pytest.mark.slow
@pytest.mark.parametrize("job", all_jobs(), ids=lambda job: job.name)
def test_nothing_loses_with_avx2_alone(monkeypatch, job: Job):
    """For a quiet machine with two cores of either kind."""
    if job.precision == "bf16":
        pytest.skip("without instructions for it, bf16 loses and says so")
    for name, value in AVX2_ALONE.items():
        monkeypatch.setenv(name, value)  # of the processes that measure
    assert measure(job, repeats=3).ratio >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize("job", [job for job in all_jobs() if job.bar is not None], ids=lambda job: job.name)
def test_no_regression(job: Job):
    """For a quiet machine with two cores and AVX-512."""
    assert job.bar is not None
    assert measure(job, repeats=3).ratio >= SLACK * MISSED.get(job.name, job.bar)
