"""More threads than any machine of ours has processors. `make test-threads` runs far more so."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from jlora.system.runtime import jt

# Losses and gradients through Jittor's operators, jlora's own, and a whole update.
NUMERIC = [
    "test_kernels.py::test_attention[17-17-6-2-8-left]",
    "test_kernels.py::test_attention[300-300-4-2-32-left]",
    "test_layers.py::test_forward_gradients_and_merge",
    "test_models.py::test_llama_computes_what_float64_computes",
    "test_block.py::test_block_equals_its_twin[gpt2-all-16-stream]",
    "test_block.py::test_block_equals_its_twin[llama-all-16-stream]",
    "test_engine.py::test_engine_equals_the_plain_model[bf16-0.005-0.05-gpt2]",
    "test_products.py::test_equal_losses_give_equal_bits",
    "test_trained.py::test_twenty_steps_follow_the_plain_model_s[tied]",
]


def test_numbers_on_64_threads():
    folder = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *(str(folder / test) for test in NUMERIC)],
        env={**os.environ, "OMP_NUM_THREADS": "64"},
        cwd=folder.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:]


def test_jittor_s_own_operators_use_one_thread():
    """Its pass that divides loops among threads is said to be wrong on 32 and more; it is off."""
    a = jt.ones((64, 3, 40))
    assert ((a * a + 2).sum() + a.reindex([64, 40], ["i0", "0", "i1"]).max()).item() == 23041
    made = Path(jt.flags.cache_path, "jit").glob("*_op.cc")
    # Jittor 2.0's products of many small matrices are written with threads, not by that pass.
    sources = [path.read_text() for path in made if not path.name.startswith("mkl_")]
    assert sources and not [text for text in sources if re.search(r"\bomp\b|omp_|thread", text)]
