"""Distance to the exact solution against evaluations, of deterministic solvers: docs/images/uvit-solvers.png.

Needs a U-ViT and an EDM2 network of the digits (docs/uvit.md says how they are trained).
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import click
import matplotlib
import torch

from dnnlib.files import atomic_write
from dnnlib.util import code_version
from training.config.dpm_solver import DPMSolver
from training.config.samplers import GridConfig, SamplerConfig
from training.denoiser import Denoiser
from training.samplers.grids import grid_for
from training.samplers.sampler import Sampler
from training.snapshot import load_network

matplotlib.use("Agg")
import matplotlib.pyplot as plt

IMAGES, SIGMA_MIN, SIGMA_MAX = 32, 0.02, 14.0
EVALUATIONS = (6, 9, 15, 30)
REFERENCE = SamplerConfig(solver="heun", grid=GridConfig(num_steps=80, sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX))
SOLVERS = {
    "heun": SamplerConfig(solver="heun"),
    "euler": SamplerConfig(solver="euler"),
    "dpmpp-2m": SamplerConfig(solver="dpmpp-2m"),
    "sqrt-3m": SamplerConfig(solver="sqrt-3m"),
    "dpm-single, data": SamplerConfig(solver="dpm-single"),
    "dpm-single, noise": SamplerConfig(solver="dpm-single", dpm=DPMSolver(prediction="noise")),
    "dpm-multi": SamplerConfig(solver="dpm-multi", dpm=DPMSolver(order=2)),
}


def mixture(x: torch.Tensor, sigma: torch.Tensor, _cond: torch.Tensor | None = None) -> torch.Tensor:
    """The exact denoiser of numbers that are -0.7 or 0.7, with standard deviation 0.1."""
    variance = 0.01 + sigma.double() ** 2
    ratio = torch.tanh(0.7 * x.double() / variance)
    return (0.7 * ratio + 0.01 / variance * (x.double() - 0.7 * ratio)).float()


def solve(
    config: SamplerConfig, D: Denoiser, noise: torch.Tensor, cond: torch.Tensor | None
) -> tuple[torch.Tensor, int]:
    sampler = Sampler(config, grid_for(config, D))
    with torch.inference_mode():
        return sampler(D, noise, cond, dtype=torch.float64), sampler.nfe


def curves(D: Denoiser, noise: torch.Tensor, cond: torch.Tensor | None) -> dict[str, list[tuple[int, float]]]:
    """(evaluations, root mean square distance) of each solver."""
    exact, _ = solve(REFERENCE, D, noise, cond)
    found: dict[str, list[tuple[int, float]]] = {}
    for name, config in SOLVERS.items():
        for evaluations in EVALUATIONS:
            steps = (evaluations + 1) // 2 if config.solver == "heun" else evaluations
            grid = dataclasses.replace(REFERENCE.grid, num_steps=steps)
            x, nfe = solve(dataclasses.replace(config, grid=grid), D, noise, cond)
            found.setdefault(name, []).append((nfe, float((x - exact).square().mean().sqrt())))
        print(name, found[name], flush=True)
    return found


@click.command()
@click.option("--uvit", help="U-ViT of the digits", metavar="FILE", required=True)
@click.option("--edm2", help="EDM2 network of the digits", metavar="FILE", required=True)
@click.option("--out", help="Picture to write", metavar="FILE", type=Path, required=True)
def main(uvit: str, edm2: str, out: Path) -> None:
    noise = torch.randn(IMAGES, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    classes = torch.eye(10)[torch.arange(IMAGES) % 10]
    panels: dict[str, Callable[[], Denoiser]] = {
        "U-ViT": lambda: load_network(uvit).net,
        "EDM2": lambda: load_network(edm2).net,
        "mixture of two normals, exact": lambda: mixture,
    }
    fig, axes = plt.subplots(1, 3, figsize=(15, 5), layout="constrained", sharey=True)
    for place, (title, make) in zip(axes, panels.items(), strict=True):
        for name, points in curves(make(), noise, classes).items():
            place.loglog(*zip(*points, strict=True), marker="o", label=name)
        place.set_title(title, fontsize=14)
        place.set_xlabel("evaluations of the network", fontsize=12)
        place.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("distance to the exact solution", fontsize=12)
    axes[0].legend(fontsize=10)
    made_by = {"Description": f"scripts/uvit_solvers.py, OpenEDM2 {code_version()}"}
    with atomic_write(out) as f:
        fig.savefig(f, format="png", dpi=80, metadata=made_by)


if __name__ == "__main__":
    main()
