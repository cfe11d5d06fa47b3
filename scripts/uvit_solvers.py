"""Distance to the exact solution against evaluations, of all deterministic solvers: docs/images/uvit-solvers.png.

All follow the probability flow from the same noise, at a level of 14, down to 0.02 and from there to the clean image.
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
from training.config.dpm_solver import AdaptiveDPMSolver, DPMSolver
from training.config.samplers import EulerMaruyama, GridConfig, RungeKutta, SamplerConfig
from training.denoiser import Denoiser
from training.samplers.grids import grid_for
from training.samplers.sampler import Sampler
from training.snapshot import load_network

matplotlib.use("Agg")
import matplotlib.pyplot as plt

IMAGES, SIGMA_MIN, SIGMA_MAX = 32, 0.02, 14.0
EVALUATIONS = (6, 9, 15, 30)
REFERENCE = SamplerConfig(solver="heun", grid=GridConfig(num_steps=80, sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX))
BY_STEPS = {
    "heun": SamplerConfig(solver="heun"),
    "euler": SamplerConfig(solver="euler"),
    "euler-maruyama --stochastic=0": SamplerConfig(
        solver="euler-maruyama", euler_maruyama=EulerMaruyama(stochastic=False)
    ),
    "dpmpp-2m": SamplerConfig(solver="dpmpp-2m"),
    "dpmpp-3m": SamplerConfig(solver="dpmpp-3m"),
    "sqrt-3m": SamplerConfig(solver="sqrt-3m"),
    "dpm-single": SamplerConfig(solver="dpm-single"),
    "dpm-single --prediction=noise": SamplerConfig(solver="dpm-single", dpm=DPMSolver(prediction="noise")),
    "dpm-multi": SamplerConfig(solver="dpm-multi"),
}
TOLERANCES = (0.3, 0.1, 0.03, 0.01, 0.003)  # absolute and relative
BY_TOLERANCE: dict[str, Callable[[float], SamplerConfig]] = {
    "dpm-adaptive": lambda tolerance: SamplerConfig(
        solver="dpm-adaptive", dpm_adaptive=AdaptiveDPMSolver(atol=tolerance, rtol=tolerance)
    ),
    "rk45": lambda tolerance: SamplerConfig(solver="rk45", rk45=RungeKutta(atol=tolerance, rtol=tolerance)),
}


def mixture(x: torch.Tensor, sigma: torch.Tensor, _cond: torch.Tensor | None = None) -> torch.Tensor:
    """The exact denoiser of numbers that are -0.7 or 0.7, with standard deviation 0.1."""
    variance = 0.01 + sigma.double().reshape(-1, 1, 1, 1) ** 2
    ratio = torch.tanh(0.7 * x.double() / variance)
    return (0.7 * ratio + 0.01 / variance * (x.double() - 0.7 * ratio)).float()


def solve(
    config: SamplerConfig, steps: int, D: Denoiser, noise: torch.Tensor, cond: torch.Tensor | None
) -> tuple[int, torch.Tensor]:
    """Evaluations and result."""
    levels = dataclasses.replace(REFERENCE.grid, num_steps=steps, schedule="vp" if config.in_time else "network")
    config = dataclasses.replace(config, grid=levels)
    # Solvers in time begin like the others, and do not scale what they give as VP models would.
    grid = dataclasses.replace(grid_for(config, D), start=None, end=1.0)
    sampler = Sampler(config, grid)
    with torch.inference_mode():
        x = sampler(D, noise, cond, dtype=torch.float64)
        if grid.sigmas[-1] == 0:
            return sampler.nfe, x
        return sampler.nfe + 1, D(x.float(), grid.sigmas[-1], cond)  # as the others' last step


def curves(D: Denoiser, noise: torch.Tensor, cond: torch.Tensor | None) -> dict[str, list[tuple[int, float]]]:
    """(evaluations, root mean square distance) of each solver."""
    _, exact = solve(REFERENCE, REFERENCE.grid.num_steps, D, noise, cond)
    found: dict[str, list[tuple[int, float]]] = {}
    runs = [(name, config, n) for name, config in BY_STEPS.items() for n in EVALUATIONS]
    runs += [(name, make(tolerance), 0) for name, make in BY_TOLERANCE.items() for tolerance in TOLERANCES]
    for name, config, evaluations in runs:
        steps = (evaluations + 1) // 2 if config.solver == "heun" else max(evaluations, 1)
        nfe, x = solve(config, steps, D, noise, cond)
        found.setdefault(name, []).append((nfe, float((x - exact).square().mean().sqrt())))
    for name, points in found.items():
        print(name, *(f"{nfe}: {distance:.2g}" for nfe, distance in points), sep="   ", flush=True)
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
    fig, axes = plt.subplots(1, 3, figsize=(17, 6.5), layout="constrained", sharex=True, sharey=True)
    for place, (title, make) in zip(axes, panels.items(), strict=True):
        print(title)
        for number, (name, points) in enumerate(curves(make(), noise, classes).items()):
            line = "--" if name in BY_TOLERANCE else "-"
            place.loglog(
                *zip(*points, strict=True), line, marker="os^v"[number % 4], color=f"C{number % 10}", label=name
            )
        place.set_title(title, fontsize=14)
        place.set_xlabel("evaluations of the network", fontsize=12)
        place.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("distance to the exact solution", fontsize=12)
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=11)
    made_by = {"Description": f"scripts/uvit_solvers.py, OpenEDM2 {code_version()}"}
    with atomic_write(out) as f:
        fig.savefig(f, format="png", dpi=80, metadata=made_by)


if __name__ == "__main__":
    main()
