"""`jlora serve` from its command line to its end."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import tiny

from jlora import LoraConfig, cli, get_peft_model
from jlora.models.hub import load
from jlora.system.runtime import jt


def test_what_is_missing_is_named(monkeypatch, capsys):
    for name in ("llguidance", "uvicorn"):
        monkeypatch.setitem(sys.modules, name, None)
        assert cli.main(["serve", "m"]) == 2
        error = capsys.readouterr().err
        assert f"needs {name}" in error and 'pip install "jlora[serve]"' in error
        assert len(error.splitlines()) == 1
        monkeypatch.undo()


def test_the_command_line_imports_no_server():
    code = (
        "import sys, jlora.cli; jlora.cli.parser(); "
        "print([m for m in ('starlette', 'uvicorn', 'llguidance', 'jittor') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (["--adapter", "a=b", "--adapter", "a=c"], "given twice"),
        (["--allow-adapter-changes"], "adapters_dir"),
        (["--port", "70000"], "port is 70000"),
        (["--precision", "fp8"], "fp8"),
        (["--timeout", "0"], "timeout is 0"),
        (["--host", "no.such.host.invalid"], "choose another --host"),
    ],
)
def test_options_that_make_no_sense(given, text: str, capsys):
    assert cli.main(["serve", "no-such-model", *given]) == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize("given", [["--adapter", "a"], ["--adapter", "=a"], ["--max-rows", "0"]])
def test_options_of_a_wrong_form(given, capsys):
    with pytest.raises(SystemExit):
        cli.main(["serve", "m", *given])
    assert given[0] in capsys.readouterr().err


def test_an_adapter_is_no_model(tmp_path, capsys):
    (tmp_path / "adapter_config.json").write_text("{}")
    assert cli.main(["serve", str(tmp_path)]) == 2
    assert "name its base model first" in capsys.readouterr().err


def test_a_key_comes_from_the_environment_too(monkeypatch, capsys):
    monkeypatch.setenv("JLORA_API_KEY", "open sesame")
    assert cli.main(["serve", "m"]) == 2
    error = capsys.readouterr().err
    assert "api_key" in error and "sesame" not in error


def write_adapter(base, folder) -> None:
    """An adapter with random values."""
    model = get_peft_model(load(str(base)), LoraConfig(r=2, target_modules=["c_attn"]))
    random = np.random.default_rng(0)
    for key, value in model.named_parameters():
        if "lora_" in key:
            value.assign(jt.array(random.normal(0, 1, value.shape).astype(np.float32)))
    model.save_pretrained(str(folder))


def test_a_server_with_its_own_engine_from_start_to_end(tmp_path, monkeypatch, capsys):
    """The real engine: base and adapter asked at once, an adapter loaded, SIGTERM, exit code 0."""
    from jlora.serving.server import Server

    tiny.write_chat_model(tmp_path / "base")
    for name in ("first", "second"):
        write_adapter(tmp_path / "base", tmp_path / "adapters" / name)
    usual = signal.signal(signal.SIGTERM, lambda *_: None)  # too late a one ends nothing
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    begun, addresses, found = threading.Event(), [], {}
    startup = Server.startup

    async def noting(self, sockets=None) -> None:
        await startup(self, sockets)
        addresses.append(self._listener.getsockname()[:2])
        begun.set()

    monkeypatch.setattr(Server, "startup", noting)

    def ask(path: str, body: dict) -> dict:
        with contextlib.closing(http.client.HTTPConnection(*addresses[0], timeout=60)) as sent:
            sent.request("POST", path, json.dumps(body))
            raw = sent.getresponse().read()
            return json.loads(raw) if raw.startswith(b"{") else {"text": raw.decode()}

    def use() -> None:
        begun.wait()
        if not addresses:
            return  # it did not start
        try:
            logprobs = {"prompt": "name : x", "max_tokens": 4, "logprobs": 1, "echo": True}
            for model in ("base", "first"):
                found[model] = ask("/v1/completions", {**logprobs, "model": model})
            chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 30}
            schema = {"type": "json_schema", "json_schema": {"schema": {"enum": [12345]}}}
            found["json"] = ask("/v1/chat/completions", {**chat, "response_format": schema})
            beams = {"prompt": "name", "max_tokens": 4, "num_beams": 3, "model": "second"}
            found["beams"] = ask("/v1/completions", beams)
            found["unloaded"] = ask("/v1/unload_lora_adapter", {"lora_name": "first"})
            found["gone"] = ask("/v1/completions", {**logprobs, "model": "first"})
            again = {"lora_name": "again", "lora_path": "first"}
            found["loaded"] = ask("/v1/load_lora_adapter", again)
            found["again"] = ask("/v1/completions", {**logprobs, "model": "again"})
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    client = threading.Thread(target=use)
    client.start()
    options = f"--adapters-dir {tmp_path}/adapters --allow-adapter-changes --port 0"
    try:
        code = cli.main(["serve", f"{tmp_path}/base", *options.split(), "--precision", "fp32"])
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    finally:
        begun.set()
        client.join()
        signal.signal(signal.SIGTERM, usual)
    assert code == 0
    error = capsys.readouterr().err
    assert "serving base, first, second at http://127.0.0.1:" in error
    scores = {
        name: found[name]["choices"][0].pop("logprobs") for name in ("base", "first", "again")
    }
    assert scores["base"]["token_logprobs"][1:] != scores["first"]["token_logprobs"][1:]
    assert scores["again"] == scores["first"]  # the same files under another name
    assert found["json"]["choices"][0]["message"]["content"] == "12345"
    assert found["beams"]["choices"][0]["text"]
    assert found["gone"]["error"]["code"] == "model_not_found"
    assert "removed successfully" in found["unloaded"]["text"]
