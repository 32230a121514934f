"""``python -m benchmarks.serve_step``: a step of rows with one adapter or many, alternating."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from datetime import date

import numpy as np

from benchmarks import work
from jlora.adapters import LoraConfig, get_peft_model
from jlora.decoding.adapter_bank import AdapterBank
from jlora.decoding.native_weights import NativeModel
from jlora.decoding.rows import RowDecoder
from jlora.engine import prepare
from jlora.models.hub import build_model
from jlora.system.machine import cpu_model, processors


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--model", default="smollm2-135m", choices=work.MODELS)
    options.add_argument("--precision", default="bf16")
    options.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64])
    options.add_argument("--adapters", type=int, nargs="+", default=[0, 1, 4, 16, 64])
    options.add_argument("--rank", type=int, default=8)
    options.add_argument("--context", type=int, default=64, help="tokens of a row's prompt")
    options.add_argument("--rounds", type=int, default=15)
    options.add_argument("--steps", type=int, default=4, help="in a round, of each")
    options.add_argument(
        "--processor-time", action="store_true",
        help="for a machine that does other things too; with OMP_NUM_THREADS=1",
    )  # fmt: skip
    chosen = options.parse_args()
    print(f"{cpu_model()}, {processors()} processors, {date.today()}")
    print(f"{chosen.model} {chosen.precision}, rank {chosen.rank} on all linear layers")
    model = build_model(work.MODELS[chosen.model])
    prepare(model, chosen.precision, keep_weights=False)
    native = NativeModel(model)
    targets = sorted({name.rpartition(".")[2] for name in native.linears})
    peft = get_peft_model(model, LoraConfig(target_modules=targets, r=chosen.rank))
    random = np.random.default_rng(0)
    peft.set_adapter_tensors(
        {
            name: 0.01 * random.standard_normal(array.shape, np.float32)
            for name, array in peft.adapter_tensors().items()
        }
    )
    adapter = peft._adapters["default"]
    peft.set_adapter(None)
    bank = AdapterBank(native)
    slots = [bank.add(adapter) for _ in range(max(chosen.adapters))]  # each has its own memory
    print(f"{bank.bytes_of(slots[0]) / 1e6:.1f} MB an adapter" if slots else "")
    clock = time.process_time if chosen.processor_time else time.perf_counter
    print("milliseconds a step, median; ratio: tokens a second against one adapter")
    for rows in chosen.rows:
        decoders = {}
        for count in chosen.adapters:
            if count <= rows:
                own = [slots[row % count] if count else -1 for row in range(rows)]
                decoders[count] = start(native, model, bank, own, chosen.context)
        times = {count: [] for count in decoders}
        for number in range(chosen.rounds + 1):
            for count, decoder in decoders.items():
                found = [step(decoder, clock) for _ in range(chosen.steps)]
                times[count] += found if number else []
        medians = {count: statistics.median(found) for count, found in times.items()}
        one = medians.get(1, next(iter(medians.values())))
        text = [f"{n} adapters {1000 * t:7.2f} ({one / t:.3f})" for n, t in medians.items()]
        print(f"{rows:3} rows: " + "  ".join(text), flush=True)


def start(native, model, bank, slots, context: int) -> RowDecoder:
    """A decoder with a row for each slot, behind a prompt of random tokens."""
    decoder = RowDecoder(native, model, bank)
    random = np.random.default_rng(0)
    words = model.config.vocab_size
    prompts = [decoder.begin(random.integers(0, words, context).tolist(), s) for s in slots]
    decoder.run(prompts, [context] * len(prompts))
    decoder.enter(prompts)
    return decoder


def step(decoder: RowDecoder, clock: Callable[[], float]) -> float:
    begun = clock()
    _, ids = decoder.best(1)
    decoder.advance(np.arange(len(ids)), ids[:, 0])
    return clock() - begun


if __name__ == "__main__":
    main()
