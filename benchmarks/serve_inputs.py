"""The models and adapters of `benchmarks.serve`, in the form that each server reads."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

#: Qwen2.5-0.5B's shape.
QWEN = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 151936,
    "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "hidden_act": "silu",
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "bos_token_id": None,
}  # fmt: skip
#: For trying the benchmark itself.
TINY = {
    **QWEN, "vocab_size": 49152, "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 2048,
}  # fmt: skip
MODELS = {"smollm2-135m": None, "qwen2.5-0.5b shape": QWEN, "tiny": TINY}
#: Ends no answer here: a special token that no model writes, so that all answers are equally long.
END = "<jupyter_script>"
RANK, ALPHA = 8, 16
#: Linear layers: name in Hugging Face's files -> in GGUF's.
LAYERS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


@dataclass
class Inputs:
    """Where a model's files are; each is made when it is first asked for, and kept."""

    name: str
    folder: Path

    @property
    def model(self) -> Path:
        return made(self.folder / "model", self._write_model)

    def gguf(self, kind: str) -> Path:
        return made(self.folder / f"{kind}.gguf", lambda path: self._export(path, kind))

    def adapter(self, number: int) -> Path:
        """A folder as PEFT writes it."""
        return made(self.folder / f"adapter-{number}", lambda path: self._write_peft(path, number))

    def gguf_adapter(self, number: int) -> Path:
        return made(
            self.folder / f"adapter-{number}.gguf", lambda path: self._write_gguf(path, number)
        )

    def mlx_adapter(self) -> Path:
        return made(self.folder / "adapter-mlx", self._write_mlx)

    @property
    def config(self) -> dict:
        return json.loads((self.model / "config.json").read_text())

    def _write_model(self, folder: Path) -> None:
        from jlora.data.pull_models import pull

        source = Path(pull("smollm2-135m"))
        folder.mkdir()
        tokenizer = json.loads((source / "tokenizer.json").read_text())
        vocabulary = tokenizer["model"]["vocab"]
        config = MODELS[self.name]
        if config is None:
            config = json.loads((source / "config.json").read_text())
            shutil.copy(source / "model.safetensors", folder)
        else:
            # Random weights choose any token; those that SmolLM2 lacks get words of their own.
            vocabulary.update({f"Ġw{i}": i for i in range(len(vocabulary), config["vocab_size"])})
            write_random(folder / "model.safetensors", config)
        ends = {"eos_token_id": vocabulary[END], "pad_token_id": vocabulary[END]}
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
        (folder / "config.json").write_text(json.dumps({**config, **ends}))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END,
            "pad_token": END,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))

    def _export(self, path: Path, kind: str) -> None:
        command = [sys.executable, "-m", "jlora", "export", str(self.model), "--gguf", str(path)]
        subprocess.run([*command, "--type", kind], check=True, capture_output=True)
        (path.parent / "Modelfile").unlink(missing_ok=True)  # for Ollama

    def _write_peft(self, folder: Path, number: int) -> None:
        from safetensors.numpy import save_file

        folder.mkdir()
        save_file(
            {
                f"base_model.model.{layer}.lora_{half}.weight": matrix
                for layer, pair in random_pairs(self.config, number).items()
                for half, matrix in zip("AB", pair)
            },
            folder / "adapter_model.safetensors",
        )
        targets = [name.rpartition(".")[2] for name in LAYERS]
        settings = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA,
            "target_modules": targets, "base_model_name_or_path": str(self.model),
        }  # fmt: skip
        (folder / "adapter_config.json").write_text(json.dumps(settings))

    def _write_gguf(self, path: Path, number: int) -> None:
        """Random numbers need none of the turns that llama.cpp's rows of q and k have."""
        from gguf import GGUFWriter

        kind = self.config["model_type"]
        writer = GGUFWriter(str(path), kind)
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", ALPHA)
        for layer, pair in random_pairs(self.config, number).items():
            _, _, block, module = layer.split(".", 3)
            for half, matrix in zip("ab", pair):
                name = f"blk.{block}.{LAYERS[module]}.weight.lora_{half}"
                writer.add_tensor(name, matrix.astype(np.float16))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def _write_mlx(self, folder: Path) -> None:
        from safetensors.numpy import save_file

        folder.mkdir()
        save_file(
            {
                f"{layer}.lora_{half}": np.ascontiguousarray(matrix.T)
                for layer, pair in random_pairs(self.config, 0).items()
                for half, matrix in zip("ab", pair)
            },
            folder / "adapters.safetensors",
        )
        settings = {
            "fine_tune_type": "lora", "num_layers": self.config["num_hidden_layers"],
            "lora_parameters": {
                "rank": RANK, "scale": ALPHA / RANK, "dropout": 0.0, "keys": list(LAYERS),
            },
        }  # fmt: skip
        (folder / "adapter_config.json").write_text(json.dumps(settings))


def made(path: Path, make: Callable[[Path], None]) -> Path:
    """The path, made under another name if it is not there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name("partial-" + path.name)
        shutil.rmtree(partial, ignore_errors=True)
        partial.unlink(missing_ok=True)
        make(partial)
        partial.rename(path)
    return path


def shapes(config: dict) -> dict[str, tuple[int, int]]:
    """(out, in) of every linear layer of a block."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    kv = width // heads * config["num_key_value_heads"]
    sizes = [(width, width), (kv, width), (kv, width), (width, width)]
    sizes += [(inner, width), (inner, width), (width, inner)]
    return dict(zip(LAYERS, sizes))


def random_pairs(config: dict, number: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A (r, in) and B (out, r) of every linear layer: a small change, so that texts stay texts."""
    random = np.random.default_rng(number)
    return {
        f"model.layers.{block}.{name}": (
            random.standard_normal((RANK, columns), np.float32) / np.sqrt(columns, dtype="f"),
            random.standard_normal((rows, RANK), np.float32) * np.float32(0.01),
        )
        for block in range(config["num_hidden_layers"])
        for name, (rows, columns) in shapes(config).items()
    }


def write_random(path: Path, config: dict) -> None:
    """A model of random weights."""
    from jlora.formats.safetensors_file import write_narrowed

    random = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape, np.float32) * np.float32(0.02)

    width = config["hidden_size"]
    tensors = {"model.embed_tokens.weight": normal(config["vocab_size"], width)}
    tensors["model.norm.weight"] = np.ones(width, np.float32)
    for block in range(config["num_hidden_layers"]):
        head = f"model.layers.{block}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{head}{norm}.weight"] = np.ones(width, np.float32)
        for name, (rows, columns) in shapes(config).items():
            tensors[f"{head}{name}.weight"] = normal(rows, columns)
            if name[-6] in "qkv" and config["model_type"] == "qwen2":
                tensors[f"{head}{name}.bias"] = normal(rows)
    write_narrowed(path, tensors, "BF16", {"format": "pt"})
