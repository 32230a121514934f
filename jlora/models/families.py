"""The model families: one entry for each, with all that is particular to it beside its model file.

`hub`, GGUF files, the fused blocks, the native decoder, the memory estimate, default LoRA targets
and BitFit read it here, or from a model as ``model.family``. To add a family see docs/adding.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jlora.formats import gguf_architectures as gguf
from jlora.formats.gguf_architecture import Architecture
from jlora.models import gemma, glm, gpt2, internlm, llama, olmo2, phi3, qwen3, smollm3
from jlora.models.parts import Parts
from jlora.system.plugins import load_plugin

GROUP = "jlora.families"  # of entry points


@dataclass(frozen=True)
class Family:
    """What there is to know of a family.

    Attributes:
        model_type: in config.json.
        config: class with ``from_dict`` and ``to_dict`` (config.json), the token ids, and for any
            family ``vocab_size, hidden_size, layers, heads, kv_heads, head_dim, inner, gated,
            norm_eps, max_positions``.
        model: `models.head.CausalLM` subclass; its parameters have Hugging Face's names.
        prefix: of the backbone's parameters, which checkpoints of the bare backbone leave out.
        embedding: name of the token embedding, which a tied head repeats.
        targets: modules that get LoRA where target_modules is not given: PEFT's choice, or where it
            has none the layers with queries and values.
        biases: switches in config.json that give linear layers biases, for BitFit on a model
            without any; empty: there are none.
        rename: name in an older checkpoint -> Hugging Face's.
        parts: for the block operator and the native decoder; None: models run layer by layer.
        gguf: how the family's models stand in GGUF files; None: they are not read or written.
    """

    model_type: str
    config: type[Any]
    model: type[Any]
    prefix: str
    embedding: str
    targets: tuple[str, ...]
    biases: tuple[str, ...] = ()
    rename: Callable[[str], str] = str
    parts: Parts | None = None
    gguf: Architecture | None = None


LLAMA_PARTS = llama.parts_of(llama.LlamaModel)


def _llama(config: type[Any], model: type[Any], **changes) -> Family:
    """A family of Llama's architecture, or of other choices of its parts."""
    usual = {
        "model_type": config.model_type,
        "prefix": "model.",
        "embedding": "model.embed_tokens.weight",
        "targets": ("q_proj", "v_proj"),
    }
    parts = LLAMA_PARTS
    if model.backbone is not llama.LlamaModel:
        parts = llama.parts_of(model.backbone)
    return Family(**{**usual, **changes}, config=config, model=model, parts=parts)


OWN = llama.LlamaConfig, llama.LlamaForCausalLM
BIASES = "attention_bias", "mlp_bias"
FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            "gpt2",
            config=gpt2.GPT2Config,
            model=gpt2.GPT2LMHeadModel,
            prefix="transformer.",
            embedding="transformer.wte.weight",
            targets=("c_attn",),
            rename=gpt2.hugging_face_name,
            parts=gpt2.PARTS,
            gguf=gguf.GPT2,
        ),
        _llama(*OWN, model_type="llama", gguf=gguf.LLAMA, biases=BIASES),
        _llama(*OWN, model_type="mistral", gguf=gguf.LLAMA),
        _llama(*OWN, model_type="qwen2", gguf=gguf.QWEN2),
        _llama(qwen3.Qwen3Config, qwen3.Qwen3ForCausalLM, gguf=gguf.QWEN3),
        _llama(
            smollm3.SmolLM3Config, smollm3.SmolLM3ForCausalLM,
            gguf=gguf.SMOLLM3, biases=BIASES,
        ),
        _llama(olmo2.Olmo2Config, olmo2.Olmo2ForCausalLM, gguf=gguf.OLMO2),
        _llama(gemma.Gemma2Config, gemma.Gemma2ForCausalLM, gguf=gguf.GEMMA2),
        _llama(gemma.Gemma3Config, gemma.Gemma3ForCausalLM, gguf=gguf.GEMMA3),
        _llama(phi3.Phi3Config, phi3.Phi3ForCausalLM, gguf=gguf.PHI3, targets=("qkv_proj",)),
        _llama(glm.GlmConfig, glm.GlmForCausalLM, gguf=gguf.GLM),
        _llama(glm.Glm4Config, glm.Glm4ForCausalLM, gguf=gguf.GLM4),
        _llama(
            internlm.InternLM2Config, internlm.InternLM2ForCausalLM,
            embedding="model.tok_embeddings.weight", targets=("wqkv",),
            gguf=gguf.INTERNLM2,
        ),
        _llama(
            internlm.InternLM3Config, internlm.InternLM3ForCausalLM,
            gguf=gguf.LLAMA, biases=BIASES,
        ),
    )
}  # fmt: skip


def register_family(family: Family) -> None:
    """Make a family known in this process, in the place of one with its model_type."""
    FAMILIES[family.model_type] = family


def find_family(model_type: str) -> Family | None:
    """The family of a ``model_type``, of this package or of another.

    In a package of its own an entry point of the group ``jlora.families`` makes a family known to
    every process: its name is the model_type, its object the `Family`.

    Raises:
        UserError: another package's family cannot be used.
    """
    if model_type not in FAMILIES:
        found = load_plugin(GROUP, model_type, Family)
        if found is not None:
            register_family(found)
    return FAMILIES.get(model_type)


def gguf_architectures() -> dict[str, Architecture]:
    """The architectures of GGUF files that some family reads, by their names."""
    return {f.gguf.name: f.gguf for f in FAMILIES.values() if f.gguf is not None}
