"""The memory estimate: exact where numbers are stored, and never at the cost of reading weights."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from needs import needs_bf16
from test_formats import LLAMA as GGUF_LLAMA
from test_formats import keyed, write_gguf
from test_tokenizer import TOKENS, gguf_metadata
from tiny_families import tiny
from tiny_models import GPT2, LLAMA, WIDE_GPT2, WIDE_LLAMA, ids_of, wide_gpt2, wide_llama

from jlora import engine
from jlora.adapters import LoraConfig, PartialModel, get_peft_model
from jlora.cli import main
from jlora.data.batches import TokenExample
from jlora.engine.products import FrozenProduct
from jlora.formats.safetensors_file import write_safetensors
from jlora.formats.torch_write import write_torch
from jlora.kernels.packed_linear import LINE
from jlora.models import hub
from jlora.models.hub import Outline, load, outline
from jlora.runs import memory_check, pipeline
from jlora.runs.memory_estimate import BlockShape, Texts, estimate, loss_scratch, trainable
from jlora.runs.recipe import make_recipe
from jlora.system.errors import UserError
from jlora.system.runtime import jt
from jlora.training.adamw import AdamW, OptimConfig
from jlora.training.loop import batch_loss, make_batch

CONFIGS = {
    "gpt2": {"model_type": "gpt2", **GPT2, **WIDE_GPT2},
    "llama": {**LLAMA, **WIDE_LLAMA},
    "tied llama": {**LLAMA, **WIDE_LLAMA, "tie_word_embeddings": True},
}
MAKE = {
    "gpt2": wide_gpt2,
    "llama": wide_llama,
    "tied llama": lambda: wide_llama(tie_word_embeddings=True),
}
TEXTS = Texts([20] * 40, [8] * 40, 130, [12] * 30, 900)


def gpt2_tensors() -> dict[str, np.ndarray]:
    """Of a GPT-2 with the head size that a bare file is taken to have."""
    model = wide_gpt2(n_head=1)
    return {name: p.numpy() for name, p in model.named_parameters()}


def llama_gguf(path):
    """A GGUF file of one layer, with a tokenizer."""
    shapes = {
        "token_embd": (len(TOKENS), 32), "output_norm": (32,),
        "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,),
        "blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32), "blk.0.attn_v": (16, 32),
        "blk.0.attn_output": (32, 32),
        "blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32), "blk.0.ffn_down": (32, 64),
    }  # fmt: skip
    tensors = {f"{name}.weight": np.zeros(shape, np.float32) for name, shape in shapes.items()}
    metadata = keyed("llama", GGUF_LLAMA)
    return write_gguf(path, "llama", metadata, tensors, tokenizer=gguf_metadata())


def outline_of(family: str) -> Outline:
    model = hub.build_model(CONFIGS[family])
    model.name_or_path = family
    return Outline(model, None)


def recipe_of(**settings):
    return make_recipe({"model": "any", "precision": "fp32", **settings}, "test")


def found(family="gpt2", texts=TEXTS, **settings):
    return estimate(recipe_of(**settings), outline_of(family), texts)


def held_bytes(model) -> int:
    """What a prepared model holds: float32 parameters, and packed weights without their margin."""
    packed = {}
    for module in model.modules():
        for product in vars(module).values():
            if isinstance(product, FrozenProduct):
                packed[product.packed.address] = product.packed._memory.nbytes
    parameters = {id(p): p for _, p in model.named_parameters() if isinstance(p, jt.Var)}
    return sum(packed.values()) + sum(p.numpy().nbytes for p in parameters.values())


# Exact parts -------------------------------------------------------------------------------------


@needs_bf16
@pytest.mark.parametrize("precision", ["plain", "fp32", "bf16", "int8"])
@pytest.mark.parametrize("family", CONFIGS)
def test_weights_are_what_the_engine_holds(family, precision):
    model = MAKE[family]()
    peft = get_peft_model(model, LoraConfig(r=2))
    engine.prepare(peft, precision, keep_weights=False)
    adapter = sum(p.numpy().nbytes for _, p in peft.trainable_parameters())
    stages = found(family, precision=precision, lora={"r": 2}).stages
    assert stages["train"]["weights"] == held_bytes(model) - adapter
    assert stages["train"]["adapter"] == adapter


@needs_bf16
@pytest.mark.parametrize("method", ["full", "bitfit", "top-layers"])
@pytest.mark.parametrize("family", CONFIGS)
def test_weights_that_are_trained_stay_what_they_are(family, method):
    model = MAKE[family]()
    tuned = PartialModel(model, method, 1)
    engine.prepare(tuned, "bf16", keep_weights=False)
    train = found(family, precision="bf16", method=method, top_layers=1).stages["train"]
    assert train["weights"] == held_bytes(model)
    assert train["adapter"] == 0


@pytest.mark.parametrize(
    "lora",
    [
        {"r": 3},
        {"r": 2, "target_modules": "all-linear", "bias": "all"},
        {"r": 2, "target_modules": ["c_attn"], "enable_lora": [True, False, True]},
        {"r": 2, "target_modules": ["c_attn", "c_fc"], "rank_pattern": {"c_fc": 5}},
        {"r": 2, "target_modules": ["c_attn"], "modules_to_save": ["ln_f"], "bias": "lora_only"},
    ],
)
def test_adapter_and_optimiser_are_those_of_training(lora):
    model = get_peft_model(wide_gpt2(), LoraConfig(**lora))
    parameters = [p for _, p in model.trainable_parameters()]
    optimizer = AdamW(parameters, OptimConfig())
    train = found(lora=lora).stages["train"]
    assert train["adapter"] == sum(p.numpy().nbytes for p in parameters)
    assert train["optimiser"] >= optimizer.m.nbytes + optimizer.v.nbytes + train["adapter"]
    names = trainable(recipe_of(lora=lora), outline_of("gpt2").model)
    assert names == {name for name, _ in model.trainable_parameters()}


@needs_bf16
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3", "olmo2"])
def test_a_fused_block_keeps_what_is_said(family):
    base = MAKE[family]() if family in MAKE else tiny(family)
    model = get_peft_model(base, LoraConfig(r=2))
    engine.prepare(model, "bf16")
    batch = make_batch(model, [TokenExample(ids_of((9,)).tolist(), 4)] * 2)
    jt.grad(batch_loss(model, batch), [p for _, p in model.trainable_parameters()])
    module = next(m for m in model.modules() if m.__dict__.get("_plans"))
    plan = next(iter(module._plans.values()))
    ranks = 2 if family == "gpt2" else 4
    counted = BlockShape.of(model.get_base_model()).saved_bytes(256, ranks)
    assert counted <= plan.saved_bytes(256) <= counted * 1.01 + 16 * LINE


# More costs more ---------------------------------------------------------------------------------


@needs_bf16
@pytest.mark.parametrize(
    "stage, less, more",
    [
        ("train", {"train": {"batch_size": 4}}, {"train": {"batch_size": 8}}),
        ("train", {"checkpoint_activations": True}, {}),
        ("train", {"precision": "int8"}, {}),
        ("train", {}, {"precision": "fp32"}),
        ("train", {"precision": "fp32"}, {"precision": "plain"}),
        ("train", {"lora": {"r": 1}}, {"lora": {"r": 64}}),
        ("train", {"method": "top-layers", "top_layers": 1}, {"method": "full"}),
        ("decode", {"decode": {"num_beams": 2}}, {"decode": {"num_beams": 10}}),
        ("decode", {"decode": {"batch_size": 2}}, {"decode": {"batch_size": 30}}),
        ("decode", {"decode": {"max_new_tokens": 8}}, {"decode": {"max_new_tokens": 300}}),
    ],
)
def test_more_costs_more(stage, less, more):
    totals = [found(**{"precision": "bf16", **x}).total(stage) for x in (less, more)]
    assert totals[0] < totals[1]


def test_longer_texts_cost_more_and_short_runs_see_their_own_batches():
    long = replace(TEXTS, inputs=[20] * 39 + [100])
    settings = {"train": {"batch_size": 4, "shuffle": False}}
    assert found(texts=long, **settings).batch.tokens == 3 * 20 + 100
    assert found(texts=long, precision="plain", **settings).batch.tokens == 4 * 100
    short = {"train": {**settings["train"], "steps": 3}}
    assert found(texts=long, **short).batch.tokens == 80
    assert found(texts=TEXTS, **settings).batch.targets == 4 * 8


def test_the_loss_keeps_exponentials_of_some_rows():
    """32 MB of them, or 64 rows; see target_loss.h. Capped logits are computed again."""
    for targets, words, rows in ((2000, 50_257, 160), (100, 50_257, 128), (2000, 256_000, 64)):
        gradients = 2 * rows * 4096
        assert loss_scratch(targets, words, None) == 4 * rows * words + gradients
    assert loss_scratch(2000, 256_000, 30.0) == 2 * 512 * 4096


def test_java_is_beside_the_process():
    both = estimate(recipe_of(), outline_of("gpt2"), TEXTS, java=True)
    assert both.peak_stage == "score"
    assert both.process_peak < both.peak


# Without weights ---------------------------------------------------------------------------------


def write_checkpoint(folder, kind: str):
    if kind == "gguf":
        return llama_gguf(folder / "tiny.gguf")
    if kind == "bare":
        write_torch(folder / "bare.bin", gpt2_tensors())
        return folder / "bare.bin"
    write_safetensors(folder / "model.safetensors", gpt2_tensors())
    (folder / "config.json").write_text(json.dumps({**CONFIGS["gpt2"], "n_head": 1}))
    return folder


@pytest.mark.parametrize("kind", ["bare", "gguf", "folder"])
def test_an_outline_has_the_shapes_of_the_model(tmp_path, kind):
    path = write_checkpoint(tmp_path, kind)
    seen = outline(path)
    shapes = {n: tuple(p.shape) for n, p in seen.model.named_parameters()}
    config = seen.model.config
    del seen
    model = load(path)
    assert shapes == {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert config == model.config


@pytest.mark.parametrize("kind", ["bare", "gguf", "folder"])
def test_no_weights_are_read(tmp_path, monkeypatch, kind):
    path = write_checkpoint(tmp_path, kind)
    for reader in (
        "jlora.formats.safetensors_file._read_tensor",
        "jlora.formats.torch_file.LazyTensor.numpy",
        "gguf.quants.dequantize",
    ):
        monkeypatch.setattr(reader, lambda *arguments: pytest.fail("weights were read"))
    assert outline(path).model.config.vocab_size > 0
    with pytest.raises(pytest.fail.Exception):
        [parameter.numpy() for parameter in load(path).parameters()]


def test_a_gpt2_that_is_not_here_is_known_by_its_name(monkeypatch):
    monkeypatch.setattr(hub, "find_local", lambda name: None)
    monkeypatch.setattr(hub, "gpt2_tokenizer", lambda: None)
    seen = outline("gpt2-medium")
    numbers = sum(int(np.prod(p.shape)) for p in seen.model.parameters())
    assert numbers == 354_823_168  # GPT-2 medium's
    assert seen.source is None


def test_estimating_leaves_random_numbers_alone():
    def adapter(first) -> np.ndarray:
        jt.set_global_seed(7)
        first()
        model = get_peft_model(wide_gpt2(), LoraConfig(r=2))
        return model.trainable_parameters()[0][1].numpy()

    np.testing.assert_array_equal(adapter(found), adapter(lambda: None))


def test_a_wrong_adapter_is_said_before_anything_is_loaded():
    with pytest.raises(UserError, match="fits no module"):
        found(lora={"target_modules": ["absent"]})


# What a user sees --------------------------------------------------------------------------------


@pytest.fixture
def recipe_file(tmp_path, tiny_model):
    path = tmp_path / "tiny.yaml"
    path.write_text(
        f"model: {tiny_model}\ndata: {{task: restaurants, metrics: [BLEU]}}\n"
        "lora: {target_modules: [c_attn]}\ntrain: {batch_size: 16, steps: 4}\n"
        "decode: {max_new_tokens: 16}\nprecision: plain\n"
    )
    return str(path)


def limited(monkeypatch, limit: int) -> None:
    monkeypatch.setattr("jlora.system.machine.memory_limit", lambda: limit)


def test_estimate_prints_parts_and_json(recipe_file, capsys):
    assert main(["estimate", recipe_file]) == 0
    text = capsys.readouterr().out
    assert "activations" in text and "together" in text and text.endswith("It fits.\n")
    assert main(["estimate", recipe_file, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["fits"] and said["data"] == "measured" and said["advice"] == []
    stages = said["stages"]
    assert said["peak_bytes"] == max(sum(parts.values()) for parts in stages.values())


def test_what_would_make_it_fit_does(recipe_file, capsys, monkeypatch):
    main(["estimate", recipe_file, "--json"])
    said = json.loads(capsys.readouterr().out)
    limited(monkeypatch, said["peak_bytes"] * 9 // 10)
    assert main(["estimate", recipe_file, "--json"]) == 1
    advice = json.loads(capsys.readouterr().out)["advice"]
    assert len(advice) > 0 and "train.batch_size" in advice[-1]["set"]
    # The effective batch stays what it was.
    settings = advice[-1]["set"]
    assert int(settings["train.batch_size"]) * int(settings["train.grad_accumulation"]) == 16
    options = [f"--set={key}={value}" for key, value in settings.items()]
    assert main(["estimate", recipe_file, "--json", *options]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["peak_bytes"] == advice[-1]["peak_bytes"]


@pytest.mark.parametrize("verb", ["run", "finetune"])
def test_a_run_that_does_not_fit_says_so_at_once(verb, recipe_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pipeline, "load", lambda name: pytest.fail("the weights were read"))
    out = tmp_path / "run"
    named = [recipe_file] if verb == "run" else ["--recipe", recipe_file]
    main(["estimate", recipe_file, "--json"])
    peak = json.loads(capsys.readouterr().out)["peak_bytes"]
    limited(monkeypatch, peak * 9 // 10)
    assert main([verb, *named, "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert "of memory (to train)" in said and "it fits with --set train.batch_size=" in said
    assert not out.exists()
    limited(monkeypatch, 1 << 20)
    assert main([verb, *named, "--out", str(out)]) == 2
    assert "no settings make it fit" in capsys.readouterr().err


def test_the_check_can_be_left_out(recipe_file, tmp_path, monkeypatch):
    limited(monkeypatch, 1 << 20)
    ran = []
    monkeypatch.setattr(pipeline, "run_recipe", lambda *arguments: ran.append(arguments) or {})
    assert main(["run", recipe_file, "--out", str(tmp_path / "run"), "--no-memory-check"]) == 0
    assert len(ran) == 1


def test_data_that_are_not_at_hand_are_taken_as_the_longest(recipe_file, tmp_path, capsys):
    assert main(["estimate", recipe_file, "--set", f"data.folder={tmp_path}", "--json",
                 "--set", "data.task=jsonl"]) == 0  # fmt: skip
    said = json.loads(capsys.readouterr().out)
    assert said["data"].startswith("no test data for task jsonl")
    assert said["batch_tokens"] == 16 * 512


def test_on_a_gpu_its_own_memory_counts(recipe_file, tmp_path, capsys, monkeypatch):
    limited(monkeypatch, 1 << 20)  # the machine's, which is not asked for
    monkeypatch.setattr(pipeline, "load", lambda name: pytest.fail("the weights were read"))
    monkeypatch.setattr(memory_check, "on_gpu", lambda: True)
    monkeypatch.setattr(memory_check.machine, "free_gpu_memory", lambda: 8 << 30)
    arguments = [recipe_file, "--set", "precision=bf16"]
    assert main(["estimate", *arguments]) == 0
    text = capsys.readouterr().out
    assert "the GPU has 8.00 GiB free" in text and text.endswith("It fits.\n")
    main(["estimate", *arguments, "--json"])
    said = json.loads(capsys.readouterr().out)
    assert set(said["stages"]) == {"train", "decode"}
    for parts in said["stages"].values():
        assert parts["CUDA"] == memory_check.CARD and "weights" in parts
        assert not {"process", "data", "Java"} & set(parts)
    monkeypatch.setattr(memory_check.machine, "free_gpu_memory", lambda: memory_check.CARD)
    assert main(["run", *arguments, "--out", str(tmp_path / "run")]) == 2
    assert "and the GPU has 1.00 GiB free" in capsys.readouterr().err
    monkeypatch.setattr(memory_check.machine, "free_gpu_memory", lambda: None)
    assert main(["estimate", *arguments]) == 0
    assert "nvidia-smi does not say" in capsys.readouterr().out


def test_advice_by_stage(monkeypatch):
    recipe = recipe_of(precision="bf16", decode={"batch_size": 8, "num_beams": 4})
    seen = found(precision="bf16")
    for stage, first in (
        ("train", "checkpoint_activations=true"),
        ("decode", "decode.batch_size=4"),
        ("score", "decode.batch_size=4"),
        ("load", "precision=int8"),
    ):
        monkeypatch.setattr(type(seen), "peak_stage", stage)
        assert next(memory_check.changes(recipe, seen))[0] == (first,)
    monkeypatch.setattr(type(seen), "peak_stage", "load")
    smallest = replace(seen, precision="int4")
    assert list(memory_check.changes(recipe, smallest)) == []
