"""Torch-free helpers: user errors, whole files, parsing and formatting."""

import errno
import functools
import math
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import click

import dnnlib


class EasyDict(dict):
    """Dictionary whose items can be read and written as attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __delattr__(self, name: str) -> None:
        del self[name]


# ---------------------------------------------------------------------------------------------------------
# Errors


class UserError(ValueError):
    """A mistake in the user's input. The message says what is wrong, where, and what to do, in one line."""


OUT_OF_MEMORY = "out of memory: use smaller batches (--batch-gpu in training, --batch elsewhere) or a smaller network"


class RunError(RuntimeError):
    """A failure at run time that the user has to know about, told in one line."""


class CommandLine(click.Command):
    """Command that reports every expected failure as one line: exit code 2 for bad input, 1 at run time."""

    def make_context(self, *args, **kwargs) -> click.Context:
        with _one_line_errors():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        with _one_line_errors():
            for param in self.params:
                value = ctx.params.get(param.name or "")
                # Infinity is for options whose default it is.
                if isinstance(value, float) and not math.isfinite(value) and str(value) != str(param.default):
                    raise UserError(f"{param.opts[0]} must be a finite number, not {value}")
            return super().invoke(ctx)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except click.UsageError as err:
        raise _BadInput(err.format_message()) from err
    except UserError as err:
        # From a loader process the message comes with a traceback before it.
        raise _BadInput(str(err).strip().splitlines()[-1].removeprefix("dnnlib.util.UserError: ")) from err
    except RunError as err:
        raise click.ClickException(str(err)) from err
    except MemoryError as err:
        raise click.ClickException(OUT_OF_MEMORY) from err
    except RuntimeError as err:
        # torch has no finer types for these.
        if "memory" in str(err) and "alloc" in str(err):
            raise click.ClickException(OUT_OF_MEMORY) from err
        if str(err).startswith("DataLoader worker"):
            raise click.ClickException(f"{str(err).splitlines()[0]} Repeat the command to continue.") from err
        raise
    except OSError as err:
        name = f": {err.filename}" if err.filename is not None else ""
        raise click.ClickException(f"{err.strerror or err}{name}") from err


def parsed_by(parse: Callable[[str], Any]) -> Callable[..., Any]:
    """click callback that parses an option's text; where that fails (ValueError), the error names the option."""

    def callback(_ctx: click.Context, param: click.Parameter, value: str | None) -> Any:
        try:
            return None if value is None else parse(value)
        except ValueError as err:
            raise UserError(f"{param.opts[0]}: {err}") from None

    return callback


class _BadInput(click.ClickException):
    exit_code = 2


# ---------------------------------------------------------------------------------------------------------
# Files


@contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "wb", sync: bool = True) -> Iterator[IO]:
    """Open a file for writing that appears under its name only when it is complete.

    Args:
        sync: wait until the disk has it, so that even a power failure leaves no half file. Slow for many small ones.

    Raises:
        OSError: it could not be written, `filename` being the path asked for; nothing is left behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with _errors_name(path):
            with open(partial, mode) as f:
                yield f
                f.flush()
                if sync:
                    os.fsync(f.fileno())
            os.replace(partial, path)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def append_line(path: str | os.PathLike, line: str) -> None:
    """Add a line to a text file.

    Raises:
        OSError: with the file's name.
    """
    with _errors_name(path), open(path, "a") as f:
        f.write(line + "\n")


@contextmanager
def _errors_name(path: str | os.PathLike) -> Iterator[None]:
    """Inside, every OSError names `path`: that of a failed write names no file, or a temporary one."""
    try:
        yield
    except OSError as err:
        raise OSError(err.errno or errno.EIO, err.strerror or str(err), str(path)) from err


@functools.cache
def code_version() -> str:
    """Version of this code, with the commit where it runs from a git checkout."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return dnnlib.__version__
    command = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return dnnlib.__version__
    return f"{dnnlib.__version__}+{commit}"


# ---------------------------------------------------------------------------------------------------------
# Parsing and formatting


MAX_RANGE = 10_000_000


def parse_nimg(text: str) -> int:
    """Number of images such as '1000', '128Ki', '8Mi' or '2Gi' (powers of 1024).

    Raises:
        UserError: anything else.
    """
    units = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}
    number, factor = (text[:-2], units[text[-2:]]) if text[-2:] in units else (text, 1)
    try:
        value = float(number) * factor
        if not 0 <= value < 2**62 or value != int(value):
            raise ValueError
    except (ValueError, OverflowError):
        raise UserError(f"{text!r} is not a number of images: write 1000, 128Ki, 8Mi or 2Gi") from None
    return int(value)


def parse_int_list(text: str) -> list[int]:
    """Integers from 0, such as '1,2,5-10' (ranges include both ends).

    Raises:
        UserError: anything else, a range that runs backwards, or nothing at all.
    """
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None:
            raise UserError(f"{text!r}: {part.strip()!r} is not a number or a range such as 0-99")
        start, end = int(match[1]), int(match[2] or match[1])
        if end < start:
            raise UserError(f"{text!r}: the range {part.strip()} runs backwards")
        if end - start >= MAX_RANGE:
            raise UserError(f"{text!r}: the range {part.strip()} is longer than {MAX_RANGE}")
        numbers.extend(range(start, end + 1))
    return numbers


def format_time(seconds: float) -> str:
    """'42s', '3m 07s', '2h 05m' or '4d 03h'."""
    s = round(seconds)
    if s < 60:
        return f"{s}s"
    if s < 3600:
        return f"{s // 60}m {s % 60:02d}s"
    if s < 86400:
        return f"{s // 3600}h {s // 60 % 60:02d}m"
    return f"{s // 86400}d {s // 3600 % 24:02d}h"
