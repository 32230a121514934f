"""``make docs-check``: runs the commands of README and docs/, and compares what pages show of them.

Everything runs in a folder of its own with what the pages speak of: conversations, splits, finished
runs, references. The models behind the names are small ones with random weights, so that a run of
1,200 steps takes a minute; what is shown of an output is compared by its shape, the first word of
every line. Commands that cannot run here (the network, other programs, hours) are listed with the
reason; each of jlora's is checked by `make test` to be one that it takes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from doc_commands import PAGES, ROOT, Command, commands, plain

#: Why commands that fit a pattern are not run; the first that fits.
LEFT_OUT = (
    (r"^(sudo|conda|docker|export|ollama|pip|mpirun|curl|OPENAI_API)", "another program"),
    (r"^make (install|test)", "`make test` itself"),
    (r"^make |^python -m (benchmarks|parity)", "measures for minutes to hours"),
    (r"^python -m (tests|pytest)", "a test by itself"),
    (r"^jlora pull", "needs the network"),
    (r"\.\.\. |\[--| N |\$p|CASE\.|RUN\b", "to be filled in by the reader"),
    (r"limericks|mine\.yaml|^sha256sum", "files that the reader writes (tests/test_tasks.py)"),
    (r"--nproc", "several processes (tests/test_distributed.py)"),
    (r"q4_k_m|q5_k_m|q6_k", "needs jlora[kquants]"),
    (r"^jlora sweep .*(--cases|seed=)", "as the other sweep, with more runs"),
    (r"^jlora chat runs/finetune$|^jlora demo --chat$", "a conversation (tests/test_talk.py)"),
)
TINY = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 49152,
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5, "rope_theta": 100000.0, "tie_word_embeddings": True, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip
TINY_GPT2 = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 50257,
    "n_positions": 1024, "n_embd": 64, "n_layer": 2, "n_head": 2, "eos_token_id": 0,
}  # fmt: skip
LIMIT = 900  # seconds of a command


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--only", default="", help="commands that this pattern fits")
    options.add_argument("--list", action="store_true", help="what would be run and what not")
    chosen = options.parse_args()
    distinct: dict[str, Command] = {}
    for page in PAGES:
        for command in commands(page):
            known = distinct.get(plain(command.line))
            if known is None or command.shown and not known.shown:
                distinct[plain(command.line)] = command
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        if not chosen.list:
            prepare(Path(scratch))
        for line, command in distinct.items():
            reason = next((why for pattern, why in LEFT_OUT if re.search(pattern, line)), None)
            if not re.search(chosen.only, line):
                continue
            if reason or chosen.list:
                print(f"left out  {line}  ({reason})" if reason else f"to run    {line}")
                continue
            problem, seconds = check(command, Path(scratch))
            failed += bool(problem)
            print(
                f"{'FAILED' if problem else 'ok':9} {line}  ({command.page}, {seconds:.0f} s)",
                flush=True,
            )
            if problem:
                print(problem)
    return 1 if failed else 0


def prepare(scratch: Path) -> None:
    """The models, data and runs that the pages speak of."""
    from jlora.data.pull_models import pull

    real = Path(pull("smollm2-135m"))
    for name, config in (
        ("smollm2-135m", TINY), ("llama-2-7b", TINY), ("gpt2-medium", TINY_GPT2),
        ("gpt2-large", TINY_GPT2),
    ):  # fmt: skip
        write_model(scratch / "cache" / "models" / name, config, real)
    shared = Path(os.environ.get("JLORA_DATA", ROOT.parent / "shared" / "data"))
    (scratch / "data").mkdir()
    for name in ("e2e", "webnlg", "dart", "boolq", "wikisql", "chat"):
        shutil.copytree(shared / name, scratch / "data" / name)
        shutil.copytree(shared / name, scratch / name)
    for name, source in (
        ("chats.jsonl", "chat/train.jsonl"), ("valid.jsonl", "chat/valid.jsonl"),
        ("test.jsonl", "chat/valid.jsonl"), ("references.txt", "metrics/jittor_gpt2m.ref.txt"),
        ("predictions.txt", "metrics/jittor_gpt2m.hyp.txt"), ("dev.jsonl", "boolq/dev.jsonl"),
        ("dev.json", "webnlg/dev.json"),
    ):  # fmt: skip
        shutil.copy(shared / source, scratch / name)
    short = ["--precision", "plain", "--set", "train.steps=2"]  # nothing to compile
    tune = ["finetune", "--model", "smollm2-135m", "--data", "chats.jsonl", *short]
    jlora(scratch, *tune, "--out", "runs/finetune")
    for name in ("mine", "cafe", "sql"):
        shutil.copytree(scratch / "runs" / "finetune", scratch / "runs" / name)
    run = ["run", "demo", *short, "--set", "data.test_limit=2", "--out"]
    jlora(scratch, *run, "runs/a")
    for name in ("b", "demo"):
        shutil.copytree(scratch / "runs" / "a", scratch / "runs" / name)


def write_model(folder: Path, config: dict, real: Path) -> None:
    """A folder of a small model with ``real``'s tokenizer."""
    import numpy as np

    from jlora.formats.safetensors_file import write_safetensors
    from jlora.models.hub import build_model

    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(real / name, folder)
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    tensors = {
        name: np.ones(p.shape, "f")
        if len(p.shape) == 1
        else rng.normal(0, 0.05, p.shape).astype("f")
        for name, p in build_model(config).named_parameters()
    }
    write_safetensors(folder / "model.safetensors", tensors)


def environment(scratch: Path) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "JLORA_CACHE": str(scratch / "cache"), "PYTHONPATH": path,
            "JLORA_DATA": str(scratch / "data")}  # fmt: skip


def jlora(scratch: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "jlora", *arguments]
    subprocess.run(command, cwd=scratch, env=environment(scratch), check=True)


def check(command: Command, scratch: Path) -> tuple[str, float]:
    """Run it; what is wrong, or nothing, and the seconds."""
    line = plain(command.line)
    if line.startswith(("jlora run", "jlora finetune")):  # a page begins anew
        out = re.search(r"--out (\S+)", line) or re.match(r"jlora run (\S+)", line)
        folder = out[1].removeprefix("runs/") if out else "finetune"
        shutil.rmtree(scratch / "runs" / folder, ignore_errors=True)
    if re.match(r"jlora run .*-gpt2-|jlora sweep", line) and "--smoke" not in line:
        line += " --smoke" if line.startswith("jlora run") else " --set train.steps=2"
    if re.match(r"jlora (run [a-z0-9]+-smollm2|sweep)", line) and "test_limit" not in line:
        line += " --set data.test_limit=8"  # minutes of beam search otherwise
    if line.startswith("jlora run wikisql"):
        line += " --set lora.layers_to_transform=[0,1]"  # all that the small model has
    shell = re.sub(r"(^|\| )jlora ", rf"\1{sys.executable} -m jlora ", line)
    shell = re.sub(r"^python ", f"{sys.executable} ", shell)
    serves = line.startswith("jlora serve")
    started = time.monotonic()
    process = subprocess.Popen(
        ["bash", "-c", f"exec {shell}" if serves else f"set -o pipefail; {shell}"], cwd=scratch,
        env=environment(scratch), stdin=subprocess.DEVNULL, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        if serves:
            return listens(process), time.monotonic() - started
        said, errors = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return f"  not done after {LIMIT} s", time.monotonic() - started
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    seconds = time.monotonic() - started
    if process.returncode:
        return f"  exit code {process.returncode}: {errors[-800:]}", seconds
    missing = missing_line(command.shown, said)
    return (f"  the page shows {missing!r}, which has no counterpart in\n{said[-2000:]}"
            if missing else ""), seconds  # fmt: skip


def listens(process: subprocess.Popen) -> str:
    """Wait for the line with which the server says where it listens, and stop it."""
    watch = threading.Timer(LIMIT, process.kill)
    watch.start()
    try:
        for line in process.stderr:
            if "http://" in line:
                process.send_signal(signal.SIGTERM)
                process.communicate(timeout=LIMIT)
                return f"  exit code {process.returncode}" if process.returncode else ""
    finally:
        watch.cancel()
    return f"  it ended, or had {LIMIT} s, without listening"


def missing_line(shown: str, said: str) -> str:
    """The first line that a page shows and whose first word is not in the output, in order."""
    heads = iter(shape(said))
    for line, head in zip(filter(str.strip, shown.splitlines()), shape(shown)):
        if not line.startswith(" " * 11) and all(head != other for other in heads):
            return line
    return ""


def shape(text: str) -> list[str]:
    """The first word of every line, numbers as 0."""
    return [re.sub(r"[\d.,]+", "0", line.split()[0]) for line in text.splitlines() if line.strip()]


if __name__ == "__main__":
    sys.exit(main())
