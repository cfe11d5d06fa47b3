"""Names that users choose from."""

import difflib
from collections.abc import Iterable

from dnnlib.errors import UserError


def unknown_preset(option: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a preset that does not exist; it names the nearest ones."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f"the nearest are {', '.join(near)}" if near else f"there are {', '.join(known[:5])}, ..."
    return UserError(f"{option}: unknown preset {name!r}; {hint}")
