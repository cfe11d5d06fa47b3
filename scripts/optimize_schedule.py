"""Noise levels for few steps: searches those at which a solver comes nearest to a network's exact solution.

\b
Examples:
  python scripts/optimize_schedule.py --net=out/digits --sampler=sqrt-3m --steps=10 --out=out/sqrt-3m-10.txt
  python generate_images.py --net=out/digits --sampler=sqrt-3m --sigmas=out/sqrt-3m-10.txt --outdir=out/few

Levels suit the network, the solver, the number of steps, and the guidance that they were found with. Half as many
further images as the search has then measure the distance to the exact solution, beside that of EDM's levels.
"""

import sys
from pathlib import Path

import click
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from dnnlib.cli import CommandLine, device_option
from dnnlib.errors import UserError
from dnnlib.files import atomic_write, check_not_input, file_sha256
from dnnlib.util import code_version
from torch_utils.device import select_device
from training.config.samplers import SIGMA_MAX, SIGMA_MIN, GridConfig, SamplerConfig
from training.denoiser import Denoiser, noise_range
from training.families import accelerated
from training.guidance import GuidedDenoiser, Unconditional
from training.guides import check_guide, load_image_network
from training.samplers import Sampler, StackedRandomGenerator
from training.samplers.grids import Grid, grid_for
from training.samplers.schedule_search import SOLVERS, ScheduleSearch, rms

REFERENCE_STEPS = 256  # of sqrt-3m


def distances(
    D: Denoiser, solver: str, grids: dict[str, Grid], noise: torch.Tensor, cond: torch.Tensor | None
) -> dict[str, float]:
    """Root mean square distance to the solution of many steps, by grid."""
    low, high = grids["EDM"].sigmas[-2].item(), grids["EDM"].sigmas[0].item()
    levels = GridConfig(num_steps=REFERENCE_STEPS, sigma_min=low, sigma_max=high)
    exact = Sampler(SamplerConfig(solver="sqrt-3m", grid=levels))(D, noise, cond, dtype=torch.float64)
    sampler = SamplerConfig(solver=solver)
    return {
        name: rms(Sampler(sampler, grid)(D, noise, cond, dtype=torch.float64) - exact) for name, grid in grids.items()
    }


@click.command(cls=CommandLine, help=__doc__)
@click.option("--net", help="Network snapshot", metavar="FILE", required=True)
@click.option(
    "--gnet", help="Guiding network snapshot  [default: the network itself, without a condition]", metavar="FILE"
)
@click.option("--guidance", help="Guidance weight", type=float, default=1.0, show_default=True)
@click.option("--sampler", "solver", help="Solver", type=click.Choice(SOLVERS), default="sqrt-3m", show_default=True)
@click.option("--steps", help="Noise levels to find", type=click.IntRange(min=1), default=10, show_default=True)
@click.option(
    "--out", help="File to write", metavar="FILE", type=click.Path(dir_okay=False, path_type=Path), required=True
)
@click.option("--images", help="Images of the search", type=click.IntRange(min=2), default=48, show_default=True)
@click.option("--candidates", help="Levels to choose from", type=click.IntRange(4, 100), default=36, show_default=True)
@click.option("--sigma_min", help="The lowest of them  [default: as of generate_images.py]", type=float)
@click.option("--sigma_max", help="The highest of them  [default: as of generate_images.py]", type=float)
@click.option("--seed", help="First seed of the images", type=click.IntRange(min=0), default=0, show_default=True)
@device_option
def main(
    net: str,
    gnet: str | None,
    guidance: float,
    solver: str,
    steps: int,
    out: Path,
    images: int,
    candidates: int,
    sigma_min: float | None,
    sigma_max: float | None,
    seed: int,
    device: str,
) -> None:
    check_not_input("--out", out, {"--net": net, "--gnet": gnet})
    target = select_device(device)
    snapshot = load_image_network(net, target)
    spec, (low, high) = snapshot.net.spec, noise_range(snapshot.net)
    denoiser = accelerated(snapshot.net, images)
    if guidance != 1:
        if gnet is None and not spec.conditioning.optional:
            raise UserError(f"--guidance={guidance:g} needs a guiding network: give --gnet")
        guide = Unconditional(denoiser)
        if gnet is not None:
            loaded = load_image_network(gnet, target)
            check_guide(spec, loaded.net.spec)
            guide = accelerated(loaded.net, images)
        denoiser = GuidedDenoiser(denoiser, guide, guidance)
    low = max(low, SIGMA_MIN) if sigma_min is None else sigma_min
    high = min(high, SIGMA_MAX) if sigma_max is None else sigma_max
    edm = grid_for(SamplerConfig(grid=GridConfig(num_steps=steps, sigma_min=low, sigma_max=high)), snapshot.net)

    count = images + images // 2
    rnd = StackedRandomGenerator(target, range(seed, seed + count))
    noise = rnd.randn([count, *spec.shape])
    cond = spec.conditioning.draw(rnd, count)
    shown, unseen = (None, None) if cond is None else cond.split([images, count - images])

    def D(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        c = shown if shown is None else shown.repeat(len(x) // images, *[1] * (shown.ndim - 1))
        return denoiser(x.float(), sigma, c).double()

    with torch.inference_mode():
        found, expected = ScheduleSearch(D, noise[:images], solver, low, high, candidates).levels(steps)
        grid = grid_for(SamplerConfig(solver=solver, grid=GridConfig(sigmas=tuple(found))), snapshot.net)
        measured = distances(denoiser, solver, {"EDM": edm, "found": grid}, noise[images:], unseen)
    evaluations = 2 * steps - 1 if solver == "heun" else steps
    lines = [
        f"Noise levels for --sampler={solver}, {evaluations} evaluations, guidance {guidance:g}",
        f"of {net}, sha256 {file_sha256(snapshot.path)}",
        f"by scripts/optimize_schedule.py --images={images} --candidates={candidates} --seed={seed}",
        f"of OpenEDM2 {code_version()}",
        f"distance to the exact solution of {count - images} other images: {measured['found']:.4f} (expected: "
        f"{expected:.4f}); with EDM's levels: {measured['EDM']:.4f}",
    ]
    with atomic_write(out, "w") as f:
        f.write("".join(f"# {line}\n" for line in lines) + "".join(f"{sigma:.6g}\n" for sigma in found))
    print("\n".join(lines))
    print(f"{out}: {', '.join(f'{sigma:.4g}' for sigma in found)}")


if __name__ == "__main__":
    main()
