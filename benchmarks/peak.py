"""The fastest matrix product on this machine, with either side's library; MFU is relative to it."""

from __future__ import annotations

from benchmarks.sides import PYTHON, Side

SIZES = (1024, 2048, 4096)  # rows, n and k; the fastest depends on the caches


def make(spec: dict):
    """One round is one bf16 product with the library of its environment."""
    try:
        import torch
    except ImportError:
        return jlora_product(spec)
    x = torch.randn(spec["rows"], spec["k"], dtype=torch.bfloat16)
    w = torch.randn(spec["n"], spec["k"], dtype=torch.bfloat16)

    def product():
        torch.nn.functional.linear(x, w)

    return product


def jlora_product(spec: dict):
    import numpy as np

    from jlora.kernels.packed_linear import PackedWeight
    from jlora.system.runtime import jt

    w = jt.array(np.random.standard_normal((spec["n"], spec["k"])).astype("f"))
    x = jt.array(np.random.standard_normal((spec["rows"], spec["k"])).astype("f"))
    packed = PackedWeight(w, transposed=False)

    def product():
        packed(x).sync()

    return product


def measure(rounds: int = 20) -> float:
    """FLOP/s of the fastest round of either side at any of the sizes."""
    best = 0.0
    for environment, python in PYTHON.items():
        if not python.exists():
            continue
        for size in SIZES:
            side = Side(environment, "peak", environment, {"rows": size, "n": size, "k": size})
            side.start()
            best = max([best, *(2 * size**3 / side.round() for _ in range(rounds))])
            side.stop()
    return best
