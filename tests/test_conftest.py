"""A test that fails leaves nothing behind that makes another one fail."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CONFTEST = Path(__file__).with_name("conftest.py")

TESTS = """
import gc, pathlib, subprocess, sys

def test_fails_with_something_open():
    process = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    process.wait()
    file = open(__file__)
    assert not file

def test_fails_with_a_process_running(popen):
    process = popen([sys.executable, "-c", "import time; time.sleep(100)"], stdout=subprocess.PIPE)
    pathlib.Path("pid").write_text(str(process.pid)) and 1 / 0

def test_after_them():
    sys.last_value = sys.last_traceback = None
    gc.collect()
"""


def test_what_a_failed_test_had_open_fails_no_other(tmp_path):
    (tmp_path / "conftest.py").write_text(CONFTEST.read_text())
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    options = ["-q", "-p", "no:randomly", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options], cwd=tmp_path, capture_output=True, text=True
    )
    assert "2 failed, 1 passed" in done.stdout, done.stdout
    errors = [line for line in done.stdout.splitlines() if line.startswith("ERROR")]
    assert all("::test_fails_with_something_open" in line for line in errors), done.stdout
    assert "ZeroDivisionError" in done.stdout
    assert not Path("/proc", (tmp_path / "pid").read_text()).exists()
