"""The toy example of autoguidance: train, plot and measure models of a two-dimensional distribution.

`train` fits a model to the ground truth, `plot` draws the paper's figure, and `evaluate` prints its numbers: --help
shows examples. Python callers find `gt` and `ToyModel` here.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dnnlib.cli import (
    CommandGroup,
    device_option,
    given_options,
    imported_when_used,
    offline_option,
    parsed_by,
    with_options,
)
from dnnlib.errors import UserError
from dnnlib.files import atomic_write, check_not_input
from dnnlib.util import code_version
from training.config.fields import all_fields, click_options
from training.config.guidance import GuidanceConfig
from training.config.samplers import SamplerConfig
from training.config.toy import CFG_GUIDANCE, GUIDANCE, MAX_GUIDANCE, ToyConfig, parse_class, parse_weights

if TYPE_CHECKING:
    import torch

    from training.networks.toy import ToyModel
    from training.toy.data import gt
    from training.toy.models import Models

__all__ = ["ToyModel", "gt"]  # for Python callers

MODELS = Path(__file__).parent / "models" / "toy"
NET = MODELS / "clsA-layers04-dim64-iter4096.safetensors"
GNET = MODELS / "clsA-layers04-dim32-iter0512.safetensors"
CFG_NET = MODELS / "clsAB-layers04-dim32-iter0512.safetensors"
PICTURE = Path("toy_example.png")  # where there is neither a display nor --save
WEIGHT = click.FloatRange(-MAX_GUIDANCE, MAX_GUIDANCE)
__getattr__ = imported_when_used({"ToyModel": "training.networks.toy", "gt": "training.toy.data"})


def command_line(ctx: click.Context, leave_out: tuple[str, ...] = ()) -> str:
    """The command that the user gave, as text."""
    return " ".join([f"python toy_example.py {ctx.info_name}", *given_options(ctx, leave_out)])


def chosen_models(
    net: str | None, gnet: str | None, cfg_net: str | None, cls: str | None, device: torch.device
) -> Models:
    """The models that the options name, or those in models/toy; a model of the user's own has no guide by default."""
    from training.snapshot import load_network
    from training.toy.models import load_models

    if net is None and gnet is None:
        gnet = str(GNET)
    load = functools.partial(load_network, device=device)
    return load_models(load, net or str(NET), gnet, cfg_net or str(CFG_NET), cls)


# Which models to load.
MODEL_OPTIONS = [
    click.option("--net", help="Main model  [default: that of class A in models/toy]", metavar="FILE"),
    click.option(
        "--gnet", help="Guide for autoguidance  [default: that in models/toy, unless --net is given]", metavar="FILE"
    ),
    click.option(
        "--cfg-net",
        help="Guide for classifier-free guidance, trained on AB  [default: that in models/toy]",
        metavar="FILE",
    ),
    click.option(
        "--cls",
        help="Class that --net was trained on: A, B or AB  [default: as its file says, else A]",
        callback=parsed_by(parse_class),
    ),
    click.option("--seed", help="Random seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True),
    device_option,
    offline_option,
]


# Guidance, but for what --weights are.
HOW = [field for field in all_fields(GuidanceConfig) if field.key not in ("guidance", "guidance_table")]
HOW_OPTIONS = [
    make for field, make in zip(all_fields(GuidanceConfig), click_options(GuidanceConfig), strict=True) if field in HOW
]


def chosen_guidance(opts: dict[str, Any]) -> GuidanceConfig:
    """Takes the options of guidance out of all those of a command.

    Raises:
        UserError: they do not go together, or not with the steps of the toy example.
    """
    given = {field.key: value for field in HOW if (value := opts.pop(field.key)) is not None}
    how = GuidanceConfig.from_flat(given)
    how.check_sampler(SamplerConfig())
    how.check_given(given)
    return how


@click.group(cls=CommandGroup)
def main() -> None:
    """The toy example of "Guiding a Diffusion Model with a Bad Version of Itself".

    \b
    Examples:
      # The paper's figure, with the models in models/toy
      python toy_example.py plot --save=out/toy.png
      # Its numbers
      python toy_example.py evaluate
      # Models like those
      python toy_example.py train --outdir=out/toy
      python toy_example.py train --outdir=out/toy-guide --dim=32 --iterations=512
      python toy_example.py plot --net=out/toy/iter4096.safetensors --gnet=out/toy-guide/iter0512.safetensors
    """


@main.command()
@click.option(
    "--outdir",
    help="Where to save the model, each time the iterations have doubled  [default: nowhere]",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
)
@click.option(
    "--cls",
    help="Class to learn: A, B, or AB for both",
    default=ToyConfig.cls,
    show_default=True,
    callback=parsed_by(parse_class),
)
@click.option(
    "--layers", help="Hidden layers", type=click.IntRange(1, 64), default=ToyConfig.num_layers, show_default=True
)
@click.option(
    "--dim", help="Their width", type=click.IntRange(1, 4096), default=ToyConfig.hidden_dim, show_default=True
)
@click.option(
    "--iterations",
    help="Training length",
    type=click.IntRange(min=1),
    default=ToyConfig.iterations,
    show_default=True,
)
@click.option(
    "--seed", help="Random seed", type=click.IntRange(0, 2**32 - 1), default=ToyConfig.seed, show_default=True
)
@click.option(
    "--viz",
    help="Show the samples in a window during training, if there is a display",
    metavar="BOOL",
    type=bool,
    default=True,
    show_default=True,
)
@click.option(
    "--save",
    help="Also save what the window shows: as an animation (.gif), or as one PNG per frame in a folder",
    metavar="FILE|DIR",
    type=click.Path(path_type=Path),
)
@device_option
@click.pass_context
def train(
    ctx: click.Context,
    outdir: Path | None,
    cls: str,
    layers: int,
    dim: int,
    iterations: int,
    seed: int,
    viz: bool,
    save: Path | None,
    device: str,
) -> None:
    """Train a model by score matching."""
    from torch_utils.device import select_device
    from training.toy.figure import check_frames, open_view
    from training.toy.training import run_training

    if save is not None:
        check_frames(save)
    target = select_device(device)
    config = ToyConfig(cls=cls, num_layers=layers, hidden_dim=dim, iterations=iterations, seed=seed)
    command = command_line(ctx, leave_out=("outdir", "viz", "save", "device"))
    keep = snapshot_writer(outdir, config, command) if outdir is not None else None
    run_training(config, target, open_view(cls, target, save, viz), keep)


def snapshot_writer(outdir: Path, config: ToyConfig, command: str) -> Callable[[int, ToyModel], str]:
    """A function that saves the model after an iteration in a folder, which is created, and returns the path."""
    import torch

    from training.encoders import StandardRGBEncoder
    from training.snapshot import save_network

    outdir.mkdir(parents=True, exist_ok=True)
    metadata = {
        "config": dataclasses.asdict(config),
        "ema_std": config.ema_std,
        "command": command,
        "date": datetime.date.today().isoformat(),
    }

    def write(iteration: int, net: ToyModel) -> str:
        path = outdir / f"iter{iteration:04d}.safetensors"
        nimg = {"nimg": iteration * config.batch}
        save_network(path, net, StandardRGBEncoder(), metadata | nimg, dtype=torch.float32)
        return str(path)

    return write


@main.command()
@with_options(MODEL_OPTIONS)
@click.option("--guidance", help=f"Weight of autoguidance  [default: {GUIDANCE:g}]", metavar="FLOAT", type=WEIGHT)
@click.option(
    "--cfg-guidance",
    help="Weight of classifier-free guidance",
    metavar="FLOAT",
    type=WEIGHT,
    default=CFG_GUIDANCE,
    show_default=True,
)
@click.option(
    "--save",
    help="Save the figure (.png, .pdf, .svg)  [default: show it in a window]",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
)
@click.pass_context
def plot(
    ctx: click.Context,
    seed: int,
    device: str,
    guidance: float | None,
    cfg_guidance: float,
    save: Path | None,
    **names: str | None,
) -> None:
    """Draw the paper's figure: samples with and without guidance, and what guides them."""
    from torch_utils.device import select_device
    from training.toy.figure import check_format, draw_paper_figure, new_figure, require_matplotlib, save_figure

    require_matplotlib()
    if save is not None:
        check_format(save)
    if guidance not in (None, 1) and names["net"] is not None and names["gnet"] is None:
        raise UserError(f"--guidance={guidance:g} needs a guiding model: give --gnet")
    models = chosen_models(**names, device=select_device(device))
    if models.gnet is None and (names["cfg_net"] is not None or cfg_guidance != CFG_GUIDANCE):
        raise UserError("the figure shows classifier-free guidance beside autoguidance: give --gnet, too")
    width = 16 if models.gnet is not None else 8
    figure, window = new_figure(save is None, figsize=(width, 8.8), dpi=100, layout="constrained")
    draw_paper_figure(figure, models, GUIDANCE if guidance is None else guidance, cfg_guidance, seed)
    if window:
        from matplotlib import pyplot

        pyplot.show()
        return
    if save is None:
        print(f"No display: saving the figure as {PICTURE} (--save chooses another name)")
    path = save or PICTURE
    save_figure(figure, path, f"{command_line(ctx, leave_out=('save',))}; OpenEDM2 {code_version()}")
    print(path)


@main.command()
@with_options(MODEL_OPTIONS)
@click.option(
    "--weights",
    help="Guidance weights",
    metavar="LIST",
    default="1.5,2,3,4",
    show_default=True,
    callback=parsed_by(parse_weights),
)
@with_options(HOW_OPTIONS)
@click.option(
    "--samples", help="Samples of each kind", type=click.IntRange(2, 1 << 20), default=1 << 15, show_default=True
)
@click.option(
    "--json",
    "json_path",
    help="Also write the figures to this file",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
)
@click.pass_context
def evaluate(
    ctx: click.Context,
    seed: int,
    device: str,
    weights: list[float],
    samples: int,
    json_path: Path | None,
    **opts: Any,
) -> None:
    """Measure samples without guidance, with classifier-free guidance, and with autoguidance.

    \b
    -log p     mean negative log-density under the ground truth, in nats
    outliers   share of samples outside the smallest region that holds 99 % of the ground truth
    branch KL  divergence of the samples' distribution over the tree's branches from
               that of the ground truth, in nats: large where branches are lost

    Each is given with its standard error. All kinds start from the same noise, so their differences are more certain
    than that.

    \b
    Examples:
      # A weight that falls from 3 to 1 as the noise grows
      python toy_example.py evaluate --weights=3 --guidance-schedule=linear --guidance-ramp=0.02,1
    """
    from torch_utils.device import select_device
    from training.toy.evaluation import HEADING, compare

    how, names = chosen_guidance(opts), opts
    if json_path is not None:
        check_not_input("--json", json_path, {f"--{key.replace('_', '-')}": name for key, name in names.items()})
    target = select_device(device)
    models = chosen_models(**names, device=target)
    rows = []
    print(HEADING)
    for row in compare(models, weights, samples, seed, target, how):
        print(row)
        rows.append(row.to_json())
    if json_path is not None:
        facts: dict[str, Any] = {
            "command": command_line(ctx, leave_out=("json_path",)),
            "date": datetime.date.today().isoformat(),
            "code_version": code_version(),
            "class": models.cls,
            "files": models.names,
            "samples": samples,
            "seed": seed,
            "rows": rows,
        }
        with atomic_write(json_path, "w") as f:
            f.write(json.dumps(facts, indent=2, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
