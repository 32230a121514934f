"""Adapters compared with PEFT in both directions: same logits, same gradients, no key lost.

1. PEFT adds an adapter with random numbers to a random model and writes its folder.
2. jlora loads that folder, computes, and writes it to a new folder; it also makes another adapter
   with `get_peft_model` and the same settings, and writes it.
3. PEFT loads both folders, without a warning about keys, and computes.
"""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from parity.case import Case
from parity.models import GPT2, LLAMA, make_model

SHAPE = {"n_embd": 16, "n_layer": 3, "n_head": 4, "vocab_size": 61}
SMALL_GPT2 = {**GPT2, **SHAPE}
SMALL_LLAMA = {**LLAMA, "hidden_size": 24, "intermediate_size": 36, "vocab_size": 61}
REAL_GPT2 = {**GPT2, "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12}
REAL_GPT2 = {**REAL_GPT2, "n_head": 12}
QV = [True, False, True]

GPT2_VARIANTS = {
    "c_attn": {"target_modules": ["c_attn"]},
    "c_proj-twice-a-block": {"target_modules": ["c_attn", "c_proj"]},
    # PEFT's equivalent of MergedLinear(r=3) on query and value; jlora reads it as a MergedLinear.
    "merged-query-value": {"target_modules": ["c_attn"], "r": 6, "blocks": QV},
    "merged-key": {"target_modules": ["c_attn"], "r": 3, "blocks": [False, True, False]},
    "merged-rslora": {"target_modules": ["c_attn"], "r": 6, "blocks": QV, "use_rslora": True},
    "rank-and-alpha-pattern": {
        "target_modules": ["c_attn", "c_fc"],
        "rank_pattern": {"c_fc": 2, "h.1.attn.c_attn": 5},
        "alpha_pattern": {"h.0.mlp.c_fc": 7},
    },
    "rslora": {"target_modules": ["c_attn"], "use_rslora": True},
    "bias-all": {"target_modules": ["c_attn"], "bias": "all"},
    "bias-lora-only": {"target_modules": ["c_attn"], "bias": "lora_only"},
    "modules-to-save": {"target_modules": ["c_attn"], "modules_to_save": ["wpe", "ln_f"]},
    "modules-to-save-tied": {"target_modules": ["c_attn"], "modules_to_save": ["wte"]},
    "layers-to-transform": {"target_modules": ["c_attn"], "layers_to_transform": [0, 2]},
    "one-layer-by-pattern": {
        "target_modules": ["c_attn"], "layers_to_transform": 1, "layers_pattern": "h",
    },
    "expression": {"target_modules": r".*\.[02]\.mlp\.c_(fc|proj)"},
    "all-linear": {"target_modules": "all-linear"},
    "exclude": {"target_modules": ["c_attn", "c_proj"], "exclude_modules": ["mlp.c_proj"]},
    "embedding": {"target_modules": ["wpe", "c_attn"]},
    "embedding-tied": {"target_modules": ["wte"]},
    "dora": {"target_modules": ["c_attn", "c_proj"], "use_dora": True},
    "lora-bias": {"target_modules": ["c_attn", "c_proj"], "lora_bias": True},
    "dora-blocks": {"target_modules": ["c_attn"], "r": 6, "blocks": QV, "use_dora": True},
    "dora-embedding": {"target_modules": ["wpe", "c_fc"], "use_dora": True, "use_rslora": True},
}  # fmt: skip
LLAMA_VARIANTS = {
    "query-value": {"target_modules": ["q_proj", "v_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "all-linear-tied": {"target_modules": "all-linear", "tie": True},
    "modules-to-save": {"target_modules": ["k_proj"], "modules_to_save": ["lm_head", "norm"]},
    "embedding": {"target_modules": ["embed_tokens", "o_proj"]},
    "biases-of-qwen2": {"target_modules": ["q_proj"], "bias": "all", "model_type": "qwen2"},
    "patterns": {
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 1, "down_proj": 6},
        "alpha_pattern": {"down_proj": 3.5},
    },
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 7, 60]},
    "tokens-of-both": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [3], "lm_head": [5, 2]},
    },
    "tokens-tied": {
        "target_modules": "all-linear", "trainable_token_indices": [3, 7], "tie": True,
    },
    "lora-bias": {"target_modules": ["q_proj", "down_proj"], "lora_bias": True},
    "dora": {"target_modules": "all-linear", "use_dora": True},
    "dora-patterns": {
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"down_proj": 6},
        "alpha_pattern": {"q_proj": 3.5},
        "use_dora": True,
        "use_rslora": True,
        "modules_to_save": ["norm"],
    },
    "dora-biases": {
        "target_modules": ["q_proj"], "bias": "lora_only", "model_type": "qwen2", "use_dora": True,
    },
}  # fmt: skip
SHARED = ("gpt2_c_attn_c_proj", "gpt2_flag_false", "gpt2_sequence_classifier")
#: Changes to a base model, to which the adapter then does not belong.
WRONG = {
    "weights": {},
    "shapes": {"n_embd": 24},
    "family": None,  # Llama
}
#: Keys of a variant's settings that are not PEFT's.
OWN = ("blocks", "tie", "model_type")


def cases(seed: int) -> list[Case]:
    found = []
    for family, base, variants in (
        ("gpt2", SMALL_GPT2, GPT2_VARIANTS),
        ("llama", SMALL_LLAMA, LLAMA_VARIANTS),
    ):
        for name, variant in variants.items():
            config = {**base, "tie_word_embeddings": family == "gpt2" or bool(variant.get("tie"))}
            config["model_type"] = variant.get("model_type", family)
            row = (
                f"{'GPT-2' if family == 'gpt2' else 'Llama family'} with PEFT's settings, both ways"
            )
            if "blocks" in variant:
                row = "MergedLinear <-> PEFT, both ways"
            if variant.get("use_dora"):
                row = "DoRA with PEFT's settings, both ways"
            golden = name in (
                *("merged-query-value", "rank-and-alpha-pattern", "bias-lora-only"),
                *("dora-embedding", "dora-patterns", "tokens-tied"),
            )
            settings = {"config": config, "peft": variant}
            found.append(Case(row, f"{family}-{name}", settings, 1e-4, golden=golden))
    settings = {"config": REAL_GPT2, "peft": {"target_modules": ["c_attn"], "r": 4}}
    found.append(Case("GPT-2 small, real shape, with gradients", "gpt2-small", settings, 1e-4))
    for name in WRONG:
        settings = {"config": SMALL_GPT2, "peft": {"target_modules": ["c_attn"]}, "wrong": name}
        row = "adapters on a base not their own: refused"
        found.append(Case(row, f"wrong-{name}", settings, relative_to="exact"))
    for name in SHARED if shared_adapters() else ():
        settings = {"config": REAL_GPT2, "folder": name}
        found.append(Case("adapters that people trained with PEFT", name, settings, 1e-4))
    return found


def shared_adapters() -> Path | None:
    """The folder of adapters trained by other people, if this machine has it."""
    places = [Path(__file__).resolve().parents[2] / "shared" / "data"]
    if os.environ.get("JLORA_DATA"):
        places.insert(0, Path(os.environ["JLORA_DATA"]))
    return next((p / "adapters" for p in places if (p / "adapters").is_dir()), None)


def inputs(case: Case, rng: np.random.Generator) -> dict[str, np.ndarray]:
    vocabulary = case.settings["config"]["vocab_size"]
    ids = rng.integers(0, vocabulary, (3, 11)).astype(np.int32)
    return {"ids": ids, "seed": rng.integers(0, 2**31, 1)}


# The reference -----------------------------------------------------------------------------------


def peft_writes(case: Case, arrays: dict[str, np.ndarray], folder: Path) -> dict[str, np.ndarray]:
    import torch
    from peft import LoraConfig, get_peft_model

    seed = int(arrays["seed"][0])
    base = make_model(case.settings["config"], seed)
    base.save_pretrained(folder / "base")
    if "wrong" in case.settings:
        changes = WRONG[case.settings["wrong"]]
        other = SMALL_LLAMA if changes is None else {**SMALL_GPT2, **changes}
        make_model(other, seed + 1).save_pretrained(folder / "other")
        expected = {"refused by name": 1, "loaded by force": 1, "keys of no module refused": 1}
        if changes != {}:  # the model has no such modules
            expected["loaded by force"] = 0
        return {name: np.array(value) for name, value in expected.items()}
    if "folder" in case.settings:
        return {"logits": peft_logits(folder, shared_adapters() / case.settings["folder"], arrays)}
    torch.manual_seed(seed)
    variant = case.settings["peft"]
    settings = {key: value for key, value in variant.items() if key not in OWN}
    transposed = case.settings["config"]["model_type"] == "gpt2" and "wte" not in str(settings)
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 9, "task_type": "CAUSAL_LM", **settings}, fan_in_fan_out=transposed
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's warnings about fan_in_fan_out and tied embeddings
        model = get_peft_model(base, config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(noise_scale(parameter) * torch.randn_like(parameter))
            if "lora_B" in name and "blocks" in variant:
                parameter.mul_(torch.from_numpy(block_mask(parameter.shape, variant["blocks"])))
    model.save_pretrained(folder / "peft")
    logits, gradients = torch_results(model, arrays["ids"])
    if "trainable_token_indices" in variant:  # which jlora reads, and does not train
        return {"logits": logits, "logits merged": logits}
    found = {"logits": logits, "gradient norm": np.array(0.0)}
    for name, gradient in gradients.items():
        if "lora_B" in name and "blocks" in variant:
            gradient = gradient * block_mask(gradient.shape, variant["blocks"])
        found[f"gradient of {plain_key(name)}"] = gradient
    found["gradient norm"] = norm(found)
    adapted = sum("lora_A" in name for name, _ in model.named_parameters())
    found["fused layers"] = np.array(adapted if "blocks" in variant else 0)
    return found


def noise_scale(values) -> float:
    """The size of random numbers for which adapter and model both affect the result."""
    return 0.3 / np.prod(values.shape[1:]) ** 0.25


def torch_results(model, ids: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits, and the gradients of the mean cross-entropy of the next tokens."""
    import torch

    tokens = torch.from_numpy(ids).long()
    logits = model(tokens).logits
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1)
    )
    wanted = {n: p for n, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    # No gradient: the bias of a module of which a copy is trained.
    named = {n: g.numpy() for n, g in zip(wanted, gradients) if g is not None}
    return logits.detach().numpy(), named


def block_mask(shape, blocks: list[bool]) -> np.ndarray:
    """1 where PEFT's B (out, r * enabled) may be non-zero when it represents blocks."""
    out, columns = len(blocks), sum(blocks)
    mask = np.zeros((out, columns), np.float32)
    mask[np.flatnonzero(blocks), np.arange(columns)] = 1
    return np.kron(mask, np.ones((shape[0] // out, shape[1] // columns), np.float32))


def plain_key(name: str) -> str:
    """A parameter's key in a file, from its name in PEFT's model."""
    key = re.sub(r"\.(default|modules_to_save\.default|base_layer)(?=\.|$)", "", name)
    return key.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")


def norm(found: dict[str, np.ndarray]) -> np.ndarray:
    """The norm of all gradients together."""
    parts = [np.sum(a.astype(np.float64) ** 2) for n, a in found.items() if "gradient of" in n]
    return np.sqrt(np.sum(parts))


def peft_reads(case: Case, arrays: dict[str, np.ndarray], folder: Path) -> dict[str, np.ndarray]:
    if "wrong" in case.settings:
        return {}
    if "folder" in case.settings:
        return {"logits of jlora's folder": peft_logits(folder, folder / "ours", arrays)}
    if "trainable_token_indices" in case.settings["peft"]:
        return {"logits of jlora's folder": peft_logits(folder, folder / "ours", arrays)}
    return {
        "logits of jlora's folder": peft_logits(folder, folder / "ours", arrays),
        "logits of a new jlora adapter": peft_logits(folder, folder / "new", arrays),
    }


def peft_logits(folder: Path, adapter: Path, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Logits (B, T, V) of ``folder``/base with an adapter; a lost key raises an error."""
    import torch
    from peft import PeftConfig, PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    classifier = PeftConfig.from_pretrained(adapter).task_type == "SEQ_CLS"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kind, settings = AutoModelForCausalLM, {"attn_implementation": "eager"}
        if classifier:
            tensors = load_file(adapter / "adapter_model.safetensors")
            settings["num_labels"] = len(tensors.get("base_model.model.score.weight", "ab"))
            kind = AutoModelForSequenceClassification
        base = kind.from_pretrained(folder / "base", **settings)
        model = PeftModel.from_pretrained(base, adapter).eval()
    lost = [str(w.message) for w in caught if re.search("missing|unexpected", str(w.message))]
    if lost:
        raise ValueError(f"{adapter}: {lost[0]}")
    tokens = torch.from_numpy(arrays["ids"]).long()
    with torch.no_grad():
        if not classifier:
            return model(tokens).logits.numpy()
        # The classifier's backbone with a language model's logits, which is what jlora loads.
        backbone = model.base_model.model.transformer
        return (backbone(tokens).last_hidden_state @ backbone.wte.weight.T).numpy()


# jlora -------------------------------------------------------------------------------------------


def ours(case: Case, arrays: dict[str, np.ndarray], folder: Path) -> dict[str, np.ndarray]:
    from jlora import LoraConfig, PeftModel, get_peft_model, load
    from jlora.layers import MergedLinear
    from jlora.system.runtime import jt

    if "wrong" in case.settings:
        return refusals(folder)
    ids = jt.array(arrays["ids"])
    theirs = shared_adapters() / case.settings["folder"] if "folder" in case.settings else None
    tokens = "trainable_token_indices" in case.settings.get("peft", ())
    model = PeftModel.from_pretrained(
        load(folder / "base"), theirs or folder / "peft", is_trainable=not tokens
    )
    model.eval()
    model.save_pretrained(folder / "ours")
    with jt.no_grad():
        logits = model(ids).numpy()
    found = {"logits": logits, "logits of jlora's folder": logits}
    if theirs:
        return found
    if tokens:
        return {**found, "logits merged": model.merge_and_unload(quiet=True)(ids).numpy()}
    gradients = jlora_gradients(model, arrays["ids"])
    found.update({f"gradient of {name}": array for name, array in gradients.items()})
    found["gradient norm"] = norm(found)
    layers = model.lora_layers().values()
    found["fused layers"] = np.array(sum(isinstance(x, MergedLinear) for x in layers))

    variant = {k: v for k, v in case.settings["peft"].items() if k not in OWN}
    settings = {"r": 4, "lora_alpha": 9, **variant, "task_type": "CAUSAL_LM"}
    if "blocks" in case.settings["peft"]:
        settings["enable_lora"] = case.settings["peft"]["blocks"]
    fresh = get_peft_model(load(folder / "base"), LoraConfig(**settings))
    rng = np.random.default_rng(arrays["seed"])
    fresh.set_adapter_tensors(
        {
            name: array + noise_scale(array) * rng.standard_normal(array.shape).astype("f")
            for name, array in fresh.adapter_tensors().items()
        }
    )
    fresh.save_pretrained(folder / "new")
    with jt.no_grad():
        found["logits of a new jlora adapter"] = fresh(ids).numpy()
    return found


def refusals(folder: Path) -> dict[str, np.ndarray]:
    """Which wrong ways to load an adapter raise an error that names both models."""
    from jlora import LoraConfig, PeftModel, UserError, get_peft_model, load

    config = LoraConfig(target_modules=["c_attn"], r=2)
    get_peft_model(load(folder / "base"), config).save_pretrained(folder / "new")

    def message(base: str, **settings) -> str:
        try:
            PeftModel.from_pretrained(load(folder / base), folder / "new", **settings)
        except UserError as error:
            return str(error)
        return ""

    refused, forced = message("other"), message("other", force=True)
    named = str(folder / "base") in refused and str(folder / "other") in refused
    tensors = load_file(folder / "new" / "adapter_model.safetensors")
    renamed = {name.replace(".h.", ".blocks."): array for name, array in tensors.items()}
    save_file(renamed, folder / "new" / "adapter_model.safetensors")
    found = {
        "refused by name": named,
        "loaded by force": not forced,
        "keys of no module refused": "fits no module" in message("base"),
    }
    return {name: np.array(int(value)) for name, value in found.items()}


def jlora_gradients(model, ids: np.ndarray) -> dict[str, np.ndarray]:
    """The gradients by PEFT's keys, in PEFT's shapes."""
    from jlora.adapters import storage
    from jlora.layers import MergedLinear
    from jlora.system.runtime import jt

    model.train()
    hidden = model.hidden_states(jt.array(ids))[:, :-1]  # (B, T - 1, C)
    targets = jt.array(np.ascontiguousarray(ids[:, 1:]).reshape(-1))
    loss = model.target_losses(hidden.reshape(-1, hidden.shape[-1]), targets).mean()
    named = dict(model.trainable_parameters())
    modules = dict(model.base_model.named_modules())
    found = {}
    for (name, _), gradient in zip(named.items(), jt.grad(loss, list(named.values()))):
        owner, array = modules[name.rpartition(".")[0]], gradient.numpy()
        if isinstance(owner, MergedLinear) and name.endswith("lora_B"):
            array = storage.block_matrix(array, owner.enable_lora, owner.r)
        key = storage.to_peft_key(name, owner).replace(".base_layer.", ".")
        found[key.removesuffix(".weight") if "lora_" in key and "embedding" in key else key] = array
    return found


STAGES = [("reference", peft_writes), ("jlora", ours), ("reference", peft_reads)]
