"""Greedy search and sampling by llama.cpp's server in xllamacpp's wheel."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from urllib.request import Request, urlopen

from benchmarks.prompts import Prompts


def make(spec: dict):
    """One round lets ``streams`` texts of equal length be written together."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = spec["model"]
    settings.n_parallel, settings.n_ctx = spec["most"], spec["most"] * spec["context"]
    settings.port, settings.hostnames, settings.verbosity = 0, ["127.0.0.1"], 0
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = spec["threads"]
    settings.cache_ram_mib = 0
    server = xllamacpp.Server(settings)
    prompts = Prompts(spec)

    def answer(prompt: list[int], tokens: int, temperature: float) -> list[int]:
        drawn = {"temperature": temperature, "samplers": ["temperature"]}
        body = {
            "prompt": prompt, "n_predict": tokens, "ignore_eos": True, "cache_prompt": False,
            "return_tokens": True, **(drawn if temperature else {"temperature": 0.0, "top_k": 1}),
        }  # fmt: skip
        request = Request(
            server.listening_address + "/completion", json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )  # fmt: skip
        with urlopen(request) as response:
            return json.load(response)["tokens"]

    def work(streams: int, tokens: int, temperature: float):
        batch = prompts.first(streams)
        with ThreadPoolExecutor(streams) as pool:
            texts = list(pool.map(lambda p: answer(p, tokens, temperature), batch.values()))
        # What it was compiled for, as it says: "CPU : SSE3 = 1 | ... | AVX2 = 1 | ..."
        compiled = [part.split()[-3] for part in xllamacpp.get_system_info().split("|")[:-1]]
        said = prompts.said(batch, texts, tokens)
        # `ignore_eos` forbids ends, where the other sides write on behind them.
        return {**said, "computes in": " ".join(compiled), "has_ends": False}

    return work
