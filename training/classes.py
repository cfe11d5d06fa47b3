"""Which class each generated image is of: found by number or name, in turn or drawn from the seed."""

import difflib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dnnlib.cli import parse_int_list
from dnnlib.errors import UserError, one_line
from training.config.generation import SamplingConfig

NEAREST = 3  # names that are proposed in place of an unknown one


@dataclass(frozen=True)
class ClassChoice:
    """The rule by which images get classes. Each depends on the seed of its image alone.

    Args:
        classes: that images take in turn: the one of number (seed modulo how many there are). None = drawn from the
            seed.
        policy: its name: 'random', 'balanced' (all classes in turn) or 'fixed' (those that the user names).
    """

    classes: tuple[int, ...] | None = None
    policy: str = "random"

    @staticmethod
    def of(sampling: SamplingConfig, size: int, names: Sequence[str] | None = None) -> "ClassChoice":
        """What the user has chosen.

        Args:
            size, names: number of classes that the network knows, and what they are called.

        Raises:
            UserError: the network knows no such class, or the options contradict each other.
        """
        policy = sampling.class_policy
        if sampling.class_idx is not None:
            if policy == "random":
                raise UserError("--class-policy=random draws from all classes: leave out --class, or the policy")
            return ClassChoice(find_classes(sampling.class_idx, size, names), "fixed")
        if policy == "balanced":
            if size == 0:
                raise UserError("--class-policy=balanced: the network knows no classes")
            return ClassChoice(tuple(range(size)), policy)
        return ClassChoice()

    def of_seeds(self, seeds: Sequence[int]) -> list[int] | None:
        """The class of each seed; None = it is drawn."""
        return None if self.classes is None else [self.classes[seed % len(self.classes)] for seed in seeds]

    def describe(self) -> dict[str, Any]:
        """The rule, as plain JSON values."""
        if self.classes is None:
            return {"labels": "drawn from the seed", "class_policy": self.policy}
        if self.policy == "balanced":
            return {"labels": f"seed modulo {len(self.classes)}", "class_policy": self.policy}
        one = len(self.classes) == 1
        labels = f"class {self.classes[0]}" if one else f"{len(self.classes)} classes in turn, by the seed"
        return {"labels": labels, "class_policy": self.policy, "classes": list(self.classes)}


def find_classes(text: str, size: int, names: Sequence[str] | None = None) -> tuple[int, ...]:
    """Numbers of the classes that a text names, such as '207', '207,360-365', 'cat' or 'cat,dog'.

    A name that looks like a number is put in double quotes.

    Args:
        size, names: number of classes, and what they are called.

    Raises:
        UserError: there is no such class, or several of that name.
    """
    whole = text.strip()
    if names and whole in names:  # whatever commas it has
        return (_class_called(whole, names),) if not re.fullmatch(r"[\d\s,-]+", whole) else _numbered(whole, size)
    found: list[int] = []
    for part in (part.strip() for part in re.findall(r'"[^"]*"|[^,]+', text)):
        if re.fullmatch(r"-?\d+|\d+-\d+", part):
            found += _numbered(part, size)
            continue
        if not names:
            known = f"its classes are numbered 0 to {size - 1}" if size else "it knows no classes"
            raise UserError(f"--class={one_line(part)}: the network does not say what its classes are called; {known}")
        found.append(_class_called(re.sub(r'^"(.*)"$', r"\1", part), names))
    if not found:
        raise UserError("--class names no class")
    return tuple(found)


def _numbered(text: str, size: int) -> tuple[int, ...]:
    numbers = [int(text)] if text.startswith("-") else parse_int_list(text)
    for number in numbers:
        if not 0 <= number < size:
            known = f"the classes are 0 to {size - 1}" if size else "the network knows no classes"
            raise UserError(f"--class={number} is out of range: {known}")
    return tuple(numbers)


def _class_called(name: str, names: Sequence[str]) -> int:
    """Number of the class of a name: exactly, or but for the case of letters and how accents are coded."""
    for alike in (str, lambda text: unicodedata.normalize("NFC", text).casefold()):
        matches = [i for i, other in enumerate(names) if alike(other) == alike(name)]
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise UserError(
                f"--class={one_line(name)}: {len(matches)} classes are called so: give a number of "
                f"{', '.join(map(str, matches[:10]))}"
            )
    by_small = {other.casefold(): other for other in names}
    within = [other for small, other in by_small.items() if name.casefold() in small]
    near = [by_small[small] for small in difflib.get_close_matches(name.casefold(), by_small, NEAREST)]
    nearest = list(dict.fromkeys([*near, *within]))[:NEAREST] or names[:NEAREST]
    raise UserError(f"--class={one_line(name)}: no such class; the nearest are {', '.join(map(one_line, nearest))}")
