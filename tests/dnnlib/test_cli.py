"""Commands whose failures are one line, their options, and what parses and prints."""

import json
import os
import shlex
import signal
import subprocess
import sys

import click
import pytest
import torch
from conftest import ROOT, fails_with, run_cli

from dnnlib.cli import (
    CommandGroup,
    CommandLine,
    given_options,
    imported_when_used,
    offline_option,
    parse_int_list,
    parse_nimg,
    parse_resolution,
    parsed_by,
    with_options,
)
from dnnlib.download import offline
from dnnlib.errors import OUT_OF_MEMORY, RunError, UserError, one_line, printable_url

# ---------------------------------------------------------------------------------------------------------
# Failures


def test_ctrl_c_says_how_to_continue():
    @click.command(cls=CommandLine, after_interrupt="repeat the command to continue")
    def main():
        raise KeyboardInterrupt

    group = CommandGroup(commands=[main])
    for command, args in ((main, []), (group, ["main"])):
        result = run_cli(command, *args)
        assert (result.exit_code, result.stderr) == (130, "\nInterrupted: repeat the command to continue\n")


def test_crashes_say_where():
    program = (
        "import os, signal, click; from dnnlib.cli import CommandLine\n"
        "def read_cut_off_file(): os.kill(os.getpid(), signal.SIGBUS)\n"
        "click.command(cls=CommandLine)(lambda: read_cut_off_file())([])"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == -signal.SIGBUS
    assert "Fatal Python error: Bus error" in result.stderr and "in read_cut_off_file" in result.stderr


def failing(error: Exception) -> click.Command:
    @click.command(cls=CommandLine)
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "line", "exit_code"),
    [
        (UserError("a.zip: no such file"), "a.zip: no such file", 2),
        (UserError("two\nlines "), "two lines", 2),
        (RunError("the server is away"), "the server is away", 1),
        (MemoryError(), OUT_OF_MEMORY, 1),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 8 bytes"), OUT_OF_MEMORY, 1),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), OUT_OF_MEMORY, 1),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.\nmore"),
            "DataLoader worker (pid 7) is killed by signal: Killed. Repeat the command to continue.",
            1,
        ),
        (OSError(28, "No space left on device", "out/a.png"), "No space left on device: out/a.png", 1),
        (OSError("strange"), "strange", 1),
        (click.UsageError("no such thing"), "no such thing (see python main --help)", 2),
    ],
)
def test_expected_failures_are_one_line(error, line, exit_code):
    result = run_cli(failing(error))
    fails_with(result, exit_code=exit_code)
    assert result.stderr == f"Error: {line}\n"


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), ValueError("ours"), KeyError("ours")])
def test_faults_of_ours_are_not_hidden(error):
    with pytest.raises(type(error)):
        run_cli(failing(error))


class Broken(torch.utils.data.Dataset):
    """Images that cannot be read."""

    def __init__(self, error: Exception):
        self.error = error

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int):
        raise self.error


@pytest.mark.parametrize(("error", "exit_code"), [(UserError("a.png: damaged"), 2), (RunError("a.png: away"), 1)])
def test_failures_of_loader_processes_are_one_line(error, exit_code):
    @click.command(cls=CommandLine)
    def main():
        list(torch.utils.data.DataLoader(Broken(error), num_workers=1))

    result = run_cli(main)
    fails_with(result, exit_code=exit_code)
    assert result.stderr == f"Error: {error}\n"


def test_groups():
    @click.group(cls=CommandGroup)
    def main():
        pass

    @main.command()
    @click.option("--number", type=float)
    def part(number):
        raise UserError(f"not {number}")

    assert isinstance(part, CommandLine)
    fails_with(run_cli(main, "part", "--number=1"), "not 1.0")
    fails_with(run_cli(main, "part", "--number=x"), "--number")
    fails_with(run_cli(main, "nothing"), "nothing")
    fails_with(run_cli(main, "part", "--nothing"), "--nothing")
    assert "Usage" in run_cli(main).output


@click.command(cls=CommandLine)
@with_options(
    [
        click.option("--low", type=float, default=0.0),
        click.option("--high", type=float, default=float("inf")),
        click.option("--seeds", callback=parsed_by(parse_int_list), default="1,2"),
        click.option("--flag", is_flag=True),
        click.option("--name", default=None),
    ]
)
@click.pass_context
def options(ctx, low, high, seeds, flag, name):
    click.echo(f"{low} {high} {seeds} {flag} {name}")
    click.echo(shlex.join(given_options(ctx, leave_out=["low"])))


def test_numbers_are_finite():
    for text in ("nan", "inf", "-inf"):
        fails_with(run_cli(options, f"--low={text}"), "--low must be a finite number")
    fails_with(run_cli(options, "--high=nan"), "--high must be a finite number")
    assert run_cli(options, "--high=inf").output.startswith("0.0 inf")  # its default


def test_errors_of_usage_point_to_the_help():
    @click.command(cls=CommandLine)
    @click.option("--outdir", required=True)
    def main(outdir): ...

    assert run_cli(main).stderr == "Error: Missing option '--outdir'. (see python main --help)\n"
    group = CommandGroup("tool", commands={"make": main})
    assert run_cli(group, "make", "--bogus").stderr.endswith("(see python tool make --help)\n")


def test_torchrun_is_told_what_failed(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    run_cli(failing(UserError("a.zip: no such file")))
    assert json.loads((tmp_path / "error.json").read_text())["message"] == "Error: a.zip: no such file"


@pytest.mark.parametrize(
    ("text", "size"), [("512x512", (512, 512)), ("32", (32, 32)), ("64x48", (64, 48)), ("8192", (8192, 8192))]
)
def test_resolutions(text, size):
    assert parse_resolution(text) == size


@pytest.mark.parametrize("text", ["", "x", "0", "64x", "x64", "64x0", "-1", "8193", "64x9999", "1" * 5000])
def test_no_resolutions(text):
    with pytest.raises(UserError):
        parse_resolution(text)


def test_options_keep_their_order():
    assert [param.name for param in options.params] == ["low", "high", "seeds", "flag", "name"]


def test_errors_of_parsing_name_the_option():
    assert run_cli(options, "--seeds=3-5").output.startswith("0.0 inf [3, 4, 5]")
    fails_with(run_cli(options, "--seeds=3-x"), "--seeds: '3-x'")


def test_given_options():
    result = run_cli(options, "--seeds=3-5", "--flag", "--name=a b", "--low=1")
    assert shlex.split(result.output.splitlines()[1]) == ["--seeds=3-5", "--flag", "--name='a b'"]
    assert run_cli(options).output.splitlines()[1] == ""


def test_offline_option():
    @click.command(cls=CommandLine)
    @offline_option
    def main():
        click.echo(f"{offline()}")

    assert run_cli(main).output == "False\n"
    assert run_cli(main, "--offline").output == "True\n"
    assert os.environ["OPENEDM2_OFFLINE"] == "1"  # for processes that it starts


def test_names_are_imported_when_used():
    get = imported_when_used({"mean": "statistics", "nothing": "statistics"})
    assert get("mean")([1, 3]) == sys.modules["statistics"].mean([1, 3])
    for name in ("median", "nothing"):
        with pytest.raises(AttributeError, match=name):
            get(name)


# ---------------------------------------------------------------------------------------------------------
# Texts


@pytest.mark.parametrize(
    ("text", "value"),
    [("0", 0), ("1000", 1000), ("128Ki", 128 << 10), ("8Mi", 8 << 20), ("2Gi", 2 << 30), ("0.5Ki", 512), ("1e3", 1000)],
)
def test_numbers_of_images(text, value):
    assert parse_nimg(text) == value


@pytest.mark.parametrize("text", ["", "x", "-1", "1.5", "0.3Ki", "Ki", "1ki", "nan", "inf", "1e400Ki", str(2**62)])
def test_no_numbers_of_images(text):
    with pytest.raises(UserError, match="is not a number of images: write 1000, 128Ki, 8Mi or 2Gi"):
        parse_nimg(text)


def test_lists_of_integers():
    assert parse_int_list("1, 2,5-7,7") == [1, 2, 5, 6, 7, 7]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not a number or a range"),
        ("1,", "not a number or a range"),
        ("-1", "not a number or a range"),
        ("1-2-3", "not a number or a range"),
        ("2-1", "runs backwards"),
        ("0-10000000", "longer than 10000000"),
    ],
)
def test_no_lists_of_integers(text, reason):
    with pytest.raises(UserError, match=reason):
        parse_int_list(text)


def test_messages_from_elsewhere():
    assert one_line("a\n\tb\x1b[31m \x00") == "a b[31m "
    assert len(one_line("x" * 1000)) == 300
    assert printable_url("http://me:secret@host/a\nb") == "http://host/a b"
