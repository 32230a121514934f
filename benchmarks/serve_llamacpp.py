"""llama.cpp's server with LoRA files, in the environment of `make llamacpp`, until stdin ends."""

from __future__ import annotations

import json
import sys

import xllamacpp


def main(spec: dict) -> None:
    settings = xllamacpp.CommonParams()
    settings.model.path = spec["model"]
    settings.n_parallel, settings.n_ctx = spec["streams"], spec["streams"] * spec["context"]
    settings.port, settings.hostnames, settings.verbosity = 0, ["127.0.0.1"], 1
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = spec["threads"]
    settings.cache_ram_mib = 0  # prompts are never the same
    settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 0.0) for path in spec["lora"]]
    settings.lora_init_without_apply = True
    server = xllamacpp.Server(settings)
    print("\n" + json.dumps({"address": server.listening_address}), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
