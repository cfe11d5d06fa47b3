"""The toy example of autoguidance: train, plot and measure models of a two-dimensional distribution."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from tqdm import tqdm

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
from dnnlib.files import atomic_write
from dnnlib.util import code_version
from training.config.metrics import TOY_CLASSES

if TYPE_CHECKING:
    import torch

    from training.networks.toy import ToyModel
    from training.toy.data import gt

__all__ = ["ToyModel", "gt"]  # for Python callers

MODELS = Path(__file__).parent / "models" / "toy"
NET = MODELS / "clsA-layers04-dim64-iter4096.safetensors"
GNET = MODELS / "clsA-layers04-dim32-iter0512.safetensors"
CFG_NET = MODELS / "clsAB-layers04-dim32-iter0512.safetensors"
GUIDANCE, CFG_GUIDANCE, MAX_GUIDANCE = 3.0, 4.0, 100.0
PICTURE = Path("toy_example.png")  # where there is neither a display nor --save
FIRST_SNAPSHOT = 256  # then at every doubling of the iterations, and at the end
FRAME_INTERVAL = 64  # iterations
WEIGHT = click.FloatRange(-MAX_GUIDANCE, MAX_GUIDANCE)
__getattr__ = imported_when_used({"ToyModel": "training.networks.toy", "gt": "training.toy.data"})


def parse_class(text: str) -> str:
    if text not in TOY_CLASSES:
        raise UserError(f"unknown class {text!r} (known: {', '.join(TOY_CLASSES)})")
    return text


def parse_weights(text: str) -> list[float]:
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        weights = [math.nan]
    if not all(abs(weight) <= MAX_GUIDANCE for weight in weights):
        raise UserError(f"{text!r} is not a list of numbers such as 1.5,2,3 (up to {MAX_GUIDANCE:g})")
    return weights


def command_line(ctx: click.Context, leave_out: tuple[str, ...] = ()) -> str:
    """The command that was given, as text."""
    return " ".join([f"python toy_example.py {ctx.info_name}", *given_options(ctx, leave_out)])


class Models:
    """The models of `plot` and `evaluate`: what the options name, or those in models/toy.

    Raises:
        UserError: a file is missing, damaged, or of another kind or class, `guidance` has no guide, or the guide is
            the model itself.
    """

    def __init__(
        self,
        net: str | None,
        gnet: str | None,
        cfg_net: str | None,
        cls: str | None,
        device: torch.device,
        guidance: float | None = None,
    ):
        if net is None and gnet is None:
            gnet = str(GNET)
        if guidance is not None and guidance != 1 and gnet is None:
            raise UserError(f"--guidance={guidance:g} needs a guiding model: give --gnet")
        net, cfg_net = net or str(NET), cfg_net or str(CFG_NET)
        self.names = {"net": Path(net).name, "gnet": gnet and Path(gnet).name, "cfg_net": Path(cfg_net).name}
        self.net, metadata = load_toy_model("--net", net, device)
        self.gnet = load_toy_model("--gnet", gnet, device)[0] if gnet is not None else None
        if self.gnet is not None and _are_equal(self.net, self.gnet):
            raise UserError(f"--gnet={gnet} is the same model as --net={net}: give a worse one, or no --gnet")
        self.cfg_net, cfg_metadata = load_toy_model("--cfg-net", cfg_net, device)
        learned = _learned_class(metadata)
        if cls is not None and learned in TOY_CLASSES and cls != learned:
            raise UserError(f"--cls={cls}, but {net} has learned {learned}")
        if learned in ("A", "B") and _learned_class(cfg_metadata) == learned:
            raise UserError(f"--cfg-net={cfg_net} has learned {learned} alone, like --net: it must know both classes")
        self.cls: str = cls or (learned if learned in TOY_CLASSES else "A")


def _learned_class(metadata: dict[str, Any]) -> str | None:
    return (metadata.get("config") or {}).get("cls")


def _are_equal(a: ToyModel, b: ToyModel) -> bool:
    parameters = zip(a.parameters(), b.parameters(), strict=True)
    return a.init_kwargs == b.init_kwargs and all((p == q).all() for p, q in parameters)


def load_toy_model(option: str, path: str, device: torch.device) -> tuple[ToyModel, dict[str, Any]]:
    from training.networks.toy import ToyModel
    from training.snapshot import load_network

    snapshot = load_network(path, device)
    net = snapshot.net
    if not isinstance(net, ToyModel):
        raise UserError(f"{option}={path} holds a {type(net).__name__}, not a model of the toy example")
    if net.init_kwargs["in_dim"] != 2:
        raise UserError(f"{option}={path} is a model of {net.init_kwargs['in_dim']} dimensions, not 2")
    return net, snapshot.metadata


# Which models to load.
MODEL_OPTIONS = [
    click.option("--net", help="Model  [default: that of class A in models/toy]", metavar="FILE"),
    click.option("--gnet", help="Its guide  [default: that in models/toy, if --net is not given]", metavar="FILE"),
    click.option(
        "--cfg-net",
        help="Guide of classifier-free guidance, trained on AB  [default: that in models/toy]",
        metavar="FILE",
    ),
    click.option(
        "--cls",
        help="Class that --net has learned: A, B or AB  [default: as its file says, else A]",
        callback=parsed_by(parse_class),
    ),
    click.option("--seed", help="Random seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True),
    device_option,
    offline_option,
]


@click.group(cls=CommandGroup)
def main() -> None:
    """The toy example of "Guiding a Diffusion Model with a Bad Version of Itself".

    \b
    Examples:
      # The paper's figure, with the models that are in models/toy
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
    help="Where to save the model, every time that the iterations have doubled  [default: nowhere]",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
)
@click.option(
    "--cls",
    help="Class to learn: A, B, or AB for both",
    default="A",
    show_default=True,
    callback=parsed_by(parse_class),
)
@click.option("--layers", help="Hidden layers", type=click.IntRange(1, 64), default=4, show_default=True)
@click.option("--dim", help="Their width", type=click.IntRange(1, 4096), default=64, show_default=True)
@click.option("--iterations", help="Training length", type=click.IntRange(min=1), default=4096, show_default=True)
@click.option("--seed", help="Random seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True)
@click.option(
    "--viz",
    help="Show the samples in a window as they become better, where there is a display",
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
    import torch

    from torch_utils.device import select_device
    from training.encoders import StandardRGBEncoder
    from training.snapshot import save_network
    from training.toy.figure import TrainingView, check_frames, require_matplotlib
    from training.toy.training import ToyConfig, train_toy

    if save is not None:
        require_matplotlib()
        check_frames(save)
    target = select_device(device)
    if outdir is not None:
        outdir.mkdir(parents=True, exist_ok=True)
    config = ToyConfig(cls=cls, num_layers=layers, hidden_dim=dim, iterations=iterations, seed=seed)
    metadata = {
        "config": dataclasses.asdict(config),
        "ema_std": config.ema_std,
        "command": command_line(ctx, leave_out=("outdir", "viz", "save", "device")),
        "date": datetime.date.today().isoformat(),
    }
    saved_at = {iterations} | {FIRST_SNAPSHOT << i for i in range(iterations.bit_length())}
    view = None
    if viz or save is not None:
        try:
            require_matplotlib()
            view = TrainingView(cls, target, save, window=viz)
        except UserError as err:  # the window is only an extra
            print(f"Note: no window: {err}")
            if save is not None:
                view = TrainingView(cls, target, save, window=False)
    with tqdm(total=iterations, unit="it", dynamic_ncols=True) as progress:
        for iteration, loss, ema in train_toy(config, target):
            if iteration % FRAME_INTERVAL == 0 or iteration == iterations:
                progress.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
                if view is not None and view.wanted:
                    view.draw(iteration, loss.item(), ema)
            progress.update()
            if outdir is not None and iteration in saved_at:
                path = outdir / f"iter{iteration:04d}.safetensors"
                nimg = {"nimg": iteration * config.batch}
                save_network(path, ema, StandardRGBEncoder(), metadata | nimg, dtype=torch.float32)
                progress.write(str(path))
    if view is not None:
        view.finish()


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
    net: str | None,
    gnet: str | None,
    cfg_net: str | None,
    cls: str | None,
    seed: int,
    device: str,
    guidance: float | None,
    cfg_guidance: float,
    save: Path | None,
) -> None:
    """Draw the paper's figure: samples with and without guidance, and what guides them."""
    from torch_utils.device import select_device
    from training.toy.figure import check_format, draw_paper_figure, new_figure, require_matplotlib, save_figure

    require_matplotlib()
    if save is not None:
        check_format(save)
    models = Models(net, gnet, cfg_net, cls, select_device(device), guidance)
    if models.gnet is None and (cfg_net is not None or cfg_guidance != CFG_GUIDANCE):
        raise UserError("the figure shows classifier-free guidance beside autoguidance: give --gnet, too")
    width = 16 if models.gnet is not None else 8
    figure, window = new_figure(save is None, figsize=(width, 8.8), dpi=100, layout="constrained")
    draw_paper_figure(
        figure,
        models.cls,
        models.net,
        models.gnet,
        GUIDANCE if guidance is None else guidance,
        models.cfg_net,
        cfg_guidance,
        seed,
    )
    if window:
        from matplotlib import pyplot

        pyplot.show()
        return
    if save is None:
        print(f"There is no display to show the figure on; saving it as {PICTURE} (choose with --save)")
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
    net: str | None,
    gnet: str | None,
    cfg_net: str | None,
    cls: str | None,
    seed: int,
    device: str,
    weights: list[float],
    samples: int,
    json_path: Path | None,
) -> None:
    """Measure samples without guidance, with classifier-free guidance, and with autoguidance.

    \b
    -log p     mean negative log-density under the ground truth, in nats
    outliers   share of samples outside the smallest region that holds 99 % of the ground truth
    branch KL  divergence of the share of samples on each of the tree's branches from what it should be, in nats:
               large where branches are lost

    Each with its standard error. The kinds share their noise, so differences between them are surer than that.
    """
    import torch

    from torch_utils.device import select_device
    from training.toy.data import gt
    from training.toy.sampling import measure, sample_toy

    target = select_device(device)
    models = Models(net, gnet, cfg_net, cls, target)
    distribution = gt(models.cls, target)
    noise = torch.randn(samples, 2, generator=torch.Generator(target).manual_seed(seed), device=target)
    guides = {"classifier-free guidance": models.cfg_net, "autoguidance": models.gnet}
    kinds = [("no guidance", None, 1.0)]
    kinds += [(name, guide, w) for name, guide in guides.items() if guide is not None for w in weights]
    rows = []
    print(f"{'':26s}{'w':>4s}{'-log p':>18s}{'outliers':>18s}{'branch KL':>18s}")

    def report(name: str, weight: float | None, x: torch.Tensor) -> None:
        quality = measure(distribution, x)
        plain = {
            key: {k: v if math.isfinite(v) else None for k, v in e._asdict().items()}
            for key, e in quality._asdict().items()
        }
        rows.append({"sampling": name, "weight": weight} | plain)
        nll, outliers, kl = quality
        print(
            f"{name:26s}{'' if weight is None else f'{weight:g}':>4s}"
            f"{nll.value:11.3f} ±{nll.error:5.3f}"
            f"{outliers.value:11.2%} ±{outliers.error:5.2%}"
            f"{kl.value:11.4f} ±{kl.error:6.4f}"
        )

    report("ground truth", None, distribution.sample(samples, generator=torch.Generator(target).manual_seed(seed)))
    for name, guide, weight in kinds:
        report(name, weight, sample_toy(models.net, noise, guide, weight))
    if json_path is not None:
        facts = {
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
