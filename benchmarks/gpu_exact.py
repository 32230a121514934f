"""The exactness part of `make gpu-check`: a card's results beside a processor's and stored ones."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np

#: Largest relative difference allowed: of float32 results, and of gradients in bf16.
FLOAT32, BF16 = 1e-4, 2e-2

TWINS = {
    "GPT-2": (
        {"model_type": "gpt2", "vocab_size": 1003, "n_positions": 512, "n_embd": 256, "n_layer": 3,
         "n_head": 4},
        {"r": 4, "lora_alpha": 16, "lora_dropout": 0.1, "target_modules": ["c_attn"],
         "enable_lora": [True, False, True]},
    ),
    "Llama, grouped heads of 128": (
        {"model_type": "llama", "vocab_size": 1003, "hidden_size": 512, "intermediate_size": 768,
         "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
         "max_position_embeddings": 512, "rms_norm_eps": 1e-5},
        {"r": 8, "lora_alpha": 16, "lora_dropout": 0.1,
         "target_modules": ["q_proj", "v_proj", "gate_proj", "down_proj"]},
    ),
}  # fmt: skip


def prepare(folder: Path) -> None:
    """Write a processor's results, for `twins`."""
    np.savez(folder / "packed.npz", **packed_weights())
    for name, (config, lora) in TWINS.items():
        loss, gradients, states, best, _ = computed(config, dict(lora), "plain")
        arrays = {"loss": loss, "states": states, "best": best}
        np.savez(
            folder / f"twin {name}.npz", **arrays, **{f"d {n}": g for n, g in gradients.items()}
        )


def twins(chosen: argparse.Namespace) -> None:
    """The fused bf16 path on the card against Jittor's own float32 layers on a processor."""
    from jlora.system.runtime import use_gpu

    use_gpu(True)
    for name, (config, lora) in TWINS.items():
        loss, gradients, states, best, made = computed(config, dict(lora), "bf16")
        plain = np.load(chosen.inputs / f"twin {name}.npz")
        worst = max(relative(gradients[n], plain[f"d {n}"]) for n in gradients)
        print(
            f"{name}: loss {loss:.5f}, plain {plain['loss']:.5f}; gradients differ by {worst:.2%} "
            f"at most ({'passed' if worst < BF16 else 'FAILED'}), states of prompts "
            f"{relative(states, plain['states']):.2%}, of the next tokens "
            f"{relative(best, plain['best']):.2%}",
            flush=True,
        )
        print(f"  {compare_words(*made)}", flush=True)
    processors = np.load(chosen.inputs / "packed.npz")
    for kind, kept in packed_weights().items():
        far = relative(kept, processors[kind])
        word = "passed" if far < FLOAT32 else "FAILED"
        print(f"{kind} weights differ from the processor's by {far:.1e} ({word})", flush=True)


def packed_weights() -> dict[str, np.ndarray]:
    """What is kept of a weight in fewer bits, by precision."""
    from jlora.kernels.packed_linear import PackedWeight
    from jlora.system.runtime import jt

    weight = np.random.default_rng(0).standard_normal((300, 512)).astype("f")
    weight *= np.geomspace(1e-6, 9, 300, dtype="f")[:, None]
    kinds = ("int8", "int4")
    return {kind: PackedWeight(jt.array(weight), False, kind).unpack(False) for kind in kinds}


def compare_words(model, decoder) -> str:
    """The decoder's best and drawn words against NumPy's, of the same logits."""
    from jlora.kernels.topk import Draw, log_softmax_topk_numpy
    from jlora.system.runtime import jt

    rows, said = len(decoder.hidden), [type(decoder).__name__]
    with jt.no_grad():
        logits = model.lm_head_logits(jt.array(decoder.hidden)).numpy()
    edits = ([[1, 2]] * rows, [[3, 3, 4]] * rows, 1.5)
    for what, k, more in (
        ("best", 20, {}),
        ("drawn", 2, {"draws": [Draw(0.8, (row + 0.5) / rows) for row in range(rows)]}),
    ):
        values, ids = decoder.best(k, *edits, **more)
        expected, places = log_softmax_topk_numpy(logits, k, *edits, **more)
        far = float(np.abs(values - expected).max())
        good = far < FLOAT32 * 10 and values.shape == expected.shape
        said.append(
            f"{what} words: {(ids == places).mean():.1%} the same, log-probabilities differ by "
            f"{far:.1e} ({'passed' if good else 'FAILED'})"
        )
    return "; ".join(said)


def relative(x: np.ndarray, reference: np.ndarray) -> float:
    """||x - reference|| / ||reference||."""
    return float(np.linalg.norm(x - reference) / np.linalg.norm(reference))


def computed(config: dict, lora: dict, precision: str):
    """Loss, gradients by name, and states of a decoder's prompts and of a step after them."""
    from jlora import LoraConfig, engine, get_peft_model
    from jlora.data.batches import Batch
    from jlora.decoding.decoder import decoder_of
    from jlora.models.hub import build_model
    from jlora.system.runtime import jt, set_seed
    from jlora.training.loop import batch_loss

    set_seed(1)
    rng = np.random.default_rng(0)
    model = get_peft_model(build_model(config), LoraConfig(**lora))
    for name, parameter in model.named_parameters():
        centre = "norm" in name or "ln_" in name
        values = 0.03 * rng.standard_normal(parameter.shape) + (centre and "weight" in name)
        parameter.assign(jt.array(values.astype("f")))
    engine.prepare(model, precision)
    lengths = np.array([150, 70, 211, 33])
    total = int(lengths.sum())
    ids = rng.integers(0, config["vocab_size"], (1, total)).astype(np.int32)
    mask = (rng.random((1, total)) < 0.5).astype(np.float32)
    batch = Batch(ids, np.roll(ids, -1, 1), mask, lengths, is_stream=True)
    # Dropout is another random number in the plain path.
    model.eval()
    names, parameters = zip(*model.trainable_parameters())
    for parameter in parameters:
        parameter.start_grad()
    loss = batch_loss(model, batch, 0.1)
    gradients = [g.numpy() for g in jt.grad(loss, list(parameters))]
    decoder = decoder_of(model)
    with jt.no_grad():
        decoder.enter([ids[0, :50].tolist(), ids[0, 60:90].tolist()])
        states = np.array(decoder.hidden)
        decoder.advance(np.array([0, 0, 1]), np.array([5, 6, 7]))
        decoder.advance(np.array([1, 0, 2, 2]), np.array([8, 9, 10, 11]))
        hidden = np.array(decoder.hidden)
    return loss.item(), dict(zip(names, gradients)), states, hidden, (model, decoder)


@contextlib.contextmanager
def float32_is_plain():
    """Cases that ask for "fp32", which is for processors, get Jittor's own float32 instead."""
    from jlora import engine

    prepare = engine.prepare

    def prepared(model, precision: str = "auto", *others, **named):
        return prepare(model, "plain" if precision == "fp32" else precision, *others, **named)

    engine.prepare = prepared
    try:
        yield
    finally:
        engine.prepare = prepare


def fixtures(chosen: argparse.Namespace) -> None:
    """Stored results of loralib, transformers and PEFT against Jittor's float32 on the card."""
    from safetensors.numpy import load_file

    from jlora.system.runtime import jt, use_gpu
    from parity.case import compare
    from parity.files import INPUTS as ARRAYS
    from parity.files import topic_module
    from parity.golden import FIXTURES, golden_cases, reference_file

    use_gpu(True)

    def operators() -> int:
        return len(list(Path(jt.flags.cache_path).glob("jit/*.so")))

    with tempfile.TemporaryDirectory() as scratch, float32_is_plain():
        for topic in ("models", "adapters", "training", "layers", "families"):
            zipfile.ZipFile(FIXTURES / f"{topic}.zip").extractall(Path(scratch) / topic)
            passed, cases = 0, golden_cases(topic)
            (function,) = [f for side, f in topic_module(topic).STAGES if side == "jlora"]
            for case in cases:
                case = replace(case, tolerance=max(case.tolerance, FLOAT32))
                print(f"  {topic} {case.name}: ", end="", flush=True)  # the one that hangs is named
                started, before = time.monotonic(), operators()
                folder = Path(scratch) / topic / case.name
                try:
                    found = function(case, load_file(folder / ARRAYS), folder)
                    expected = load_file(folder / reference_file(topic))
                    kept = {n: a for n, a in found.items() if n in expected}
                    outcome = compare(case, expected, kept)
                    word = f"differs by {outcome.relative:.1e}"
                    word = word if outcome.passed else f"FAILED: {outcome.problem}"
                    passed += outcome.passed
                except Exception as error:
                    word = f"FAILED: {type(error).__name__}: {str(error)[:300]}"
                seconds, new = time.monotonic() - started, operators() - before
                print(f"{word} ({seconds:.0f} s, {new} new operators)", flush=True)
            print(f"{topic}: {passed} of {len(cases)} passed", flush=True)
