"""`jlora combine` and `add_weighted_adapter`; PEFT's own numbers are in parity/combining.py."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import ids_of, randomise_adapter, tiny_gpt2, tiny_llama

from jlora.adapters import LoraConfig, PeftModel, get_peft_model
from jlora.adapters.combine import nearest
from jlora.cli import main
from jlora.system.errors import UserError
from jlora.system.runtime import jt

IDS = ids_of((2, 9))


def logits(model):
    return model(jt.array(IDS)).numpy()


def changes(model):
    return {name: layer.delta_weight().numpy() for name, layer in model.lora_layers().items()}


def write(folder, base=tiny_llama, seed=1, **settings):
    config = LoraConfig(**{"target_modules": ["q_proj", "v_proj"], "r": 2, **settings})
    model = randomise_adapter(get_peft_model(base(), config), seed)
    model.save_pretrained(folder)
    return changes(model)


@pytest.fixture
def two(tmp_path):
    """Two adapters that share q_proj, and their changes."""
    a = write(tmp_path / "a", use_rslora=True)
    b = write(tmp_path / "b", seed=2, r=3, target_modules=["q_proj", "down_proj"])
    return tmp_path, a, b


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_the_change_is_the_weighted_sum(two, kind, capsys):
    tmp_path, a, b = two
    out = tmp_path / "sum"
    arguments = ["combine", str(tmp_path / "a"), str(tmp_path / "b"), "--type", kind]
    rank = ["--rank", "5"] if kind == "svd" else []
    assert main([*arguments, *rank, "--weights=.7,-.3", "--out", str(out)]) == 0
    assert "written:" in capsys.readouterr().out
    model = PeftModel.from_pretrained(tiny_llama(), out)
    found = changes(model)
    assert set(found) == {*a, *b}
    for name, change in found.items():
        expected = 0.7 * a.get(name, 0) - 0.3 * b.get(name, 0)
        np.testing.assert_allclose(change, expected, atol=1e-5)
    # In the memory of one model it is the same.
    both = PeftModel(tiny_llama())
    for name in "ab":
        both.load_adapter(tmp_path / name, name)
    both.add_weighted_adapter(["a", "b"], [0.7, -0.3], "sum", kind, 5 if kind == "svd" else None)
    assert both.active_adapter is None
    both.set_adapter("sum")
    np.testing.assert_allclose(logits(both), logits(model), atol=1e-5)
    assert both.trainable_parameters() == []


def test_svd_is_the_nearest_of_its_rank():
    random = np.random.default_rng(0)
    A, B = random.standard_normal((6, 9)), random.standard_normal((7, 6))
    U, S, V = np.linalg.svd(B @ A)
    for rank in (1, 3, 6):
        small_A, small_B = nearest(A, B, rank)
        assert small_A.shape == (rank, 9) and small_B.shape == (7, rank)
        np.testing.assert_allclose(small_B @ small_A, (U[:, :rank] * S[:rank]) @ V[:rank])
    assert len(nearest(A, B, 40)[0]) == 6


def test_fused_layers_keep_their_blocks(tmp_path):
    """The sum of adapters on GPT-2's query and value changes no key."""
    QV = {"target_modules": ["c_attn"], "enable_lora": [True, False, True]}
    a = write(tmp_path / "a", tiny_gpt2, **QV)
    b = write(tmp_path / "b", tiny_gpt2, seed=2, **QV)
    for kind in ("linear", "cat"):
        out = str(tmp_path / kind)
        folders = str(tmp_path / "a"), str(tmp_path / "b")
        assert main(["combine", *folders, "--type", kind, "--out", out]) == 0
        for name, change in changes(PeftModel.from_pretrained(tiny_gpt2(), out)).items():
            assert np.abs(change[:, 12:24]).max() == 0 < np.abs(change[:, 24:]).max()
            if kind == "cat":
                np.testing.assert_allclose(change, (a[name] + b[name]) / 2, atol=1e-6)


def test_what_cannot_be_combined(two, tmp_path, capsys):
    write(tmp_path / "dora", use_dora=True)
    write(tmp_path / "biases", tiny_gpt2, target_modules=["c_attn"], bias="all")
    write(tmp_path / "copies", modules_to_save=["norm"])
    write(tmp_path / "gpt2", tiny_gpt2, target_modules=["c_attn"])
    write(tmp_path / "other", lambda: tiny_llama(seed=5))
    write(tmp_path / "half")
    file = tmp_path / "half" / "adapter_model.safetensors"
    save_file(dict(list(load_file(file).items())[:-1]), file)
    for names, options, message in (
        ("a dora", [], "dora is of the variant 'dora', whose change is no sum of B A"),
        ("biases biases", [], "biases trains biases (bias 'all')"),
        ("a copies", [], "copies has whole modules (modules_to_save ['norm'])"),
        ("a gpt2", [], "are not one; combine adapters of one base"),
        ("a other", [], "are not one; combine adapters of one base"),
        ("a half", [], "A and B of model.layers.1.self_attn.v_proj do not fit"),
        ("a b", ["--type", "linear"], "linear needs equal ranks, and model.layers.0.self_attn"),
        ("a b", ["--weights", ".7"], "2 adapters and 1 weights; give one for each"),
        ("a b", ["--weights", "1,nan"], "a weight must be a number, not nan"),
        ("a b", ["--type", "cat", "--rank", "3"], "a rank is for svd; with cat it follows"),
        ("a nowhere", [], "nowhere is no folder"),
        ("a b", ["--out", str(tmp_path / "a")], "a is there already; remove it"),
    ):
        folders = [str(tmp_path / name) for name in names.split()]
        assert main(["combine", *folders, "--out", str(tmp_path / "sum"), *options]) == 2, message
        assert message in capsys.readouterr().err
        assert not (tmp_path / "sum").exists()
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "a", adapter_name="a")
    with pytest.raises(UserError, match="combination_type 'ties' is none that is built here"):
        model.add_weighted_adapter(["a"], [1.0], "sum", "ties")
    with pytest.raises(UserError, match="no adapter is called 'b'; there are a"):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum")
    assert model.available_adapters == ["a"]
