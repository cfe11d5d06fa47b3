"""Command lines: commands whose errors are one line, common options, parsing and formatting."""

import faulthandler
import importlib
import math
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, Any, TypeVar

import click

from dnnlib.download import OFFLINE_VARIABLE
from dnnlib.errors import OUT_OF_MEMORY, RunError, UserError, tell_torchrun

Command = TypeVar("Command", bound=Callable[..., Any])
MAX_RANGE = 10_000_000  # numbers in one range of parse_int_list
MAX_RESOLUTION = 8192  # of images that are made


class CommandLine(click.Command):
    """Command that reports every expected failure as one line: exit code 2 for bad input, 1 at run time, 130 after
    Ctrl-C.

    Args:
        after_interrupt: what Ctrl-C leaves, and how the user continues.
    """

    def __init__(self, *args, after_interrupt: str = "repeat the command to start over", **kwargs):
        super().__init__(*args, **kwargs)
        self.after_interrupt = after_interrupt

    def make_context(self, *args, **kwargs) -> click.Context:
        with one_line_errors():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        if sys.__stderr__ is not None:
            faulthandler.enable(sys.__stderr__)  # a dataset cut off while it is read (SIGBUS), and crashes, say where
        with one_line_errors(self.after_interrupt):
            for param in self.params:
                value = ctx.params.get(param.name or "")
                # Infinity is for options whose default it is.
                if isinstance(value, float) and not math.isfinite(value) and str(value) != str(param.default):
                    raise UserError(f"{param.opts[0]} must be a finite number, not {value}")
            return super().invoke(ctx)


class CommandGroup(click.Group):
    """Group of `CommandLine`s."""

    command_class = CommandLine

    def make_context(self, *args, **kwargs) -> click.Context:
        with one_line_errors():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        with one_line_errors():
            return super().invoke(ctx)


@contextmanager
def one_line_errors(after_interrupt: str = "") -> Iterator[None]:
    """Inside, every expected failure becomes a click error of one line; so does Ctrl-C where there is a text for it."""
    try:
        yield
    except KeyboardInterrupt as err:
        if not after_interrupt:
            raise
        raise _Interrupted(after_interrupt) from err
    except click.UsageError as err:
        if isinstance(err, getattr(click.exceptions, "NoArgsIsHelpError", ())):
            raise  # prints the help
        pointer = "" if err.ctx is None else f" (see python {err.ctx.command_path} --help)"
        raise _BadInput(err.format_message() + pointer) from err
    except UserError as err:
        raise _BadInput(_message(err)) from err
    except RunError as err:
        raise _Failure(_message(err)) from err
    except MemoryError as err:
        raise _Failure(OUT_OF_MEMORY) from err
    except RuntimeError as err:
        # torch has no finer types for these.
        if "memory" in str(err) and "alloc" in str(err):
            raise _Failure(OUT_OF_MEMORY) from err
        if str(err).startswith("DataLoader worker"):
            raise _Failure(f"{str(err).splitlines()[0]} Repeat the command to continue.") from err
        raise
    except OSError as err:
        name = f": {err.filename}" if err.filename is not None else ""
        raise _Failure(f"{err.strerror or err}{name}") from err


class _Failure(click.ClickException):
    """An expected failure, which ends the process with exit code 1."""

    def show(self, file: IO[Any] | None = None) -> None:
        super().show(file)
        tell_torchrun(f"Error: {self.format_message()}")


class _BadInput(_Failure):
    """An error of the user, which ends the process with exit code 2."""

    exit_code = 2


class _Interrupted(click.ClickException):
    """Ctrl-C, which ends the process with the exit code that shells give it."""

    exit_code = 130

    def show(self, file: IO | None = None) -> None:
        # The terminal shows ^C, or a progress bar, in this line.
        click.echo(f"\nInterrupted: {self.message}", file=file, err=True)


def _message(error: Exception) -> str:
    """The message in one line, without the traceback that torch puts before it where a loader process failed."""
    text = str(error).strip()
    if "Traceback" in text:
        text = text.splitlines()[-1].removeprefix(f"{type(error).__module__}.{type(error).__qualname__}: ")
    return " ".join(text.splitlines())


def parsed_by(parse: Callable[[str], Any]) -> Callable[..., Any]:
    """A click callback that parses an option's text; where that fails (ValueError), the error names the option."""

    def callback(ctx: click.Context, param: click.Parameter, value: str | None) -> Any:
        ctx.meta[f"{__name__}.text.{param.name}"] = value
        try:
            return None if value is None else parse(value)
        except ValueError as err:
            raise UserError(f"{param.opts[0]}: {err}") from None

    return callback


def with_options(options: Sequence[Callable]) -> Callable[[Command], Command]:
    """Decorator that adds options to a command, in order."""

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def given_options(ctx: click.Context, leave_out: Iterable[str] = ()) -> list[str]:
    """The options that the user has given, as words that a shell reads as the same options."""
    options = []
    for param in ctx.command.params:
        name = param.name or ""
        if ctx.get_parameter_source(name) != click.core.ParameterSource.COMMANDLINE or name in leave_out:
            continue
        value = ctx.meta.get(f"{__name__}.text.{name}", ctx.params.get(name))
        if isinstance(param, click.Option) and param.is_flag:
            options.append(param.opts[0])
            continue
        values = value if isinstance(value, tuple) and isinstance(param, click.Option) and param.multiple else [value]
        options += [f"{param.opts[0]}={shlex.quote(str(value))}" for value in values]
    return options


device_option = click.option(
    "--device",
    help="Where to compute; auto = the first of cuda, mps, cpu that is there",
    type=click.Choice(["auto", "cpu", "cuda", "mps"]),
    default="auto",
    show_default=True,
)


def _set_offline(_ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    """Pass the choice on to this process and those that it starts."""
    if value:
        os.environ[OFFLINE_VARIABLE] = "1"


offline_option = click.option(
    "--offline",
    help=f"Use no network, only what was fetched before (or set {OFFLINE_VARIABLE}=1)",
    is_flag=True,
    expose_value=False,
    callback=_set_offline,
)


def imported_when_used(module_of: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a module that offers names of others and imports those when a name is used.

    For commands, whose help need not wait for the import of torch, which takes a second.

    Args:
        module_of: module of each name; 'module:name' where it is called otherwise there.
    """

    def get(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(name)
        module, _, there = module_of[name].partition(":")
        return getattr(importlib.import_module(module), there or name)

    return get


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


def parse_bytes(text: str) -> int:
    """Bytes such as '500MB', '2GB' (powers of 1000), '512MiB' or '2GiB' (powers of 1024).

    Raises:
        UserError: anything else, or nothing.
    """
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([kMGT]i?)B", text)
    if match is None:
        raise UserError(f"{text!r} is not a number of bytes: write 500MB, 512MiB, 2GB or 2GiB")
    power = "kMGT".index(match[2][0]) + 1
    value = int(float(match[1]) * (1024 if match[2].endswith("i") else 1000) ** power)
    if value == 0:
        raise UserError(f"{text!r} is nothing")
    return value


def format_bytes(count: int) -> str:
    """A number of bytes as '12.3 MB' or '635 GB'."""
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def parse_resolution(text: str) -> tuple[int, int]:
    """Width and height of '512x512', or of '512', which means the same.

    Raises:
        UserError: anything else, or more than `MAX_RESOLUTION`.
    """
    match = re.fullmatch(r"([1-9][0-9]*)(?:x([1-9][0-9]*))?", text)
    if match is None or max(map(len, filter(None, match.groups()))) > 9:
        raise UserError(f"{text!r} is not of the form WxH, such as 512x512, nor a number")
    width = int(match[1])
    height = int(match[2] or width)
    if max(width, height) > MAX_RESOLUTION:
        raise UserError(f"{text!r} is above {MAX_RESOLUTION}x{MAX_RESOLUTION}")
    return width, height


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
