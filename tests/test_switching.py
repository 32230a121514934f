"""Several adapters on one base: outputs after a switch are those of a fresh load, on every path."""

from __future__ import annotations

import gc
import json
import re
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
from needs import needs_bf16
from safetensors.numpy import load_file, save_file
from tiny_models import ids_of, randomise_adapter, wide_gpt2, wide_llama

from jlora import engine
from jlora.adapters import LoraConfig, PartialModel, PeftModel, get_peft_model
from jlora.decoding.decoder import decoder_of
from jlora.decoding.native_decoder import NativeDecoder
from jlora.layers import set_trainable
from jlora.runs.adapter_file import AdapterFile, switchable
from jlora.system.errors import UserError
from jlora.system.runtime import jt

IDS = np.concatenate([ids_of((2, 7)), [[3, 5], [5, 3]]], 1).astype(np.int32)
#: Adapters that differ in targets, rank, scaling, biases, copies, fused layers and dropout.
GPT2 = {
    "a": {"target_modules": ["c_attn", "c_fc"], "r": 2, "lora_alpha": 8, "lora_dropout": 0.3},
    "b": {"target_modules": ["c_attn"], "r": 4, "enable_lora": [True, False, True]},
    "biases": {"target_modules": ["mlp.c_proj"], "r": 3, "bias": "all"},
    "copies": {"target_modules": ["c_attn"], "r": 2, "modules_to_save": ["ln_f", "wpe"]},
    "tokens": {"target_modules": ["c_fc"], "r": 2},
    "dora": {"target_modules": ["c_attn", "c_proj"], "r": 2, "use_dora": True},
}
LLAMA = {
    "a": {"target_modules": ["q_proj", "v_proj"], "r": 2, "lora_alpha": 8},
    "head": {"target_modules": ["lm_head", "up_proj"], "r": 4},
    "embedding": {"target_modules": ["embed_tokens", "down_proj"], "r": 2, "use_rslora": True},
    "copies": {"target_modules": ["k_proj"], "r": 2, "modules_to_save": ["lm_head"]},
    "tokens": {"target_modules": ["o_proj"], "r": 2},
}
TOKENS = {"gpt2": "transformer.wte", "llama": "model.embed_tokens"}
MODELS = {"gpt2": (wide_gpt2, GPT2), "llama": (wide_llama, LLAMA)}


def logits(model):
    with jt.no_grad():
        return model(jt.array(IDS)).numpy()


def decoded(model):
    """The states of a prompt and of a step after it, by whichever decoder serves the model."""
    decoder = decoder_of(model)
    decoder.enter([[3, 1, 4], [5, 9]])
    decoder.advance(np.arange(2), np.array([2, 7]))
    return isinstance(decoder, NativeDecoder), np.array(decoder.hidden)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Random adapters of each kind, written."""
    found = {}
    for kind, (make, adapters) in MODELS.items():
        for seed, (name, settings) in enumerate(adapters.items()):
            folder = tmp_path_factory.mktemp(kind) / name
            model = randomise_adapter(get_peft_model(make(), LoraConfig(**settings)), seed, 0.2)
            model.save_pretrained(folder)
            found[kind, name] = folder
        add_tokens(found[kind, "tokens"], TOKENS[kind])
    return found


def add_tokens(folder, module):
    """Rows for tokens 3 and 5, as PEFT writes them."""
    config = json.loads((folder / "adapter_config.json").read_text())
    config["trainable_token_indices"] = [3, 5]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "adapter_model.safetensors")
    rows = 0.2 * np.random.default_rng(0).standard_normal((2, 64)).astype("f")
    tensors[f"base_model.model.{module}.token_adapter.trainable_tokens_delta"] = rows
    save_file(tensors, folder / "adapter_model.safetensors")


def base(kind):
    model = MODELS[kind][0]()
    set_trainable(model, ())
    model.eval()
    return model


@pytest.mark.parametrize("kind", MODELS)
def test_outputs_after_a_switch_are_those_of_a_fresh_load(kind, folders):
    names = list(MODELS[kind][1])
    plain = logits(base(kind))
    fresh = {n: logits(PeftModel.from_pretrained(base(kind), folders[kind, n])) for n in names}
    model = PeftModel(base(kind))
    parameters = [name for name, _ in model.base_model.named_parameters()]
    for name in names:
        model.load_adapter(folders[kind, name], name)
    np.testing.assert_array_equal(logits(model), plain)
    for name in [*names, *reversed(names)]:
        model.set_adapter(name)
        np.testing.assert_array_equal(logits(model), fresh[name])
        with model.disable_adapter():
            np.testing.assert_array_equal(logits(model), plain)
    assert model.available_adapters == names
    model.set_adapter(None)
    np.testing.assert_array_equal(logits(model), plain)
    assert [name for name, _ in model.unload().named_parameters()] == parameters


@needs_bf16
@pytest.mark.parametrize(
    ("precision", "keep_weights"), [("bf16", True), ("bf16", False), ("fp32", True)]
)
@pytest.mark.parametrize("kind", MODELS)
def test_fast_paths_have_no_stale_copies(kind, precision, keep_weights, folders):
    """Blocks, native decoder and packed products, with adapters that come after `prepare`."""
    names = [n for n in MODELS[kind][1] if keep_weights or n not in ("embedding", "head")]
    fresh = {}
    for name in [None, *names]:
        model = base(kind)
        if name:
            model = PeftModel.from_pretrained(model, folders[kind, name])
        engine.prepare(model, precision, keep_weights=keep_weights)
        fresh[name] = logits(model), decoded(model)

    model = base(kind)
    engine.prepare(model, precision, keep_weights=keep_weights)
    model = PeftModel(model)
    for name in names:
        model.load_adapter(folders[kind, name], name)

    def check(name, on):
        right, (native, states) = fresh[name]
        # A head that came after `prepare` is multiplied in float32, and not in bf16; DoRA's change
        # goes into a weight that was rounded to bf16 before.
        own_head = on in {"llama": ("head", "copies"), "gpt2": ("tokens",)}[kind]
        rounded = not keep_weights and on in ("dora", "tokens")
        atol = 3e-2 if own_head or rounded else 1e-6
        np.testing.assert_allclose(logits(model), right, atol=atol)
        own_native, own_states = decoded(model)
        if own_native == native:
            close = 1e-6
        else:  # sums in another order; of packed weights the native decoder alone has keys in bf16
            close = 5e-6 if precision == "fp32" else 3e-2
        np.testing.assert_allclose(own_states, states, atol=3e-2 if rounded else close)
        assert own_native == native or name != on

    check(None, None)
    for name in [*names, *reversed(names), None]:
        model.set_adapter(name)
        check(name, name)
        with model.disable_adapter():
            check(None, name)


def test_adding_training_and_deleting(folders, tmp_path, caplog):
    model = PeftModel.from_pretrained(base("gpt2"), folders["gpt2", "a"], adapter_name="a")
    right = logits(model)
    model.add_adapter("new", LoraConfig(target_modules=["c_proj"], r=2))
    assert model.active_adapter == "a" and model.trainable_parameters() == []
    np.testing.assert_array_equal(logits(model), right)
    model.set_adapter("new")
    plain = logits(model)  # B is zero
    np.testing.assert_array_equal(plain, logits(base("gpt2")))
    names = [name for name, _ in model.trainable_parameters()]
    assert len(names) == 8 and all(".c_proj.lora_" in name for name in names)
    model.train()
    assert {n for n, v in model.base_model.named_parameters() if not v.is_stop_grad()} == {*names}
    randomise_adapter(model)
    trained = logits(model)
    model.merge_adapter()
    model.set_adapter("a")
    assert "new was merged and is unmerged" in caplog.text
    np.testing.assert_array_equal(logits(model), right)
    model.set_adapter("new")
    np.testing.assert_array_equal(logits(model), trained)
    model.save_pretrained(tmp_path / "new")
    loaded = PeftModel.from_pretrained(base("gpt2"), tmp_path / "new")
    np.testing.assert_array_equal(logits(loaded), trained)
    model.delete_adapter("new")
    assert model.active_adapter == "a" and "new was on; now it is a" in caplog.text
    np.testing.assert_array_equal(logits(model), right)
    model.delete_adapter("a")
    np.testing.assert_array_equal(logits(model), plain)
    with pytest.raises(UserError, match="no adapter is on"):
        model.save_pretrained(tmp_path / "none")


def test_hotswap(folders):
    model = PeftModel.from_pretrained(base("gpt2"), folders["gpt2", "a"])
    model.load_adapter(folders["gpt2", "b"], "b")
    right = logits(PeftModel.from_pretrained(base("gpt2"), folders["gpt2", "biases"]))
    before = logits(model)
    model.hotswap_adapter(folders["gpt2", "biases"], "b")  # which is not on
    np.testing.assert_array_equal(logits(model), before)
    model.hotswap_adapter(folders["gpt2", "biases"])
    np.testing.assert_array_equal(logits(model), right)
    with pytest.raises(UserError, match="is no folder"):
        model.hotswap_adapter(folders["gpt2", "a"] / "nowhere")
    np.testing.assert_array_equal(logits(model), right)
    model.set_adapter("b")
    np.testing.assert_array_equal(logits(model), right)


@needs_bf16
def test_an_adapter_that_is_gone_is_freed(folders):
    """DoRA's folded weights are as large as the base's: no plan of a block may keep them."""
    model = PeftModel.from_pretrained(base("gpt2"), folders["gpt2", "dora"])
    engine.prepare(model, "bf16")
    for leave in (
        lambda: model.hotswap_adapter(folders["gpt2", "dora"]),
        lambda: model.delete_adapter("default"),
    ):
        logits(model)
        layer = next(iter(model.lora_layers().values()))
        kept = weakref.ref(layer._folded[1].packed)
        del layer
        leave()
        gc.collect()
        engine.release()  # memory that operators may still have had to read
        assert kept() is None


def test_loading_beside_a_merged_adapter_keeps_it_merged(folders):
    model = PeftModel.from_pretrained(base("gpt2"), folders["gpt2", "a"])
    model.merge_adapter()
    merged = logits(model)
    model.load_adapter(folders["gpt2", "b"], "b")
    assert all(layer.merged for layer in model.lora_layers().values())
    np.testing.assert_array_equal(logits(model), merged)


@pytest.mark.parametrize("verb", ["unmerge_adapter", "set_adapter", "unload"])
def test_unmerging_is_all_or_nothing(verb, folders):
    model = PeftModel.from_pretrained(base("gpt2"), folders["gpt2", "dora"])
    model.load_adapter(folders["gpt2", "b"], "b")
    model.merge_adapter()
    last = list(model.lora_layers().values())[-1]
    last.weight.update(last.weight * 2)  # other weights, which DoRA's change cannot be taken from
    before = logits(model)
    with pytest.raises(UserError, match="unmerge before loading"):
        getattr(model, verb)(*(["b"] if verb == "set_adapter" else []))
    assert all(layer.merged for layer in model.lora_layers().values())
    assert model.active_adapter == "default"
    np.testing.assert_array_equal(logits(model), before)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_an_adapter_that_cannot_be_put_on_leaves_the_other(kind, folders, monkeypatch):
    model = PeftModel.from_pretrained(base(kind), folders[kind, "a"])
    model.load_adapter(folders[kind, "copies"], "copies")
    model.merge_adapter()
    before = logits(model)
    copies = list(model._adapters["copies"].modules.values())

    def fails(base):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(copies[-1], "put_on", fails)
        with pytest.raises(MemoryError):
            model.set_adapter("copies")
    assert model.active_adapter == "default" and model.get_model_status().merged_adapters
    np.testing.assert_array_equal(logits(model), before)
    model.set_adapter("copies")
    expected = PeftModel.from_pretrained(base(kind), folders[kind, "copies"])
    np.testing.assert_array_equal(logits(model), logits(expected))


def test_a_merge_that_fails_half_way_leaves_no_layer_merged(folders, monkeypatch):
    model = PeftModel.from_pretrained(base("gpt2"), folders["gpt2", "a"])
    before = logits(model)
    last = list(model.lora_layers().values())[-1]
    monkeypatch.setattr(last, "merge", lambda: next(iter(())))
    with pytest.raises(StopIteration):
        model.merge_adapter()
    assert not any(layer.merged for layer in model.lora_layers().values())
    np.testing.assert_array_equal(logits(model), before)


@needs_bf16
def test_merging_weights_that_are_packed_alone(folders):
    model = base("llama")
    engine.prepare(model, "bf16", keep_weights=False)
    model = PeftModel.from_pretrained(model, folders["llama", "a"])
    right = logits(model)
    model.merge_adapter()
    difference = np.linalg.norm(logits(model) - right) / np.linalg.norm(right)
    assert 0 < difference < 2e-2  # of the bf16 in the block, which a merged layer does not run by
    model.unmerge_adapter()
    np.testing.assert_array_equal(logits(model), right)
    model.set_adapter(None)
    assert type(model.base_model.model.layers[0].self_attn.q_proj).__name__ == "PackedLinear"


def test_status(folders):
    model = PeftModel.from_pretrained(base("gpt2"), folders["gpt2", "biases"], adapter_name="b")
    model.load_adapter(folders["gpt2", "copies"], "c", is_trainable=True)
    status = model.get_model_status()
    plain = sum(var.numel() for var in base("gpt2").parameters())
    assert status.active_adapters == ["b"] and status.available_adapters == ["b", "c"]
    assert status.requires_grad == {"b": False, "c": True} and status.merged_adapters == []
    own = 2 * 3 * (256 + 64) + 2 * 2 * (64 + 192) + 2 * 64 + 128 * 64  # the last: ln_f, wpe
    assert status.total_params == plain + own and status.trainable_params == 0
    # c_proj of two layers; c_attn of two, ln_f and wpe.
    assert status.num_adapter_layers == 2 + 4 and status.enabled
    assert status.peft_types == {"b": "LORA", "c": "LORA"}
    model.set_adapter("c")
    assert model.get_model_status().total_params == status.total_params
    assert model.get_model_status().trainable_params == 2 * 2 * (64 + 192) + 2 * 64 + 128 * 64
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["c"]
    with model.disable_adapter():
        assert not model.get_model_status().enabled


def test_mistakes(folders, tmp_path):
    model = PeftModel.from_pretrained(base("gpt2"), folders["gpt2", "a"], adapter_name="mine")
    right = logits(model)
    for wrong, message in (
        (lambda: model.set_adapter("mime"), "no adapter is called 'mime'; nearest: mine"),
        (lambda: model.delete_adapter("x"), "no adapter is called 'x'; there are mine"),
        (lambda: model.load_adapter(folders["gpt2", "b"], "mine"), "'mine' already; take another"),
        (lambda: model.add_adapter("", LoraConfig()), "an adapter's name is a text, not ''"),
        (lambda: model.add_adapter("n", LoraConfig(target_modules=["c_atn"])), "nearest: c_attn"),
        (lambda: model.load_adapter(folders["llama", "a"], "n"), "made for the base model"),
        (lambda: model.load_adapter(tmp_path, "n"), "holds no adapter_config.json"),
    ):
        with pytest.raises(UserError, match=message):
            wrong()
        assert model.available_adapters == ["mine"] and model.active_adapter == "mine"
        np.testing.assert_array_equal(logits(model), right)
    with model.disable_adapter(), pytest.raises(UserError, match="inside disable_adapter"):
        model.set_adapter(None)
    np.testing.assert_array_equal(logits(model), right)


@needs_bf16
def test_an_adapter_below_the_one_that_was_prepared_for_learns():
    """Its gradient is not lost in blocks that `prepare` found nothing trained below."""
    model = get_peft_model(base("llama"), LoraConfig(target_modules=["layers.1.self_attn.q_proj"]))
    engine.prepare(model, "bf16")
    model.add_adapter("low", LoraConfig(target_modules=["embed_tokens"], r=2))
    model.set_adapter("low")
    model.train()
    (_, A), (_, B) = model.trainable_parameters()
    hidden = model.hidden_states(jt.array(IDS))
    loss = model.target_losses(hidden.reshape(-1, 64), jt.array(IDS.reshape(-1))).mean()
    found = jt.grad(loss, [A, B])
    assert np.abs(found[0].numpy()).max() > 0


def test_files_of_all_kinds_beside_each_other(folders, tmp_path):
    model = switchable(base("gpt2"))
    assert switchable(model) is model and model.active_adapter is None
    AdapterFile(folders["gpt2", "a"]).add_to(model, "a")
    model.set_adapter("a")
    right = logits(PeftModel.from_pretrained(base("gpt2"), folders["gpt2", "a"]))
    np.testing.assert_array_equal(logits(model), right)
    PartialModel(base("gpt2"), "bitfit").save_pretrained(tmp_path / "bitfit")
    with pytest.raises(UserError, match="is a change of the base's own weights, which cannot"):
        AdapterFile(tmp_path / "bitfit").add_to(model, "b")
    (tmp_path / "a.pt").write_bytes(b"")
    with pytest.raises(UserError, match="a.pt is a .pt file, .* or `jlora convert` it"):
        AdapterFile(tmp_path / "a.pt", lora_alpha=8).add_to(model, "b")
    with pytest.raises(UserError, match="tuned in its own weights"):
        switchable(PartialModel(base("gpt2"), "bitfit"))


@needs_bf16
def test_the_program_of_the_documents(folders, monkeypatch, capsys):
    """docs/adapters.md, with a tiny model and the adapters of this file."""
    import jlora

    text = (Path(__file__).parents[1] / "docs" / "adapters.md").read_text(encoding="utf-8")
    program = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    for name, kind in (("runs/sql/best", "a"), ("runs/mail/best", "b"), ("runs/mail-2/best", "b")):
        program = program.replace(f'"{name}"', repr(str(folders["gpt2", kind])))
    monkeypatch.setitem(vars(jlora), "load", lambda name: base("gpt2"))
    space: dict = {}
    exec(program, space)
    assert "active_adapters=[]" in capsys.readouterr().out
    assert space["model"].available_adapters == ["mail", "both"]


@needs_bf16
def test_tokens_of_an_adapter_are_not_trained(folders):
    with pytest.raises(UserError, match="trainable_token_indices is read and not trained here"):
        PeftModel.from_pretrained(base("llama"), folders["llama", "tokens"], is_trainable=True)
    for settings, message in (
        (
            {"trainable_token_indices": [1]},
            "is read in adapters that PEFT trained, and not",
        ),
        ({"trainable_token_indices": [-1]}, "must be a list of tokens, or lists by module"),
        ({"trainable_token_indices": "x"}, "must be a list of tokens, or lists by module"),
    ):
        with pytest.raises(UserError, match=message):
            get_peft_model(base("llama"), LoraConfig(target_modules=["q_proj"], **settings))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([99], "'model.embed_tokens': there is no token 99; model.embed_tokens has 23 rows"),
        ({"embed_tokns": [1]}, "nearest: embed_tokens"),
        ([3], r"token_adapter.trainable_tokens_delta is \(2, 64\) instead of \(1, 64\)"),
        (None, "unexpected: model.embed_tokens.token_adapter.trainable_tokens_delta"),
    ],
)
def test_tokens_that_do_not_fit(tokens, message, folders, tmp_path):
    shutil.copytree(folders["llama", "tokens"], tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "trainable_token_indices": tokens}))
    model = base("llama")
    before = logits(model)
    with pytest.raises(UserError, match=message):
        PeftModel.from_pretrained(model, tmp_path / "a")
    np.testing.assert_array_equal(logits(model), before)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"modules_to_save": ["embed_tokens"]}, "model.embed_tokens.weight"),
        ({"modules_to_save": ["lm_head"]}, "lm_head.weight"),
        ({"target_modules": ["embed_tokens"]}, "model.embed_tokens.lora_A"),
        ({"target_modules": ["lm_head"]}, "lm_head.lora_B"),
    ],
)
def test_adapters_of_a_resized_vocabulary_are_refused(settings, name, tmp_path):
    larger = get_peft_model(
        wide_llama(vocab_size=25), LoraConfig(**{"target_modules": ["q_proj"], "r": 2, **settings})
    )
    larger.save_pretrained(tmp_path)
    (tmp_path / "jlora_adapter.json").unlink()
    message = f"{name} is .*: the base model of this adapter has 25 words, and this one 23; load"
    with pytest.raises(UserError, match=message):
        PeftModel.from_pretrained(base("llama"), tmp_path)
