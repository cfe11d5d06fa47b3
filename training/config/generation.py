"""The options of commands that generate images, and what they stand for.

Imports what needs torch only when networks are loaded, so that a command's help comes at once.
"""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from dnnlib.cli import device_option, given_options, offline_option, parsed_by
from dnnlib.download import is_url
from dnnlib.errors import UserError
from dnnlib.files import file_sha256
from training.config.edm2 import GENERATION_PRESETS, unknown_preset
from training.config.metrics import PRECISIONS
from training.samplers.coefficients import SOLVERS, check_solver

if TYPE_CHECKING:
    import torch

    from training.generation import ImageBatches
    from training.snapshot import Snapshot

Positive = click.FloatRange(min=0, min_open=True)


def parse_interval(text: str) -> tuple[float, float]:
    try:
        lo, hi = (float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"{text!r} is not of the form LO,HI") from None
    if not 0 <= lo < hi:
        raise UserError(f"{text!r}: LO must be less than HI, and not negative")
    return lo, hi


def _number(name: str, default: float, help_text: str, kind: click.ParamType | None = None) -> Callable:
    kind = kind if kind is not None else click.FloatRange(min=0)
    parameter = name.lstrip("-")
    return click.option(name, parameter, help=help_text, metavar="FLOAT", type=kind, default=default, show_default=True)


NETWORK_OPTIONS = [
    click.option("--preset", help="Published networks and guidance; options that are given win", metavar="NAME"),
    click.option(
        "--net", help="Network snapshot: a file, a Hugging Face folder, or a URL (http, file, hf)", metavar="FILE"
    ),
    click.option("--gnet", help="Guiding network snapshot", metavar="FILE"),
]
SAMPLING_OPTIONS = [
    click.option(
        "--class", "class_idx", help="Class of all images  [default: drawn from the seed]", metavar="INT", type=int
    ),
    click.option(
        "--sampler",
        help="Solver; heun evaluates the network twice per step, the others once (see docs/performance.md)",
        type=click.Choice(SOLVERS),
        default="heun",
        show_default=True,
    ),
    click.option(
        "--steps",
        "num_steps",
        help="Sampling steps",
        metavar="INT",
        type=click.IntRange(min=1),
        default=32,
        show_default=True,
    ),
    _number("--sigma_min", 0.002, "Lowest noise level", Positive),
    _number("--sigma_max", 80, "Highest noise level", Positive),
    _number("--rho", 7, "Exponent of the time steps", Positive),
    click.option("--guidance", help="Guidance weight  [default: 1, no guidance]", metavar="FLOAT", type=float),
    click.option(
        "--guidance-interval",
        help="Noise levels at which guidance acts  [default: all]",
        metavar="LO,HI",
        callback=parsed_by(parse_interval),
    ),
    _number("--S_churn", 0, "Strength of added noise"),
    _number("--S_min", 0, "Lowest noise level at which noise is added"),
    _number("--S_max", float("inf"), "Highest noise level at which noise is added"),
    _number("--S_noise", 1, "Scale of added noise"),
    click.option(
        "--precision",
        help="What the networks compute in; auto = fp16 on GPUs, fp32 on CPUs",
        type=click.Choice(["auto", *PRECISIONS]),
        default="auto",
        show_default=True,
    ),
    click.option(
        "--compile",
        "compiled",
        help="On GPUs, let torch.compile make the networks' kernels (a CPU has faster ones in any case)",
        metavar="BOOL",
        type=bool,
        default=False,
        show_default=True,
    ),
    device_option,
    offline_option,
]


@dataclass(frozen=True)
class GenerationOptions:
    """What the options above say. `None` for `preset`, `gnet`, `class_idx` and `guidance_interval` is none of them."""

    preset: str | None
    net: str | None
    gnet: str | None
    class_idx: int | None
    sampler: str
    num_steps: int
    sigma_min: float
    sigma_max: float
    rho: float
    guidance: float | None
    guidance_interval: tuple[float, float] | None
    S_churn: float
    S_min: float
    S_max: float
    S_noise: float
    precision: str
    compiled: bool
    device: str

    @classmethod
    def take(cls, opts: dict[str, Any]) -> GenerationOptions:
        """Take these options out of all those of a command, with networks and guidance of the preset put in.

        Raises:
            UserError: they do not go together, or there is no such preset.
        """
        options = cls(**{field.name: opts.pop(field.name) for field in dataclasses.fields(cls)})
        net, gnet, guidance = options.net, options.gnet, options.guidance
        if options.preset is not None:
            chosen = GENERATION_PRESETS.get(options.preset)
            if chosen is None:
                raise unknown_preset("--preset", options.preset, GENERATION_PRESETS)
            net, guidance = net or chosen.net, chosen.guidance if guidance is None else guidance
            if guidance != 1:
                gnet = gnet or chosen.gnet
        if net is None:
            raise UserError("which network? Give --net or --preset (see generate_images.py --list-presets)")
        guidance = 1.0 if guidance is None else guidance
        if guidance != 1 and gnet is None:
            raise UserError(f"--guidance={guidance:g} needs a guiding network: give --gnet")
        if options.sigma_min > options.sigma_max:
            raise UserError(f"--sigma_min={options.sigma_min:g} is above --sigma_max={options.sigma_max:g}")
        check_solver(options.sampler, options.S_churn)
        return dataclasses.replace(options, net=net, gnet=gnet, guidance=guidance)

    def command(self, ctx: click.Context, leave_out: Sequence[str] = ()) -> str:
        """The command line without presets."""
        options = [f"--net={shlex.quote(str(self.net))}"]
        if self.gnet is not None:
            options += [f"--gnet={shlex.quote(self.gnet)}", f"--guidance={self.guidance:g}"]
        options += given_options(ctx, leave_out=["preset", "net", "gnet", "guidance", *leave_out])
        return " \\\n    ".join(["python generate_images.py", *options])

    def sampler_kwargs(self) -> dict[str, Any]:
        """Arguments of the sampler."""
        names = ("num_steps", "sigma_min", "sigma_max", "rho", "guidance", "S_churn", "S_min", "S_max", "S_noise")
        kwargs = {"solver": self.sampler} | {name: getattr(self, name) for name in names}
        if self.guidance_interval is not None and self.guidance != 1:
            kwargs["guidance_interval"] = self.guidance_interval
        return kwargs

    def fetch(self) -> None:
        """Fetch networks that are URLs: once for all processes of a machine. To be called by all of them."""
        from torch_utils import distributed
        from training.snapshot import open_snapshot

        with distributed.fail_together():
            if distributed.get_local_rank() == 0:
                for network in (self.net, self.gnet):
                    if network is not None and is_url(network):
                        open_snapshot(network)

    def load(self) -> LoadedGenerator:
        """
        Raises:
            UserError: a network cannot be loaded, or they do not go together.
        """
        from torch_utils import distributed
        from torch_utils.device import check_compiler, resolve_precision, select_device, set_up_device
        from training.generation import load_image_network

        device = select_device(self.device)
        set_up_device(device)
        if self.compiled and device.type != "cpu":
            check_compiler(device)
        assert self.net is not None
        snapshot = load_image_network(self.net, device)
        guided = self.guidance != 1
        guide = load_image_network(self.gnet, device) if guided and self.gnet is not None else None
        if not guided and (self.gnet is not None or self.guidance_interval is not None):
            given = "--gnet" if self.gnet is not None else "--guidance-interval"
            distributed.print0(f"Note: {given} has no effect without --guidance")
        snapshot.net.precision = resolve_precision(self.precision, device)
        if guide is not None:
            guide.net.precision = snapshot.net.precision
            if guide.metadata["encoder"] != snapshot.metadata["encoder"]:
                raise UserError(
                    f"--gnet={self.gnet} works on other latents than --net={self.net}: they must share an encoder"
                )
        snapshot.encoder.prepare(device)
        return LoadedGenerator(self, snapshot, guide, device)


@dataclass(frozen=True)
class LoadedGenerator:
    """Networks that are ready to generate."""

    options: GenerationOptions
    snapshot: Snapshot
    guide: Snapshot | None
    device: torch.device

    @property
    def suffix(self) -> str:
        """File type of the images."""
        return self.snapshot.encoder.output_suffix(self.snapshot.net.img_channels)

    @property
    def resolution(self) -> int:
        """Height and width of the images."""
        from training.generation import image_resolution

        return image_resolution(self.snapshot.net, self.snapshot.encoder, self.device)

    def images(self, seeds: Sequence[int], **kwargs: Any) -> ImageBatches:
        """The images of these seeds; further arguments and errors are those of `generate_images`."""
        from training.generation import generate_images

        return generate_images(
            self.snapshot.net,
            self.guide.net if self.guide is not None else None,
            self.snapshot.encoder,
            seeds=seeds,
            class_idx=self.options.class_idx,
            device=self.device,
            compiled=self.options.compiled,
            **self.options.sampler_kwargs(),
            **kwargs,
        )

    def describe(self, seeds: Sequence[int]) -> dict[str, Any]:
        """What makes the images of these seeds, one after the other, as plain JSON values."""
        from training.snapshot import open_snapshot

        options = self.options
        facts: dict[str, Any] = {}
        sources = {"net": options.net, "gnet": options.gnet if self.guide is not None else None}
        for key, source in sources.items():
            if source is not None:
                facts |= {key: source, f"{key}_sha256": file_sha256(open_snapshot(source).path)}
        label_dim = self.snapshot.net.label_dim
        labels = "none" if label_dim == 0 else "drawn from the seed"
        sampler = options.sampler_kwargs()
        if options.S_churn == 0:
            sampler = {key: value for key, value in sampler.items() if not key.startswith("S_")}
        elif sampler["S_max"] == math.inf:  # which JSON does not know
            del sampler["S_max"]
        if "guidance_interval" in sampler:
            lo, hi = sampler["guidance_interval"]
            sampler["guidance_interval"] = [lo, None if hi == math.inf else hi]
        return {
            **facts,
            "seeds": f"{seeds[0]}-{seeds[-1]}",
            "labels": labels if options.class_idx is None else f"class {options.class_idx}",
            "sampler": sampler,
            "precision": self.snapshot.net.precision,
        }
