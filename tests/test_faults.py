"""A sample of the trials of `python -m tests.faults`, in a process of its own, which forks."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest


def run_faults(*arguments: str) -> str:
    command = [sys.executable, "-m", "tests.faults", *arguments]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_twenty_kills_lose_nothing():
    output = run_faults("--kills", "20", "--only-kills", "--seed", "3")
    assert re.search(r"^20 trials .*: 0 lost$", output, re.MULTILINE), output


@pytest.mark.slow
def test_other_faults_lose_nothing():
    output = run_faults("--kills", "60", "--seed", "4")
    assert ": 0 lost" in output
    for kind in ("No space left", "newest checkpoint damaged", "both checkpoints damaged"):
        assert kind in output


@pytest.mark.slow
def test_the_tool_sees_a_loss():
    """With checkpoints that nobody checks, a damaged one is a loss, and the tool says so."""
    code = """
import sys
from tests import faults
import jlora.state
jlora.state.check_sums = lambda folder: None
sys.exit(faults.main(["--kills", "30", "--seed", "3"]))
"""
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "LOST" in done.stdout, done.stdout + done.stderr
