"""Progress: a bar on terminals, lines elsewhere."""

import io
import re
import sys

import pytest

from dnnlib import progress
from dnnlib.progress import Lines, Progress, format_time


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves only when it is told to."""
    now = [1000.0]
    monkeypatch.setattr(progress, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress, "INTERVAL", 30.0)
    return now


def test_a_line_every_half_minute_where_there_is_no_terminal(clock, capsys):
    for _ in Progress(range(100), unit="img"):
        clock[0] += 10
    assert capsys.readouterr().err.splitlines()[:2] == [
        "3/100 img  elapsed 30s  left 16m 10s  0.1 img/s",
        "6/100 img  elapsed 1m 00s  left 15m 40s  0.1 img/s",
    ]


def test_short_and_hidden_jobs_print_nothing(clock, capsys):
    for hidden, seconds in ((False, 5), (True, 500)):
        for _ in Progress(range(5), unit="img", hidden=hidden):
            clock[0] += seconds
    assert capsys.readouterr() == ("", "")


def test_lines_of_what_was_done_before_and_of_what_has_no_end(clock, capsys):
    with Progress(unit="B", total=4_000_000, initial=1_000_000, desc="net.pkl", unit_scale=True) as download:
        clock[0] += 100
        download.update(1_000_000)
    with Progress(unit="img") as endless:
        clock[0] += 40
        endless.update(80)
    assert capsys.readouterr().err.splitlines() == [
        "net.pkl: 2.00M/4.00M B  elapsed 1m 40s  left 3m 20s  10.0k B/s",
        "80 img  elapsed 40s  2 img/s",
    ]


def test_other_lines_postpone_them(clock, capsys):
    lines = Lines("img", 100)
    clock[0] += 29
    lines.postpone()
    clock[0] += 29
    lines.update()
    assert capsys.readouterr().err == ""


def test_a_bar_on_terminals(clock, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    for _ in Progress(range(4), unit="img"):
        clock[0] += 100
    text = sys.stderr.getvalue()
    assert re.search(r"100%\|.*\| 4/4 \[", text) and "elapsed" not in text


def test_times():
    cases = {0: "0s", 59.4: "59s", 59.6: "1m 00s", 187: "3m 07s", 7500: "2h 05m", 86400 * 4 + 3 * 3600: "4d 03h"}
    assert {seconds: format_time(seconds) for seconds in cases} == cases
