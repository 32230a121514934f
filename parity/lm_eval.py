"""lm-evaluation-harness asks `jlora serve`: ``make lm-eval``.

A small task with answers to choose from is put to the server by lm_eval's ``local-completions``:
token ids, several prompts a request, ``echo`` with ``logprobs``. The sums that it reports, of the
base model and of an adapter, are compared with what the plain model gives in this process, in
float32.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
LM_EVAL = ROOT / ".venv-lm-eval" / "bin" / "python"
CLOSE = 1e-4  # of a sum of log-probabilities
TASK = """\
task: jlora_choice
dataset_path: json
dataset_kwargs: {data_files: {test: QUESTIONS}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}]
"""
QUESTIONS = [
    ("What is the capital of France?", ["Paris", "London", "Rome", "a river in Africa"], 0),
    ("How many legs has a spider?", ["six", "eight", "twenty-four"], 1),
    ("Which of these is a fruit?", ["a hammer", "an apple", "a cloud"], 1),
    ("What do bees make?", ["honey", "milk", "naïve café crème — 蜂蜜 🍯"], 0),
    ("Water freezes at", ["zero degrees Celsius", "one hundred degrees"], 0),
    ("The opposite of hot is", ["cold", "warm", "sun", "winter, spring, summer and autumn"], 0),
    ("Who wrote Hamlet?", ["William Shakespeare", "Isaac Newton"], 0),
    ("2 + 2 =", ["3", "4", "5", "22", "1234567890"], 1),
]


def main() -> int:
    """Compare; 0 if all sums are close."""
    parser = argparse.ArgumentParser(prog="python -m parity.lm_eval", description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--python", type=Path, default=LM_EVAL, help="of lm_eval's environment")
    chosen = parser.parse_args()
    if not chosen.python.exists():
        print("no .venv-lm-eval; run `make lm-eval`, which makes it", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        questions = folder / "questions.jsonl"
        rows = [dict(zip(("question", "choices", "answer"), row)) for row in QUESTIONS]
        questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "task.yaml").write_text(TASK.replace("QUESTIONS", str(questions)))
        model, tokenizer_folder = make_adapter(chosen.model, folder / "adapter")
        with server(chosen.model, folder) as url:
            found = {
                name: ask(chosen.python, name, url, tokenizer_folder, folder)
                for name in ("base", "adapter")
            }
        worst = 0.0
        for name, sums in found.items():
            model.set_adapter("default" if name == "adapter" else None)
            own = own_sums(model, list(sums))
            difference = max(abs(own[pair] - sums[pair]) for pair in sums)
            print(f"{name}: {len(sums)} sums, largest difference {difference:.1e}")
            worst = max(worst, difference)
        return 0 if worst < CLOSE else 1


def make_adapter(name: str, folder: Path):
    """A LoRA adapter with random values; the model with it, and where its tokenizer is."""
    from jlora import LoraConfig, get_peft_model
    from jlora.models.hub import find, load
    from jlora.system.runtime import jt

    model = get_peft_model(load(name), LoraConfig(r=8, target_modules="all-linear"))
    random = np.random.default_rng(0)
    for key, value in model.named_parameters():
        if "lora_B" in key:
            value.assign(jt.array(random.normal(0, 0.02, value.shape).astype(np.float32)))
    model.save_pretrained(str(folder))
    model.eval()
    place = find(name)
    return model, place if place.is_dir() else place.parent


@contextmanager
def server(model: str, folder: Path) -> Iterator[str]:
    """`jlora serve` with the adapter; its address."""
    command = [sys.executable, "-m", "jlora", "serve", model, "--served-model-name", "base"]
    command += ["--adapter", f"adapter={folder / 'adapter'}", "--port", "0", "--precision", "fp32"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            said = []
            for line in process.stderr:
                said.append(line)
                address = re.search(r"serving .* at (http://\S+)", line)
                if address:
                    yield address[1]
                    break
            else:
                raise RuntimeError("".join(said))
        finally:
            process.terminate()


def ask(python: Path, name: str, url: str, tokenizer: Path, folder: Path) -> dict:
    """The sums that lm_eval gets, by question and answer."""
    out = folder / f"out-{name}"
    settings = {
        "model": name, "base_url": f"{url}/v1/completions", "tokenizer": tokenizer,
        "tokenizer_backend": "huggingface", "tokenized_requests": True, "num_concurrent": 3,
        "max_retries": 1,
    }  # fmt: skip
    command = [python, "-m", "lm_eval", "--model", "local-completions", "--tasks", "jlora_choice"]
    command += ["--batch_size", 5, "--include_path", folder, "--log_samples", "--output_path", out]
    command += ["--model_args", ",".join(f"{key}={value}" for key, value in settings.items())]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "datasets")}
    done = subprocess.run(
        list(map(str, command)), env={**os.environ, **offline, "PYTHONPATH": ""},
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-5000:])
    (samples,) = out.rglob("samples_*.jsonl")
    sums = {}
    for line in samples.read_text().splitlines():
        sample = json.loads(line)
        for arguments, response in zip(sample["arguments"].values(), sample["resps"]):
            pair = (arguments["arg_0"], arguments["arg_1"])
            sums[pair] = float(response[0][0])
    return sums


def own_sums(model, pairs: list[tuple[str, str]]) -> dict:
    """The plain model's log-probabilities of what follows each text."""
    from jlora.system.runtime import jt

    tokenizer, found = model.tokenizer, {}
    for text, answer in pairs:
        whole, before = tokenizer.encode(text + answer), len(tokenizer.encode(text))
        with jt.no_grad():
            logits = model(jt.array(np.array([whole], np.int32))).numpy()[0].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        places = range(before, len(whole))
        found[text, answer] = sum(logprobs[place - 1, whole[place]] for place in places)
    return found


if __name__ == "__main__":
    sys.exit(main())
