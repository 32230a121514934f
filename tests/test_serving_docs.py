"""docs/serve.md says what the server does."""

from __future__ import annotations

import ast
import configparser
import dataclasses
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from stub_openai import serving

from jlora import cli

pytest.importorskip("jlora.serving.app", reason="no jlora[serve]")
from jlora.serving import fields  # noqa: E402
from jlora.serving.settings import ServeConfig  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
COMMANDS = re.findall(r"^    (jlora .*)$", TEXT, re.MULTILINE)


def blocks(kind: str) -> list[str]:
    return [text for name, text in BLOCKS if name == kind]


def parsed(command: str):
    return cli.parser().parse_args(shlex.split(command)[1:])


def unit() -> configparser.ConfigParser:
    found = configparser.ConfigParser(strict=False, interpolation=None)
    found.optionxform = str
    found.read_string(blocks("ini")[0])
    return found


def test_commands_are_ones_that_jlora_takes():
    (arguments,) = map(parsed, COMMANDS)
    assert arguments.adapter == [("cafe", Path("runs/cafe")), ("sql", Path("runs/sql"))]
    started = parsed(unit()["Service"]["ExecStart"])
    assert str(started.adapters_dir) == "/srv/adapters" and started.port == 8080


def test_options_and_their_defaults_are_the_servers(capsys):
    with pytest.raises(SystemExit):
        cli.parser().parse_args(["serve", "--help"])
    known = set(re.findall(r"^  (--[\w-]+)", capsys.readouterr().out, re.MULTILINE))
    assert set(re.findall(r"`(--[\w-]+)", TEXT)) - known == set()
    defaults = {field.name: field.default for field in dataclasses.fields(ServeConfig)}
    table = re.findall(r"^\| `--([\w-]+)` \| ([\d.]+) \|", TEXT, re.MULTILINE)
    assert len(table) == 7
    for name, value in table:
        assert defaults[name.replace("-", "_")] == float(value), name
    # systemd lets the last answer finish.
    assert float(unit()["Service"]["TimeoutStopSec"]) > defaults["timeout"]


def test_every_field_of_a_request_is_there():
    told = set(re.findall(r"`(\w+)`", TEXT))
    source = ast.parse(Path(fields.__file__).read_text(encoding="utf-8"))
    readers = ("take", "number", "whole", "flag", "text", "object")
    calls = [node for node in ast.walk(source) if isinstance(node, ast.Call) and node.args]
    taken = {
        call.args[0].value for call in calls
        if getattr(call.func, "attr", "") in readers and isinstance(call.args[0], ast.Constant)
    }  # fmt: skip
    assert len(taken) > 20
    assert taken - told - {"include_usage"} == set()


def test_python_and_curl_are_answered(capsys):
    """As written, but for the port; LangChain's lines are the same request."""
    pytest.importorskip("openai")
    with serving() as stub:
        here = stub.address.rstrip("/")
        code = blocks("python")[0].replace("http://127.0.0.1:8080", here)
        exec(compile(code, "docs/serve.md", "exec"), {})
        curl = blocks("sh")[0].replace("http://127.0.0.1:8080", here)
        done = subprocess.run(["bash", "-c", curl + " -s"], capture_output=True, text=True)
    assert "cafe says: cafe: When do you open?" in capsys.readouterr().out
    if done.returncode != 127:
        assert done.stdout.endswith("data: [DONE]\n\n"), done
    for code in blocks("python"):
        ast.parse(code)
    assert len(blocks("python")) == 2


def test_bodies_are_json():
    for body in re.findall(r"`(\{\".*?\})`", TEXT):
        json.loads(body)
    (body,) = re.findall(r"-d '(.*?)'", blocks("sh")[0], re.DOTALL)
    assert json.loads(body)["model"] == "cafe"
