"""Files of `jlora export --gguf` in llama.cpp: ``make llamacpp``.

Of every family a model with random weights, and SmolLM2-135M-Instruct's own, are exported in
float32 and run by llama.cpp in an environment of its own (`LLAMACPP`). Compared are the tokens of
texts that are hard to split, and the likeliest tokens one by one with their probabilities. A
decision that is closer than `CLOSEST` ends the comparison of its answer: it may fall otherwise with
other rounding.

GPT-2's vocabulary stands in for those of the byte-level families, each with its own splitting; a
SentencePiece BPE is trained on this repository's pages for the others.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
LLAMACPP = ROOT / ".venv-llamacpp" / "bin" / "python"
TOKENS, CLOSEST = 24, 5e-3
#: Of the logarithms of probabilities. llama.cpp's GELU is a table in float16.
CLOSE = 5e-3
BASE = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
LONGROPE = {
    "type": "longrope", "short_factor": [1.0, 1.1, 1.3, 2.0] * 2,
    "long_factor": [1.5, 2.0, 4.0, 7.0] * 2,
}  # fmt: skip
TIED = {"tie_word_embeddings": True}
GEMMA = {**TIED, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 7}
CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
GPT2 = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256}
#: name -> config.json beside `BASE`, and the kind of the tokenizer (`pretokenizers.KINDS`, "spm").
MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "gpt2": ({"model_type": "gpt2", **GPT2}, "gpt2"),
    "llama": ({"model_type": "llama", "rope_theta": 500.0}, "llama3"),
    "llama, llama3 rope": (
        {"model_type": "llama", "rope_scaling": LLAMA3, "rope_theta": 500.0, **TIED}, "llama3",
    ),
    "llama, linear rope": (
        {"model_type": "llama", "rope_scaling": {"rope_type": "linear", "factor": 4.0}}, "smollm",
    ),
    "mistral": ({"model_type": "mistral", "sliding_window": None, "head_dim": 32}, "tekken"),
    "qwen2": ({"model_type": "qwen2"}, "qwen2"),
    "qwen3": ({"model_type": "qwen3", "head_dim": 32}, "qwen2"),
    "smollm3": ({"model_type": "smollm3", **TIED}, "llama3"),
    "olmo2": ({"model_type": "olmo2"}, "gpt4"),
    "gemma2": ({"model_type": "gemma2", **GEMMA, **CAPS}, "spm"),
    "gemma3": (
        {"model_type": "gemma3_text", **GEMMA, "rope_local_base_freq": 100.0,
         "rope_theta": 1000000.0, "sliding_window_pattern": 2}, "spm",
    ),
    "gemma3, linear rope": (
        {"model_type": "gemma3_text", **GEMMA, "num_hidden_layers": 7,
         "rope_scaling": {"rope_type": "linear", "factor": 8.0}}, "spm",
    ),
    "phi3": ({"model_type": "phi3", "sliding_window": None}, "spm"),
    "phi3, longrope short": (
        {"model_type": "phi3", "rope_scaling": LONGROPE, "sliding_window": None,
         "original_max_position_embeddings": 512, "max_position_embeddings": 2048}, "spm",
    ),
    "phi3, longrope long": (
        {"model_type": "phi3", "rope_scaling": LONGROPE, "sliding_window": None,
         "original_max_position_embeddings": 4}, "spm",
    ),
    "phi4-mini": (
        {"model_type": "phi3", "hidden_size": 128, "partial_rotary_factor": 0.5, **TIED,
         "rope_scaling": LONGROPE, "sliding_window": None,
         "original_max_position_embeddings": 512, "max_position_embeddings": 2048}, "gpt4o",
    ),
    "glm": ({"model_type": "glm", "head_dim": 16}, "gpt4"),
    "glm4": ({"model_type": "glm4", "head_dim": 32}, "gpt4"),
    "internlm2": ({"model_type": "internlm2", "bias": False}, "spm"),
    "internlm3": ({"model_type": "internlm3", "head_dim": 32}, "spm"),
}  # fmt: skip
SMOLLM2 = "smollm2-135m"
#: The context that llama.cpp is given: it takes LongRoPE's form by that, jlora by the text.
CONTEXT = {"phi3, longrope long": 256}
TEXTS = [
    "The quick brown fox; it's camelCase, we'll HTTPServer's don'T.",
    "12345 1,234.5 and 2026-11-27T09:15",
    "  two  spaces\n\n\tand tabs \r\n x  ",
    "def __init__(self, *args):\n    return a//b <= c[0]  # naïve café\n",
    "日本語 中文, 한국어. Ελληνικά и русский — “quotes” … 🙂 👩‍👩‍👧",
]


@dataclass
class Line:
    """What came of one model."""

    name: str
    compared: int = 0
    answers: int = 0
    equal: int = 0
    difference: float = 0.0
    texts: int = 0
    problem: str = ""

    @property
    def passed(self) -> bool:
        whole = self.equal == self.compared > 0 and self.texts == len(TEXTS)
        return whole and self.difference < CLOSE and not self.problem

    def __str__(self) -> str:
        if self.problem:
            return f"| {self.name} | {self.problem} | | | |"
        cells = (
            self.name, f"{self.texts} of {len(TEXTS)}", f"{self.equal} of {self.compared}",
            f"{self.difference:.1e}", "equal" if self.passed else "**not equal**",
        )  # fmt: skip
        return "| " + " | ".join(cells) + " |"


HEAD = """| model | texts split alike | tokens equal | log p, largest difference | |
|---|---|---|---|---|"""


def main() -> int:
    """Print a table; 0 if every model passes."""
    parser = argparse.ArgumentParser(prog="python -m parity.llamacpp", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--models", nargs="+", choices=[*MODELS, SMOLLM2])
    chosen = parser.parse_args()
    if not LLAMACPP.exists():
        print("no .venv-llamacpp; run `make llamacpp`, which makes it", file=sys.stderr)
        return 2
    lines = []
    print(HEAD)
    for name in chosen.models or [*MODELS, SMOLLM2]:
        lines.append(compare(name, chosen.seed))
        print(lines[-1], flush=True)
    return 0 if all(line.passed for line in lines) else 1


def compare(name: str, seed: int) -> Line:
    """Export a model, run it on both sides, and compare."""
    from jlora.adapters.export_gguf import export_gguf
    from jlora.models.hub import load

    random = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.gguf"
        model = load(SMOLLM2) if name == SMOLLM2 else random_model(*MODELS[name], random)
        export_gguf(model, file)
        rows = model.tokenizer.vocab_size
        prompts = [random.integers(0, rows, n).tolist() for n in (3, 9, 20)]
        texts = [model.tokenizer.encode(text) for text in TEXTS]
        prompts += texts[:2]
        job = {"model": str(file), "context": CONTEXT.get(name, 128), "tokens": TOKENS}
        job |= {"texts": TEXTS, "prompts": prompts}
        line = Line(name)
        try:
            theirs = llama_cpp(job, Path(folder))
        except RuntimeError as error:
            line.problem = str(error)
            return line
        line.texts = sum(a == b for a, b in zip(theirs["tokens"], texts))
        for prompt, answer in zip(prompts, theirs["answers"]):
            compare_answer(line, model, prompt, answer)
    return line


def compare_answer(line: Line, model: Any, prompt: list[int], answer: dict[str, list]) -> None:
    """Of each token of llama.cpp's answer: whether it is jlora's likeliest, and its log p."""
    from jlora.system.runtime import jt

    ids = np.array([prompt + answer["ids"]], np.int32)
    with jt.no_grad():
        logits = model(jt.array(ids)).numpy()[0, len(prompt) - 1 : -1].astype(np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    line.answers += 1
    for row, token, said in zip(logs, answer["ids"], answer["logprobs"]):
        first, second = np.sort(row)[-1], np.sort(row)[-2]
        # llama.cpp was told to go on, so it does not choose the end.
        if first - second < CLOSEST or row.argmax() == model.tokenizer.eos_token_id:
            return
        line.compared += 1
        if row.argmax() != token:
            return
        line.equal += 1
        if said is not None:
            line.difference = max(line.difference, abs(row[token] - said))


def llama_cpp(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`llamacpp_side` in its own environment.

    Raises:
        RuntimeError: llama.cpp does not load the file, with the last thing that it said.
    """
    path = folder / "job.json"
    path.write_text(json.dumps(job))
    command = [LLAMACPP, Path(__file__).with_name("llamacpp_side.py"), path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode:
        said = [x for x in (done.stderr + done.stdout).splitlines() if "error" in x.lower()]
        raise RuntimeError((said or done.stderr.splitlines() or ["it died"])[0][:200])
    return json.loads(done.stdout.splitlines()[-1])


# Models ------------------------------------------------------------------------------------------


def random_model(config: dict[str, Any], kind: str, random: np.random.Generator) -> Any:
    """A model with a tokenizer; its weights are large enough that attention and norms matter."""
    from jlora.models.hub import build_model
    from jlora.system.runtime import jt

    tokenizer = sentencepiece(config["model_type"]) if kind == "spm" else byte_level(kind)
    base = {} if config["model_type"] == "gpt2" else BASE
    model = build_model({**base, **config, "vocab_size": tokenizer.vocab_size + 3})
    gemma = config["model_type"].startswith("gemma")
    for name, parameter in model.named_parameters():
        noise = random.standard_normal(tuple(parameter.shape)).astype("f")
        if len(parameter.shape) == 1:
            values = 0.2 * noise + (name.endswith("weight") and not gemma)
        else:
            values = 1.5 * parameter.shape[-1] ** -0.5 * noise
            # Gemma multiplies its embeddings by the root of their width.
            values *= 1 if gemma or "embed" not in name and "wte" not in name else 2
        parameter.assign(jt.array(values.astype("f")))
    model.tokenizer = tokenizer
    model.eval()
    return model


def byte_level(kind: str) -> Any:
    """GPT-2's vocabulary, its texts split as those of another family."""
    from jlora.data.pretokenizers import byte_level_bpe
    from jlora.data.tokenizer import Tokenizer
    from parity.downloads import downloaded

    data = downloaded("gpt2-vocabulary") / "data"
    vocab = json.loads((data / "encoder.json").read_text(encoding="utf-8"))
    lines = (data / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:]
    merges = [tuple(line.split(" ")) for line in lines if line]
    end = vocab["<|endoftext|>"]
    return Tokenizer(byte_level_bpe(vocab, merges, kind, ["<|endoftext|>"]), end, end)


def sentencepiece(model_type: str) -> Any:
    """A BPE of SentencePiece's kind, trained on the pages of this repository."""
    from tokenizers import AddedToken, decoders, models, normalizers, trainers
    from tokenizers import Tokenizer as Backend

    from jlora.data.sentencepiece import MARK
    from jlora.data.tokenizer import Tokenizer

    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Backend(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replace, spaced = normalizers.Replace(" ", MARK), not model_type.startswith("gemma")
    prepend = [normalizers.Prepend(MARK)] if spaced else []
    backend.normalizer = normalizers.Sequence([*prepend, replace]) if spaced else replace
    trainer = trainers.BpeTrainer(
        vocab_size=3000, special_tokens=special, show_progress=False, max_token_length=12
    )
    pages = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))]
    words = [MARK + word for page in pages for word in page.split()]
    backend.train_from_iterator(words, trainer)
    # Only the first three are special; bytes are there for what has no token.
    settings = json.loads(backend.to_str())
    settings["added_tokens"] = []
    backend = Backend.from_str(json.dumps(settings))
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in special[:3]])
    steps = [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] * spaced)])
    return Tokenizer(backend, 2, 1)


if __name__ == "__main__":
    sys.exit(main())
