"""Samplers: solvers, the noise levels that they visit, and their own options. One home of their defaults."""

import itertools
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

from dnnlib.errors import UserError
from training.config.dpm_solver import SPACINGS, AdaptiveDPMSolver, DPMSolver
from training.config.fields import Config, all_fields, option, show
from training.config.tables import MAX_LINES, read_numbers
from training.config.unipc import UniPC

SIGMA_MIN, SIGMA_MAX = 0.002, 80.0  # noise levels of EDM (Karras et al. 2022, Table 1)
CONSISTENCY_LEVELS = (20.0, 0.8)
SCHEDULES = ("network", "ve", "vp", "subvp")
PREDICTORS = ("reverse_diffusion", "euler_maruyama", "ancestral_sampling", "none")
CORRECTORS = ("langevin", "ald", "none")
NORMS = ("sample", "batch")


def parse_levels(text: str) -> tuple[float, ...]:
    """Noise levels from numbers with commas between, or from a file with one per line; a 0 at the end is left out.

    Raises:
        UserError: there is no such file, or the levels do not fall.
    """
    try:
        levels = [float(part) for part in text.split(",")]
    except ValueError:
        levels = [sigma for (sigma,) in read_numbers(text, columns=1)]
    if levels[-1] == 0:
        del levels[-1]
    if not levels:
        raise UserError(f"{text!r}: no noise level but 0")
    return tuple(levels)


@dataclass(frozen=True, kw_only=True)
class GridConfig(Config):
    """The noise levels that a sampler visits: those of EDM (Karras et al. 2022, Eq. 5), or of times of a schedule."""

    num_steps: int = option(32, "Sampling steps; solvers with adaptive steps ignore them", flag="--steps", low=1)
    sigma_min: float | None = option(
        None,
        "Lowest noise level",
        flag="--sigma_min",
        above=0,
        default_text=f"{SIGMA_MIN:g}, or the network's lowest; solvers in time: its schedule's last time",
    )
    sigma_max: float | None = option(
        None,
        "Highest noise level",
        flag="--sigma_max",
        above=0,
        default_text=f"{SIGMA_MAX:g}, or the network's highest; solvers in time: its schedule's first time",
    )
    rho: float = option(7.0, "Exponent of the time steps of --spacing=edm", above=0, default_text="7")
    spacing: str = option(
        "edm",
        "What steps are even in: sigma to the power 1/rho, or the schedule's time t, ln(1/sigma), the root of t",
        choices=("edm", *SPACINGS),
    )
    schedule: str = option(
        "network",
        "Schedule whose times count and whose SDE is followed; network = the one that the network was trained on",
        choices=SCHEDULES,
    )
    sigmas: tuple[float, ...] | None = option(
        None,
        "Noise levels to visit, from the highest to the lowest, in place of --steps and the like: numbers with commas "
        "between, or a file with one per line (scripts/optimize_schedule.py makes such files). With "
        f"--sampler=consistency, {show(CONSISTENCY_LEVELS)} by default, or the network's highest where that is lower",
        parse=parse_levels,
        metavar="FILE|LIST",
        above=0,
        items=(1, MAX_LINES),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.sigma_min or SIGMA_MIN, self.sigma_max or SIGMA_MAX
        if None not in (self.sigma_min, self.sigma_max) and low > high:
            raise UserError(f"--sigma_min={low:g} is above --sigma_max={high:g}")
        if any(low >= high for high, low in itertools.pairwise(self.sigmas or ())):
            raise UserError(f"--sigmas={show(self.sigmas)}: noise levels must fall from each to the next")


@dataclass(frozen=True, kw_only=True)
class Churn(Config):
    """Noise that is added at each step (EDM, Algorithm 2)."""

    S_churn: float = option(0.0, "Strength of added noise", flag="--S_churn", low=0, default_text="0")
    S_min: float = option(0.0, "Lowest noise level at which noise is added", flag="--S_min", low=0, default_text="0")
    S_max: float = option(math.inf, "Highest noise level at which noise is added", flag="--S_max", low=0, infinite=True)
    S_noise: float = option(1.0, "Scale of added noise", flag="--S_noise", low=0, default_text="1")


@dataclass(frozen=True, kw_only=True)
class PredictorCorrector(Config):
    """Predictor and corrector of the reverse SDE (Song et al. 2021, Algorithms 1 to 5)."""

    predictor: str = option("reverse_diffusion", "Predictor of --sampler=pc", choices=PREDICTORS)
    corrector: str = option("langevin", "Corrector of --sampler=pc", choices=CORRECTORS)
    n_steps_each: int = option(1, "Steps of the corrector at each noise level", flag="--n-steps-each", low=1)
    snr: float = option(0.16, "Signal-to-noise ratio of the corrector's steps", above=0)
    noise_removal: bool = option(True, "Leave out the noise of the last predictor step")
    probability_flow: bool = option(False, "Predict by the probability flow in place of the SDE")
    corrector_norm: str = option(
        "sample",
        "Norms that the corrector's steps follow: the sample's own, or means over the batch, as published",
        choices=NORMS,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.predictor == "ancestral_sampling" and self.probability_flow:
            raise UserError("ancestral sampling is no probability flow: use reverse_diffusion or euler_maruyama")


@dataclass(frozen=True, kw_only=True)
class EulerMaruyama(Config):
    """Euler's steps in the time of a schedule."""

    stochastic: bool = option(True, "Follow the SDE by --sampler=euler-maruyama; otherwise its probability flow")


@dataclass(frozen=True, kw_only=True)
class RungeKutta(Config):
    """Step size control of Dormand and Prince's method (Song et al. 2021, Appendix D.4)."""

    rtol: float = option(1e-5, "Relative tolerance of --sampler=rk45", above=0)
    atol: float = option(1e-5, "Absolute tolerance of --sampler=rk45", above=0)
    common_norm: bool = option(False, "Give all images of a batch the same steps, as published")
    denoise: int | None = option(
        None,
        "Remove the noise that is left at the end of --sampler=rk45 by one step of reverse diffusion, of so many",
        metavar="STEPS",
        low=1,
    )


class SolverKind(NamedTuple):
    """A solver: the section of `SamplerConfig` with its own options, and the grid that it takes.

    `grid` is 'levels' (any), 'inner' (with levels inside of steps), 'times' (of a schedule, evenly spaced), 'ends' (of
    a schedule, the first and the last, with steps of the solver's own) or 'listed' (--sigmas only).
    """

    section: str | None
    grid: str = "levels"


SOLVERS: dict[str, SolverKind] = {
    "heun": SolverKind("churn"),
    "euler": SolverKind("churn"),
    "dpmpp-2m": SolverKind(None),
    "dpmpp-3m": SolverKind(None),
    "sqrt-3m": SolverKind(None),
    "dpm-single": SolverKind("dpm", "inner"),
    "dpm-multi": SolverKind("dpm"),
    "dpm-adaptive": SolverKind("dpm_adaptive", "ends"),
    "unipc": SolverKind("unipc"),
    "euler-maruyama": SolverKind("euler_maruyama", "times"),
    "pc": SolverKind("pc", "times"),
    "rk45": SolverKind("rk45", "ends"),
    "consistency": SolverKind(None, "listed"),
}


# Those whose noise levels can be any list.
LEVEL_SOLVERS = tuple(name for name, kind in SOLVERS.items() if kind.grid == "levels")


@dataclass(frozen=True, kw_only=True)
class SamplerConfig(Config):
    """A solver, the noise levels that it visits, and its own options."""

    solver: str = option(
        "heun",
        "Solver; heun evaluates the network twice per step, most others once (see docs/samplers.md)",
        flag="--sampler",
        choices=tuple(SOLVERS),
    )
    grid: GridConfig = GridConfig()
    churn: Churn = Churn()
    dpm: DPMSolver = DPMSolver()
    dpm_adaptive: AdaptiveDPMSolver = AdaptiveDPMSolver()
    unipc: UniPC = UniPC()
    euler_maruyama: EulerMaruyama = EulerMaruyama()
    pc: PredictorCorrector = PredictorCorrector()
    rk45: RungeKutta = RungeKutta()

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise UserError(f"unknown sampler {self.solver!r} (known: {', '.join(SOLVERS)})")
        super().__post_init__()
        if self.churn.S_churn > 0 and self.kind.section != "churn":
            raise UserError(
                f"S_churn={self.churn.S_churn:g} adds noise, which {self.solver} cannot follow: it relies on earlier "
                f"steps; use heun or euler"
            )
        if self.grid.sigmas is not None and self.kind.grid not in ("levels", "listed"):
            raise UserError(
                f"--sigmas: {self.solver} takes no list of noise levels: use one of {', '.join(LEVEL_SOLVERS)}"
            )

    @property
    def kind(self) -> SolverKind:
        return SOLVERS[self.solver]

    @property
    def listed(self) -> bool:
        """Whether the noise levels are a list, --sigmas or the solver's own, and no other option chooses them."""
        return self.kind.grid == "listed" or self.grid.sigmas is not None

    @property
    def in_time(self) -> bool:
        """Whether the noise levels are those of times of a schedule."""
        return self.kind.grid in ("times", "ends") or (self.grid.spacing != "edm" and not self.listed)

    @property
    def options(self) -> Any:
        """The section of the solver's own options; None = it has none."""
        return None if self.kind.section is None else getattr(self, self.kind.section)

    def as_options(self) -> list[str]:
        """What differs from the defaults, as on the command line."""
        defaults = SamplerConfig().flat()
        flags = {field.key: field.flag for field in all_fields(SamplerConfig)}
        return [f"{flags[key]}={show(value)}" for key, value in self.flat().items() if value != defaults[key]]

    def without_effect(self, given: Collection[str]) -> list[str]:
        """Those of the given options, by their names, that this sampler does not look at."""
        names = {kind.section for kind in SOLVERS.values() if kind.section is not None} - {self.kind.section}
        fields = [field for name in sorted(names) for field in all_fields(type(getattr(self, name)))]
        unused = ["rho"] if self.in_time else ["schedule"]
        unused += ["spacing"] if self.kind.grid in ("times", "ends") else []
        unused += ["steps"] if self.kind.grid == "ends" else []
        if self.listed:
            unused = [field.key for field in all_fields(GridConfig) if field.key != "sigmas"]
        return [field.flag for field in fields if field.key in given] + [
            f"--{name}" for name in unused if name in given
        ]

    def describe(self) -> dict[str, Any]:
        """What it stands for, as plain JSON values; no options that have no effect."""
        if self.kind.grid == "listed":
            return {"solver": self.solver}
        facts: dict[str, Any] = {"solver": self.solver, **self.grid.to_json()}
        facts = {name: value for name, value in facts.items() if value is not None}
        if self.grid.sigmas is not None:
            facts = {"solver": self.solver, "sigmas": list(self.grid.sigmas), "num_steps": len(self.grid.sigmas)}
        elif self.in_time:
            del facts["rho"]
        else:
            del facts["spacing"], facts["schedule"]
        if self.kind.grid == "ends":
            del facts["num_steps"]
        if self.kind.grid in ("times", "ends"):
            del facts["spacing"]
        if self.kind.section not in (None, "churn") or self.churn.S_churn > 0:
            # Infinity is no JSON.
            facts |= {name: value for name, value in self.options.to_json().items() if value not in (math.inf, None)}
        return facts
