"""The fastest matrix product on this machine, with either side's library; MFU is relative to it."""

from __future__ import annotations

import importlib.util

from benchmarks.environments import missing
from benchmarks.sides import Side

SIZES = (1024, 2048, 4096)  # rows, n and k; the fastest depends on the caches
KINDS = {"jlora": ("bf16", "fp32"), "peft": ("bf16", "fp32")}
LIBRARY = {"jlora": "jlora", "peft": "torch"}
READ = 1 << 28  # numbers, 4 bytes each: more than any cache holds


def make(spec: dict):
    """One round is a product with the library of its environment, or (kind "read") a sum of
    numbers that only memory holds."""
    prepare = jlora_product
    if importlib.util.find_spec("torch") is not None:
        prepare = torch_read if spec.get("kind") == "read" else torch_product
    ready = {}

    def work(size: int = 0):
        if size not in ready:
            shape = {"rows": size, "n": size, "k": size} if size else {}
            ready[size] = prepare({"kind": "bf16", **spec, **shape})
        ready[size]()

    return work


def torch_product(spec: dict):
    import torch

    dtype = torch.bfloat16 if spec["kind"] == "bf16" else torch.float32
    x = torch.randn(spec["rows"], spec["k"], dtype=dtype)
    w = torch.randn(spec["n"], spec["k"], dtype=dtype)

    def product():
        with torch.inference_mode():
            torch.nn.functional.linear(x, w)

    return product


def torch_read(spec: dict):
    import torch

    numbers = torch.ones(spec["rows"])
    return numbers.sum


def jlora_product(spec: dict):
    import numpy as np

    from jlora.kernels.packed_linear import PackedWeight
    from jlora.system.runtime import jt

    w = jt.array(np.random.standard_normal((spec["n"], spec["k"])).astype("f"))
    x = jt.array(np.random.standard_normal((spec["rows"], spec["k"])).astype("f"))
    if spec["kind"] == "fp32":
        return lambda: jt.matmul(x, w).sync()
    packed = PackedWeight(w, transposed=False)
    return lambda: packed(x).sync()


def measure(rounds: int = 20, variables: dict[str, str] | None = None) -> dict[str, float]:
    """FLOP/s of the fastest round at any of the sizes, by library and kind; what cannot be
    multiplied here is not among them."""
    best = {}
    for environment, kinds in KINDS.items():
        for kind in kinds if missing(environment) is None else ():
            operations = {size: 2 * size**3 for size in SIZES}
            found = fastest(environment, kind, operations, rounds, variables or {})
            if found:
                best[f"{LIBRARY[environment]} {kind}"] = found
    return best


def bandwidth(rounds: int = 10, variables: dict[str, str] | None = None) -> float | None:
    """Bytes a second that all threads together read from memory; None without torch."""
    if missing("peft"):
        return None
    return fastest("peft", "read", {READ: 4 * READ}, rounds, variables or {}) or None


def fastest(
    environment: str, kind: str, amounts: dict[int, int], rounds: int, variables: dict[str, str]
) -> float:
    """The largest amount a second of all sizes; 0 where it cannot be done."""
    side = Side(environment, "peak", environment, {"kind": kind}, variables=variables)
    best = 0.0
    try:
        side.start()
        for size, amount in amounts.items():
            side.arguments = {"size": size}
            side.round()
            best = max([best, *(amount / side.round() for _ in range(rounds))])
    except RuntimeError:
        return best
    side.stop()
    return best
