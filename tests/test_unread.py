"""Weights that are read one by one: what is asked for, and nothing else."""

from __future__ import annotations

import ctypes
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from needs import needs_bf16
from test_hub import CONFIG, gpt2_tensors
from tiny_models import randomise_adapter

from jlora import LoraConfig, engine, get_peft_model
from jlora.adapters.base_model import remember_base
from jlora.adapters.export_folder import write_merged
from jlora.adapters.export_gguf import export_gguf
from jlora.engine.products import FrozenProduct, PackedOnly
from jlora.formats import safetensors_file
from jlora.formats.safetensors_file import write_safetensors
from jlora.models.hub import load
from jlora.system import unread as unread_module
from jlora.system.errors import UserError
from jlora.system.runtime import jt
from jlora.system.unread import is_waiting, source_of, unread


@pytest.fixture
def folder(tmp_path):
    write_safetensors(tmp_path / "model.safetensors", gpt2_tensors())
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


@pytest.fixture
def read(monkeypatch):
    """Names of tensors, as they are read."""
    names, real = [], safetensors_file._read_tensor

    def noting(path, name, *rest):
        names.append(name)
        return real(path, name, *rest)

    monkeypatch.setattr(safetensors_file, "_read_tensor", noting)
    return names


def test_loading_reads_nothing_and_one_number_reads_one_tensor(folder, read):
    model = load(folder)
    assert (jt.ones(3) + 1).numpy().tolist() == [2, 2, 2]
    assert read == []
    name, bias = "transformer.h.1.ln_1.bias", dict(model.named_parameters())
    np.testing.assert_array_equal(bias[name].numpy(), gpt2_tensors()[name])
    assert read == [name]


def test_what_is_computed_at_once_waits_for_nobody():
    """With `lazy_execution=0`, as Jittor's users look for errors."""
    source = SimpleNamespace(shape=(3,), read=lambda: np.ones(3, np.float32))
    jt.flags.lazy_execution = 0
    try:
        assert unread(source).numpy().tolist() == [1, 1, 1]
    finally:
        jt.flags.lazy_execution = 1
    assert not is_waiting() and jt.flags.use_threading == 0


def test_a_forward_pass_reads_everything_once_and_jittor_is_as_before(folder, read):
    assert jt.flags.use_threading == 0
    model = load(folder)
    assert jt.flags.use_threading == 1
    model(jt.array([[1, 2, 3]])).numpy()
    assert sorted(read) == sorted(gpt2_tensors())
    assert jt.flags.use_threading == 0


def test_a_model_that_nobody_reads_leaves_jittor_as_before(folder, read):
    model = load(folder)
    del model
    jt.gc()
    assert read == [] and jt.flags.use_threading == 0


def test_a_model_is_merged_and_written_by_the_piece(folder, read, tmp_path):
    """One tensor after the other, none of which stays."""
    model = randomise_adapter(get_peft_model(load(folder), LoraConfig(r=2)))
    assert len(read) == 4  # whose hashes an adapter knows its base by
    matrices = {name for name, array in gpt2_tensors().items() if array.ndim == 2}
    for write in (
        lambda: write_merged(model, tmp_path / "a"),
        lambda: export_gguf(model, tmp_path / "a.gguf", tokenizer=False),
    ):
        read.clear()
        write()
        assert sorted(name for name in read if name in matrices) == sorted(matrices)
    waiting = {n for n, p in model.base_model.named_parameters() if source_of(p) is not None}
    assert waiting >= matrices


@needs_bf16
@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_the_head_which_is_largest_is_packed_first(folder, read, precision):
    model = get_peft_model(load(folder), LoraConfig(r=2))
    remember_base(model)
    read.clear()
    engine.prepare(model, precision, keep_weights=False)
    matrices = [name for name in read if gpt2_tensors()[name].ndim == 2]
    assert matrices[0].endswith("wte.weight") and len(matrices) > 8


@needs_bf16
def test_weights_that_are_kept_beside_the_packed_ones_are_read(folder):
    model = get_peft_model(load(folder), LoraConfig(r=2))
    engine.prepare(model, "bf16", keep_weights=True)
    for module in model.base_model.modules():
        product = vars(module).get("_engine") or vars(module).get("_packed")
        if isinstance(product, FrozenProduct):
            assert source_of(product.weight) is None


@needs_bf16
def test_a_weight_is_packed_before_the_next_is_read(folder, read, monkeypatch):
    model = get_peft_model(load(folder), LoraConfig(r=2))
    remember_base(model)  # reads four, whose hashes an adapter is known by, and keeps none
    read.clear()
    layers = dict(model.base_model.named_modules())

    def check(path, name, *rest):
        waiting = [n for n in read if n.count(".") > 3 and ".ln_" not in n]
        weights = [layers[n.rpartition(".")[0]].weight for n in waiting if n.endswith(".weight")]
        assert all(isinstance(weight, PackedOnly) for weight in weights), name
        return real(path, name, *rest)

    real = safetensors_file._read_tensor
    monkeypatch.setattr(safetensors_file, "_read_tensor", check)
    engine.prepare(model, "bf16", keep_weights=False)
    assert len(read) >= 9 and len(set(read)) == len(read)


def test_a_file_that_changes_before_it_is_read_is_refused(folder):
    model = load(folder)
    write_safetensors(folder / "model.safetensors", gpt2_tensors())
    with pytest.raises(UserError, match="it was changed while it was being read; load it again"):
        model(jt.array([[1, 2, 3]])).numpy()


class Card:
    """Stands for CUDA's library, whose memory is memory."""

    def __init__(self, code: int):
        self.code, self.kinds = code, []

    def cudaMemcpy(self, to, source, size, kind):
        self.kinds.append(kind)
        ctypes.memmove(to, source, size.value)
        return self.code


@pytest.mark.parametrize("code", [0, 2])
def test_on_a_gpu_values_are_copied_to_its_memory(monkeypatch, code):
    card, flags = Card(code), SimpleNamespace(use_cuda=1)
    monkeypatch.setattr(unread_module, "jt", SimpleNamespace(flags=flags))
    monkeypatch.setattr(unread_module.ctypes, "CDLL", lambda name: card)
    values, output = np.arange(6, dtype=np.float64).reshape(2, 3).T, np.zeros((3, 2), np.float32)
    if code:
        with pytest.raises(UserError, match=r"could not be copied to the GPU \(CUDA error 2\)"):
            unread_module._fill(output, values)
    else:
        unread_module._fill(output, values)
        np.testing.assert_array_equal(output, values)
    assert card.kinds == [1]


def test_cupy_is_replaced_where_jittor_has_found_none(monkeypatch):
    """One that is installed and cannot be imported is none."""
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    unread_module._stand_in_for_cupy(True)
    assert "cupy" not in sys.modules
    unread_module._stand_in_for_cupy(False)
    assert "of jlora's" in sys.modules.pop("cupy").__doc__


def test_arrays_of_cupy_are_set(monkeypatch):
    monkeypatch.setattr(unread_module, "jt", SimpleNamespace(flags=SimpleNamespace(use_cuda=1)))
    given = []
    unread_module._fill(SimpleNamespace(set=given.append), np.arange(3))
    assert given[0].dtype == np.float32 and given[0].tolist() == [0, 1, 2]
