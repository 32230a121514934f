"""What goes to the terminal: colours, bars; and that a pipe gets neither."""

from __future__ import annotations

import io
import sys

import pytest

from jlora import cli
from jlora.report.tables import plain_table
from jlora.system import console
from jlora.system.errors import UserError
from jlora.system.progress import progress


def stream(terminal: bool) -> io.StringIO:
    made = io.StringIO()
    made.isatty = lambda: terminal
    return made


@pytest.mark.parametrize(
    ("terminal", "variables", "coloured"),
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"NO_COLOR": "1"}, False),
        (True, {"NO_COLOR": ""}, True),  # no-color.org: set and not empty
        (True, {"TERM": "dumb"}, False),
    ],
)
def test_colours_are_for_terminals_that_want_them(monkeypatch, terminal, variables, coloured):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    error = stream(terminal)
    monkeypatch.setattr(sys, "stderr", error)
    console.warn("slow")
    cli.fail(UserError("no such file"))
    red, yellow = ("\033[31merror:\033[0m", "\033[33mwarning:\033[0m")
    plain = f"jlora: {'warning:'} slow\njlora: {'error:'} no such file\n"
    shown = plain.replace("error:", red).replace("warning:", yellow)
    assert error.getvalue() == (shown if coloured else plain)


def test_a_bar_on_a_terminal_comes_late_and_goes_at_the_end():
    shown = stream(terminal=True)
    with progress(3_000_000, "writing", "B", stream=shown, delay=0) as bar:
        bar.update(1_500_000)
        bar.refresh()
    assert "writing:  50%" in shown.getvalue() and "1.50M/3.00M" in shown.getvalue()
    assert shown.getvalue().endswith("\r") and "\n" not in shown.getvalue()
    quick = stream(terminal=True)
    with progress(2, "quick", stream=quick) as bar:
        bar.update(2)
    assert quick.getvalue() == ""  # in a second


def test_a_pipe_gets_nothing_of_quick_work():
    shown = stream(terminal=False)
    assert list(progress([1, 2, 3], "measuring", "layer", stream=shown)) == [1, 2, 3]
    assert shown.getvalue() == ""


def test_a_pipe_gets_no_line_within_30_seconds_of_the_last():
    """tqdm's own thread shows a bar that has not been shown for so long, mininterval or not."""
    with progress(2, stream=stream(terminal=False)) as bar:
        assert bar.mininterval == bar.maxinterval == 30


def test_columns_are_aligned_in_chinese_too():
    table = plain_table([["run", "loss"], ["微调/第一次", "1.25"], ["é", "10.5"]]).split("\n")
    assert table == ["run          loss", "-" * 17, "微调/第一次  1.25", "é            10.5"]
    assert console.width_of("e\u0301") == 1
