"""Noise levels for few steps: searches those at which a solver comes nearest to a network's exact solution.

\b
Examples:
  python scripts/optimize_schedule.py --net=out/digits --sampler=sqrt-3m --steps=10,12 --outdir=out/levels
  python generate_images.py --net=out/digits --sampler=sqrt-3m --sigmas=out/levels/sqrt-3m-10.txt --outdir=out/few

Levels suit the network, the solver, the number of steps, and the guidance that they were found with. Half as many
further images as the search has then measure the distance to the exact solution, beside that of EDM's levels.
"""

import dataclasses
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import click
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from dnnlib.cli import CommandLine, device_option, parse_int_list, parsed_by
from dnnlib.errors import UserError
from dnnlib.files import atomic_write, check_not_input, file_sha256
from dnnlib.util import code_version
from torch_utils.device import select_device
from training.conditioning import DataSpec
from training.config.samplers import SIGMA_MAX, SIGMA_MIN, GridConfig, SamplerConfig
from training.denoiser import Denoiser, noise_range
from training.families import accelerated
from training.guidance import GuidedDenoiser, Unconditional
from training.guides import check_denoiser, check_guide, load_image_network
from training.samplers import Sampler, StackedRandomGenerator
from training.samplers.grids import grid_for
from training.samplers.schedule_search import SOLVERS, ScheduleSearch, rms

REFERENCE_STEPS = 256  # of sqrt-3m
BESIDE = GridConfig(rho=10.0, sigma_min=0.05)  # levels for few steps without a search


class Loaded(NamedTuple):
    """A denoiser, perhaps guided, with what its images look like and the noise levels to choose from."""

    denoiser: Denoiser
    spec: DataSpec
    sha256: str
    low: float
    high: float


def load(net: str, gnet: str | None, guidance: float, device: torch.device, batch: int) -> Loaded:
    """The denoiser that the options name.

    Raises:
        UserError: it cannot be loaded, or has no guide.
    """
    snapshot = load_image_network(net, device)
    check_denoiser(snapshot, net)
    spec, (low, high) = snapshot.net.spec, noise_range(snapshot.net)
    denoiser = accelerated(snapshot.net, batch)
    if guidance != 1:
        if gnet is None and not spec.conditioning.optional:
            raise UserError(f"--guidance={guidance:g} needs a guiding network: give --gnet")
        guide: Denoiser = Unconditional(denoiser)
        if gnet is not None:
            loaded = load_image_network(gnet, device)
            check_guide(spec, loaded.net.spec)
            guide = accelerated(loaded.net, batch)
        denoiser = GuidedDenoiser(denoiser, guide, guidance)
    return Loaded(denoiser, spec, file_sha256(snapshot.path), max(low, SIGMA_MIN), min(high, SIGMA_MAX))


def distances(
    loaded: Loaded, solver: str, grids: Iterable[GridConfig], noise: torch.Tensor, cond: torch.Tensor | None
) -> list[float]:
    """Root mean square distance to the solution of many steps, of each of some grids."""

    def result(config: SamplerConfig) -> torch.Tensor:
        return Sampler(config, grid_for(config))(loaded.denoiser, noise, cond, dtype=torch.float64)

    levels = GridConfig(num_steps=REFERENCE_STEPS, sigma_min=loaded.low, sigma_max=loaded.high)
    exact = result(SamplerConfig(solver="sqrt-3m", grid=levels))
    return [rms(result(SamplerConfig(solver=solver, grid=grid)) - exact) for grid in grids]


@click.command(cls=CommandLine, help=__doc__)
@click.option("--net", help="Network snapshot", metavar="FILE", required=True)
@click.option("--gnet", help="Guiding network  [default: --net without a condition]", metavar="FILE")
@click.option("--guidance", help="Guidance weight", type=float, default=1.0, show_default=True)
@click.option("--sampler", "solver", help="Solver", type=click.Choice(SOLVERS), default="sqrt-3m", show_default=True)
@click.option(
    "--steps",
    help="How many levels to find; several numbers share the measurements",
    metavar="LIST",
    default="8,10,12",
    show_default=True,
    callback=parsed_by(parse_int_list),
)
@click.option(
    "--outdir",
    help="Where to save the levels, as SAMPLER-STEPS.txt",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
)
@click.option("--images", help="Images of the search", type=click.IntRange(min=2), default=48, show_default=True)
@click.option("--candidates", help="Levels to choose from", type=click.IntRange(4, 100), default=36, show_default=True)
@click.option("--seed", help="First seed of the images", type=click.IntRange(min=0), default=0, show_default=True)
@device_option
def main(
    net: str,
    gnet: str | None,
    guidance: float,
    solver: str,
    steps: list[int],
    outdir: Path,
    images: int,
    candidates: int,
    seed: int,
    device: str,
) -> None:
    check_not_input("--outdir", outdir, {"--net": net, "--gnet": gnet})
    if not 1 <= min(steps) <= max(steps) <= candidates:
        raise UserError(f"--steps: the levels are chosen from --candidates={candidates}: ask for 1 to {candidates}")
    target = select_device(device)
    loaded = load(net, gnet, guidance, target, images)
    count = images + images // 2
    rnd = StackedRandomGenerator(target, range(seed, seed + count))
    noise, cond = rnd.randn([count, *loaded.spec.shape]), loaded.spec.conditioning.draw(rnd, count)
    shown, unseen = (None, None) if cond is None else cond.split([images, count - images])

    def D(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        c = shown if shown is None else shown.repeat(len(x) // images, *[1] * (shown.ndim - 1))
        return loaded.denoiser(x.float(), sigma, c).double()

    with torch.inference_mode():
        search = ScheduleSearch(D, noise[:images], solver, loaded.low, loaded.high, candidates)
        print(f"distance to the exact solution of {count - images} other images by {solver}, with EDM's levels,")
        print(f"--rho={BESIDE.rho:g} --sigma_min={BESIDE.sigma_min:g}, and those that were found")
        print(f"{'steps':>5s} {'EDM':>8s} {f'rho={BESIDE.rho:g}':>8s} {'found':>8s}  levels that were found")
        for number in steps:
            levels, expected = search.levels(number)
            edm = GridConfig(num_steps=number, sigma_min=loaded.low, sigma_max=loaded.high)
            beside = dataclasses.replace(BESIDE, num_steps=number, sigma_max=loaded.high)
            grids = [edm, beside, GridConfig(sigmas=tuple(levels))]
            measured = distances(loaded, solver, grids, noise[images:], unseen)
            text = (
                f"noise levels for --sampler={solver} --steps={number}, found with --guidance={guidance:g}",
                f"for {net}, sha256 {loaded.sha256}",
                f"by scripts/optimize_schedule.py --images={images} --candidates={candidates} --seed={seed}",
                f"of OpenEDM2 {code_version()}",
                f"distance to the exact solution {measured[2]:.4f} (expected: {expected:.4f}); of EDM's levels "
                f"{measured[0]:.4f}",
            )
            with atomic_write(outdir / f"{solver}-{number}.txt", "w") as f:
                f.write("".join(f"# {line}\n" for line in text) + "".join(f"{sigma:.6g}\n" for sigma in levels))
            print(
                f"{number:5d} " + " ".join(f"{value:8.4f}" for value in measured),
                " " + ", ".join(f"{sigma:.4g}" for sigma in levels),
                flush=True,
            )


if __name__ == "__main__":
    main()
