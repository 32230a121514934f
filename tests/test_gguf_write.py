"""GGUF files that jlora writes: the weights come back, tokenizer and settings too."""

from __future__ import annotations

import json

import numpy as np
import pytest
import spm
import tiny
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize, quantize
from tiny_models import ids_of, randomise_adapter, tiny_gpt2, tiny_llama, weights
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

import jlora
from jlora.adapters import LoraConfig, get_peft_model, merged_weights
from jlora.adapters.export_gguf import export_gguf
from jlora.cli import main
from jlora.data.pretokenizers import GGUF_PRE, byte_level_bpe
from jlora.data.tokenizer import Tokenizer
from jlora.formats.gguf_architecture import permute, unpermute
from jlora.formats.gguf_file import main_kind, read_gguf
from jlora.formats.gguf_kinds import MIXTURES, WRITTEN
from jlora.models.hub import build_model, load_weights
from jlora.system.errors import UserError
from jlora.system.runtime import jt

# Rows of 32 numbers, so that blocks fit, but for one matrix of the Llamas.
WIDE = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "head_dim": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
MODELS = {
    "gpt2": lambda: tiny_gpt2(n_embd=32, n_head=2),
    "llama": lambda: tiny_llama(**WIDE),
    "mistral": lambda: tiny_llama(**WIDE, model_type="mistral"),
    "tied, biases": lambda: tiny_llama(
        **WIDE, tie_word_embeddings=True, attention_bias=True, mlp_bias=True
    ),
    "linear": lambda: tiny_llama(**WIDE, rope_scaling={"rope_type": "linear", "factor": 4.0}),
    "llama3": lambda: tiny_llama(**{**WIDE, "rope_theta": 5e5}, rope_scaling=LLAMA3),
    "qwen2": lambda: tiny_llama(**WIDE, model_type="qwen2"),
}
TARGETS = {"gpt2": ["c_attn", "c_proj"]}


def adapted(kind: str):
    targets = TARGETS.get(kind, ["q_proj", "k_proj", "v_proj"])
    model = get_peft_model(MODELS[kind](), LoraConfig(r=2, target_modules=targets))
    return randomise_adapter(model)


def logits(model) -> np.ndarray:
    return model(jt.array(ids_of((2, 5)))).numpy()


@pytest.mark.parametrize("kind", MODELS)
def test_float32_comes_back_exactly(tmp_path, kind):
    model = adapted(kind)
    written = export_gguf(model, tmp_path / "m.gguf", "f32", tokenizer=False)
    assert written.loss is None and written.report.layers == len(model.lora_layers())
    merged = merged_weights(model).tensors
    found = read_gguf(tmp_path / "m.gguf")
    assert set(found.tensors) == set(merged)
    for name, array in merged.items():
        np.testing.assert_array_equal(found.tensors[name], array, name)
    # The settings came back too.
    again = build_model(found.config)
    load_weights(again, found.tensors)
    np.testing.assert_allclose(logits(again), logits(model), atol=1e-4)
    other = {"mistral": {"model_type", "architectures", "sliding_window"}, "gpt2": {"n_inner"}}.get(
        kind, set()
    )
    other |= {"bos_token_id", "eos_token_id"}  # of the tokenizer
    one, two = again.config.to_dict(), model.config.to_dict()
    assert {k: v for k, v in one.items() if k not in other} == {
        k: v for k, v in two.items() if k not in other
    }


@pytest.mark.parametrize("stored", [kind for kind in WRITTEN if kind not in MIXTURES])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_what_the_gguf_package_finds(tmp_path, kind, stored):
    model = adapted(kind)
    written = export_gguf(model, tmp_path / "m.gguf", stored, tokenizer=False)
    base, merged = weights(MODELS[kind]()), merged_weights(model).tensors
    reader = GGUFReader(tmp_path / "m.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    prefix, attention = {
        "gpt2": ("transformer.h.1", "attn.c_attn"),
        "llama": ("model.layers.1", "self_attn.q_proj"),
    }[kind]
    own = merged[f"{prefix}.{attention}.weight"]
    own = own.T if kind == "gpt2" else permute(own, 4)
    found = tensors[f"blk.1.attn_{'qkv' if kind == 'gpt2' else 'q'}.weight"]
    assert found.tensor_type.name == stored
    stored_type = GGMLQuantizationType[stored]
    np.testing.assert_array_equal(found.data, quantize(np.ascontiguousarray(own), stored_type))
    assert main_kind(tmp_path / "m.gguf") == stored

    block = {"Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"}
    for name, tensor in tensors.items():
        expected = stored
        if len(tensor.shape) == 1 or name == "position_embd.weight":
            expected = "F32"
        elif stored in block and tensor.shape[0] % 32:
            expected = "F16"  # rows of 40
        assert tensor.tensor_type.name == expected, name
    kinds = {tensor.tensor_type.name for tensor in tensors.values()}
    assert ("F16" in kinds) == (stored == "F16" or (kind == "llama" and stored in block))

    if stored == "F32":
        return
    read = read_gguf(tmp_path / "m.gguf").tensors
    changed = [n for n in base if not np.array_equal(base[n], merged[n])]
    error = sum(np.square(read[n] - merged[n], dtype="d").sum() for n in changed)
    change = sum(np.square(merged[n] - base[n], dtype="d").sum() for n in changed)
    assert written.loss.overall == pytest.approx(np.sqrt(error / change), rel=1e-6)
    assert stored.lower() in str(written)


def test_permute_is_the_inverse_of_unpermute():
    rows = np.arange(48.0).reshape(24, 2)
    np.testing.assert_array_equal(unpermute(permute(rows, 3), 3), rows)
    np.testing.assert_array_equal(permute(rows, 3)[:4, 0] // 2, [0, 4, 1, 5])


def test_metadata(tmp_path):
    model = tiny_llama(**WIDE, rope_scaling={"type": "linear", "factor": 4.0})
    model.name_or_path = "owner/SmolLM2-1.7B"
    export_gguf(model, tmp_path / "m.gguf", "Q8_0", tokenizer=False)
    fields = GGUFReader(tmp_path / "m.gguf").fields
    found = {name: entry.contents() for name, entry in fields.items()}
    assert found == {
        **{name: found[name] for name in found if name.startswith("GGUF.")},
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "SmolLM2-1.7B",
        "general.file_type": 7,
        "general.quantization_version": 2,
        "llama.vocab_size": 23,
        "llama.context_length": 2048,
        "llama.embedding_length": 32,
        "llama.block_count": 2,
        "llama.feed_forward_length": 40,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 8,
        "llama.attention.value_length": 8,
        "llama.rope.dimension_count": 8,
        "llama.rope.freq_base": 100.0,
        "llama.rope.scaling.type": "linear",
        "llama.rope.scaling.factor": 4.0,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
    }


def test_llama3_factors_are_a_tensor(tmp_path):
    export_gguf(MODELS["llama3"](), tmp_path / "m.gguf", "f16", tokenizer=False)
    (factors,) = (
        tensor for tensor in GGUFReader(tmp_path / "m.gguf").tensors
        if tensor.name == "rope_freqs.weight"
    )  # fmt: skip
    # Wavelengths of 500000^(i / 4) turns: the last two are longer than 8192 and 2048 positions.
    smooth = (8192 / (2 * np.pi * 5e5 ** (2 / 4)) - 1) / 3
    middle = 1 / ((1 - smooth) / 8 + smooth)
    np.testing.assert_allclose(factors.data, [1, 1, middle, 8], rtol=1e-6)


# The tokenizer -----------------------------------------------------------------------------------

TEXTS = ["name : Blue Spice | food : 20230", "<|endoftext|>  it's café  ", "\n\n x\t<user>y"]


def tokenizer_of(kind: str, template: str | None = None) -> Tokenizer:
    model = json.loads(tiny.train_tokenizer().to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    backend = byte_level_bpe(model["vocab"], merges, kind, [tiny.END], ["<user>"])
    return Tokenizer(backend, 0, 0, None, template)


@pytest.mark.parametrize("kind", sorted(set(GGUF_PRE.values())))
def test_tokenizer_comes_back(tmp_path, kind):
    model = tiny_llama(**WIDE, vocab_size=410)
    model.tokenizer = own = tokenizer_of(kind, "{{ messages }}")
    export_gguf(model, tmp_path / "m.gguf")
    again = jlora.load(tmp_path / "m.gguf").tokenizer
    assert [again.encode(text) for text in TEXTS] == [own.encode(text) for text in TEXTS]
    ids = ("eos_token_id", "bos_token_id", "pad_token_id", "chat_template")
    assert [getattr(again, name) for name in ids] == [getattr(own, name) for name in ids]
    metadata = read_gguf(tmp_path / "m.gguf").metadata
    assert GGUF_PRE[metadata["tokenizer.ggml.pre"]] == kind
    types = metadata["tokenizer.ggml.token_type"]
    assert (types[0], types[1], types[400], types[401]) == (3, 1, 4, 5)
    assert metadata["tokenizer.ggml.tokens"][401:403] == ["[PAD401]", "[PAD402]"]
    assert metadata["tokenizer.ggml.add_bos_token"] is False


def test_a_tokenizer_that_begins_every_text_says_so():
    from tokenizers.processors import TemplateProcessing

    own = tokenizer_of("llama3")
    own.backend.post_processor = TemplateProcessing(
        single=f"{tiny.END} $A", special_tokens=[(tiny.END, 0)]
    )
    assert own.to_gguf(401)["tokenizer.ggml.add_bos_token"] is True


def test_offsets_do_not_make_another_tokenizer():
    own = tokenizer_of("gpt2")
    own.backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False)
    assert own.to_gguf(401)["tokenizer.ggml.pre"] == "gpt-2"


def odd_tokenizers() -> dict[str, Tokenizer | None]:
    spaced = tokenizer_of("gpt2")
    spaced.backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return {
        "another split": spaced,
        "another model": Tokenizer(Backend(models.WordLevel({"a": 0}, unk_token="a"))),
        "none": None,
    }


@pytest.mark.parametrize("kind", odd_tokenizers())
def test_a_tokenizer_without_a_name_in_gguf_is_refused_with_the_way_out(tmp_path, kind):
    model = tiny_llama(**WIDE, vocab_size=410)
    model.tokenizer = odd_tokenizers()[kind]
    message = "the model has no tokenizer" if kind == "none" else "no byte-level BPE of a kind"
    with pytest.raises(UserError, match=rf"{message}.*; --no-tokenizer"):
        export_gguf(model, tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())
    export_gguf(model, tmp_path / "m.gguf", tokenizer=False)
    assert "tokenizer.ggml.model" not in read_gguf(tmp_path / "m.gguf").metadata


def bytes_alone() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*alphabet, tiny.END])}
    return Tokenizer(byte_level_bpe(vocab, [], "gpt2", [tiny.END]), 256)


WRITTEN = {
    "gpt2": (tiny_gpt2, {"n_embd": 32, "n_head": 2, "activation_function": "gelu_pytorch_tanh"}),
    "mistral": (tiny_llama, {**WIDE, "model_type": "mistral"}),
    "qwen2": (tiny_llama, {**WIDE, "model_type": "qwen2", "tie_word_embeddings": True}),
    "biases": (tiny_llama, {**WIDE, "attention_bias": True, "mlp_bias": True}),
    "odd factor": (tiny_llama, {**WIDE, "rope_scaling": {"type": "linear", "factor": 3.3}}),
    "other llama3": (
        tiny_llama,
        {**WIDE, "rope_scaling": {**LLAMA3, "factor": 3.3, "original_max_position_embeddings": 40}},
    ),
}
TOKENIZERS = {
    **{kind: (lambda kind=kind: tokenizer_of(kind)) for kind in ("gpt2", "llama3", "tekken")},
    "sentencepiece": lambda: Tokenizer(spm.backend(True), 2, 1),
    "bytes alone": bytes_alone,
    "left out": lambda: tokenizer_of("gpt2"),
    "none": lambda: None,
}


@pytest.mark.parametrize("family", WRITTEN)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_whatever_export_writes_load_reads(tmp_path, family, kind):
    make, changes = WRITTEN[family]
    model = make(**changes, vocab_size=410)
    model.tokenizer = own = TOKENIZERS[kind]()
    export_gguf(model, tmp_path / "m.gguf", tokenizer=kind not in ("none", "left out"))
    again = jlora.load(tmp_path / "m.gguf")
    for name, array in weights(model).items():
        np.testing.assert_array_equal(weights(again)[name], array, name)
    if kind in ("none", "left out"):
        assert again.tokenizer is None
    else:
        assert [again.tokenizer.encode(t) for t in TEXTS] == [own.encode(t) for t in TEXTS]
    written, read = model.config.to_dict(), again.config.to_dict()
    same = [key for key in written if key.startswith(("rope", "rms", "head", "tie", "layer_norm"))]
    assert len(same) >= 1 and {k: read.get(k) for k in same} == {k: written[k] for k in same}


def test_a_tokenizer_with_words_and_no_merges_is_refused(tmp_path):
    model = tiny_llama(**WIDE, vocab_size=410)
    model.tokenizer = tokenizer_of("llama3")
    vocab = json.loads(model.tokenizer.backend.to_str())["model"]["vocab"]
    model.tokenizer = Tokenizer(byte_level_bpe(vocab, [], "llama3", [tiny.END]), 0)
    with pytest.raises(UserError, match="has words and no merges.*; --no-tokenizer"):
        export_gguf(model, tmp_path / "m.gguf")


def test_what_export_refuses(tmp_path):
    model = tiny_gpt2()
    (tmp_path / "there").write_text("")
    with pytest.raises(UserError, match="there is there already"):
        export_gguf(model, tmp_path / "there", tokenizer=False)
    with pytest.raises(UserError, match="type 'q5_k' is not one of f32, f16, bf16, q8_0"):
        export_gguf(model, tmp_path / "new", "Q5_K", tokenizer=False)
    model.transformer.wte.weight.assign(jt.array(np.full((23, 12), 7e4, "f")))
    with pytest.raises(UserError, match=r"transformer\.wte\.weight has values up to 7e\+04"):
        export_gguf(model, tmp_path / "new", "f16", tokenizer=False)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_export_command(tmp_path, tiny_model, tiny_run, capsys):
    out = tmp_path / "m.gguf"
    argv = ["export", tiny_model, "--gguf", out, "--adapter", tiny_run, "--type", "q8_0"]
    assert main([str(a) for a in argv]) == 0
    said = capsys.readouterr().out
    assert "merged 2 layers in float32" in said and "q8_0" in said and f"written: {out}" in said
    found = {tensor.name: tensor for tensor in GGUFReader(out).tensors}["blk.0.attn_qkv.weight"]
    model = jlora.PeftModel.from_pretrained(jlora.load(tiny_model), tiny_run / "best")
    own = merged_weights(model).tensors["transformer.h.0.attn.c_attn.weight"].T
    step = np.abs(own).max() / 127
    assert np.abs(dequantize(found.data, found.tensor_type) - own).max() < step
    assert main(["generate", "--model", str(out), "--prompt", "name : A", "--beams", "2",
                 "--max-new-tokens", "3", "--precision", "plain"]) == 0  # fmt: skip
