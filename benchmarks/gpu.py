"""``make gpu-check``: what works on an NVIDIA card, how exactly and how fast, in under ten minutes.

Stages run one after the other, each with a limit of its own; what a stage finds is printed and
written at once, so that a machine that is taken away has told what it could. What no card has
answered yet comes first. No network is needed: `make gpu-inputs` has written batches and prompts
beforehand.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks import sides, work
from benchmarks.sides import ROOT, Side, problems_of, start, stop, take_turns

INPUTS = ROOT / "runs" / "gpu" / "inputs"
#: Limit of each in seconds; what they took or should take is in docs/gpu.md.
STAGES = {
    "compile": 200, "twins": 90, "fixtures": 200, "epochs": 70, "decode": 140, "train": 200,
}  # fmt: skip
#: Largest relative difference allowed: of float32 results, and of gradients in bf16.
FLOAT32, BF16 = 1e-4, 2e-2


@dataclass(frozen=True)
class Sizes:
    """How much is computed; `REHEARSAL` is for a card that is emulated.

    Attributes:
        configs: of the models that are trained; the first one decodes, too.
        even: rows and tokens of the batches of equal rows.
        rows: of E2E's batches.
        steps: of training beside the peer; `epoch_steps` is how many the five epochs are told from.
        inputs, beams, new_tokens: of decoding.
    """

    configs: dict[str, dict]
    even: tuple[int, int] = (8, 512)
    rows: int = 8
    steps: int = 50
    epoch_steps: int = 200
    inputs: int = 64
    beams: int = 10
    new_tokens: int = 64


FULL = Sizes({name: work.MODELS[name] for name in ("gpt2-medium", "gpt2-small")})
_SMALL = {**work.MODELS["gpt2-small"], "n_embd": 64, "n_layer": 2, "n_head": 2}
REHEARSAL = Sizes(
    {"gpt2-medium": _SMALL}, even=(2, 40), rows=2, steps=3, epoch_steps=4, inputs=3, beams=2,
    new_tokens=4,
)  # fmt: skip


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    options.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu")
    options.add_argument("--inputs", type=Path, default=INPUTS)
    options.add_argument("--prepare", action="store_true", help="write the inputs and end")
    options.add_argument("--stage", choices=STAGES, help="run one stage here, without a limit")
    options.add_argument("--limit", type=float, help="of --stage: where it stands after so long")
    options.add_argument("--seconds", type=float, default=560, help="of all stages together")
    options.add_argument("--torch-path", help="PYTHONPATH of the processes of PyTorch")
    options.add_argument("--rehearsal", action="store_true", help="small, for an emulated card")
    chosen = options.parse_args()
    chosen.sizes = REHEARSAL if chosen.rehearsal else FULL
    if chosen.prepare:
        prepare(chosen.inputs, chosen.sizes)
    elif chosen.stage:
        sides.PYTHON.update(jlora=Path(sys.executable), peft=Path(sys.executable))
        if chosen.limit is not None:
            faulthandler.dump_traceback_later(chosen.limit)
        globals()[f"stage_{chosen.stage}"](chosen)
    else:
        run_stages(chosen)


def run_stages(chosen: argparse.Namespace) -> None:
    """Run stages as processes; their output goes to the screen and behind ``report.txt``."""
    chosen.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with (chosen.out / "report.txt").open("a") as report:

        def say(text: str) -> None:
            print(text, end="", flush=True)
            report.write(text)
            report.flush()

        for command in ("nvidia-smi -L", "nvcc --version | tail -2 | head -1", "date -u +%F"):
            with contextlib.suppress(subprocess.TimeoutExpired):
                asked = subprocess.run(
                    command, shell=True, capture_output=True, text=True, timeout=30
                )
                say(asked.stdout)
        for stage in chosen.stages:
            left = chosen.seconds - (time.monotonic() - began)
            if left < 20:
                say(f"\n## {stage}: no time left\n")
                continue
            limit = min(STAGES[stage], left - 10)  # seconds that it may take to die
            say(f"\n## {stage}\n")
            command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu", "--stage", stage]
            command += ["--out", str(chosen.out), "--inputs", str(chosen.inputs)]
            command += ["--limit", str(limit - 2)]
            command += ["--rehearsal"] * chosen.rehearsal
            if chosen.torch_path is not None:
                command += ["--torch-path", chosen.torch_path]
            started = time.monotonic()
            ended = run_limited(command, limit, say)
            say(f"({stage}: {time.monotonic() - started:.0f} s{ended})\n")


def run_limited(command: Sequence[str], limit: float, say: Callable[[str], None]) -> str:
    """Run a command, and end it and what it has started after ``limit`` seconds.

    It may leave a process behind that holds its output, or hang in the driver, where no signal
    reaches it: the next stage begins all the same.

    Args:
        say: gets its output line by line, at once.

    Returns:
        How it ended; "" if well.
    """
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip

    def pass_on() -> None:
        with process.stdout:
            for line in process.stdout:
                say(line)

    reader = threading.Thread(target=pass_on, daemon=True)
    reader.start()
    try:
        code = process.wait(limit)
        ended = "" if code == 0 else f", ended with {code}"
    except subprocess.TimeoutExpired:
        ended = ", ended with its limit"
    finally:  # also after Ctrl-C, which does not reach it
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(3)
            reader.join(1)
    return ended


def prepare(folder: Path, sizes: Sizes) -> None:
    """Write what the stages read besides the code: batches and prompts of E2E."""
    from benchmarks.decoding import make_spec

    folder.mkdir(parents=True, exist_ok=True)
    data = Path(os.environ.get("JLORA_DATA", ROOT.parent / "shared" / "data"))
    work.e2e_batches(folder / "e2e.npz", data, "gpt2-medium", sizes.rows, sizes.epoch_steps)
    work.even_batches(folder / "even.npz", work.GPT2["vocab_size"], *sizes.even)
    options = argparse.Namespace(
        model="gpt2-medium", adapter=None, beams=sizes.beams, new_tokens=sizes.new_tokens,
        rank_up_to=None,
    )  # fmt: skip
    spec = {**make_spec(options, folder / "prompts.json"), "config": sizes.configs["gpt2-medium"]}
    (folder / "decode.json").write_text(json.dumps(spec))
    np.savez(folder / "packed.npz", **packed_weights())
    for name, (config, lora) in TWINS.items():
        loss, gradients, states, best, _ = computed(config, dict(lora), "plain")
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

    The first round is told at once, in case that the others do not end within the stage.

    Args:
        module: "train" or "decode".
        inputs: of a round, by which its time is divided.
    """
    path = {} if chosen.torch_path is None else {"PYTHONPATH": chosen.torch_path}
    spec = {**spec, "device": "cuda", "precision": "bf16"}
    ours, less = (
        Side(f"jlora {p}", f"jlora_{module}", "jlora", {**spec, "precision": p})
        for p in ("bf16", "int4")
    )
    theirs = Side(peer, f"torch_{module}", "peft", spec, variables=path)
    for side in (ours, less) if chosen.rehearsal else (ours, theirs, less):
        started = time.monotonic()
        start([side])
        take_turns([side], 1, warmup)
        if side.problem is None:
            print(
                f"  {side.name:20} {1000 * side.seconds[0] / inputs:9.2f} ms, one round, first "
                f"{side.first_seconds:6.1f} s, begun and warm {time.monotonic() - started:.0f} s",
                flush=True,
            )
        for _ in range(rounds - 1):
            with problems_of(side):
                side.seconds += [side.round()] if side.problem is None else []
        stop([side])
        if side.problem is not None:
            print(f"  {side.problem}", flush=True)  # the other one runs all the same
            continue
        ratio = f", ratio {side.median / ours.median:.2f}" if ours.problem is None else ""
        memory = f", {side.extra['gpu_mb']:.0f} MB of the card" if "gpu_mb" in side.extra else ""
        print(f"  {side.name:20} {1000 * side.median / inputs:9.2f} ms{memory}{ratio}", flush=True)


def stage_train(chosen: argparse.Namespace) -> None:
    """Training steps of each side; batches of E2E have another length at each step."""
    sizes = chosen.sizes
    shapes = {"even": f"{sizes.even[0]} x {sizes.even[1]} tokens", "e2e": f"E2E, {sizes.rows} rows"}
    pairs = [("gpt2-medium", "even"), *((model, "e2e") for model in sizes.configs)]
    for model, batch in pairs:
        spec = training_spec(chosen, model, batch)
        print(
            f"{model}, {shapes[batch]}, {sizes.steps} steps each; estimated: "
            f"{estimated_mb(spec):.0f} MB of the card",
            flush=True,
        )
        run_sides(chosen, "train", spec, "PEFT bf16", rounds=sizes.steps, warmup=6, inputs=1)


def estimated_mb(spec: dict) -> float:
    """What `jlora estimate` would say of this training, in MiB."""
    from jlora.models.hub import Outline, build_model
    from jlora.runs.memory_check import on_card
    from jlora.runs.memory_estimate import Texts, estimate
    from jlora.runs.recipe import make_recipe

    batches = np.load(spec["batches"])
    numbers = range(int(batches["count"]))
    lengths = np.concatenate([batches[f"lengths{i}"] for i in numbers]).tolist()
    targets = np.concatenate([batches[f"mask{i}"].sum(1) for i in numbers]).astype(int).tolist()
    settings = {"lora": spec["lora"], "precision": spec["precision"], "model": "any"}
    settings["train"] = {"batch_size": len(lengths) // len(numbers)}
    model = build_model(spec["config"])
    model.name_or_path = "any"
    texts = Texts(lengths, targets, 0, [1], 0)
    found = estimate(make_recipe(settings, "the check"), Outline(model, None), texts)
    return on_card(found).total("train") / 2**20


def training_spec(chosen: argparse.Namespace, model: str, batch: str) -> dict:
    return {
        "config": chosen.sizes.configs[model], "lora": work.lora_settings(model),
        "batches": str(chosen.inputs / f"{batch}.npz"), "label_smoothing": 0.1, "device": "cuda",
        "precision": "bf16",
    }  # fmt: skip


def stage_decode(chosen: argparse.Namespace) -> None:
    """Steps by their parts; beam search of many inputs at a time."""
    from jlora.system.runtime import use_gpu

    use_gpu(True)
    sizes = chosen.sizes
    inputs, beams = sizes.inputs, sizes.beams
    for precision in ("bf16", "int4"):
        print(f"{precision}: ", end="")
        step_times(sizes.configs["gpt2-medium"], precision, inputs=inputs, beams=beams, steps=20)
    print(
        f"gpt2-medium, {inputs} inputs at a time, {beams} beams, {sizes.new_tokens} tokens; for "
        "each input:",
        flush=True,
    )
    spec = json.loads((chosen.inputs / "decode.json").read_text())
    spec.update(
        prompts=str(chosen.inputs / "prompts.json"), batch_size=inputs, inputs=inputs,
        early_stopping=False,
    )  # fmt: skip
    run_sides(chosen, "decode", spec, "transformers bf16", rounds=2, warmup=1, inputs=inputs)


def step_times(config: dict, precision: str, inputs: int, beams: int, steps: int) -> None:
    """What the parts of a decoding step take, without the search's own work."""
    from jlora import engine
    from jlora.decoding.decoder import decoder_of
    from jlora.layers import set_trainable
    from jlora.models.hub import build_model

    def prepared():
        model = build_model(config)
        set_trainable(model, ())
        engine.prepare(model, precision, keep_weights=False)
        model.eval()
        return model

    model = timed("a model", prepared)
    rng = np.random.default_rng(0)
    decoder = decoder_of(model)
    prompts = rng.integers(0, config["vocab_size"], (inputs, 60)).tolist()
    timed(f"{inputs} prompts of 60 tokens", lambda: decoder.enter(prompts))
    rows, seconds = np.repeat(np.arange(inputs), beams), np.zeros((steps, 2))
    for step in range(steps):
        began = time.monotonic()
        decoder.advance(rows, rng.integers(0, config["vocab_size"], len(rows)))
        between = time.monotonic()
        decoder.best(2 * beams)
        seconds[step] = between - began, time.monotonic() - between
        rows = np.arange(len(rows))
    layers, words = 1000 * np.median(seconds, axis=0)
    print(
        f"{type(decoder).__name__}, a step of {len(rows)} rows: layers {layers:.1f} ms, words "
        f"{words:.1f} ms",
        flush=True,
    )


def stage_epochs(chosen: argparse.Namespace) -> None:
    """Five epochs of E2E with GPT-2 medium, from some hundred steps of its batches."""
    from benchmarks import jlora_train

    step = jlora_train.make(training_spec(chosen, "gpt2-medium", "e2e"))
    for _ in range(5):
        step()
    started = time.monotonic()
    losses = []
    wanted = chosen.sizes.epoch_steps
    steps = 5 * 42061 / chosen.sizes.rows  # E2E's training rows
    for done in range(1, wanted + 1):
        losses.append(step()["loss"])
        if done % (wanted // 4) == 0:
            each = (time.monotonic() - started) / done
            print(
                f"{done} steps: {1000 * each:.1f} ms each, loss {losses[0]:.3f} to "
                f"{losses[-1]:.3f}; five epochs of {steps / 5:.0f} steps: {steps * each / 60:.1f} "
                "min",
                flush=True,
            )


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


def stage_fixtures(chosen: argparse.Namespace) -> None:
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


if __name__ == "__main__":
    main()
