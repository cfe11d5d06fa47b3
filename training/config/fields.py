"""Fields of configurations: each is an option of the command line, a bound on what files ask for, a line of JSON and a
rule for resuming.

Configurations are frozen dataclasses derived from `Config`, and may hold others as sections. `option` describes a
field; it is checked whenever a configuration is made, so Python callers and files meet the same errors as the command
line. Names of options are unique over all sections: `flat` and `from_flat` know a configuration by them.
"""

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import click

from dnnlib.cli import parsed_by
from dnnlib.errors import UserError, one_line

C = TypeVar("C", bound="Config")
APART = {"apart": True}  # metadata of a dataclass field that is no option and no section
FROM_PRESET, REQUIRED = "from preset", "required"  # default texts
MAX_TEXT = 4096  # characters of a value; more is no name of anything
METAVARS = {int: "INT", float: "FLOAT", bool: "BOOL", str: "STR", tuple: "LIST"}


@dataclass(frozen=True)
class Option:
    """What a field is beyond its name, type and default; see `option`."""

    help: str
    flag: str | None
    low: float
    high: float
    above: float
    below: float
    items: tuple[int, int]
    choices: tuple[str, ...]
    parse: Callable[[str], Any] | None
    metavar: str | None
    default_text: str | None
    may_change: bool
    infinite: bool
    multiple: bool


def option(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    flag: str | None = "",
    low: float = -math.inf,
    high: float = math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    items: tuple[int, int] = (0, 1 << 16),
    choices: tuple[str, ...] = (),
    parse: Callable[[str], Any] | None = None,
    metavar: str | None = None,
    default_text: str | None = None,
    may_change: bool = False,
    infinite: bool = False,
    multiple: bool = False,
) -> Any:
    """A dataclass field that is an option.

    Args:
        default: none = it comes from the preset.
        help: its help text; the default is added.
        flag: its name on the command line; '' = that of the field, None = no option of the command line.
        low, high, above, below: range of a number, or of each number of a list; the first two belong to it.
        items: least and largest length of a list.
        choices: the texts that it may be.
        parse: text -> value; by default as the type says.
        metavar, default_text: what the help shows for the value and the default.
        may_change: whether a resumed run may have another value.
        infinite: whether infinity is a value.
        multiple: a list of texts whose option may be given several times, once for each.
    """
    described = Option(
        help,
        flag,
        low,
        high,
        above,
        below,
        items,
        tuple(choices),
        parse,
        metavar,
        default_text,
        may_change,
        infinite,
        multiple,
    )
    return dataclasses.field(default=default, metadata={"option": described})


class Field(NamedTuple):
    """A field of a configuration that is an option."""

    name: str
    type: Any  # without None
    optional: bool  # whether None is a value
    default: Any  # dataclasses.MISSING = none
    option: Option

    @property
    def flag(self) -> str:
        """How messages call it: as an option, or by its name where it is none."""
        return self.name if self.option.flag is None else self.option.flag or "--" + self.name.replace("_", "-")

    @property
    def key(self) -> str:
        """Its name among all options."""
        return self.flag.removeprefix("--").replace("-", "_")


@dataclass(frozen=True, kw_only=True)
class Config:
    """A configuration that holds only values that its fields allow.

    Raises:
        UserError: when it is made, if a value is of another type or out of range; names the option.
    """

    def __post_init__(self) -> None:
        for field in own_fields(type(self)):
            value = getattr(self, field.name)
            if isinstance(value, list):
                value = tuple(value)
                object.__setattr__(self, field.name, value)
            problem = _problem(field, value)
            if problem:
                raise UserError(f"{field.flag} {problem}")

    def flat(self) -> dict[str, Any]:
        """All values by the names of their options."""
        values: dict[str, Any] = {}
        for name, part in _parts(type(self)).items():
            value = getattr(self, name)
            values |= {part.key: value} if isinstance(part, Field) else value.flat()
        return values

    @classmethod
    def from_flat(cls: type[C], values: Mapping[str, Any], base: C | None = None) -> C:
        """A configuration of values by the names of their options; what is not among them is as in `base`.

        Raises:
            UserError: a value that its field does not allow, or a missing one.
        """
        made: dict[str, Any] = {field.name: values[field.key] for field in own_fields(cls) if field.key in values}
        for name, section in sections(cls).items():
            made[name] = section.from_flat(values, None if base is None else getattr(base, name))
        if base is not None:
            return dataclasses.replace(base, **made)
        _check_complete(cls, made)
        return cls(**made)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, with a dictionary per section."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls: type[C], values: Any) -> C:
        """The inverse of `to_json`.

        Raises:
            UserError: unknown or missing names, or values that the fields do not allow.
        """
        if not isinstance(values, dict):
            raise UserError(f"{type(values).__name__} where a dictionary of options belongs")
        parts = sections(cls)
        check_known(values, {field.name for field in own_fields(cls)} | parts.keys())
        made = {name: parts[name].from_json(value) if name in parts else value for name, value in values.items()}
        _check_complete(cls, made)
        return cls(**made)


def check_known(names: Iterable[str], known: Collection[str]) -> None:
    """Check that names belong to options.

    Raises:
        UserError: one of them does not.
    """
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"unknown option {one_line(unknown[0])[:50]!r}")


def _check_complete(cls: type[Config], made: Collection[str]) -> None:
    for f in dataclasses.fields(cls):
        has_default = f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING
        if f.name not in made and not has_default:
            raise UserError(f"option {f.name!r} is missing")


@functools.cache
def _parts(cls: type[Config]) -> dict[str, "Field | type[Config]"]:
    """The options and sections of a configuration by name; not what is kept apart."""
    return {
        f.name: _field(cls, f) if "option" in f.metadata else _hints(cls)[f.name]
        for f in dataclasses.fields(cls)
        if "apart" not in f.metadata
    }


def sections(cls: type[Config]) -> dict[str, type[Config]]:
    """The configurations that a configuration holds, by name."""
    return {name: part for name, part in _parts(cls).items() if not isinstance(part, Field)}


def own_fields(cls: type[Config]) -> list[Field]:
    """The options of a configuration that are in no section."""
    return [part for part in _parts(cls).values() if isinstance(part, Field)]


def all_fields(cls: type[Config]) -> list[Field]:
    """The options of a configuration and of its sections, in their order."""
    lists = [[part] if isinstance(part, Field) else all_fields(part) for part in _parts(cls).values()]
    return [field for some in lists for field in some]


@functools.cache
def _hints(cls: type[Config]) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _field(cls: type[Config], f: dataclasses.Field) -> Field:
    kind = _hints(cls)[f.name]
    optional = isinstance(kind, types.UnionType)
    if optional:
        (kind,) = [part for part in typing.get_args(kind) if part is not types.NoneType]
    return Field(f.name, kind, optional, f.default, f.metadata["option"])


def refuse_changed(parts: Iterable[Config], family: str) -> None:
    """Check that options without a meaning for a family have been left alone.

    Args:
        parts: sections with these options, all of which have defaults.

    Raises:
        UserError: one of them is not as by default.
    """
    for part in parts:
        defaults = type(part)().flat()
        flags = {field.key: field.flag for field in all_fields(type(part))}
        for key, value in part.flat().items():
            if value != defaults[key]:
                raise UserError(f"{flags[key]} has no meaning for {family} networks, such as --net: leave it out")


# ---------------------------------------------------------------------------------------------------------
# Values


def _problem(field: Field, value: Any) -> str:
    """What is wrong with a value: the end of a sentence that begins with the option; '' if nothing is."""
    if value is None and field.optional:
        return ""
    if typing.get_origin(field.type) is not tuple:
        return _problem_of_one(field, field.type, value)
    if not isinstance(value, tuple):
        return f"must be a list, not {_shown(value)}"
    low, high = field.option.items
    if not low <= len(value) <= high:
        return f"must have {low} to {high} values, not {len(value)}"
    kinds = typing.get_args(field.type)
    kinds = [kinds[0]] * len(value) if kinds[-1] is Ellipsis else kinds
    if len(kinds) != len(value):
        return f"must have {len(kinds)} values, not {len(value)}"
    return next(filter(None, map(functools.partial(_problem_of_one, field), kinds, value)), "")


def _problem_of_one(field: Field, kind: type, value: Any) -> str:
    described = field.option
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        return f"must be {_ARTICLES[kind]}, not {_shown(value)}"
    if kind is str:
        if described.choices and value not in described.choices:
            return f"must be one of {', '.join(described.choices)}, not {_shown(value)}"
        return "" if len(value) <= MAX_TEXT and value.isprintable() else "must be text on one line"
    if kind is not bool:
        if not (math.isfinite(value) or (described.infinite and value == math.inf)):
            return f"must be a finite number, not {value}"
        beyond = value <= described.above > -math.inf or value >= described.below < math.inf
        if beyond or not described.low <= value <= described.high:
            return f"must be {_range(described, value)}, not {value}"
    return ""


_ARTICLES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def _range(described: Option, value: float) -> str:
    """The side of a range that a value is beyond; both where they are near."""
    if described.low == 0 and described.below < math.inf:
        return f"at least 0 and less than {described.below:g}"
    if value <= described.above:
        return "positive" if described.above == 0 else f"more than {described.above:g}"
    if value < described.low:
        return f"at least {described.low:.10g}"
    return f"less than {described.below:.10g}" if value >= described.below else f"at most {described.high:.10g}"


def _shown(value: Any) -> str:
    return repr(value)[:50] if isinstance(value, (int, float, str)) else f"a {type(value).__name__}"


def show(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, tuple):
        return ",".join(show(v) for v in value) or "none"
    return str(int(value)) if isinstance(value, bool) else str(value)


# ---------------------------------------------------------------------------------------------------------
# The command line


def click_options(cls: type[Config], defaults: Mapping[str, str] | None = None) -> list[Callable]:
    """click's options for the fields of a configuration. Those that are not given are None.

    Args:
        defaults: what the help shows as the default of some options, by their names.
    """
    fields = [field for field in all_fields(cls) if field.option.flag is not None]
    return [_click_option(field, (defaults or {}).get(field.key, _default_text(field))) for field in fields]


def _click_option(field: Field, default: str | None) -> Callable:
    described = field.option
    kind = typing.get_origin(field.type) or field.type
    keywords: dict[str, Any] = {"type": kind, "metavar": described.metavar or METAVARS[kind]}
    if described.multiple:
        not_given_is_none = {"callback": lambda _ctx, _param, value: value or None}
        keywords = {"type": str, "multiple": True, "metavar": described.metavar, **not_given_is_none}
    elif described.choices and kind is str:
        keywords = {"type": click.Choice(described.choices)}
    elif described.parse is not None:
        keywords = {"callback": parsed_by(described.parse), "metavar": described.metavar or METAVARS[kind]}
    notes = [REQUIRED if default == REQUIRED else f"default: {default}"] if default is not None else []
    notes += [_range_text(described)] if kind in (int, float) and described.parse is None else []
    notes = [note for note in notes if note]
    text = f"{described.help}  [{'; '.join(notes)}]" if notes else described.help
    # Named, since click would make the letters small.
    return click.option(field.flag, field.key, help=text, **keywords)


def _default_text(field: Field) -> str | None:
    """What the help shows as the default; None = nothing."""
    if field.option.default_text is not None:
        return field.option.default_text
    if field.default is dataclasses.MISSING:
        return FROM_PRESET
    if field.default is None or field.default in ("", ()):
        return None
    return str(field.default) if isinstance(field.default, bool) else show(field.default)


def _range_text(described: Option) -> str:
    """'x>=1', '0<=x<1' and the like; '' = any number."""
    left = f"{described.low:.10g}<=" if described.low > -math.inf else ""
    left = left or (f"{described.above:.10g}<" if described.above > -math.inf else "")
    right = f"<={described.high:.10g}" if described.high < math.inf else ""
    right = right or (f"<{described.below:.10g}" if described.below < math.inf else "")
    if left and not right:
        number = left.rstrip("<=")
        return f"x>={number}" if left.endswith("<=") else f"x>{number}"
    return f"{left}x{right}" if left or right else ""
