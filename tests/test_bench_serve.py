"""The arithmetic of `make bench ARGS=serve`, its client and its inputs; no timings."""

from __future__ import annotations

import argparse
import asyncio
import json

import numpy as np
import pytest
from safetensors.numpy import load_file
from stub_openai import serving

from benchmarks import serve, serve_client, serve_inputs, serve_sides
from benchmarks.serve_sides import Round, Side
from jlora.formats.safetensors_file import lazy_safetensors
from jlora.system.errors import UserError


def test_the_client_counts_what_the_server_counts():
    with serving() as stub:
        bodies = [
            {"model": name, "prompt": "one two three", "max_tokens": 9, "stream": True}
            for name in ("café", "sql")
        ]
        answers = asyncio.run(serve_client.all_at_once(stub.address, bodies))
    assert [answer.text for answer in answers] == ["café: one two three", "sql: one two three"]
    for answer in answers:
        assert (answer.status, answer.tokens, answer.reason, answer.error) == (200, 4, "stop", "")
        assert len(answer.times) == 4 and answer.sent < answer.times[0] < answer.times[-1]
        assert answer.step == (answer.times[-1] - answer.times[0]) / 3


def test_the_client_sees_a_refusal_and_can_go_away():
    with serving() as stub:
        body = {"model": "café", "prompt": "one two", "stream": True}
        answer = asyncio.run(serve_client.stream(stub.address, {**body, "temperature": 9}))
        assert answer.status == 400 and "must" in json.loads(answer.error)["error"]["message"]
        stub.gate.clear()
        answer = asyncio.run(serve_client.stream(stub.address, body, on_piece=lambda a: True))
        assert answer.text == "café:" and answer.reason is None and stub.left.wait(20)


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_lines_are_put_together_from_chunks_of_any_size(size):
    text = "data: {é}\n\ndata: [DONE]\n\n".encode()
    chunks = [text[i : i + size] for i in range(0, len(text), size)]

    async def read() -> list[str]:
        reader = asyncio.StreamReader()
        for chunk in chunks:
            reader.feed_data(b"%x;x=1\r\n%b\r\n" % (len(chunk), chunk))
        reader.feed_data(b"0\r\n\r\n")
        reader.feed_eof()
        return [line async for line in serve_client.read_lines(reader, chunked=True)]

    assert asyncio.run(read()) == ["data: {é}", "", "data: [DONE]", ""]


CONFIG = {
    "model_type": "llama", "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture
def inputs(tmp_path):
    found = serve_inputs.Inputs("tiny", tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG))
    serve_inputs.write_random(tmp_path / "model" / "model.safetensors", CONFIG)
    return found


def test_an_adapter_has_one_product_in_every_form(inputs):
    """PEFT's, llama.cpp's and mlx-lm's file of an adapter, and it fits the model."""
    from gguf import GGUFReader

    base = lazy_safetensors(inputs.model / "model.safetensors")
    peft = load_file(inputs.adapter(0) / "adapter_model.safetensors")
    mlx = load_file(inputs.mlx_adapter() / "adapters.safetensors")
    gguf = {tensor.name: tensor.data for tensor in GGUFReader(inputs.gguf_adapter(0)).tensors}
    assert len(peft) == len(mlx) == len(gguf) == 28
    for name, array in peft.items():
        weight = name.removeprefix("base_model.model.").replace(f".lora_{name[-8]}", "")
        shape = base[weight].shape
        assert array.shape == ((8, shape[1]) if "lora_A" in name else (shape[0], 8)), name
    layer, short = "model.layers.1.mlp.down_proj", "blk.1.ffn_down.weight"
    a, b = (peft[f"base_model.model.{layer}.lora_{half}.weight"] for half in "AB")
    assert a.shape == (8, 48) and b.shape == (32, 8)
    np.testing.assert_array_equal(mlx[f"{layer}.lora_a"] @ mlx[f"{layer}.lora_b"], a.T @ b.T)
    np.testing.assert_allclose(gguf[f"{short}.lora_b"], b, atol=1e-4)
    np.testing.assert_allclose(gguf[f"{short}.lora_a"], a, atol=1e-3)
    other = load_file(inputs.adapter(1) / "adapter_model.safetensors")
    assert all((other[name] != peft[name]).any() for name in peft)


def test_what_breaks_off_while_it_is_made_is_made_again(tmp_path):
    def broken(path):
        path.write_text("half")
        raise UserError("the disk is full")

    with pytest.raises(UserError):
        serve_inputs.made(tmp_path / "x", broken)
    assert not (tmp_path / "x").exists()
    assert serve_inputs.made(tmp_path / "x", lambda p: p.write_text("whole")).read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_short_answers_are_extrapolated_by_their_steps():
    assert serve_sides.extrapolated(Round(3.0, 1.0, 0.25), 8, 16) == Round(5.0, 1.0, 0.25)
    assert serve_sides.extrapolated(Round(3.0, 1.0, 0.25), 8, 8).seconds == 3.0


def side(name: str, **seconds: float) -> Side:
    """A side whose scenarios, such as s16x1, took so many seconds."""
    found = Side(name)
    for scenario, value in seconds.items():
        streams, adapters = map(int, scenario[1:].split("x"))
        found.rounds[streams, adapters] = [Round(value, 0.5, 0.01)] * 3
    return found


def test_the_table_and_the_targets():
    ours = side("jlora bf16", s1x1=1.0, s16x1=2.0, s16x16=2.5)
    ours.beside = {"step": 0.02, "alone": 0.03, "beside": 0.06}
    llama, peft = side("llama.cpp f16", s1x1=1.5, s16x1=5.0), side("PEFT bf16", s16x16=40.0)
    peft.tokens = 8
    chosen = argparse.Namespace(prompt=64, tokens=32)
    rows = serve.table("m", [ours, llama, peft], chosen).splitlines()
    assert "| 1 | 1 | 32.0, 0.50 s | 21.3, 0.50 s, 1.5x |  |" in rows
    assert "| 16 | 16 | 204.8, 0.50 s |  | 12.8, 0.50 s, 16.0x |" in rows
    assert rows[-1] == "PEFT bf16: answers of 8 tokens, extrapolated."
    assert serve.verdicts([ours, llama, peft]) == [
        "16 adapters beside one, 16 streams: 0.80, target 0.90: NOT met",
        "beside llama.cpp f16, 1 streams, one adapter: 1.50x, target 1.00x: met",
        "beside llama.cpp f16, 16 streams, one adapter: 2.50x, target 3.00x: NOT met",
        "beside PEFT's mixing, 16 streams, 16 adapters: 16.00x, target 10.00x: met",
        "first token of a short prompt beside 16 streams: 60 ms, target below two steps and its "
        "time alone, 40 + 30 ms: met",
    ]


def test_prompts_differ_and_are_equally_long(tiny_model):
    from jlora.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(tiny_model)
    prompts = serve.make_prompts(tokenizer, 5, 20, seed=1)
    assert len(set(prompts)) == 5 and {len(tokenizer.encode(text)) for text in prompts} == {20}
    assert prompts == serve.make_prompts(tokenizer, 5, 20, seed=1)


def test_a_side_without_its_environment_is_left_out_and_said(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(serve.PYTHONS, "mlx-lm", tmp_path / "none")
    chosen = argparse.Namespace(sides=["jlora bf16", "mlx-lm"], quick=False)
    assert [each.name for each in serve.make_sides(chosen, "tiny")] == ["jlora bf16"]
    assert "mlx-lm: left out" in capsys.readouterr().out
