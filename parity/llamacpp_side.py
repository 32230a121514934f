"""llama.cpp on a GGUF file, in the environment of `make llamacpp`: ``python llamacpp_side.py JOB``.

JOB is a JSON file: ``model`` (path), ``context``, ``texts`` to split into tokens, ``prompts`` (ids)
to continue greedily by ``tokens`` tokens each. The results go to standard output, JSON.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from typing import Any

import xllamacpp


def main(path: str) -> None:
    with open(path, encoding="utf-8") as file:
        job = json.load(file)
    server = start(job["model"], job["context"])
    found = {
        "tokens": [split(server, text) for text in job["texts"]],
        "answers": [answer(server, prompt, job["tokens"]) for prompt in job["prompts"]],
    }
    print("\n" + json.dumps(found))


def start(model: str, context: int) -> xllamacpp.Server:
    """Everything in float32, on two threads."""
    settings = xllamacpp.CommonParams()
    settings.model.path = model
    settings.n_ctx, settings.n_parallel, settings.warmup = context, 1, False
    settings.verbosity, settings.port, settings.hostnames = 1, 0, ["127.0.0.1"]
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 2
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(settings)


def ask(server: xllamacpp.Server, path: str, **body: Any) -> dict[str, Any]:
    request = urllib.request.Request(
        f"{server.listening_address}/{path}",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as reply:
        return json.load(reply)


def split(server: xllamacpp.Server, text: str) -> list[int]:
    """The tokens of a text, special tokens in it as themselves."""
    return ask(server, "tokenize", content=text, add_special=False, parse_special=True)["tokens"]


def answer(server: xllamacpp.Server, prompt: list[int], tokens: int) -> dict[str, list]:
    """The likeliest tokens one by one, and the logarithms of their probabilities.

    llama.cpp says nothing of the probability of a token that ends within a character: None.
    """
    reply = ask(
        server, "completion", prompt=prompt, n_predict=tokens, temperature=0.0, top_k=1, n_probs=1,
        ignore_eos=True, cache_prompt=False, return_tokens=True,
    )  # fmt: skip
    steps = iter(reply["completion_probabilities"])
    step, logs = next(steps, None), []
    for token in reply["tokens"]:
        said = step is not None and step["id"] == token
        logs.append(step["logprob"] if said else None)
        step = next(steps, None) if said else step
    return {"ids": reply["tokens"], "logprobs": logs}


if __name__ == "__main__":
    main(sys.argv[1])
