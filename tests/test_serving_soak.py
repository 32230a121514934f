"""A short run of `python -m tests.serve_soak`, and that it sees what it is there for."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("uvicorn") is None, reason="no jlora[serve]"),
]


def run(command: list[str]) -> tuple[int, str]:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_three_hundred_requests_of_every_kind():
    code, output = run([sys.executable, "-m", "tests.serve_soak", "--requests", "300"])
    assert code == 0 and "300 requests, seed 1: 0 faults" in output, output


#: A server that takes another adapter at every ninth request, and one that keeps every body.
WRONG = """
import itertools, sys
from jlora.serving import service
count, right = itertools.count(), service.Service.request
def request(self, fields, voice, *rest, **more):
    voice = self.voices["ada"] if next(count) % 9 == 8 else voice
    return right(self, fields, voice, *rest, **more)
service.Service.request = request
from jlora.cli import main
sys.exit(main(sys.argv[1:]))
"""
LEAK = """
import sys
from jlora.serving import app
kept, right = [], app.parse_body
def parse_body(raw):
    kept.append(bytearray(1 << 18))
    return right(raw)
app.parse_body = parse_body
from jlora.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("server", "sign"), [(WRONG, "alone"), (LEAK, "the memory grew")])
def test_the_soak_sees_another_adapters_answer_and_a_leak(server, sign):
    code = f"""
import sys
from tests import serve_soak
serve_soak.COMMAND = [sys.executable, "-c", {server!r}]
sys.exit(serve_soak.main(["--requests", "100"]))
"""
    status, output = run([sys.executable, "-c", code])
    assert status == 1 and "FAULT: " in output and sign in output, output
