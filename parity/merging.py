"""Merged models, GGUF files and loralib's checkpoints, read by the tools they are made for.

1. PEFT makes an adapter, and loralib the same kind of layer inside transformers' GPT-2.
2. jlora merges, exports and converts with the functions of `jlora merge`, `export`, `convert`.
3. transformers loads the merged folder and the GGUF file, gguf reads its tensors, loralib loads
   the ``.pt`` file.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from parity import adapters
from parity.case import Case
from parity.models import FAMILY, LLAMA, LLAMA3_ROPE, make_model

SMALL_GPT2 = adapters.SMALL_GPT2
MERGED = {
    # model's config, PEFT's settings, whether transformers' own GGUF reader has this model right
    # (of GPT-2 it knows the usual vocabulary and context alone)
    "gpt2": (
        {**SMALL_GPT2, "vocab_size": 50257, "n_positions": 1024},
        {"target_modules": ["c_attn", "c_fc"]},
        True,
    ),
    "gpt2-bias-all": (SMALL_GPT2, {"target_modules": ["c_attn"], "bias": "all"}, False),
    "gpt2-modules-to-save": (
        SMALL_GPT2,
        {"target_modules": ["c_attn"], "modules_to_save": ["ln_f"]},
        False,
    ),
    "llama": (LLAMA, {"target_modules": "all-linear"}, True),
    "llama-tied": ({**LLAMA, "tie_word_embeddings": True}, {"target_modules": ["k_proj"]}, True),
    "llama-head-saved": (
        LLAMA,
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        True,
    ),
    "llama-dora": (LLAMA, {"target_modules": "all-linear", "use_dora": True}, True),
    "gpt2-dora": (
        SMALL_GPT2,
        {"target_modules": ["c_attn", "mlp.c_proj"], "use_dora": True, "use_rslora": True},
        False,
    ),
    # Llama 3.1's numbers: the only ones that GGUF files can store.
    "llama3-rope": (
        {
            **LLAMA,
            "head_dim": 16,
            "rope_parameters": {
                **LLAMA3_ROPE, "rope_theta": 500000.0, "original_max_position_embeddings": 8192,
            },
        },
        {"target_modules": ["q_proj", "k_proj"]},
        False,
    ),
    "qwen2": ({**LLAMA, **FAMILY["qwen2"]}, {"target_modules": ["q_proj", "down_proj"]}, True),
}  # fmt: skip
LORALIB = {
    "bare": {"nested": False, "bias": "none"},
    "nested": {"nested": True, "bias": "none"},
    "nested-bias-all": {"nested": True, "bias": "all"},
    "bare-bias-lora-only": {"nested": False, "bias": "lora_only"},
}
QV, R, ALPHA = [True, False, True], 3, 10


def cases(seed: int) -> list[Case]:
    found = []
    for name, (config, peft, gguf) in MERGED.items():
        settings = {"config": config, "peft": peft, "gguf": gguf}
        found.append(Case("jlora merge and export --gguf", f"merge-{name}", settings, 1e-4))
    for name, how in LORALIB.items():
        settings = {"config": SMALL_GPT2, "loralib": how}
        golden = name == "nested"
        row = "loralib .pt, read and written"
        found.append(Case(row, f"loralib-{name}", settings, 1e-5, golden=golden))
    return found


inputs = adapters.inputs


def reference_writes(case: Case, arrays: dict, folder: Path) -> dict[str, np.ndarray]:
    import torch

    if "loralib" in case.settings:
        return loralib_writes(case, arrays, folder)
    adapters.peft_writes(case, arrays, folder)
    model = load_peft(folder).merge_and_unload()
    with torch.no_grad():
        logits = model(torch.from_numpy(arrays["ids"]).long()).logits.numpy()
    found = {"logits of the merged folder": logits}
    if case.settings["gguf"]:
        found["logits of the F32 GGUF file"] = logits
    return found


def load_peft(folder: Path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder / "base", attn_implementation="eager")
    return PeftModel.from_pretrained(base, folder / "peft").eval()


def loralib_model(base):
    """transformers' GPT-2 with loralib's layer in place of c_attn, as in microsoft/LoRA."""
    import loralib

    for block in base.transformer.h:
        old = block.attn.c_attn
        new = loralib.MergedLinear(
            *old.weight.shape, r=R, lora_alpha=ALPHA, enable_lora=QV, fan_in_fan_out=True
        )
        new.weight.data, new.bias.data = old.weight.data, old.bias.data
        block.attn.c_attn = new
    return base


def loralib_writes(case: Case, arrays: dict, folder: Path) -> dict[str, np.ndarray]:
    import loralib
    import torch

    how, seed = case.settings["loralib"], int(arrays["seed"][0])
    base = make_model(case.settings["config"], seed)
    base.save_pretrained(folder / "base")
    model = loralib_model(base)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            trained = "bias" in name and how["bias"] == "all"
            trained = trained or (name.endswith("c_attn.bias") and how["bias"] == "lora_only")
            if "lora_" in name or trained:
                parameter.add_(adapters.noise_scale(parameter) * torch.randn_like(parameter))
    state = loralib.lora_state_dict(model, bias=how["bias"])
    torch.save({"model_state_dict": state} if how["nested"] else state, folder / "lora.pt")
    return {"logits": torch_logits(model, arrays)}


def torch_logits(model, arrays: dict) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model.eval()(torch.from_numpy(arrays["ids"]).long()).logits.numpy()


def ours(case: Case, arrays: dict, folder: Path) -> dict[str, np.ndarray]:
    import jlora
    from jlora.system.runtime import jt

    base = jlora.load(folder / "base")
    if "loralib" in case.settings:
        model = jlora.PeftModel.from_loralib(base, folder / "lora.pt", ALPHA, QV)
        alpha = model.save_loralib(folder / "ours.pt", nested=case.settings["loralib"]["nested"])
        logits = model(jt.array(arrays["ids"])).numpy()
        return {"logits": logits, "logits of jlora's .pt file": logits, "alpha": np.array(alpha)}
    model = jlora.PeftModel.from_pretrained(base, folder / "peft")
    jlora.write_merged(model, folder / "merged")
    for kind in ("F32", "F16"):
        jlora.export_gguf(model, folder / f"{kind}.gguf", kind, tokenizer=False)
    logits = model(jt.array(arrays["ids"])).numpy()
    found = {"logits of the merged folder": logits}
    if case.settings["gguf"]:
        found["logits of the F32 GGUF file"] = logits
    for kind in ("F32", "F16"):
        found[f"unequal numbers in the {kind} GGUF file"] = np.array(0)
    return found


def reference_reads(case: Case, arrays: dict, folder: Path) -> dict[str, np.ndarray]:
    import torch
    from transformers import AutoModelForCausalLM

    eager = {"attn_implementation": "eager", "dtype": torch.float32}
    if "loralib" in case.settings:
        base = AutoModelForCausalLM.from_pretrained(folder / "base", **eager)
        model = loralib_model(base)
        state = torch.load(folder / "ours.pt", weights_only=True)
        state = state["model_state_dict"] if case.settings["loralib"]["nested"] else state
        unexpected = model.load_state_dict(state, strict=False).unexpected_keys
        if unexpected:
            raise ValueError(f"loralib does not know {unexpected}")
        return {"logits of jlora's .pt file": torch_logits(model, arrays), "alpha": np.array(ALPHA)}
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged", **eager)
    found = {"logits of the merged folder": torch_logits(merged, arrays)}
    if case.settings["gguf"]:
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file="F32.gguf", **eager)
        found["logits of the F32 GGUF file"] = torch_logits(model, arrays)
    for kind in ("F32", "F16"):
        unequal = count_unequal(case.settings["config"], folder, kind)
        found[f"unequal numbers in the {kind} GGUF file"] = np.array(unequal)
    return found


def count_unequal(config: dict, folder: Path, kind: str) -> int:
    """How many numbers of a GGUF file differ from the merged folder's, rounded to ``kind``."""
    from gguf import MODEL_ARCH, GGUFReader, get_tensor_name_map
    from gguf.quants import dequantize
    from safetensors.numpy import load_file

    reader = GGUFReader(folder / f"{kind}.gguf")
    stored = {
        t.name: dequantize(t.data, t.tensor_type).reshape(t.shape[::-1]) for t in reader.tensors
    }
    stored.pop("rope_freqs.weight", None)
    arch = {"gpt2": MODEL_ARCH.GPT2, "qwen2": MODEL_ARCH.QWEN2}.get(
        config["model_type"], MODEL_ARCH.LLAMA
    )
    names = get_tensor_name_map(arch, 3)
    heads = {
        "q_proj": config.get("num_attention_heads"),
        "k_proj": config.get("num_key_value_heads"),
    }
    unequal = 0
    for name, array in load_file(folder / "merged" / "model.safetensors").items():
        end = "weight" if name.endswith("weight") else "bias"
        found = stored.pop(f"{names.get_name(name.removesuffix(f'.{end}'))}.{end}")
        projection = next((heads[part] for part in heads if part in name), None)
        if arch == MODEL_ARCH.LLAMA and projection:  # rows in rotary pairs -> two halves
            pairs = found.reshape(projection, -1, 2, *found.shape[1:])
            found = pairs.swapaxes(1, 2).reshape(found.shape)
        if arch == MODEL_ARCH.GPT2 and array.ndim == 2 and ".c_" in name:
            found = found.T
        if kind == "F16" and array.ndim == 2 and "wpe" not in name:
            array = array.astype(np.float16)
        unequal += int((found.astype(np.float32) != array.astype(np.float32)).sum())
    return unequal + sum(array.size for array in stored.values())


STAGES = [("reference", reference_writes), ("jlora", ours), ("reference", reference_reads)]
