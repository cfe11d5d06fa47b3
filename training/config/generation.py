"""What makes images: networks, sampler, guidance, and what they compute in. One home of the samplers' defaults."""

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import click

from dnnlib.cli import given_options
from dnnlib.errors import UserError
from training.config.edm2 import GENERATION_PRESETS
from training.config.fields import Config, all_fields, option
from training.config.metrics import PRECISIONS
from training.config.names import unknown_preset


def check_seed(largest: int) -> None:
    """Check the largest of some seeds.

    Raises:
        UserError: random generators would take it for a smaller one.
    """
    if largest >= 2**32:
        raise UserError(f"seed {largest} is too large: seeds are less than 2^32, beyond which images would repeat")


def parse_interval(text: str) -> tuple[float, float]:
    """Noise levels of the form 'LO,HI'.

    Raises:
        UserError: of another form, or not 0 <= LO < HI.
    """
    try:
        lo, hi = (float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"{text!r} is not of the form LO,HI") from None
    if not 0 <= lo < hi:
        raise UserError(f"{text!r}: LO must be less than HI, and not negative")
    return lo, hi


@dataclass(frozen=True, kw_only=True)
class EDMGrid(Config):
    """The noise levels of EDM (Karras et al. 2022, Eq. 5)."""

    num_steps: int = option(32, "Sampling steps", flag="--steps", low=1)
    sigma_min: float = option(0.002, "Lowest noise level", flag="--sigma_min", above=0)
    sigma_max: float = option(80.0, "Highest noise level", flag="--sigma_max", above=0, default_text="80")
    rho: float = option(7.0, "Exponent of the time steps", above=0, default_text="7")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sigma_min > self.sigma_max:
            raise UserError(f"--sigma_min={self.sigma_min:g} is above --sigma_max={self.sigma_max:g}")


@dataclass(frozen=True, kw_only=True)
class Churn(Config):
    """Noise that is added at each step (EDM, Algorithm 2)."""

    S_churn: float = option(0.0, "Strength of added noise", flag="--S_churn", low=0, default_text="0")
    S_min: float = option(0.0, "Lowest noise level at which noise is added", flag="--S_min", low=0, default_text="0")
    S_max: float = option(math.inf, "Highest noise level at which noise is added", flag="--S_max", low=0, infinite=True)
    S_noise: float = option(1.0, "Scale of added noise", flag="--S_noise", low=0, default_text="1")


# The solvers, and the section of `SamplerConfig` with each one's own options.
SOLVERS: dict[str, str | None] = {
    "heun": "churn",
    "euler": "churn",
    "dpmpp-2m": None,
    "dpmpp-3m": None,
    "sqrt-3m": None,
}


@dataclass(frozen=True, kw_only=True)
class SamplerConfig(Config):
    """A solver, the noise levels that it visits, and its own options."""

    solver: str = option(
        "heun",
        "Solver; heun evaluates the network twice per step, the others once (see docs/performance.md)",
        flag="--sampler",
        choices=tuple(SOLVERS),
    )
    grid: EDMGrid = EDMGrid()
    churn: Churn = Churn()

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise UserError(f"unknown sampler {self.solver!r} (known: {', '.join(SOLVERS)})")
        super().__post_init__()
        if self.churn.S_churn > 0 and SOLVERS[self.solver] != "churn":
            raise UserError(
                f"S_churn={self.churn.S_churn:g} adds noise, which {self.solver} cannot follow: it relies on earlier "
                f"steps; use heun or euler"
            )

    @property
    def options(self) -> Any:
        """The section of the solver's own options; None = it has none."""
        section = SOLVERS[self.solver]
        return None if section is None else getattr(self, section)

    def describe(self) -> dict[str, Any]:
        """What it stands for, as plain JSON values; no options that have no effect."""
        facts: dict[str, Any] = {"solver": self.solver, **self.grid.to_json()}
        if self.churn.S_churn > 0:
            # Infinity is no JSON.
            facts |= {name: value for name, value in self.churn.to_json().items() if value != math.inf}
        return facts


@dataclass(frozen=True, kw_only=True)
class GuidanceConfig(Config):
    """The weight of guidance, and the noise levels lo < sigma <= hi at which it acts."""

    guidance: float = option(1.0, "Guidance weight", default_text="1, no guidance")
    guidance_interval: tuple[float, float] | None = option(
        None,
        "Noise levels at which guidance acts",
        parse=parse_interval,
        metavar="LO,HI",
        default_text="all",
        infinite=True,
    )

    @property
    def interval(self) -> tuple[float, float]:
        return self.guidance_interval or (0.0, math.inf)

    def describe(self) -> dict[str, Any]:
        """What it stands for, as plain JSON values."""
        facts: dict[str, Any] = {"guidance": self.guidance}
        if self.guidance_interval is not None and self.guidance != 1:
            lo, hi = self.guidance_interval
            facts["guidance_interval"] = [lo, None if hi == math.inf else hi]
        return facts


@dataclass(frozen=True, kw_only=True)
class NetworksConfig(Config):
    """The networks that make images."""

    preset: str | None = option(None, "Published networks and guidance; options that are given win", metavar="NAME")
    net: str | None = option(
        None, "Network snapshot: a file, a Hugging Face folder, or a URL (http, file, hf)", metavar="FILE"
    )
    gnet: str | None = option(None, "Guiding network snapshot", metavar="FILE")
    encoder: str | None = option(
        None,
        "VAE that decodes latents: owner/repo on the Hugging Face hub, a folder or a .safetensors file",
        metavar="NAME",
        default_text="the one that the snapshot names",
    )
    trust_encoder: bool = option(False, "Fetch whatever VAE the snapshot names on the hub")


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(Config):
    """How images are made of noise."""

    class_idx: int | None = option(None, "Class of all images", flag="--class", default_text="drawn from the seed")
    sampler: SamplerConfig = SamplerConfig()
    guidance: GuidanceConfig = GuidanceConfig()
    precision: str = option(
        "auto", "What the networks compute in; auto = fp16 on GPUs, fp32 on CPUs", choices=("auto", *PRECISIONS)
    )
    compiled: bool = option(
        False,
        "On GPUs, let torch.compile make the networks' kernels (a CPU has faster ones in any case)",
        flag="--compile",
    )
    device: str = option(
        "auto",
        "Where to compute; auto = the first of cuda, mps, cpu that is there",
        choices=("auto", "cpu", "cuda", "mps"),
    )


@dataclass(frozen=True, kw_only=True)
class GenerationConfig(Config):
    """Networks, and how images are made with them."""

    networks: NetworksConfig = NetworksConfig()
    sampling: SamplingConfig = SamplingConfig()

    @classmethod
    def take(cls, opts: dict[str, Any]) -> "GenerationConfig":
        """Take these options out of all those of a command, and add networks and guidance of the preset.

        Raises:
            UserError: they do not go together, or there is no such preset.
        """
        names = [field.key for field in all_fields(cls)]
        given = {name: value for name in names if (value := opts.pop(name)) is not None}
        config = cls.from_flat(given)
        net, gnet, guidance = config.networks.net, config.networks.gnet, config.sampling.guidance.guidance
        preset = config.networks.preset
        if preset is not None:
            chosen = GENERATION_PRESETS.get(preset)
            if chosen is None:
                raise unknown_preset("--preset", preset, GENERATION_PRESETS)
            net, guidance = net or chosen.net, given.get("guidance", chosen.guidance)
            if guidance != 1:
                gnet = gnet or chosen.gnet
        if net is None:
            raise UserError("which network? Give --net or --preset (see generate_images.py --list-presets)")
        if guidance != 1 and gnet is None:
            raise UserError(f"--guidance={guidance:g} needs a guiding network: give --gnet")
        return cls.from_flat({"net": net, "gnet": gnet, "guidance": guidance}, config)

    def command(self, ctx: click.Context, leave_out: Sequence[str] = ()) -> str:
        """The command line without presets."""
        networks, guidance = self.networks, self.sampling.guidance.guidance
        options = [f"--net={shlex.quote(str(networks.net))}"]
        if networks.gnet is not None:
            options += [f"--gnet={shlex.quote(networks.gnet)}", f"--guidance={guidance:g}"]
        options += given_options(ctx, leave_out=["preset", "net", "gnet", "guidance", *leave_out])
        return " \\\n    ".join(["python generate_images.py", *options])
