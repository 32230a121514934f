"""loralib's .pt files: read by shapes and keys, written as torch.save would, refused by name."""

from __future__ import annotations

import pickletools
import zipfile

import numpy as np
import pytest
from test_formats import Call, Named, Reference, write_arrays
from tiny_models import ids_of, randomise_adapter, tiny_gpt2, tiny_llama, weights

import jlora
from jlora.adapters import LoraConfig, PeftModel, get_peft_model
from jlora.adapters.loralib import loralib_note, read_loralib
from jlora.cli import main
from jlora.formats.safetensors_file import read_safetensors, write_safetensors
from jlora.formats.torch_file import read_torch
from jlora.formats.torch_write import write_torch
from jlora.layers import Linear, MergedLinear, lora_state_dict
from jlora.system.errors import UserError
from jlora.system.runtime import jt

QV = [True, False, True]
SETTINGS = {
    "fused": (tiny_gpt2, {"r": 4, "lora_alpha": 32, "enable_lora": QV}),
    "one block": (tiny_gpt2, {"r": 2, "lora_alpha": 3, "enable_lora": [False, True, False]}),
    "all blocks": (tiny_gpt2, {"r": 2, "lora_alpha": 4, "enable_lora": [True] * 3}),
    "plain": (tiny_gpt2, {"r": 3, "lora_alpha": 7.5}),
    "several": (
        tiny_gpt2,
        {
            "r": 2,
            "lora_alpha": 8,
            "enable_lora": QV,
            "target_modules": ["c_attn", "c_fc", "wpe"],
            "rank_pattern": {"wpe": 3},
        },
    ),
    "names": (tiny_gpt2, {"r": 2, "target_modules": ["attn.c_proj"]}),
    "biases": (tiny_gpt2, {"r": 2, "enable_lora": QV, "bias": "all"}),
    "its biases": (tiny_gpt2, {"r": 2, "enable_lora": QV, "bias": "lora_only"}),
    "rslora": (tiny_gpt2, {"r": 4, "lora_alpha": 16, "enable_lora": QV, "use_rslora": True}),
    "llama": (tiny_llama, {"r": 2, "lora_alpha": 4}),
}


def adapted(name: str) -> PeftModel:
    make, settings = SETTINGS[name]
    model = get_peft_model(make(), LoraConfig(**settings))
    return randomise_adapter(model)


def logits(model) -> np.ndarray:
    return model(jt.array(ids_of((2, 5)))).numpy()


@pytest.mark.parametrize("name", SETTINGS)
def test_there_and_back(tmp_path, name):
    model, (make, settings) = adapted(name), SETTINGS[name]
    alpha = model.save_loralib(tmp_path / "a.pt")
    own = model.adapter_tensors()
    found = read_torch(tmp_path / "a.pt")
    assert set(found) == set(own) == set(
        lora_state_dict(model.base_model, settings.get("bias", "none"))
    )  # fmt: skip
    for key, array in own.items():
        np.testing.assert_array_equal(found[key], array)
    # enable_lora need not be said where every block has LoRA.
    flags = None if name == "all blocks" else settings.get("enable_lora")
    loaded = PeftModel.from_loralib(make(), tmp_path / "a.pt", alpha, flags)
    np.testing.assert_allclose(logits(loaded), logits(model), atol=1e-6)
    layers, others = model.lora_layers(), loaded.lora_layers()
    assert {n: (type(m), m.r) for n, m in others.items()} == {
        n: (type(m), m.r) for n, m in layers.items()
    }
    assert loaded.peft_config.bias == settings.get("bias", "none")
    assert loaded.peft_config.enable_lora == settings.get("enable_lora")
    assert loaded.trainable_parameters() == [] and not loaded.is_training()
    # And on to a PEFT folder.
    loaded.save_pretrained(tmp_path / "peft")
    again = PeftModel.from_pretrained(make(), tmp_path / "peft")
    np.testing.assert_allclose(logits(again), logits(model), atol=1e-6)


def test_the_alpha_that_must_be_given(tmp_path):
    assert adapted("fused").save_loralib(tmp_path / "a.pt") == 32
    assert adapted("rslora").save_loralib(tmp_path / "b.pt") == 32  # 16 / sqrt(4) = 32 / 4
    assert adapted("plain").save_loralib(tmp_path / "c.pt") == 7.5
    note = loralib_note(32, adapted("fused").lora_layers())
    assert note.startswith("a .pt file has no place for lora_alpha and enable_lora: ")
    assert note.endswith("load it with lora_alpha=32, enable_lora=[True, False, True]")
    assert loralib_note(7.5, adapted("plain").lora_layers()).endswith("lora_alpha=7.5")


def test_targets_are_as_short_as_they_can_be(tmp_path):
    adapted("fused").save_loralib(tmp_path / "a.pt")
    loaded = PeftModel.from_loralib(tiny_gpt2(), tmp_path / "a.pt", 32, QV, is_trainable=True)
    assert loaded.peft_config.target_modules == ["c_attn"]
    assert len(loaded.trainable_parameters()) == 4
    adapted("names").save_loralib(tmp_path / "b.pt")
    loaded = PeftModel.from_loralib(tiny_gpt2(), tmp_path / "b.pt", 8)
    names = [f"transformer.h.{i}.attn.c_proj" for i in (0, 1)]
    assert loaded.peft_config.target_modules == names  # "c_proj" would be the MLP's too


@pytest.mark.parametrize(
    "change",
    [
        lambda t: {f"module.{k}": a for k, a in t.items()},
        lambda t: {k[len("transformer.") :]: a for k, a in t.items()},
        lambda t: {**t, "transformer.h.0.attn.bias": np.ones((1, 1, 32, 32), "f")},
        lambda t: {**t, **weights(tiny_gpt2())},
        lambda t: {**t, "lm_head.weight": weights(tiny_gpt2())["transformer.wte.weight"]},
    ],
    ids=["DataParallel", "bare model", "mask", "whole checkpoint", "tied head"],
)
@pytest.mark.parametrize("layout", ["zip", "legacy"])
def test_keys_of_other_origins(tmp_path, change, layout):
    model = adapted("fused")
    write_arrays(tmp_path / "a.pt", change(model.adapter_tensors()), layout)
    loaded = PeftModel.from_loralib(tiny_gpt2(), tmp_path / "a.pt", 32, QV)
    np.testing.assert_allclose(logits(loaded), logits(model), atol=1e-6)


def test_a_whole_checkpoint_of_another_base_is_refused(tmp_path):
    tensors = {**adapted("fused").adapter_tensors(), **weights(tiny_gpt2(seed=3))}
    write_torch(tmp_path / "a.pt", {n: a for n, a in tensors.items() if "bias" not in n})
    with pytest.raises(UserError, match=r"a\.pt brings its own .*which differs"):
        PeftModel.from_loralib(tiny_gpt2(), tmp_path / "a.pt", 32, QV)


C_ATTN = "transformer.h.1.attn.c_attn"


def replaced(part: str, shape: tuple[int, ...]):
    return lambda t: {**t, f"{C_ATTN}.{part}": np.ones(shape, "f")}


@pytest.mark.parametrize(
    ("change", "flags", "message"),
    [
        (dict, None, r"c_attn\.lora_A \(8, 12\) and \.lora_B \(24, 4\) have LoRA on 2 of 3 blocks"),
        (dict, None, "say which, such as .*--enable-lora 1,0,1"),
        (dict, [True, False, False], "on 2 of 3 blocks, but enable_lora has 1 of 3"),
        (dict, [True, True], "on 2 of 3 blocks, but enable_lora has 2 of 2"),
        (replaced("lora_A", (8, 13)), QV, "1.attn.c_attn.* do not fit the layer of 12 inputs"),
        (replaced("lora_A", (7, 12)), QV, "1.attn.c_attn.* do not fit the layer of 12 inputs"),
        (replaced("lora_B", (23, 4)), QV, "1.attn.c_attn.* do not fit .* and 36 outputs"),
        (replaced("lora_B", (24,)), QV, r"c_attn\.lora_B is missing or no matrix"),
        (
            lambda t: {k: a for k, a in t.items() if k != f"{C_ATTN}.lora_A"},
            QV,
            r"c_attn\.lora_A is missing",
        ),
        (
            lambda t: {**t, f"{C_ATTN}.lora_A": t[f"{C_ATTN}.lora_A"][:4],
                       f"{C_ATTN}.lora_B": np.ones((36, 4), "f")},
            QV,
            "0.attn.c_attn and .*1.attn.c_attn have LoRA on different blocks",
        ),
        (
            lambda t: {k.replace("h.1", "h.7"): a for k, a in t.items()},
            QV,
            r"1 of its 2 layers match no module .* transformer\.h\.7\.attn\.c_attn\.lora_A",
        ),
        (
            lambda t: {**t, f"{C_ATTN}.bias": np.ones(36, "f")},
            QV,
            r'has the bias transformer\.h\.1\.attn\.c_attn\.bias, but not .*"lora_only"',
        ),
        (lambda t: {**t, "extra": np.ones(2, "f")}, QV, "unexpected: extra"),
        (
            lambda t: {f"transformer.wpe.lora_{x}": np.ones((2, 2), "f") for x in "AB"},
            None,
            r"wpe.* do not fit the embedding \(32, 12\)",
        ),
        (
            lambda t: {f"transformer.h.0.lora_{x}": np.ones((2, 2), "f") for x in "AB"},
            None,
            "are of a Block, which takes no LoRA here",
        ),
        (lambda t: weights(tiny_gpt2()), QV, "a model's own weights: give it as the base model"),
        (lambda t: {"x.bias": np.ones(2, "f")}, QV, "holds biases only"),
        (
            lambda t: {f"base_model.model.{k}.weight": a for k, a in t.items()},
            QV,
            "in another form: give the folder with its adapter_config.json",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(tmp_path, change, flags, message):
    write_torch(tmp_path / "a.pt", change(adapted("fused").adapter_tensors()))
    base = tiny_gpt2()
    before, names = logits(base), [name for name, _ in base.named_parameters()]
    with pytest.raises(UserError, match=message) as error:
        PeftModel.from_loralib(base, tmp_path / "a.pt", 32, flags)
    assert "a.pt" in str(error.value) and "\n" not in str(error.value)
    assert [name for name, _ in base.named_parameters()] == names
    np.testing.assert_array_equal(logits(base), before)


def test_blocks_of_a_file_without_any(tmp_path):
    adapted("plain").save_loralib(tmp_path / "a.pt")
    with pytest.raises(UserError, match="enable_lora is given, but no layer is fused"):
        PeftModel.from_loralib(tiny_gpt2(), tmp_path / "a.pt", 8, QV)
    with pytest.raises(UserError, match="lora_alpha must be a number, not None"):
        PeftModel.from_loralib(tiny_gpt2(), tmp_path / "a.pt", None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modules_to_save": ["wpe"]}, r"modules_to_save \['wpe'\] have no place"),
        ({"alpha_pattern": {"h.1.attn.c_attn": 5}}, r"different lora_alpha \(.*: 8, .*: 5\)"),
        (
            {"use_rslora": True, "rank_pattern": {"h.1.attn.c_attn": 2}},
            "the layers need different lora_alpha",
        ),
    ],
)
def test_what_a_loralib_file_cannot_hold(tmp_path, settings, message):
    model = get_peft_model(tiny_gpt2(), LoraConfig(r=8, **settings))
    with pytest.raises(UserError, match=message):
        model.save_loralib(tmp_path / "a.pt")
    assert not list(tmp_path.iterdir())


def test_an_adapter_is_no_base_model(tmp_path, tiny_run):
    """microsoft/LoRA#138"""
    adapted("fused").save_loralib(tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"a LoRA adapter and no model .*lora_A.*--adapter \S+a\.pt "
                       "--lora-alpha ALPHA"):  # fmt: skip
        jlora.load(tmp_path / "a.pt")
    write_torch(tmp_path / "b.pt", {**weights(tiny_gpt2()), **adapted("fused").adapter_tensors()})
    with pytest.raises(UserError, match="a model with an unmerged LoRA adapter inside"):
        jlora.load(tmp_path / "b.pt")
    file = tiny_run / "best" / "adapter_model.safetensors"
    with pytest.raises(UserError, match=rf"a LoRA adapter and no model.*--adapter {file.parent}"):
        jlora.load(file)
    write_safetensors(tmp_path / "c.safetensors", read_safetensors(file))
    with pytest.raises(UserError, match="attach this with --adapter and its folder"):
        jlora.load(tmp_path / "c.safetensors")


# The file itself ---------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [None, "model_state_dict"])
def test_the_file_is_laid_out_as_torch_does(tmp_path, nested):
    arrays = {
        "a": np.arange(6, dtype="f").reshape(2, 3).T,  # not contiguous
        "é.b": np.ones((), "d"),
        "c": np.zeros((0, 2), "f"),
        "long": np.zeros(70_000, "f"),
    }
    write_torch(tmp_path / "a.pt", arrays, nested)
    for name, array in read_torch(tmp_path / "a.pt").items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, arrays[name])
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        assert archive.read("archive/version") == b"3\n"
        assert archive.read("archive/byteorder") == b"little"
        np.testing.assert_array_equal(
            np.frombuffer(archive.read("archive/data/0"), "<f4"), [0, 3, 1, 4, 2, 5]
        )
        pickled = archive.read("archive/data.pkl")
    operations = list(pickletools.genops(pickled))  # raises for a pickle that is not whole
    assert {value for code, value, _ in operations if code.name == "GLOBAL"} == {
        "torch._utils _rebuild_tensor_v2", "torch FloatStorage", "collections OrderedDict",
    }  # fmt: skip
    texts = [value for code, value, _ in operations if code.name == "BINUNICODE"]
    assert texts[0] == (nested or "a")


def test_a_file_that_asks_for_code_is_refused(tmp_path):
    from test_formats import write_zip

    write_zip(tmp_path / "a.pt", {"x.lora_A": Call(Named("os", "system"), "true")}, {})
    with pytest.raises(UserError, match=r"asks to load os\.system"):
        read_loralib(tmp_path / "a.pt")
    write_zip(tmp_path / "b.pt", {"x.lora_A": Reference("storage", 1, "0", "cpu", 1)}, {})
    with pytest.raises(UserError, match=r"b\.pt: a damaged or incomplete PyTorch file"):
        read_loralib(tmp_path / "b.pt")


# Through the command line ------------------------------------------------------------------------


def run(capsys, *argv) -> str:
    assert main([str(argument) for argument in argv]) == 0
    return capsys.readouterr().out


def test_convert_and_use(tmp_path, tiny_model, tiny_run, capsys):
    file, folder = tmp_path / "a.pt", tmp_path / "peft"
    said = run(capsys, "convert", tiny_run, file)  # the run knows its base model
    assert "load it with lora_alpha=" in said and f"written: {file}" in said
    alpha = said.split("lora_alpha=")[1].split()[0].strip(",")
    run(capsys, "convert", file, folder, "--model", tiny_model, "--lora-alpha", alpha)
    base = jlora.load(tiny_model)
    own = PeftModel.from_pretrained(jlora.load(tiny_model), tiny_run / "best")
    back = PeftModel.from_pretrained(base, folder)
    np.testing.assert_allclose(logits(back), logits(own), atol=1e-6)
    for adapter in ([tiny_run], [file, "--lora-alpha", alpha]):
        out = tmp_path / f"merged{len(adapter)}"
        run(capsys, "merge", tiny_model, adapter[0], out, *adapter[1:])
    one, two = (read_safetensors(tmp_path / f"merged{n}" / "model.safetensors") for n in (1, 3))
    for name, array in one.items():
        np.testing.assert_allclose(two[name], array, atol=1e-7)
    prompt = ["--prompt", "name : A", "--method", "greedy", "--max-new-tokens", 3]
    prompt += ["--precision", "plain"]
    texts = {
        run(capsys, "generate", "--model", tiny_model, "--adapter", *adapter, *prompt)
        for adapter in ([tiny_run / "best"], [file, "--lora-alpha", alpha], [folder])
    }
    assert len(texts) == 1


def test_fused_layers_through_the_command_line(tmp_path, tiny_model, capsys):
    model = get_peft_model(jlora.load(tiny_model), LoraConfig(r=2, lora_alpha=4, enable_lora=QV))
    model.set_adapter_tensors({n: np.full_like(a, 0.1) for n, a in model.adapter_tensors().items()})
    model.save_pretrained(tmp_path / "peft")
    out = tmp_path / "a.pt"
    said = run(capsys, "convert", tmp_path / "peft", out, "--model", tiny_model)
    assert "lora_alpha=4, enable_lora=[True, False, True]" in said
    argv = ["--model", tiny_model, "--lora-alpha", 4, "--enable-lora", "1,0,1"]
    run(capsys, "convert", out, tmp_path / "back", *argv)
    back = PeftModel.from_pretrained(jlora.load(tiny_model), tmp_path / "back")
    assert {type(layer) for layer in back.lora_layers().values()} == {MergedLinear}
    assert Linear not in {type(layer) for layer in back.lora_layers().values()}
    model.eval()
    np.testing.assert_allclose(logits(back), logits(model), atol=1e-6)
