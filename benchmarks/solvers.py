"""What samplers give for their evaluations: distance to the exact solution and fd_pixels of all deterministic ones.

Three networks of the digits (EDM2, U-ViT, VP of score-SDE), which are trained first unless they are named, EDM2's
guided by an early snapshot of its training, and the exact denoiser of a mixture of two normal distributions. In each
case all samplers start from the same noise and end at the same lowest level, from where the last evaluation gives the
clean image. Writes solvers.png, solvers.json and a table.
"""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from dnnlib.files import atomic_write
from dnnlib.util import code_version
from training.config.dpm_solver import AdaptiveDPMSolver, DPMSolver
from training.config.samplers import SIGMA_MAX, SIGMA_MIN, EulerMaruyama, GridConfig, RungeKutta, SamplerConfig
from training.config.unipc import UniPC
from training.dataset.images import ImageFolderDataset
from training.denoiser import Denoiser, noise_range
from training.encoders import Encoder
from training.families import accelerated
from training.guidance import GuidedDenoiser
from training.metrics import calculate_metrics_from_stats, calculate_stats_for_iterable
from training.samplers import Sampler, StackedRandomGenerator
from training.samplers.grids import grid_for
from training.snapshot import load_network

ROOT = Path(__file__).parent.parent
DIGITS = ROOT / "datasets" / "digits.zip"
COMPARED, BATCH = 32, 250  # images whose distance is measured; images at a time
EVALUATIONS = (5, 7, 9, 11, 15, 23, 31)  # odd: Heun's method takes 2 * steps - 1
WITH_FD = (5, 7, 9, 11, 15)
REFERENCE = SamplerConfig(solver="sqrt-3m", grid=GridConfig(num_steps=256))
GUIDANCE = 2.0
PRESETS = {"EDM2": "train_edm2.py --preset=digits", "U-ViT": "train_uvit.py --preset=digits-uvit",
           "VP": "train_score_sde.py --preset=digits-vp"}  # fmt: skip
BY_STEPS = {
    "heun": SamplerConfig(solver="heun"),
    "euler": SamplerConfig(solver="euler"),
    "euler-maruyama --stochastic=0": SamplerConfig(
        solver="euler-maruyama", euler_maruyama=EulerMaruyama(stochastic=False)
    ),
    "dpmpp-2m": SamplerConfig(solver="dpmpp-2m"),
    "dpmpp-3m": SamplerConfig(solver="dpmpp-3m"),
    "sqrt-3m": SamplerConfig(solver="sqrt-3m"),
    "unipc": SamplerConfig(solver="unipc"),
    "unipc --unipc-order=2": SamplerConfig(solver="unipc", unipc=UniPC(order=2)),
    "dpm-single": SamplerConfig(solver="dpm-single"),
    "dpm-single --prediction=noise": SamplerConfig(solver="dpm-single", dpm=DPMSolver(prediction="noise")),
    "dpm-multi": SamplerConfig(solver="dpm-multi"),
}
TOLERANCES = (0.3, 0.1, 0.03, 0.01)  # absolute and relative
BY_TOLERANCE: dict[str, Callable[[float], SamplerConfig]] = {
    "dpm-adaptive": lambda tolerance: SamplerConfig(
        solver="dpm-adaptive", dpm_adaptive=AdaptiveDPMSolver(atol=tolerance, rtol=tolerance)
    ),
    "rk45": lambda tolerance: SamplerConfig(solver="rk45", rk45=RungeKutta(atol=tolerance, rtol=tolerance)),
}
SHOWN = (7, 9, 11, 15, 31)  # evaluations in the table


class Case(NamedTuple):
    """A denoiser with what it starts from; `encoder` decodes images, None = their fd_pixels is not measured."""

    name: str
    denoiser: Denoiser
    noise: torch.Tensor
    cond: torch.Tensor | None = None
    low: float = SIGMA_MIN
    high: float = SIGMA_MAX
    encoder: Encoder | None = None


class Point(NamedTuple):
    """One run of a solver.

    Args:
        evaluations: of the denoiser.
        rms, median: distance to the exact solution over coordinates: root mean square of all samples, which a few far
            off can raise, and of the median sample.
        fd_pixels: None = not measured.
    """

    evaluations: int
    rms: float
    median: float
    fd_pixels: float | None


def mixture(x: torch.Tensor, sigma: torch.Tensor, _cond: torch.Tensor | None = None) -> torch.Tensor:
    """The exact denoiser of numbers that are -0.7 or 0.7, with standard deviation 0.1."""
    variance = 0.01 + sigma.double().reshape(-1, 1, 1, 1) ** 2
    side = torch.tanh(0.7 * x.double() / variance)
    return (0.7 * side + 0.01 / variance * (x.double() - 0.7 * side)).float()


def trained(name: str, folder: Path) -> Path:
    """The folder of a trained network of digits, whose training ends now if it has not."""
    script, preset = PRESETS[name].split()
    command = [sys.executable, script, f"--outdir={folder.resolve()}", f"--data={DIGITS}", preset]
    subprocess.run(command, cwd=ROOT, check=True)
    return folder


def solve(case: Case, config: SamplerConfig, steps: int, count: int) -> tuple[int, torch.Tensor]:
    """Evaluations, and the first samples, float64."""
    levels = GridConfig(
        num_steps=steps, sigma_min=case.low, sigma_max=case.high, schedule="vp" if config.in_time else "network"
    )
    config = dataclasses.replace(config, grid=levels)
    # Solvers in time begin like the others, and do not scale what they give as VP models would.
    sampler = Sampler(config, dataclasses.replace(grid_for(config), start=None, end=1.0))
    evaluations, parts = 0, []
    for start in range(0, count, BATCH):
        batch = slice(start, min(start + BATCH, count))
        cond = None if case.cond is None else case.cond[batch]
        x, nfe = sampler(case.denoiser, case.noise[batch], cond, dtype=torch.float64), sampler.nfe
        if sampler.grid.sigmas[-1] > 0:  # as the others' last step
            x, nfe = case.denoiser(x.float(), sampler.grid.sigmas[-1], cond).double(), nfe + 1
        parts.append(x)
        evaluations = max(evaluations, nfe)
    return evaluations, torch.cat(parts)


def measure(case: Case, ref: Any) -> dict[str, list[Point]]:
    """The runs of each solver."""
    _, exact = solve(case, REFERENCE, REFERENCE.grid.num_steps, COMPARED)
    runs = [
        (name, config, (n + 1) // 2 if name == "heun" else n, n in WITH_FD)
        for name, config in BY_STEPS.items()
        for n in EVALUATIONS
    ]
    runs += [(name, make(tolerance), 1, False) for name, make in BY_TOLERANCE.items() for tolerance in TOLERANCES]
    found: dict[str, list[Point]] = {}
    for name, config, steps, with_fd in runs:
        measured = with_fd and case.encoder is not None
        nfe, x = solve(case, config, steps, len(case.noise) if measured else COMPARED)
        of_samples = (x[:COMPARED] - exact).square().flatten(1).mean(dim=1)
        fd = fd_pixels(case.encoder.decode(x.float()), ref) if measured and case.encoder is not None else None
        point = Point(nfe, of_samples.mean().sqrt().item(), of_samples.median().sqrt().item(), fd)
        found.setdefault(name, []).append(point)
        print(case.name, name, point, flush=True)
    return found


def statistics_of(images: torch.Tensor) -> Any:
    """Statistics of uint8 images, for fd_pixels."""
    return list(calculate_stats_for_iterable(images.split(BATCH), ["fd_pixels"], verbose=False))[-1].stats


def fd_pixels(images: torch.Tensor, ref: Any) -> float:
    return float(calculate_metrics_from_stats(statistics_of(images), ref, ["fd_pixels"], verbose=False)["fd_pixels"])


def table(results: dict[str, dict[str, list[Point]]]) -> str:
    """All and typical samples at some numbers of evaluations, with fd_pixels where it is measured, as Markdown."""
    lines = []
    for name, solvers in results.items():
        lines += [f"| {name} | " + " | ".join(str(count) for count in SHOWN) + " |", "|---" * (len(SHOWN) + 1) + "|"]
        for solver in BY_STEPS:
            cells = []
            for count in SHOWN:
                point = solvers[solver][EVALUATIONS.index(count)]
                fd = "" if point.fd_pixels is None else f", {point.fd_pixels:.2f}"
                cells.append(f"{point.rms:.4f} ({point.median:.4f}){fd}")
            lines += [f"| `{solver}` | " + " | ".join(cells) + " |"]
        lines += [""]
    return "\n".join(lines)


def draw(path: Path, results: dict[str, dict[str, list[Point]]], floor: float) -> None:
    """Distance above, fd_pixels below, a column per network; the exact denoiser has the first alone."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import ScalarFormatter

    colors = plt.get_cmap("tab20")  # in pairs, of which the strong ones come first here
    shown = [name for name in results if "autoguidance" not in name]
    size = (5.5 * len(shown), 11)
    fig, axes = plt.subplots(
        2, len(shown), figsize=size, squeeze=False, sharex=True, sharey="row", layout="constrained"
    )
    for column, name in zip(axes.T, shown, strict=True):
        for number, (solver, points) in enumerate(results[name].items()):
            line = "--" if solver in BY_TOLERANCE else "-"
            style: dict[str, Any] = dict(
                linestyle=line, marker="os^vDP"[number % 6], color=colors(2 * number % 20 + number // 10), markersize=5
            )
            column[0].loglog([p.evaluations for p in points], [p.rms for p in points], label=solver, **style)
            with_fd = [p for p in points if p.fd_pixels is not None]
            column[1].loglog([p.evaluations for p in with_fd], [p.fd_pixels for p in with_fd], **style)
        column[0].set_title(name, fontsize=14)
        if any(p.fd_pixels is not None for points in results[name].values() for p in points):
            column[1].axhline(floor, color="gray", linestyle=":", label="as many real digits")
            column[1].legend(fontsize=11)
            column[1].set_xlabel("evaluations of the network", fontsize=12)
        else:
            column[1].axis("off")
            column[1].legend(*column[0].get_legend_handles_labels(), fontsize=12, loc="center")
        for place in column:
            place.set_xticks(EVALUATIONS)
            place.set_xticks([], minor=True)
            place.xaxis.set_major_formatter(ScalarFormatter())
            place.tick_params(labelbottom=True)
            place.grid(alpha=0.3, which="both")
    axes[0, 0].set_ylabel("distance to the exact solution (root mean square)", fontsize=12)
    axes[1, 0].set_ylabel("fd_pixels", fontsize=12)
    with atomic_write(path) as f:
        made_by = {"Description": f"benchmarks/solvers.py, OpenEDM2 {code_version()}"}
        fig.savefig(f, format="png", dpi=70, metadata=made_by)


def network_case(name: str, source: Path, noise: torch.Tensor) -> Case:
    snapshot = load_network(source)
    low, high = noise_range(snapshot.net)
    cond = snapshot.net.spec.conditioning.draw(
        StackedRandomGenerator("cpu", range(len(noise))), len(noise), [i % 10 for i in range(len(noise))]
    )
    levels = max(low, SIGMA_MIN), min(high, SIGMA_MAX)
    return Case(name, accelerated(snapshot.net.eval(), BATCH), noise, cond, *levels, snapshot.encoder)


@click.command(help=__doc__)
@click.option("--dir", "folder", type=click.Path(path_type=Path), default="out/benchmark/solvers", show_default=True)
@click.option(
    "--edm2", help="Run directory of an EDM2 network  [default: trained now]", type=click.Path(path_type=Path)
)
@click.option("--uvit", help="The same of a U-ViT", type=click.Path(path_type=Path))
@click.option("--vp", help="The same of a VP network", type=click.Path(path_type=Path))
@click.option(
    "--samples",
    help="Images of which fd_pixels is measured",
    type=click.IntRange(COMPARED),
    default=500,
    show_default=True,
)
def main(folder: Path, edm2: Path | None, uvit: Path | None, vp: Path | None, samples: int) -> None:
    given = {"EDM2": edm2, "U-ViT": uvit, "VP": vp}
    runs = {name: run or trained(name, folder / name.lower()) for name, run in given.items()}
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(samples, 1, 8, 8, generator=generator, dtype=torch.float64)
    dataset = ImageFolderDataset(DIGITS)
    real = torch.stack([torch.from_numpy(dataset[i][0]) for i in range(len(dataset))])
    ref = statistics_of(real)
    floor = fd_pixels(real[torch.randint(len(real), [samples], generator=generator)], ref)
    cases = [network_case(name, run, noise) for name, run in runs.items()]
    first = sorted(runs["EDM2"].glob("network-snapshot-*-0.100.safetensors"))[0]
    gnet = accelerated(load_network(first).net.eval(), BATCH)
    main_case = cases[0]
    guided = GuidedDenoiser(main_case.denoiser, gnet, GUIDANCE)
    name = f"EDM2, autoguidance {GUIDANCE:g}"
    cases.append(main_case._replace(name=name, denoiser=guided, encoder=None))
    cases.append(Case("mixture of two normals, exact", mixture, noise))
    with torch.inference_mode():
        results = {case.name: measure(case, ref) for case in cases}
    draw(folder / "solvers.png", results, floor)
    facts = {"code_version": code_version(), "samples": samples, "floor": floor, "runs": results}
    with atomic_write(folder / "solvers.json", "w") as f:
        f.write(json.dumps(facts, indent=2) + "\n")
    print(table(results))
    print(f"fd_pixels of {samples} real digits: {floor:.3f}")
    print(f"{folder / 'solvers.png'}, {folder / 'solvers.json'}")


if __name__ == "__main__":
    main()
