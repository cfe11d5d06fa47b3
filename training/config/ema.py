"""The averages of weights that a training run tracks."""

import re
from dataclasses import dataclass

from dnnlib.errors import UserError
from training.config.fields import FROM_PRESET, Config, option, show

MIN_STD = 0.001  # file names of EMA profiles have three decimals
MAX_STD = 12**-0.5  # of the flat average (`phema`)
MAX_LIST = 1000


def parse_std_list(text: str) -> tuple[float, ...]:
    """Parse widths such as '0.05', '0.05,0.10' or '0.010,0.015,...,0.250' (the last = 49 even steps).

    Raises:
        ValueError: not numbers, outside [0.001, 0.289), or '...' that does not reach its end in even steps.
    """
    stds: list[float] = []
    parts = [part.strip() for part in re.sub(r"^\[|\]$", "", text.strip()).split(",")]
    for i, part in enumerate(parts):
        if part == "...":
            if len(stds) < 2 or i + 1 >= len(parts):
                raise ValueError(f"{text!r}: '...' needs two values before it and one after it")
            continue
        try:
            value = float(part)
        except ValueError:
            raise ValueError(f"{text!r}: {part!r} is not a number") from None
        if not MIN_STD <= value < MAX_STD:
            raise ValueError(f"{text!r}: an EMA std must lie between {MIN_STD} and {MAX_STD:.3f}, not {part}")
        if i > 0 and parts[i - 1] == "...":
            first, step = stds[-1], stds[-1] - stds[-2]
            count = round((value - first) / step) if step != 0 else 0
            if not 1 <= count <= MAX_LIST or abs(first + count * step - value) > 1e-6:
                raise ValueError(f"{text!r}: even steps of {step:.6g} from {first:g} do not reach {value:g}")
            stds += [round(first + k * step, 9) for k in range(1, count)]
        stds.append(value)
    return tuple(stds)


@dataclass(frozen=True, kw_only=True)
class PowerFunctionConfig(Config):
    """The EMA profiles that a run tracks (EDM2, Section 3)."""

    ema_std: tuple[float, ...] = option(
        (0.05, 0.10),
        "Widths of the tracked EMA profiles",
        parse=parse_std_list,
        low=MIN_STD,
        below=MAX_STD,
        items=(1, 64),
        default_text="0.05,0.10",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if len({f"{std:.3f}" for std in self.ema_std}) < len(self.ema_std):
            raise UserError(f"--ema-std={show(self.ema_std)}: two widths share a file name (three decimals count)")


@dataclass(frozen=True, kw_only=True)
class EMAConfig(PowerFunctionConfig):
    """The profiles for post-hoc EMA, and the exponential average of the published models."""

    ema_rate: float = option(
        0.999,
        "Decay per step of the exponential average that is saved as -ema, 0 = none",
        low=0,
        below=1,
        default_text=FROM_PRESET,
    )
