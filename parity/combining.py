"""Adapters combined by PEFT's ``add_weighted_adapter`` and by jlora, in memory and in files.

1. PEFT writes random adapters of a random model, combines them, and computes the logits.
2. jlora loads the same folders into one model and combines them there; it combines the folders
   without the model, too, and loads the result.
3. PEFT loads that result.

"linear" adds A and B each by itself, so that the order of PEFT's operations shows; of "svd" only
the change counts, whose factors are free.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np

from parity.adapters import SMALL_GPT2, SMALL_LLAMA, noise_scale, peft_logits
from parity.case import Case
from parity.models import make_model

LLAMA = {**SMALL_LLAMA, "tie_word_embeddings": False, "model_type": "llama"}
GPT2 = {**SMALL_GPT2, "tie_word_embeddings": True, "model_type": "gpt2"}
Q, QV = {"target_modules": ["q_proj"]}, {"target_modules": ["q_proj", "v_proj"]}
#: name: (config of the model, kind, weights, rank of svd, settings of each adapter)
CASES = {
    "linear": (LLAMA, "linear", [0.7, 0.3], None, [{**QV, "r": 4}, {**Q, "r": 4, "lora_alpha": 3}]),
    "linear-negative": (LLAMA, "linear", [1.0, -0.5], None, [{**QV, "r": 2}, {**QV, "r": 2}]),
    "cat": (LLAMA, "cat", [0.7, 0.3], None, [{**QV, "r": 4}, {**Q, "r": 2}]),
    "cat-of-three": (LLAMA, "cat", [1.0, -0.5, 0.2], None, [{**QV, "r": 2}, {**Q, "r": 3}, Q]),
    "svd": (LLAMA, "svd", [0.7, 0.3], None, [{**QV, "r": 4}, {**Q, "r": 2}]),
    "svd-of-rank-3": (GPT2, "svd", [1.5, -0.5], 3, [
        {"target_modules": ["c_attn", "wpe"], "r": 4}, {"target_modules": ["c_attn"], "r": 4},
    ]),
    "one": (GPT2, "svd", [-0.5], None, [{"target_modules": ["c_attn", "c_proj"], "r": 3}]),
    "patterns": (GPT2, "svd", [0.6, 0.6], 5, [
        {"target_modules": ["c_attn", "c_fc"], "r": 4, "alpha_pattern": {"c_fc": 7}},
        {"target_modules": ["c_fc"], "r": 2, "rank_pattern": {"h.1.mlp.c_fc": 5}},
    ]),
}  # fmt: skip


def cases(seed: int) -> list[Case]:
    golden = ("linear", "cat", "svd-of-rank-3")
    return [
        Case(
            "add_weighted_adapter and `jlora combine`",
            name,
            {"case": name, "config": config},
            1e-4,
            golden=name in golden,
        )
        for name, (config, *_) in CASES.items()
    ]


def inputs(case: Case, rng: np.random.Generator) -> dict[str, np.ndarray]:
    ids = rng.integers(0, case.settings["config"]["vocab_size"], (3, 11)).astype(np.int32)
    return {"ids": ids, "seed": rng.integers(0, 2**31, 1)}


def combined_by_peft(
    case: Case, arrays: dict[str, np.ndarray], folder: Path
) -> dict[str, np.ndarray]:
    import torch
    from peft import LoraConfig, get_peft_model

    seed = int(arrays["seed"][0])
    config, kind, weights, rank, adapters = CASES[case.settings["case"]]
    base = make_model(config, seed)
    base.save_pretrained(folder / "base")
    torch.manual_seed(seed)
    names = [f"a{number}" for number in range(len(adapters))]
    model = None
    for name, settings in zip(names, adapters):
        settings = {"r": 4, "lora_alpha": 9, "task_type": "CAUSAL_LM", **settings}
        lora = LoraConfig(**settings)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of fan_in_fan_out
            if model is None:
                model = get_peft_model(base, lora, adapter_name=name)
            else:
                model.add_adapter(name, lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(noise_scale(parameter) * torch.randn_like(parameter))
    model.save_pretrained(folder)  # each in a folder of its name
    model.add_weighted_adapter(names, weights, "sum", combination_type=kind, svd_rank=rank)
    model.set_adapter("sum")
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(arrays["ids"]).long()).logits.numpy()
    return {"logits": logits, "logits of the files": logits}


def combined_by_jlora(
    case: Case, arrays: dict[str, np.ndarray], folder: Path
) -> dict[str, np.ndarray]:
    from jlora import PeftModel, load
    from jlora.runs.combining import combine_files
    from jlora.system.runtime import jt

    ids = jt.array(arrays["ids"])
    _, kind, weights, rank, adapters = CASES[case.settings["case"]]
    names = [f"a{number}" for number in range(len(adapters))]
    model = PeftModel(load(folder / "base"))
    for name in names:
        model.load_adapter(folder / name, name)
    model.add_weighted_adapter(names, weights, "sum", kind, rank)
    model.set_adapter("sum")
    combine_files([folder / name for name in names], weights, folder / "sum", kind, rank)
    loaded = PeftModel.from_pretrained(load(folder / "base"), folder / "sum")
    with jt.no_grad():
        found = {"logits": model(ids).numpy(), "logits of the files": loaded(ids).numpy()}
    return {**found, "logits of the files in PEFT": found["logits of the files"]}


def peft_reads(case: Case, arrays: dict[str, np.ndarray], folder: Path) -> dict[str, np.ndarray]:
    assert json.loads((folder / "sum" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    return {"logits of the files in PEFT": peft_logits(folder, folder / "sum", arrays)}


STAGES = [
    ("reference", combined_by_peft),
    ("jlora", combined_by_jlora),
    ("reference", peft_reads),
]
