"""``make gpu-check``: what works on an NVIDIA card, how exactly and how fast, in under ten minutes.

Stages run one after the other, each with a limit of its own; what a stage finds is printed and
written at once, so that a machine that is taken away has told what it could. No network is needed:
`make gpu-inputs` has written batches and prompts beforehand.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np

from benchmarks import sides, work
from benchmarks.sides import ROOT, Side, alternate, check

INPUTS = ROOT / "runs" / "gpu" / "inputs"
STAGES = {
    "compile": 240, "twins": 120, "train": 200, "decode": 150, "epochs": 60, "fixtures": 150,
}  # fmt: skip


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    options.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu")
    options.add_argument("--inputs", type=Path, default=INPUTS)
    options.add_argument("--prepare", action="store_true", help="write the inputs and end")
    options.add_argument("--stage", choices=STAGES, help="run one stage here, without a limit")
    options.add_argument("--seconds", type=float, default=570, help="of all stages together")
    options.add_argument("--torch-path", help="PYTHONPATH of the processes of PyTorch")
    chosen = options.parse_args()
    if chosen.prepare:
        prepare(chosen.inputs)
    elif chosen.stage:
        sides.PYTHON.update(jlora=Path(sys.executable), peft=Path(sys.executable))
        globals()[f"stage_{chosen.stage}"](chosen)
    else:
        run_stages(chosen)


def run_stages(chosen: argparse.Namespace) -> None:
    """Run stages as processes; their output goes to the screen and to ``report.txt``."""
    chosen.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with (chosen.out / "report.txt").open("w") as report:

        def say(text: str) -> None:
            print(text, end="", flush=True)
            report.write(text)
            report.flush()

        for command in ("nvidia-smi -L", "nvcc --version | tail -2 | head -1", "date -u +%F"):
            say(subprocess.run(command, shell=True, capture_output=True, text=True).stdout)
        for stage in chosen.stages:
            left = chosen.seconds - (time.monotonic() - began)
            if left < 20:
                say(f"\n## {stage}: no time left\n")
                continue
            limit = min(STAGES[stage], left)
            say(f"\n## {stage}\n")
            command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu", "--stage", stage]
            command += ["--out", str(chosen.out), "--inputs", str(chosen.inputs)]
            if chosen.torch_path is not None:
                command += ["--torch-path", chosen.torch_path]
            started = time.monotonic()
            full = ["timeout", "-k", "5", str(int(limit)), *command]
            process = subprocess.Popen(
                full, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                errors="replace",
            )  # fmt: skip
            for line in process.stdout:
                say(line)
            code = process.wait()
            ended = "" if code == 0 else f", ended with {'its limit' if code == 124 else code}"
            say(f"({stage}: {time.monotonic() - started:.0f} s{ended})\n")


def prepare(folder: Path) -> None:
    """Write what the stages read besides the code: batches and prompts of E2E."""
    from benchmarks.decoding import make_spec

    folder.mkdir(parents=True, exist_ok=True)
    data = Path(os.environ.get("JLORA_DATA", ROOT.parent / "shared" / "data"))
    work.e2e_batches(folder / "e2e-8.npz", data, "gpt2-medium", 8, 200)
    work.even_batches(folder / "8x512.npz", 50257, 8, 512)
    options = argparse.Namespace(
        model="gpt2-medium", adapter=None, beams=10, new_tokens=64, rank_up_to=None
    )
    spec = make_spec(options, folder / "prompts.json")
    (folder / "decode.json").write_text(json.dumps(spec))
    for name, (config, lora) in TWINS.items():
        loss, gradients, states, best = computed(config, dict(lora), "plain")
        arrays = {"loss": loss, "states": states, "best": best}
        np.savez(
            folder / f"twin {name}.npz", **arrays, **{f"d {n}": g for n, g in gradients.items()}
        )


def stage_compile(chosen: argparse.Namespace) -> None:
    """Jittor's CUDA build, the doctor's word, and jlora's operators."""
    from jlora.cli import doctor
    from jlora.system.runtime import jt, use_gpu

    timed("Jittor for CUDA", lambda: jt.has_cuda)
    use_gpu(True)
    timed("jlora's operators", library)
    doctor.main()


def library():
    from jlora.kernels import native

    return native.library()


def timed(what: str, function):
    started = time.monotonic()
    result = function()
    print(f"{what}: {time.monotonic() - started:.1f} s", flush=True)
    return result


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


def stage_twins(chosen: argparse.Namespace) -> None:
    """The fused bf16 path on the card against Jittor's own float32 layers on a processor."""
    from jlora.system.runtime import use_gpu

    use_gpu(True)
    for name, (config, lora) in TWINS.items():
        loss, gradients, states, best = computed(config, dict(lora), "bf16")
        plain = np.load(chosen.inputs / f"twin {name}.npz")
        worst = max(relative(gradients[n], plain[f"d {n}"]) for n in gradients)
        print(
            f"{name}: loss {loss:.5f}, plain {plain['loss']:.5f}; gradients differ by {worst:.2%} "
            f"at most, states of prompts {relative(states, plain['states']):.2%}, of the next "
            f"tokens {relative(best, plain['best']):.2%}",
            flush=True,
        )


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
        return loss.item(), dict(zip(names, gradients)), states, np.array(decoder.hidden)


def run_sides(
    chosen: argparse.Namespace,
    module: str,
    spec: dict,
    peer: str,
    rounds: int,
    warmup: int,
    inputs: int,
) -> None:
    """Run jlora and its peer, one after the other: two programs on one card would take turns.

    Args:
        module: "train" or "decode".
        inputs: of a round, by which its time is divided.
    """
    path = {} if chosen.torch_path is None else {"PYTHONPATH": chosen.torch_path}
    spec = {**spec, "device": "cuda", "precision": "bf16"}
    ours = Side("jlora bf16", f"jlora_{module}", "jlora", spec)
    theirs = Side(peer, f"torch_{module}", "peft", spec, variables=path)
    for side in (ours, theirs):
        alternate([side], rounds, warmup)
        check([side])
        print(
            f"  {side.name:20} {1000 * side.median / inputs:9.2f} ms, first "
            f"{side.first_seconds:6.1f} s, {side.extra.get('gpu_mb', 0):7.0f} MB of the card, "
            f"ratio {side.median / ours.median:.2f}",
            flush=True,
        )


def stage_train(chosen: argparse.Namespace) -> None:
    """50 training steps of each side; batches of E2E have another length at each step."""
    for model, batch in (
        ("gpt2-medium", "e2e-8"),
        ("gpt2-small", "e2e-8"),
        ("gpt2-medium", "8x512"),
    ):
        print(f"{model}, {batch}, 50 steps each:", flush=True)
        spec = {
            "config": work.MODELS[model], "lora": work.lora_settings(model),
            "batches": str(chosen.inputs / f"{batch}.npz"), "label_smoothing": 0.1,
        }  # fmt: skip
        run_sides(chosen, "train", spec, "PEFT bf16", rounds=50, warmup=6, inputs=1)


def stage_decode(chosen: argparse.Namespace) -> None:
    """Beam search, 10 beams, 64 tokens, of 64 inputs at a time."""
    print("gpt2-medium, 64 inputs at a time, 10 beams, 64 tokens; for each input:", flush=True)
    spec = json.loads((chosen.inputs / "decode.json").read_text())
    spec.update(
        prompts=str(chosen.inputs / "prompts.json"), batch_size=64, inputs=64, early_stopping=False
    )
    run_sides(chosen, "decode", spec, "transformers bf16", rounds=2, warmup=1, inputs=64)


def stage_epochs(chosen: argparse.Namespace) -> None:
    """Five epochs of E2E with GPT-2 medium, from 200 steps of its batches."""
    from benchmarks import jlora_train

    spec = {
        "config": work.MODELS["gpt2-medium"], "lora": work.lora_settings("gpt2-medium"),
        "batches": str(chosen.inputs / "e2e-8.npz"), "label_smoothing": 0.1, "device": "cuda",
        "precision": "bf16",
    }  # fmt: skip
    step = jlora_train.make(spec)
    for _ in range(5):
        step()
    started = time.monotonic()
    losses = [step()["loss"] for _ in range(200)]
    each = (time.monotonic() - started) / 200
    steps = 5 * 42061 / 8  # E2E's training rows
    print(
        f"200 steps: {1000 * each:.1f} ms each, loss {losses[0]:.3f} to {losses[-1]:.3f}; five "
        f"epochs of {steps / 5:.0f} steps: {steps * each / 60:.1f} min",
        flush=True,
    )


def stage_fixtures(chosen: argparse.Namespace) -> None:
    """Stored results of loralib, transformers and PEFT against Jittor's float32 on the card."""
    from safetensors.numpy import load_file

    from jlora.system.runtime import use_gpu
    from parity.case import compare
    from parity.files import INPUTS as ARRAYS
    from parity.files import topic_module
    from parity.golden import FIXTURES, golden_cases, reference_file

    use_gpu(True)
    with tempfile.TemporaryDirectory() as scratch:
        for topic in ("models", "adapters", "layers"):
            zipfile.ZipFile(FIXTURES / f"{topic}.zip").extractall(Path(scratch) / topic)
            passed, failed = 0, []
            (function,) = [f for side, f in topic_module(topic).STAGES if side == "jlora"]
            for case in golden_cases(topic):
                folder = Path(scratch) / topic / case.name
                try:
                    found = function(case, load_file(folder / ARRAYS), folder)
                    expected = load_file(folder / reference_file(topic))
                    kept = {n: a for n, a in found.items() if n in expected}
                    outcome = compare(case, expected, kept)
                    problem = None if outcome.passed else outcome.problem
                except Exception as error:
                    problem = f"{type(error).__name__}: {str(error)[:300]}"
                if problem is None:
                    passed += 1
                else:
                    failed.append(f"{case.name}: {problem}")
                    print(f"  {topic} {failed[-1]}", flush=True)
            print(f"{topic}: {passed} passed, {len(failed)} failed", flush=True)


if __name__ == "__main__":
    main()
