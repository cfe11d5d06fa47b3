"""Names that users choose from."""

import difflib
from collections.abc import Iterable

from dnnlib.errors import UserError

NEAREST = 5  # names that an error shows


def unknown_preset(option: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a preset that does not exist; it names the nearest ones, and says how many others there are."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=NEAREST, cutoff=0) if name else known[:NEAREST]
    others = len(known) - len(near)
    more = f", and {others} others (--list-presets shows all)" if others else ""
    return UserError(f"{option}: unknown preset {name!r}; the nearest are {', '.join(near)}{more}")
