"""Writes tests/fixtures/peft_configs.json and peft_behaviour.json, with PEFT.

    .venv-parity/bin/python tests/make_peft_configs.py

Needs an environment with torch, transformers and PEFT 0.21 (`make parity` makes one) and a package
index. Of every minor version of PEFT the last release is installed alone into a temporary folder,
over that environment's torch and transformers, and writes one and the same configuration:
peft_configs.json. PEFT 0.21 then answers the questions below, which jlora is tested against:
peft_behaviour.json. The test reads this file's tables, so nothing here imports torch at the top.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

FIXTURES = Path(__file__).parent / "fixtures"

VERSIONS = (
    "0.4.0", "0.5.0", "0.6.2", "0.7.1", "0.8.2", "0.9.0", "0.10.0", "0.11.1", "0.12.0", "0.13.2",
    "0.14.0", "0.15.2", "0.16.0", "0.17.1", "0.18.1", "0.19.1", "0.20.0", "0.21.2",
)  # fmt: skip

SETTINGS = {
    "r": 8, "lora_alpha": 16, "target_modules": ["c_attn"], "lora_dropout": 0.05, "bias": "none",
    "task_type": "CAUSAL_LM", "fan_in_fan_out": True,
}  # fmt: skip

# A value other than the usual one, for every field that jlora's LoraConfig lacks.
ON_VALUES = {
    "alora_invocation_tokens": [3, 4],
    "arrow_config": {"top_k": 2, "router_temperature": 1.0, "use_gks": False},
    "auto_mapping": {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers"},
    "corda_config": {"corda_method": "ipm"},
    "ensure_weight_tying": True,
    "eva_config": {"rho": 2.0, "tau": 0.99},
    "inference_mode": True,
    "kasa_config": {"beta": 0.1},
    "layer_replication": [[0, 2], [1, 2]],
    "loftq_config": {"loftq_bits": 4, "loftq_iter": 1},
    "lora_ga_config": {"direction": "ArB2r"},
    "megatron_config": {"num_layers": 2},
    "megatron_core": "my.megatron",
    "monteclora_config": {"num_samples": 4},
    "peft_version": "0.99.0",
    "qalora_group_size": 8,
    "revision": "main",
    "target_parameters": ["mlp.gate_proj.weight"],
    "use_bdlora": {"target_modules_bd_b": ["q_proj", "v_proj"], "nblocks": 2},
    "use_qalora": True,
    "velora_config": {"num_groups": 4},
}

INITS = (
    True, False, "gaussian", "eva", "olora", "pissa", "pissa_niter_4", "corda", "loftq",
    "orthogonal", "lora_ga", "mica",
)  # fmt: skip

# (settings, module name): does LoRA go on it?
_H = "transformer.h.1.attn.c_attn"
_L = "model.layers.11.self_attn.q_proj"
TARGETS = [
    ({"target_modules": targets}, name)
    for targets, name in (
        (["c_attn"], _H), (["attn"], _H), (["attn.c_attn"], _H), (["c_att"], _H), ([_H], _H),
        (["1.attn.c_attn"], "transformer.h.11.attn.c_attn"), (["c_attn"], "c_attn"),
        (["c_attn"], "xc_attn"), (["c.attn"], _H), (["q_proj"], _L), (["self_attn"], _L),
        ("c_attn", _H), (".*c_attn", _H), (r".*\.h\.1\..*attn", _H), ("transformer", _H),
        (r".*(q|v)_proj", _L), (r"(.*\.)?q_proj|v_proj", _L), (r"v_proj|(.*\.)?q_proj", _L),
        (r".*\.layers\.1\..*", _L), (".*Q_PROJ", _L), (r"^model\.layers\.\d+\.self_attn.*$", _L),
    )
] + [
    ({"target_modules": ["c_attn"], **more}, name)
    for more, name in (
        ({"exclude_modules": ["c_attn"]}, _H), ({"exclude_modules": ["attn"]}, _H),
        ({"exclude_modules": [_H]}, _H), ({"exclude_modules": r".*\.h\.1\..*"}, _H),
        ({"exclude_modules": r"h\.1"}, _H), ({"exclude_modules": []}, _H),
        ({"exclude_modules": ""}, _H), ({"modules_to_save": ["attn"]}, _H),
        ({"modules_to_save": ["h.1"]}, _H), ({"modules_to_save": ["h.1"]}, "t.h.11.c_attn"),
        ({"modules_to_save": ["att"]}, _H), ({"modules_to_save": []}, _H),
        ({"modules_to_save": ["h.."]}, _H), ({"modules_to_save": ["c_attn", "score"]}, "c_attn"),
        ({"layers_to_transform": 1}, _H), ({"layers_to_transform": 0}, _H),
        ({"layers_to_transform": [0, 1]}, _H), ({"layers_to_transform": [0, 2]}, _H),
        ({"layers_to_transform": []}, _H), ({"layers_to_transform": [1]}, "h.1.attn.c_attn"),
        ({"layers_to_transform": [1]}, "c_attn"), ({"layers_to_transform": [9]}, "c_attn"),
        ({"layers_to_transform": [1]}, "t.h.1.c_attn"),
        ({"layers_to_transform": [1]}, "t.1.c_attn"),
        ({"layers_to_transform": [1]}, "t.h.0.e.1.c_attn"),
        ({"layers_to_transform": [0]}, "t.h.0.e.1.c_attn"),
        ({"layers_to_transform": [1], "layers_pattern": "e"}, "t.h.0.e.1.c_attn"),
        ({"layers_to_transform": [0], "layers_pattern": "e"}, "t.h.0.e.1.c_attn"),
        ({"layers_to_transform": [1], "layers_pattern": "h"}, "h.1.attn.c_attn"),
        ({"layers_to_transform": [1], "layers_pattern": ["x", "h"]}, _H),
        ({"layers_to_transform": [1], "layers_pattern": ["x"]}, _H),
        ({"layers_to_transform": [1], "layers_pattern": []}, _H),
        ({"layers_to_transform": [1], "layers_pattern": ""}, _H),
        ({"layers_to_transform": [1], "layers_pattern": "transformer.h"}, _H),
        ({"layers_to_transform": [1], "layers_pattern": "(g|h)"}, _H),
        ({"layers_to_transform": [1], "layers_pattern": "g|h"}, _H),
        ({"layers_to_transform": [1], "layers_pattern": "transformer|h"}, _H),
    )
]  # fmt: skip

# (rank_pattern or alpha_pattern, module name): which value? The default is 0.
PATTERNS = [
    ({"c_attn": 1}, _H), ({"attn": 1}, _H), ({"attn.c_attn": 1}, _H), ({_H: 1}, _H),
    ({"^" + _H: 1}, _H), ({"^c_attn": 1}, _H), ({"^attn.c_attn": 1}, _H), ({"c_att": 1}, _H),
    ({r"h\.1\..*": 1}, _H), ({r"h\.1": 1}, _H), ({r"h\.1\.": 1}, _H), ({"c_attn$": 1}, _H),
    ({r".*\.h\.(0|1)\.attn\.c_attn": 1}, _H), ({"q|c_attn": 1}, _H), ({"c_attn|q": 1}, _H),
    ({"attn|c_attn": 1}, _H), ({"c_attn": 1, "attn.c_attn": 2}, _H),
    ({"attn.c_attn": 2, "c_attn": 1}, _H), ({"x": 1, "c_attn": 2}, _H), ({"": 1}, _H),
    ({".*": 1}, _H), ({"transformer": 1}, _H), ({"C_ATTN": 1}, _H), ({}, _H),
    ({"attnXc_attn": 1, "attn.c_attn": 2}, _H), ({"1.attn.c_attn": 1}, "t.h.11.attn.c_attn"),
    ({r"(?i:C_ATTN)": 1}, "c_attn"), ({"c_attn": 1}, "c_attn"), ({"c_attn": 1}, "xc_attn"),
    ({r"layers\.(1|2)\..*q_proj": 1}, _L), ({r"layers\.1\d\..*q_proj": 1}, _L),
    ({"^model.layers.1.*.q_proj$": 1}, _L), ({r"\w+_proj": 1}, _L), ({"self_attn": 1}, _L),
]  # fmt: skip

GPT2 = {"vocab_size": 23, "n_positions": 32, "n_embd": 12, "n_layer": 2, "n_head": 3}
LLAMA = {
    "vocab_size": 23, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 2,
    "tie_word_embeddings": False,
}  # fmt: skip

# (family, settings): which modules get LoRA, with which rank and scaling, and which train whole?
MODELS = [
    ("gpt2", {"target_modules": ["c_attn"]}),
    ("gpt2", {"target_modules": ["c_proj"], "r": 4}),
    ("gpt2", {"target_modules": ["transformer.h.1.attn.c_attn", "h.0.mlp.c_fc"]}),
    ("gpt2", {"target_modules": r".*\.h\.1\.(attn|mlp)\.c_.*"}),
    ("gpt2", {"target_modules": "all-linear"}),
    ("gpt2", {"target_modules": "All-Linear", "exclude_modules": ["mlp.c_proj"]}),
    ("gpt2", {"target_modules": ["c_attn"], "layers_to_transform": 1}),
    ("gpt2", {"target_modules": ["c_attn"], "layers_to_transform": [0], "layers_pattern": "h"}),
    ("gpt2", {"target_modules": ["c_attn", "wte"], "lora_alpha": 12.5}),
    ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": []}),
    ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["wpe", "ln_f"]}),
    ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["mlp"]}),
    ("gpt2", {"target_modules": ["c_attn", "c_proj"], "modules_to_save": ["mlp"]}),
    (
        "gpt2",
        {
            "target_modules": ["c_attn", "c_proj"],
            "rank_pattern": {"^transformer.h.0.attn.c_attn": 2, "mlp.c_proj": 3},
            "alpha_pattern": {r"h\.1\..*": 5, "c_attn": 1.5},
            "use_rslora": True,
        },
    ),
    ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    ("llama", {"target_modules": "all-linear", "exclude_modules": r".*\.mlp\..*"}),
    ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
    ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
    ("llama", {"target_modules": "all-linear", "modules_to_save": ["lm_head", "mlp"]}),
]


def main() -> None:
    FIXTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        configs = {version: config_of(version, Path(folder)) for version in VERSIONS}
    write(FIXTURES / "peft_configs.json", configs)
    write(
        FIXTURES / "peft_behaviour.json",
        {
            "targets": [is_target(settings, name) for settings, name in TARGETS],
            "patterns": [pattern_value(patterns, name) for patterns, name in PATTERNS],
            "models": [modules_of(family, settings) for family, settings in MODELS],
            "fields": {name: loads({name: value}) for name, value in ON_VALUES.items()},
            "inits": {str(init): loads_with_init(init) for init in INITS},
        },
    )


def write(path: Path, values: dict) -> None:
    """One line a first-level entry: small, and a change shows in a diff."""
    lines = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in values.items())
    path.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


# Versions ----------------------------------------------------------------------------------------

_WRITE_CONFIG = """
import json, sys
from transformers.utils.import_utils import _LazyModule
_LazyModule.HybridCache = type("HybridCache", (), {})  # PEFT 0.16 and 0.17 import it by name
import peft
assert peft.__version__ == sys.argv[1], peft.__file__
peft.LoraConfig(**json.loads(sys.argv[2])).save_pretrained(sys.argv[3])
"""


def config_of(version: str, folder: Path) -> dict:
    """What a version of PEFT writes for `SETTINGS`."""
    packages, out = folder / version, folder / f"{version}-config"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--target", packages, f"peft=={version}"], check=True)
    subprocess.run(
        [sys.executable, "-c", _WRITE_CONFIG, version, json.dumps(SETTINGS), out],
        check=True,
        env={"PYTHONPATH": str(packages)},
    )
    return json.loads((out / "adapter_config.json").read_text())


# Questions to PEFT -------------------------------------------------------------------------------


def is_target(settings: dict, name: str) -> bool:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    return bool(check_target_module_exists(LoraConfig(**settings), name))


def pattern_value(patterns: dict[str, int], name: str) -> int:
    from peft.utils.other import get_pattern_key

    return patterns.get(get_pattern_key(patterns.keys(), name), 0)


def model(family: str):
    """A small transformers model, the same at each call."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(**GPT2)).eval()
    return LlamaForCausalLM(LlamaConfig(**LLAMA)).eval()


def modules_of(family: str, settings: dict) -> dict:
    """{"lora": {name: [r, scaling]}, "saved": names} of a model with an adapter."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper

    whole = get_peft_model(model(family), LoraConfig(**settings)).base_model.model
    lora, saved = {}, []
    for name, module in whole.named_modules():
        if isinstance(module, LoraLayer):
            lora[name] = [module.r["default"], module.scaling["default"]]
        elif isinstance(module, ModulesToSaveWrapper):
            saved.append(name)
    return {"lora": lora, "saved": sorted(saved)}


def loads(changes: dict) -> str:
    """Load a trained plain adapter whose file says ``changes`` as well.

    Returns:
        "same": the model computes what it computes without them; "differs"; or "fails".
    """
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from safetensors.torch import load_file, save_file

    ids = torch.arange(1, 13).reshape(2, 6)
    plain = get_peft_model(
        model("llama"), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        plain.save_pretrained(folder)
        weights = Path(folder) / "adapter_model.safetensors"
        trained = {name: 0.3 * torch.randn(x.shape) for name, x in load_file(weights).items()}
        save_file(trained, weights, metadata={"format": "pt"})
        expected = PeftModel.from_pretrained(model("llama"), folder)(ids).logits
        config = Path(folder) / "adapter_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
        try:
            found = PeftModel.from_pretrained(model("llama"), folder)(ids).logits
        except Exception as error:
            print(f"{changes}: {type(error).__name__}: {str(error)[:100]}")
            return "fails"
    return "same" if torch.allclose(found, expected, rtol=1e-5, atol=1e-6) else "differs"


def loads_with_init(init: bool | str) -> str:
    more = {"loftq_config": ON_VALUES["loftq_config"]} if init == "loftq" else {}
    return loads({"init_lora_weights": init, **more})


if __name__ == "__main__":
    main()
