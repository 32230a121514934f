"""``python -m benchmarks.one_stream``: tokens a second of one text, beside the memory's bandwidth.

A token reads all packed weights once, so it takes at least their bytes divided by the bandwidth,
which is measured between the rounds, by a loop that reads a large array by all threads.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np

from benchmarks import work

READ = """
#include <immintrin.h>
#include <cstdint>
extern "C" int64_t read_all(const char* p, int64_t bytes) {
    int64_t sum = 0;
    #pragma omp parallel for reduction(^ : sum) schedule(static)
    for (int64_t block = 0; block < bytes; block += 1 << 20) {
        int64_t lanes[8] = {};
        const int64_t* at = (const int64_t*)(p + block);
        for (int64_t i = 0; i < 1 << 17; i += 8) {
            __builtin_prefetch(at + i + 512);
            for (int64_t j = 0; j < 8; j++) lanes[j] ^= at[i + j];
        }
        for (int64_t j = 0; j < 8; j++) sum ^= lanes[j];
    }
    return sum;
}
"""
PROMPT, ROUND = 32, 64  # tokens of the prompt, and of a round


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--model", default="smollm2-135m", choices=work.MODELS)
    options.add_argument("--precisions", nargs="+", default=["bf16", "int8", "int4"])
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument(
        "--processor-time", action="store_true",
        help="for a machine that does other things too; with OMP_NUM_THREADS=1",
    )  # fmt: skip
    chosen = options.parse_args()
    from jlora.system.machine import cpu_model, processors

    clock = time.process_time if chosen.processor_time else time.perf_counter
    print(f"{cpu_model()}, {processors()} processors, {date.today()}")
    print(f"{'':22} {'tokens/s':>9} {'MB':>6} {'GB/s':>6} {'of the bandwidth':>17}")
    with tempfile.TemporaryDirectory() as scratch:
        read = reader(Path(scratch))
        for precision in chosen.precisions:
            sides, packed = make_sides(chosen.model, precision)
            speeds, times = [], {name: [] for name in sides}
            for _ in range(chosen.rounds):
                speeds.append(read(clock))
                for name, side in sides.items():
                    times[name].append(side(clock))
            bandwidth = statistics.median(speeds)
            for name, found in times.items():
                seconds = statistics.median(found)
                print(f"{precision + ' ' + name:22} {1 / seconds:9.1f} {packed / 1e6:6.0f} "
                      f"{packed / seconds / 1e9:6.1f} {packed / seconds / bandwidth:17.1%}",
                      flush=True)  # fmt: skip
            print(f"{'memory':22} {'':9} {'':6} {bandwidth / 1e9:6.1f}")


def reader(folder: Path) -> Callable:
    """A function that reads an array larger than the caches and returns bytes a second."""
    from jlora.system import machine

    source, library = folder / "read.cc", folder / "read.so"
    source.write_text(READ)
    flags = "-O3 -march=native -shared -fPIC -fopenmp".split()
    subprocess.run([machine.compiler() or "g++", *flags, source, "-o", library], check=True)
    read_all = ctypes.CDLL(str(library)).read_all
    array = np.ones(1 << 29, np.uint8)

    def read(clock) -> float:
        begun = clock()
        read_all(ctypes.c_void_p(array.ctypes.data), ctypes.c_int64(array.nbytes))
        return array.nbytes / (clock() - begun)

    return read


def make_sides(model_name: str, precision: str) -> tuple[dict[str, Callable], int]:
    """Functions that give the seconds of a token, greedy and drawn; bytes of the weights."""
    from jlora import engine
    from jlora.decoding.decoder import decoder_of
    from jlora.decoding.sampling import GenerateConfig, next_tokens
    from jlora.kernels.packed_linear import KINDS, packed_bytes
    from jlora.layers import set_trainable
    from jlora.models.hub import build_model

    model = build_model(work.MODELS[model_name])
    set_trainable(model, ())
    engine.prepare(model, precision, keep_weights=False)
    model.eval()
    modules = [module for module in model.modules() if hasattr(module, "_packed")]
    weights = {module._packed.packed for module in modules}  # the embedding shares the head's
    names = {number: kind for kind, number in KINDS.items()}
    size = sum(packed_bytes(w.n, w.k, names[w._weight.kind]) for w in weights)
    prompt = np.random.default_rng(0).integers(0, model.config.vocab_size, PROMPT).tolist()

    def side(config: GenerateConfig) -> Callable:
        def decode(clock: Callable) -> float:
            decoder = decoder_of(model)
            decoder.enter([prompt])
            tokens = next_tokens(decoder, model, [prompt], [0], config, [0])
            next(tokens)
            begun = clock()
            for _ in range(ROUND):
                next(tokens)
            return (clock() - begun) / ROUND

        decode(time.perf_counter)
        return decode

    settings = {"greedy": {}, "drawn": {"temperature": 0.8, "top_p": 0.95}}
    sides = {
        name: side(GenerateConfig((), max_new_tokens=ROUND + 1, **own))
        for name, own in settings.items()
    }
    return sides, size


if __name__ == "__main__":
    main()
