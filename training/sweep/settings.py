"""What a sweep varies: its axes and their values."""

import math
from dataclasses import dataclass

from dnnlib.errors import UserError
from training.config.ema import parse_std_list
from training.config.fields import all_fields
from training.config.generation import GenerationConfig

NETWORKS = {"ema-std": "net", "guide-std": "gnet"}  # axes that choose networks, and the option that they set
KIMG = "kimg"  # likewise: the training time of both
Setting = dict[str, str]  # values by axis, as on a command line


@dataclass(frozen=True)
class Axis:
    """What is varied: an option of generation by its name, or EMA widths, and its values."""

    name: str
    values: tuple[str, ...]

    @staticmethod
    def parse(text: str) -> "Axis":
        """An axis of the form 'NAME=VALUE,VALUE,...'; where values hold commas, with ';' between them.

        Raises:
            UserError: of another form, nothing that can be varied, or one value twice.
        """
        name, equals, values = text.partition("=")
        name = name.removeprefix("--")
        if not equals or not values:
            raise UserError(
                f"--vary={text}: give a name and values, such as ema-std=0.05,0.10,0.15 or guidance=1,1.5,2"
            )
        if name not in _options() | NETWORKS.keys() | {KIMG}:
            raise UserError(
                f"--vary={text}: {name} is neither an option of generate_images.py nor {', '.join(NETWORKS)} or {KIMG}"
            )
        if name in NETWORKS:
            try:
                found = [f"{std:.3f}" for std in parse_std_list(values)]
            except ValueError as err:
                raise UserError(f"--vary={text}: {err}") from None
        else:
            found = [value.strip() for value in values.split(";" if ";" in values else ",")]
        if len(set(found)) < len(found):
            raise UserError(f"--vary={text}: the same value twice")
        return Axis(name, tuple(found))

    def numbers(self) -> list[float] | None:
        """The values as numbers; None = they are none."""
        try:
            return [float(value) for value in self.values]
        except ValueError:
            return None

    @property
    def is_range(self) -> bool:
        """Whether it can be searched between its values: there are two, of something that is not counted or named."""
        numbers = self.numbers()
        continuous = self.name in NETWORKS or _options().get(self.name) is float
        return continuous and len(self.values) == 2 and numbers is not None and all(map(math.isfinite, numbers))

    def between(self, share: float) -> str:
        """A value of a range, so far from its lower end: in the logarithm of EMA widths, else as numbers are."""
        numbers = self.numbers()
        assert numbers is not None
        low, high = sorted(numbers)
        if self.name in NETWORKS:
            return f"{low * (high / low) ** share:.3f}"  # as files are named
        return f"{low + share * (high - low):.4g}"


def _options() -> dict[str, type]:
    """Types of the options of generation by their names."""
    fields = [field for field in all_fields(GenerationConfig) if field.option.flag is not None]
    return {field.flag.removeprefix("--"): field.type for field in fields}
