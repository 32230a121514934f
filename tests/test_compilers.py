"""Which compiler makes jlora's operators, and which one Jittor gets."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from jlora.cli import doctor
from jlora.kernels import native
from jlora.system import compilers, environment, machine
from jlora.system.compilers import STATIC, Compiler, operator_compilers
from jlora.system.errors import UserError

KNOWN = {"avx512_bf16": "__AVX512BF16__", "amx_bf16": "__AMX_BF16__", "amx_int8": "__AMX_INT8__"}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The only folder on the PATH, on a processor with AVX512_BF16 and AMX."""
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("cc_path", "CXX", "JLORA_CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(machine, "cpu_flags", lambda: set(KNOWN) | {"avx2"})
    monkeypatch.setattr(machine.platform, "system", lambda: "Linux")
    monkeypatch.setattr(machine.platform, "machine", lambda: "x86_64")
    clear = compilers.examine.cache_clear
    clear()
    yield tmp_path
    clear()


def put(folder: Path, name: str, version: str, *flags: str) -> str:
    """A stand-in for a compiler, which names its version and the instructions that it knows."""
    major, minor = version.split(".")
    own = "__clang_{}__" if "clang" in name else "__GNUC{}__"
    lines = [f"#define {own.format('major' if 'clang' in name else '')} {major}"]
    lines += [f"#define {own.format('minor' if 'clang' in name else '_MINOR')} {minor}"]
    lines += ["#define __clang__ 1"] if "clang" in name else []
    lines += [f"#define {KNOWN[flag]} 1" for flag in flags]
    path = folder / name
    text = "\n".join(lines)
    path.write_text(f"#!/bin/sh\n/bin/cat <<'END'\n{text}\nEND\n")
    path.chmod(0o755)
    return str(path)


def test_one_compiler_is_not_asked(folder, monkeypatch):
    path = put(folder, "g++", "12.2", *KNOWN)
    (folder / "g++-12").symlink_to("g++")  # the same one under Debian's other name
    monkeypatch.setattr(compilers, "examine", lambda *_: pytest.fail("asked"))
    assert [found.path for found in operator_compilers()] == [path]


def test_the_newest_makes_the_operators_and_jittor_keeps_its_own(folder):
    old = put(folder, "g++", "10.2", "avx512_bf16")
    new = put(folder, "g++-12", "12.2", *KNOWN)
    middle = put(folder, "x86_64-conda-linux-gnu-g++", "11.4", *KNOWN)
    put(folder, "g++-12-real-name-of-another-kind", "99.0")
    found = operator_compilers()
    assert [(each.path, each.own) for each in found] == [
        (new, False), (middle, False), (old, True)
    ]  # fmt: skip
    assert machine.compiler() == old and str(found[0]) == "g++ 12.2"
    assert found[2].missing == {"amx_bf16", "amx_int8"} and not found[0].missing


def test_clang_only_where_it_knows_more(folder):
    gcc = put(folder, "g++", "12.2", *KNOWN)
    clang = put(folder, "clang++-19", "19.1", *KNOWN)
    assert [each.path for each in operator_compilers()] == [gcc, clang]
    compilers.examine.cache_clear()
    put(folder, "g++", "10.2")
    assert [each.path for each in operator_compilers()] == [clang, gcc]


def test_the_choice_of_the_user(folder, monkeypatch):
    put(folder, "g++", "12.2", *KNOWN)
    chosen = put(folder, "g++-11", "11.1", *KNOWN)
    monkeypatch.setenv("JLORA_CXX", "g++-11")
    (found,) = operator_compilers()
    assert (found.version, found.own) == ((11, 1), False)
    monkeypatch.setenv("JLORA_CXX", "g++")
    assert operator_compilers()[0].own
    for wrong in ("g++-99", str(folder), f"{chosen} -O3"):
        monkeypatch.setenv("JLORA_CXX", wrong)
        with pytest.raises(UserError, match="JLORA_CXX=.*no C\\+\\+ compiler of that name runs"):
            operator_compilers()


def test_a_compiler_that_does_not_run_is_passed_over(folder):
    good = put(folder, "g++", "10.2")
    broken = folder / "g++-13"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    assert [each.path for each in operator_compilers()] == [good]


def test_one_for_another_processor_is_left_out(folder, monkeypatch):
    """As Debian's g++-aarch64-linux-gnu beside g++-10, where there is no plain g++."""
    for name in ("aarch64-linux-gnu-g++", "aarch64-linux-gnu-g++-14"):
        put(folder, name, "14.2", *KNOWN)
    monkeypatch.setenv("CXX", "aarch64-linux-gnu-g++")
    assert machine.compiler() is None
    own = put(folder, "g++-10", "10.2")
    assert machine.compiler() == own and [each.path for each in operator_compilers()] == [own]


def test_where_no_compiler_answers_jittor_s_is_taken(folder):
    """Such as with a wrong JLORA_ARCH, or on a machine too busy to answer."""
    for name in ("g++", "g++-13"):
        (folder / name).write_text("#!/bin/sh\nexit 1\n")
        (folder / name).chmod(0o755)
    assert [each.path for each in operator_compilers()] == [str(folder / "g++")]


def test_another_compiler_s_library_brings_its_own_libraries(monkeypatch):
    monkeypatch.setattr(machine, "cpu_features", list)  # with AMX the compiler would be asked
    own, other = Compiler("g++", (10, 2), False), Compiler("g++-12", (12, 2), False, own=False)
    assert not set(STATIC) & set(native._command(None, own))
    command = native._command(None, other)
    assert command[0] == "g++-12" and set(STATIC) <= set(command)


@pytest.mark.skipif(not shutil.which("readelf"), reason="no readelf")
def test_such_a_library_needs_no_libstdcxx(tmp_path):
    source = tmp_path / "a.cc"
    source.write_text(
        "#include <string>\n"
        'extern "C" size_t f(int n) {\n'
        "    try { return std::string(n, 1).size(); } catch (...) { return 7; }\n"
        "}\n"
    )
    library = tmp_path / "a.so"
    compiler = machine.compiler()
    subprocess.run([compiler, "-shared", "-fPIC", *STATIC, source, "-o", library], check=True)
    needed = subprocess.run(["readelf", "-d", library], check=True, capture_output=True, text=True)
    assert "libstdc++" not in needed.stdout and "libgcc" not in needed.stdout
    loaded = ctypes.CDLL(str(library), mode=os.RTLD_NOW | os.RTLD_LOCAL)
    assert loaded.f(3) == 3 and loaded.f(-1) == 7  # an exception stays inside


@pytest.fixture
def two(tmp_path, monkeypatch) -> list[Compiler]:
    """Another compiler than Jittor's, and Jittor's."""
    found = [Compiler("g++-13", (13, 1), False, own=False), Compiler("g++", (10, 2), False)]
    monkeypatch.setattr(machine, "cpu_features", list)
    monkeypatch.setattr(native, "jt", SimpleNamespace(flags=SimpleNamespace(cache_path=tmp_path)))
    monkeypatch.setattr(native, "find_onednn", lambda: None)
    monkeypatch.setattr(native, "operator_compilers", lambda: found)
    (tmp_path / "jlora").mkdir()
    return found


def test_the_next_one_where_the_best_fails(two, monkeypatch, capsys):
    tried, library = [], object()

    def made(_onednn, compiler):
        tried.append(compiler)
        if compiler is two[0]:
            raise UserError("g++-13 could not compile jlora's operators (no <omp.h>)")
        return library

    monkeypatch.setattr(native, "_made", made)
    assert native._first_that_works() is library and tried == two
    assert "warning: g++-13 could not compile" in capsys.readouterr().err
    assert native._first_that_works() is library and tried == [*two, two[1]]
    assert capsys.readouterr().err == ""  # half a minute that is not spent again


@pytest.mark.parametrize(
    ("code", "said", "shown", "lasting"),
    [
        (1, "a.h:3:9: fatal error: omp.h: No such file", "a.h:3:9: fatal error: omp.h", True),
        (1, "g++: fatal error: Killed signal terminated program cc1plus", "Killed signal", False),
        (1, "cc1plus: out of memory allocating 65536 bytes", "out of memory", False),
        (1, "a.cc:1:1: error: x\n/tmp/a.s: No space left on device", "No space left", False),
        (-15, "", "ended by signal 15", False),
    ],
)
def test_only_what_will_fail_again_is_remembered(
    two, tmp_path, monkeypatch, capsys, code, said, shown, lasting
):
    tried = []

    def run_compiler(command, _message):
        tried.append(command[0])
        return (code, said) if command[0] == "g++-13" else (1, "error: the other one, too")

    monkeypatch.setattr(native, "run_compiler", run_compiler)
    for _ in range(2):
        with pytest.raises(UserError, match="the other one, too"):
            native._first_that_works()
    assert tried == ["g++-13", "g++", *(["g++"] if lasting else ["g++-13", "g++"])]
    warned = capsys.readouterr().err
    assert warned.count(shown) == (1 if lasting else 2)
    remembered = list((tmp_path / "jlora").glob("*.failed"))
    assert len(remembered) == lasting and all(f"{name} remembers" in warned for name in remembered)


def test_a_full_disk_is_not_remembered_and_the_next_compiler_is_tried(two, monkeypatch, capsys):
    def full(_command, path):
        with native.atomic_path(path):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(native, "_compile", full)
    monkeypatch.setattr(native, "write_text", lambda *_: pytest.fail("remembered"))
    with pytest.raises(UserError, match="No space left"):
        native._first_that_works()
    assert capsys.readouterr().err.count("taking another compiler") == 1


def test_doctor_says_what_a_newer_one_would_bring(folder, monkeypatch):
    old = put(folder, "g++", "10.2", "avx512_bf16")
    (check,) = doctor._operators(True)
    assert not check.ok and not check.required
    assert check.detail == (
        f"g++ 10.2 ({old}) makes no AMX_BF16, AMX_INT8 code, which this processor has"
    )
    assert check.fix.startswith("install g++ 11 or newer beside it (JLORA_CXX names")
    new = put(folder, "g++-12", "12.2", *KNOWN)
    (check,) = doctor._operators(True)
    assert check.ok
    known = "AVX512_BF16, AMX_BF16, AMX_INT8"
    assert check.detail == f"g++ 12.2 ({new}; Jittor keeps its own), for {known}"
    monkeypatch.setenv("JLORA_CXX", "nothing")
    (check,) = doctor._operators(True)
    assert not check.ok and check.required and check.fix.startswith("correct it")
    assert doctor._operators(False) == []


@pytest.mark.parametrize("variable", [None, "CXX"])
def test_jittor_gets_a_compiler_of_another_name(folder, monkeypatch, variable):
    """As in contest and conda environments, where g++ itself is not there."""
    assert machine.compiler() is None
    for name in ("g++-9", "clang++-15", "x86_64-conda-linux-gnu-c++"):
        put(folder, name, "9.4")
    wanted = put(folder, "g++-10", "10.2")
    if variable:
        wanted = put(folder, "x86_64-conda-linux-gnu-g++", "10.4")
        monkeypatch.setenv(variable, wanted)
    assert machine.compiler() == wanted
    assert environment.jittor_variables()["cc_path"] == wanted
    put(folder, "g++", "12.2")
    assert "cc_path" not in environment.jittor_variables()
