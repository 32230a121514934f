"""What makes Jittor compile an operator faster."""

from __future__ import annotations

import subprocess
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
    flags.update({"python_path": "py", "jittor_path": "/j", **changes})
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
