"""Numbers in text files: noise levels to visit, weights of guidance."""

import os

from dnnlib.errors import UserError, one_line

MAX_LINES = 10_000


def read_numbers(path: str, columns: int) -> list[tuple[float, ...]]:
    """The numbers of a text file: so many per line, with spaces or commas between; what follows a # is no number.

    Raises:
        UserError: there is no such file, or it holds something else.
    """
    try:
        with open(path, encoding="utf-8") as f:
            lines = f.read(64 * MAX_LINES).splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path}: is no text file") from None
    except OSError as err:
        raise UserError(f"{path}: {os.strerror(err.errno or 0).lower()}") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].replace(",", " ").split()
        try:
            row = tuple(float(word) for word in words)
        except ValueError:
            row = ()
        if words and len(row) != columns:
            wanted = "a number" if columns == 1 else f"{columns} numbers"
            raise UserError(f"{path}, line {number}: {one_line(line)[:50]!r} where {wanted} should be")
        rows += [row] if words else []
    if not 0 < len(rows) <= MAX_LINES:
        raise UserError(f"{path}: holds {len(rows)} lines of numbers, which must be 1 to {MAX_LINES}")
    return rows
