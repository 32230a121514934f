"""Greedy search and sampling by llama.cpp's server in its wheel, without a network between."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

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
        pieces = []
        drawn = {"temperature": temperature, "samplers": ["temperature"]}
        body = {
            "prompt": prompt, "n_predict": tokens, "ignore_eos": True, "cache_prompt": False,
            "return_tokens": True, "stream": False,
            **(drawn if temperature else {"temperature": 0.0, "top_k": 1}),
        }  # fmt: skip
        server.handle_completions(json.dumps(body), lambda piece: pieces.append(piece) and False)
        (found,) = (json.loads(p) if isinstance(p, (str, bytes)) else p for p in pieces)
        return found["tokens"]

    def work(streams: int, tokens: int, temperature: float):
        batch = prompts.first(streams)
        with ThreadPoolExecutor(streams) as pool:
            texts = list(pool.map(lambda p: answer(p, tokens, temperature), batch.values()))
        return prompts.said(batch, texts)

    return work
