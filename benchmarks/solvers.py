"""Accuracy of the samplers for their cost: distance to a 256-step Heun solution against network evaluations.

Three denoisers: a network of digits that is trained first as in the quickstart, the same guided by an early snapshot
of its training, and the exact one of the toy example's mixture of Gaussians. All samplers start from the same noise and
use the default noise levels.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import click
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from dnnlib.files import atomic_write
from dnnlib.util import code_version
from training.config.samplers import SOLVERS
from training.denoiser import Denoiser
from training.guidance import GuidedDenoiser
from training.networks.edm2_layers import effective_weights
from training.samplers.edm import ode_sampler
from training.samplers.grids import edm_sigmas
from training.snapshot import load_network
from training.toy.data import gt
from training.toy.sampling import denoiser

ROOT = Path(__file__).parent.parent
IMAGES, POINTS = 128, 1024
REFERENCE_STEPS = 256
EVALUATIONS = (5, 7, 9, 11, 15, 23, 31, 47, 63, 95)  # odd: Heun's method takes 2 * steps - 1
GUIDANCE = 2.0
COLORS = dict(zip(SOLVERS, ["black", "tab:gray", "tab:blue", "tab:orange", "tab:red"], strict=True))


class Case(NamedTuple):
    """A denoiser with what it starts from."""

    name: str
    denoiser: Denoiser
    noise: torch.Tensor
    labels: torch.Tensor | None = None
    sigma_max: float = 80


class Distance(NamedTuple):
    """Root mean square over coordinates: of all samples, which a few far off can raise, and of the median sample."""

    rms: float
    median: float


def trained_digits(folder: Path) -> tuple[str, str]:
    """Files of the last and of the first snapshot of a network of digits; trained now if they are not there."""
    data = ROOT / "datasets" / "digits.zip"
    command = [sys.executable, "train_edm2.py", f"--outdir={folder.resolve()}", f"--data={data}", "--preset=digits"]
    subprocess.run(command, cwd=ROOT, check=True)
    files = sorted(folder.glob("network-snapshot-*-0.100.safetensors"))
    return str(files[-1]), str(files[0])


def solve(case: Case, solver: str, steps: int) -> torch.Tensor:
    sigmas = edm_sigmas(steps, sigma_max=case.sigma_max)
    return ode_sampler(case.denoiser, case.noise, sigmas, case.labels, solver, dtype=torch.float64)


def measure(case: Case) -> dict[str, list[Distance]]:
    """Distances by solver at each of `EVALUATIONS`, and what the reference itself may be off."""
    reference = solve(case, "heun", REFERENCE_STEPS)

    def distance(solver: str, steps: int) -> Distance:
        of_samples = (solve(case, solver, steps) - reference).square().flatten(1).mean(dim=1)
        return Distance(of_samples.mean().sqrt().item(), of_samples.median().sqrt().item())

    distances = {
        solver: [distance(solver, (count + 1) // 2 if solver == "heun" else count) for count in EVALUATIONS]
        for solver in SOLVERS
    }
    return distances | {"reference": [distance("heun", 2 * REFERENCE_STEPS)]}


def table(results: dict[str, dict[str, list[Distance]]]) -> str:
    """All and typical samples at some numbers of evaluations, as Markdown."""
    shown = [11, 15, 23, 31, 63]
    lines = []
    for name, distances in results.items():
        lines += [f"| {name} | " + " | ".join(f"{count} evaluations" for count in shown) + " |"]
        lines += ["|---" * (len(shown) + 1) + "|"]
        for solver in SOLVERS:
            row = [distances[solver][EVALUATIONS.index(count)] for count in shown]
            lines += [f"| {solver} | " + " | ".join(f"{d.rms:.4f} ({d.median:.4f})" for d in row) + " |"]
        lines += [""]
    return "\n".join(lines)


def draw(path: Path, results: dict[str, dict[str, list[Distance]]]) -> None:
    import matplotlib
    from matplotlib.ticker import ScalarFormatter

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(2, len(results), figsize=(16, 12), sharex=True, sharey="row", layout="constrained")
    for column, (name, distances) in zip(axes.T, results.items(), strict=True):
        for place, measure in zip(column, Distance._fields, strict=True):
            curves = {solver: [getattr(d, measure) for d in values] for solver, values in distances.items()}
            for solver in SOLVERS:
                place.loglog(EVALUATIONS, curves[solver], "o-", color=COLORS[solver], label=solver, markersize=5)
            goal = curves["heun"][EVALUATIONS.index(63)]
            place.axhline(goal, color="black", linewidth=1, linestyle="--", label="heun, 32 steps (63 evaluations)")
            place.axvline(31, color="black", linewidth=1, linestyle=":", label="half of its evaluations")
            place.axhline(curves["reference"][0], color="tab:green", linewidth=1, label="512 steps of heun")
            place.set_xticks([5, 7, 11, 15, 23, 31, 47, 63, 95])
            place.set_xticks([], minor=True)
            place.xaxis.set_major_formatter(ScalarFormatter())
            place.tick_params(labelsize=12, labelbottom=True)
            place.grid(alpha=0.3)
        column[0].set_title(name, fontsize=15)
        column[1].set_xlabel("network evaluations", fontsize=13)
    axes[0, 0].set_ylabel("distance to 256 steps of heun, RMS of all samples", fontsize=13)
    axes[1, 0].set_ylabel("distance to 256 steps of heun, median sample", fontsize=13)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), fontsize=13, loc="outside lower center", ncols=4)
    fig.savefig(path, dpi=100, metadata={"Description": f"benchmarks/solvers.py, OpenEDM2 {code_version()}"})


@click.command()
@click.option("--dir", "folder", type=click.Path(path_type=Path), default="out/benchmark/solvers", show_default=True)
def main(folder: Path) -> None:
    net_file, gnet_file = trained_digits(folder / "digits")
    net, gnet = (load_network(file).net.eval() for file in (net_file, gnet_file))
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(IMAGES, 1, 8, 8, generator=generator, dtype=torch.float64)
    points = torch.randn(POINTS, 2, generator=generator, dtype=torch.float64)
    labels = torch.eye(10)[torch.arange(IMAGES) % 10]
    results = {}
    with torch.inference_mode(), effective_weights(net), effective_weights(gnet):
        for case in [
            Case("digits", net, images, labels),
            Case(f"digits, autoguidance {GUIDANCE:g}", GuidedDenoiser(net, gnet, GUIDANCE), images, labels),
            Case("mixture of Gaussians, exact score", denoiser(gt("A")), points, sigma_max=5),
        ]:
            results[case.name] = measure(case)
    draw(folder / "solvers.png", results)
    facts = {"code_version": code_version(), "evaluations": EVALUATIONS, "distances": results}
    with atomic_write(folder / "solvers.json", "w") as f:
        f.write(json.dumps(facts, indent=2) + "\n")
    print(table(results))
    print(f"{folder / 'solvers.png'}, {folder / 'solvers.json'}")


if __name__ == "__main__":
    main()
