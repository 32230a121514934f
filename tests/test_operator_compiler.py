"""What makes Jittor compile an operator faster."""

from __future__ import annotations

import os
import pty
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from jlora.system import operator_compiler
from jlora.system.runtime import jt


def test_the_compiler_is_called_at_once(tmp_path):
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    compiler.chmod(0o755)
    command = ["sh", operator_compiler.SCRIPT, "/j/asm_tuner.py"]
    command += [f"--cc_path={compiler}", "a_op.cc", "-I/a b", "-o", "a_op.so"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\n")
    assert lines == ["a_op.cc", "-I/a b", "-o", "a_op.so", ""]


def test_the_failure_of_the_compiler_is_the_script_s(tmp_path):
    source = tmp_path / "a_op.cc"
    source.write_text("")
    command = ["sh", operator_compiler.SCRIPT, "tuner", "--cc_path=false", source]
    assert subprocess.run(command).returncode == 1


def test_operators_are_compiled_with_the_compiled_header(tmp_path):
    if jt.flags.cc_type != "g++" or " -include " not in jt.flags.cc_flags:
        pytest.skip("no precompiled header with this compiler")
    source = tmp_path / "a.cc"
    source.write_text('#define JIT 1\n#include "var.h"\n')
    # -H lists the headers that are read: "!" marks a precompiled one that is used.
    command = [
        jt.flags.cc_path,
        *operator_compiler.header_options(shlex.split(jt.flags.cc_flags)),
        *("-include", f"{jt.flags.cache_path}/{operator_compiler.HEADER}"),
        "-H",
        "-fsyntax-only",
        str(source),
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    read = [line for line in done.stderr.splitlines() if line.startswith(("!", ".", "x"))]
    assert [line[0] for line in read if operator_compiler.HEADER in line][-1] == "!"
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
    assert not list(Path(tmp_path).rglob("*.gch/*"))


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """Commands that compile a header, which write a file instead; and folders to work in."""
    commands = []
    for name in ("", "mem", "misc", "ops", "opt", "pybind", "pyjt", "utils"):
        (tmp_path / "jittor" / "src" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "jittor" / "src" / name / "a.h").write_text("")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / operator_compiler.HEADER).write_text("")

    def run(command, **_):
        if command[-1] != "--version":
            commands.append(command)
            Path(command[-1]).write_text("compiled")
        return SimpleNamespace(stdout=b"g++ 1.2.3")

    monkeypatch.setattr(operator_compiler.subprocess, "run", run)
    return commands


def test_headers_of_another_jittor_are_compiled_anew(tmp_path, compiled):
    sources, header = tmp_path / "jittor" / "src", tmp_path / "cache" / operator_compiler.HEADER

    def precompile(*options):
        return operator_compiler._precompile(header, "g++", options, sources)

    first, again, other = precompile("-I/a"), precompile("-I/b"), precompile("-O2")
    assert first == again != other and first.exists() and len(compiled) == 2
    os.utime(sources / "misc" / "a.h", (1, 1))
    newer = precompile()
    assert newer.exists() and not first.exists() and not other.exists()  # g++ would take those


def test_jittor_s_own_sources_are_compiled_with_the_compiled_header(tmp_path, compiled):
    header = tmp_path / "cache" / operator_compiler.HEADER
    ran = []
    jittor_utils = SimpleNamespace(
        run_cmd=lambda command: ran.append(command),
        run_cmds=lambda commands, name: ran.append((commands, name)),
        __file__=str(tmp_path / "jittor_utils" / "__init__.py"),
    )
    (tmp_path / "jittor_utils").mkdir()
    with operator_compiler.compiled_headers(jittor_utils):
        for command in ("g++ --version", f'g++ -c a.cc -include "{header}" -include "b" -o a.o'):
            jittor_utils.run_cmd(command)
            assert not compiled
        commands = [f'"g++" "/{name}.cc" -fPIC -include "{header}" -c -o "a.o"' for name in "ab"]
        jittor_utils.run_cmds(commands, "core")
        assert compiled[0][:5] == ["g++", "-x", "c++-header", str(header), "-fPIC"]
        jittor_utils.run_cmd(f'g++ a.cc -fPIC -include "{header}" -lx -o a.so')
        assert len(compiled) == 1 and list(Path(f"{header}.gch").iterdir())
    assert not list(Path(f"{header}.gch").iterdir())
    assert ran[2] == (commands, "core") and len(ran) == 4


def test_the_header_is_that_of_the_own_cache(tmp_path):
    """A process may have inherited its environment from one with another home."""
    environment = dict(operator_compiler.FLAGS)
    operator_compiler.add_header(environment, tmp_path / "one", True)
    operator_compiler.add_header(environment, tmp_path / "two", True)
    header = tmp_path / "two" / operator_compiler.HEADER
    assert environment["cc_flags"] == f' -O1  -include "{header}" ' and header.exists()
    assert environment["kernel_flags"].split() == ["-Ofast", "-DJIT=1", "-DJIT_cpu=1"]
    assert operator_compiler.remove_header(environment)
    assert environment == operator_compiler.FLAGS
    assert not operator_compiler.remove_header(environment)


@pytest.mark.parametrize("flags", [{"cc_flags": "-O3"}, {"kernel_flags": "-O2"}, {}])
def test_flags_of_the_user_s_are_left_alone(flags, tmp_path):
    environment = {**operator_compiler.FLAGS, **flags} if flags else {}
    before = dict(environment)
    operator_compiler.add_header(environment, tmp_path, True)
    assert environment == before
    operator_compiler.add_header(default := dict(operator_compiler.FLAGS), tmp_path, False)
    assert default == operator_compiler.FLAGS  # another compiler


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
