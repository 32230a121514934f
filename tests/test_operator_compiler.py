"""What makes Jittor compile an operator faster."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from jlora.system import operator_compiler
from jlora.system.runtime import jt


@pytest.mark.parametrize("marked", [False, True])
def test_python_is_asked_only_for_marked_sources(marked, tmp_path):
    source = tmp_path / "a_op.cc"
    source.write_text("int x;\n" + "// @begin replace\n" * marked)
    programs = {}
    for name in ("python", "compiler"):
        programs[name] = tmp_path / name
        programs[name].write_text(f'#!/bin/sh\nprintf "%s\\n" {name} "$@"\n')
        programs[name].chmod(0o755)
    command = ["sh", operator_compiler.SCRIPT, programs["python"], "/j/asm_tuner.py"]
    command += [f"--cc_path={programs['compiler']}", source, "-I/a b", "-o", "a_op.so"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\n")
    rest = [str(source), "-I/a b", "-o", "a_op.so", ""]
    if marked:
        expected = ["python", "/j/asm_tuner.py", f"--cc_path={programs['compiler']}", *rest]
    else:
        expected = ["compiler", *rest]
    assert lines == expected


def test_the_failure_of_the_compiler_is_the_script_s(tmp_path):
    source = tmp_path / "a_op.cc"
    source.write_text("")
    command = ["sh", operator_compiler.SCRIPT, "python", "tuner", "--cc_path=false", source]
    assert subprocess.run(command).returncode == 1


def test_operators_are_compiled_with_the_compiled_header(tmp_path):
    if jt.flags.cc_type != "g++" or " -include " not in jt.flags.cc_flags:
        pytest.skip("no precompiled header with this compiler")
    source = tmp_path / "a.cc"
    source.write_text('#include "var.h"\n')
    # -H lists the headers that are read: "!" marks a precompiled one that is used.
    command = [
        jt.flags.cc_path,
        *operator_compiler.compile_flags(jt.flags.cc_flags),
        "-H",
        "-fsyntax-only",
        str(source),
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    read = [line for line in done.stderr.splitlines() if line.startswith(("!", ".", "x"))]
    assert [line[0] for line in read if "jlora-operators" in line] == ["!"]
    assert not any(line.endswith("/var.h") for line in read)


def fake_jittor(**changes):
    flags = {"cc_type": "g++", "cc_path": "g++", "cc_flags": " -fPIC ", "nvcc_path": ""}
    flags.update({"python_path": "py", "jittor_path": "/j", "log_silent": 0, **changes})
    return SimpleNamespace(flags=SimpleNamespace(**flags))


@pytest.mark.parametrize("changes", [{"nvcc_path": "/nvcc"}, {"jittor_path": "/my folder/j"}])
def test_where_it_cannot_be_nothing_changes(changes, tmp_path):
    jittor = fake_jittor(**changes)
    before = vars(jittor.flags).copy()
    operator_compiler.set_up(jittor, tmp_path)
    assert vars(jittor.flags) == before and not list(tmp_path.iterdir())


@pytest.mark.parametrize("compiler", ["false", "no-such-compiler"])
def test_a_compiler_that_fails_leaves_the_plain_headers(compiler, tmp_path):
    jittor = fake_jittor(cc_path=compiler)
    operator_compiler.set_up(jittor, tmp_path)
    assert jittor.flags.cc_flags == " -fPIC "
    assert not list(Path(tmp_path).glob("*.gch"))


def test_headers_of_another_jittor_are_compiled_anew(tmp_path, monkeypatch):
    jittor, cache, compiled = tmp_path / "jittor", tmp_path / "cache", []
    for name in ("", "mem", "misc", "ops", "opt", "pybind", "utils"):
        (jittor / "src" / name).mkdir(parents=True, exist_ok=True)
        (jittor / "src" / name / "a.h").write_text("")
    cache.mkdir()

    def run(command, **_):
        if command[-1] != "--version":
            compiled.append(command)
            Path(command[-1]).write_text("compiled")
        return SimpleNamespace(stdout=b"g++ 1.2.3")

    monkeypatch.setattr(operator_compiler.subprocess, "run", run)
    first, again = (operator_compiler._precompiled("g++", "", jittor, cache) for _ in range(2))
    os.utime(jittor / "src" / "misc" / "a.h", (1, 1))
    other = operator_compiler._precompiled("g++", "", jittor, cache)
    assert first == again != other and len(compiled) == 2


SHOWS_PROGRESS = """
#include <iomanip>
#include <iostream>
extern "C" void show() {  // as Jittor does, in parallel_compiler.cc
    std::cerr << "before\\n";
    std::cerr << "\\n";
    std::cerr << "one line of its own" << std::endl;
    std::cerr << "\\n";
    for (int i = 1; i <= 2; i++) {
        std::cerr << "Compiling Operators(" << i << '/' << 2 << ")"
            << " used: " << std::setprecision(3) << std::setw(4) << 2.5 << "s eta: "
            << std::setprecision(3) << std::setw(4) << 0.5 << "s \\r";
        if (i == 1) std::cerr << "[e] a warning of a compiling thread\\n";
        // As Jittor says it where a compiling thread dies.
        if (i == 1) std::cerr << "Segfault, exit" << ", flush log..." << std::endl;
    }
    std::cerr << std::endl;
    std::cerr << 7 << " after\\n";
}
"""


@pytest.mark.skipif(jt.flags.cc_type != "g++", reason="for g++")
@pytest.mark.parametrize("terminal", [False, True])
def test_progress_with_operators_is_one_line_on_a_terminal_and_nothing_elsewhere(
    terminal, tmp_path
):
    source, library = tmp_path / "shows.cc", tmp_path / "shows.so"
    source.write_text(SHOWS_PROGRESS)
    command = ["g++", str(source), str(operator_compiler.FILTER), "-std=c++14", "-shared", "-fPIC"]
    subprocess.run([*command, "-o", str(library)], check=True)
    code = f"import ctypes; l = ctypes.CDLL({str(library)!r}); l.jlora_quiet_operators(); l.show()"
    ours, theirs = pty.openpty() if terminal else os.pipe()
    try:
        subprocess.run([sys.executable, "-c", code], check=True, stderr=theirs)
        said = os.read(ours, 1 << 16).decode().replace("\r\n", "\n")  # a terminal adds the "\r"
    finally:
        os.close(ours)
        os.close(theirs)
    warning = "[e] a warning of a compiling thread\nSegfault, exit, flush log...\n"
    if terminal:
        shown = [f"\r\033[Kjlora: compiling operators (once) ... {i}/2" for i in (1, 2)]
        warning = f"{shown[0]}{warning}{shown[1]}\r\033[K"
    assert said == f"before\n\none line of its own\n{warning}7 after\n"
