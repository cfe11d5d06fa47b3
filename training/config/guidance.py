"""Guidance: its weight as a function of the noise level, and the rule by which it combines two denoisers."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from dnnlib.errors import UserError
from training.config.fields import Config, all_fields, option
from training.config.samplers import SamplerConfig
from training.config.tables import MAX_LINES, read_numbers

SCHEDULES = ("constant", "linear", "cosine")
METHODS = ("cfg", "apg", "cfg++", "cfg-zero")


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


def read_table(path: str) -> tuple[float, ...]:
    """Noise levels and weights in turn, from the lines 'sigma weight' of a file, from the lowest level to the highest.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    rows = sorted(read_numbers(path, columns=2))
    levels = [sigma for sigma, _ in rows]
    if levels[0] <= 0 or len(set(levels)) < len(levels):
        raise UserError(f"{path}: noise levels must be positive, and each in one line")
    return tuple(number for row in rows for number in row)


@dataclass(frozen=True, kw_only=True)
class APG(Config):
    """Adaptive projected guidance (Sadat et al. 2024, arXiv 2410.02416)."""

    eta: float = option(
        0.0,
        "What --guidance-method=apg keeps of the part of guidance that is parallel to the image; 1 = all",
        flag="--apg-eta",
        default_text="0",
    )
    norm: float | None = option(
        None, "Largest norm of the difference of the two images in --guidance-method=apg", flag="--apg-norm", above=0,
        default_text="no limit",
    )  # fmt: skip
    momentum: float = option(
        -0.5,
        "Share of the last step's difference that --guidance-method=apg adds to that of a step",
        flag="--apg-momentum",
        above=-1,
        below=1,
    )


@dataclass(frozen=True, kw_only=True)
class GuidanceConfig(Config):
    """The weight of guidance at each noise level, and the rule that it follows."""

    guidance: float = option(
        1.0,
        "Guidance weight w; without --gnet, the network guides itself by what it knows of images without a condition "
        "(w is 1 more than the scale of U-ViT's and other papers). With --classifier, the factor of its gradient",
        default_text="1, which is no guidance without --classifier",
    )
    guidance_interval: tuple[float, float] | None = option(
        None,
        "Noise levels at which guidance acts",
        parse=parse_interval,
        metavar="LO,HI",
        default_text="all",
        infinite=True,
    )
    guidance_schedule: str = option(
        "constant",
        "How the weight depends on the noise level: not, or from --guidance at the lower level of --guidance-ramp to "
        "--guidance-end at the upper one, along a line or half a cosine in ln(sigma), and constant beyond them",
        choices=SCHEDULES,
    )
    guidance_ramp: tuple[float, float] | None = option(
        None,
        "Noise levels between which --guidance-schedule=linear and cosine change the weight",
        parse=parse_interval,
        metavar="LO,HI",
        above=0,
    )
    guidance_end: float | None = option(
        None,
        "Weight at the upper level of --guidance-ramp",
        default_text="that of no guidance: 1, or 0 with --classifier",
    )
    guidance_table: tuple[float, ...] | None = option(
        None,
        "File of weights in place of --guidance: a noise level and a weight in each line, linear in ln(sigma) between",
        parse=read_table,
        metavar="FILE",
        items=(2, 2 * MAX_LINES),
    )
    guidance_method: str = option(
        "cfg",
        "How the weight combines the two: cfg = classifier-free guidance and autoguidance; apg = by what is orthogonal "
        "to the image; cfg++ = renoised by the guide (w from 0 to 1; --sampler=euler); cfg-zero = CFG-Zero*, with the "
        "guide scaled to fit",
        choices=METHODS,
    )
    apg: APG = APG()
    zero_init_steps: int = option(
        1, "First steps in which --guidance-method=cfg-zero leaves the noise as it is", low=0, high=1000
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        shape, ramp, end = self.guidance_schedule, self.guidance_ramp, self.guidance_end
        if self.guidance_table is not None:
            for flag, given in {"--guidance": self.guidance != 1, "--guidance-schedule": shape != "constant"}.items():
                if given:
                    raise UserError(f"--guidance-table says the weights at all noise levels: leave {flag} out")
        if shape != "constant" and ramp is None:
            raise UserError(f"--guidance-schedule={shape} needs --guidance-ramp=LO,HI: where the weight changes")
        for flag, value in {"--guidance-ramp": ramp, "--guidance-end": end}.items():
            if shape == "constant" and value is not None:
                raise UserError(f"{flag} has no effect with --guidance-schedule=constant: leave it out")

    @property
    def interval(self) -> tuple[float, float]:
        return self.guidance_interval or (0.0, math.inf)

    @property
    def acts(self) -> bool:
        """Whether two denoisers are combined at all: a weight other than 1, or a rule for which 1 is no exception."""
        weights = [self.guidance] if self.guidance_table is None else list(self.guidance_table[1::2])
        if self.guidance_schedule != "constant":
            weights.append(1.0 if self.guidance_end is None else self.guidance_end)
        return self.guidance_method == "cfg++" or any(weight != 1 for weight in weights)

    def check_sampler(self, sampler: SamplerConfig) -> None:
        """Check that the rule can be followed along the steps of a sampler.

        Raises:
            UserError: it cannot.
        """
        method, solver = self.guidance_method, sampler.solver
        if method == "cfg++" and solver != "euler":
            raise UserError("--guidance-method=cfg++ is a rule for steps of Euler's method: use --sampler=euler")
        if method == "cfg++" and sampler.churn.S_churn > 0:
            raise UserError("--guidance-method=cfg++: --S_churn adds noise to its steps: leave it out")
        if sampler.kind.grid != "ends":
            return
        if method == "apg" and self.apg.momentum != 0:
            raise UserError(f"--apg-momentum needs steps that are given, and {solver} finds its own: set it to 0")
        if method == "cfg-zero" and self.zero_init_steps > 0:
            raise UserError(f"--zero-init-steps needs steps that are given, and {solver} finds its own: set it to 0")

    def check_given(self, given: Collection[str]) -> None:
        """Check that the rule looks at all of the given options.

        Args:
            given: their names.

        Raises:
            UserError: it does not look at one of them.
        """
        parameters = {"apg": [field.key for field in all_fields(APG)], "cfg-zero": ["zero_init_steps"]}
        for method, keys in parameters.items():
            useless = [key for key in keys if key in given and method != self.guidance_method]
            if useless:
                flag = f"--{useless[0].replace('_', '-')}"
                raise UserError(f"{flag} has no effect with --guidance-method={self.guidance_method}: leave it out")

    def changed(self) -> list[str]:
        """The options that are not as by default."""
        defaults = GuidanceConfig().flat()
        return [f"--{key.replace('_', '-')}" for key, value in self.flat().items() if value != defaults[key]]

    def describe(self, by_classifier: bool = False) -> dict[str, Any]:
        """What it stands for, as plain JSON values; nothing that has no effect."""
        if not (by_classifier or self.acts):
            return {"guidance": self.guidance}
        facts: dict[str, Any] = {} if self.guidance_table is not None else {"guidance": self.guidance}
        if self.guidance_table is not None:
            facts["guidance_table"] = list(self.guidance_table)
        if self.guidance_schedule != "constant":
            assert self.guidance_ramp is not None
            none = 0.0 if by_classifier else 1.0
            facts["guidance_schedule"] = self.guidance_schedule
            facts["guidance_ramp"] = list(self.guidance_ramp)
            facts["guidance_end"] = none if self.guidance_end is None else self.guidance_end
        if self.guidance_interval is not None:
            lo, hi = self.guidance_interval
            facts["guidance_interval"] = [lo, None if hi == math.inf else hi]  # infinity is no JSON
        if self.guidance_method != "cfg":
            facts["guidance_method"] = self.guidance_method
        if self.guidance_method == "apg":
            facts |= {f"apg_{name}": value for name, value in self.apg.to_json().items()}
        if self.guidance_method == "cfg-zero":
            facts["zero_init_steps"] = self.zero_init_steps
        return facts
