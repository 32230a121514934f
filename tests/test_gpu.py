"""The CUDA operators without a card: as C++ beside an emulator, against the plain layers."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import stat
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from needs import needs_products
from tiny_models import round_bf16

from jlora import LoraConfig, UserError, engine, get_peft_model
from jlora.cli import doctor
from jlora.data.batches import Batch
from jlora.decoding.decoder import Decoder
from jlora.decoding.native_decoder import NativeDecoder
from jlora.decoding.native_weights import native_model
from jlora.engine.blocks import BLOCKS
from jlora.formats.lazy import Blocks, LazyArray
from jlora.kernels import elementwise, gpu_library, native, packed_linear
from jlora.kernels.topk import Draw, log_softmax_topk_numpy
from jlora.models.hub import build_model
from jlora.system import cuda_toolkit, environment, machine, runtime
from jlora.system.runtime import jt
from jlora.system.unread import unread
from jlora.training.loop import batch_loss

EMULATOR = Path(__file__).parent / "cuda_emulator"


@pytest.fixture(scope="session")
def emulator(tmp_path_factory) -> Path:
    library = tmp_path_factory.mktemp("cuda") / "operators.so"
    options = ["-std=c++17", "-O1", "-fno-strict-aliasing", "-fPIC", "-shared", "-w"]
    options += ["-DJLORA_CUDA_EMULATOR", f"-I{EMULATOR}", f"-I{EMULATOR / 'jlora'}", "-x", "c++"]
    command = [machine.compiler(), *options, str(gpu_library.SOURCE), "-o", str(library)]
    subprocess.run(command, check=True)
    return library


@pytest.fixture
def gpu(emulator, monkeypatch):
    """Operators run in the emulator until the end of the test."""
    monkeypatch.setattr(gpu_library, "emulated", emulator)
    yield
    native.free_retired()


GPT2 = {
    "model_type": "gpt2", "vocab_size": 53, "n_positions": 64, "n_embd": 64, "n_layer": 2,
    "n_head": 2,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "vocab_size": 53, "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
}  # fmt: skip
CASES = {
    "gpt2": (GPT2, {"target_modules": ["c_attn"], "enable_lora": [True, False, True]}),
    "gpt2, every layer": (GPT2, {"target_modules": ["c_attn", "c_fc", "c_proj"]}),
    "llama": (LLAMA, {"target_modules": ["q_proj", "v_proj", "gate_proj", "down_proj"]}),
    "qwen2, heads of 128": (
        {**LLAMA, "model_type": "qwen2", "hidden_size": 128, "num_attention_heads": 1},
        {"target_modules": ["q_proj", "k_proj", "o_proj", "up_proj"]},
    ),
    "mistral, a window": (
        {**LLAMA, "model_type": "mistral", "sliding_window": 5, "tie_word_embeddings": False},
        {"target_modules": ["q_proj", "v_proj"]},
    ),
}


def make(config: dict, lora: dict):
    """A model with random numbers, none of them zero; the same at each call."""
    model = get_peft_model(build_model(config), LoraConfig(r=4, lora_alpha=8, **lora))
    rng = np.random.default_rng(0)
    for name, parameter in model.named_parameters():
        norm = "weight" in name and ("ln_" in name or "norm" in name)
        values = norm + (0.1 if "lora" in name else 0.05) * rng.standard_normal(parameter.shape)
        parameter.assign(jt.array(values.astype("f")))
    return model


LENGTHS = [19, 3, 12]


def loss_and_gradients(model, smoothing: float = 0.1):
    rng = np.random.default_rng(1)
    total = sum(LENGTHS)
    ids = rng.integers(0, 53, (1, total)).astype(np.int32)
    mask = (rng.random((1, total)) < 0.6).astype(np.float32)
    batch = Batch(ids, np.roll(ids, -1, 1), mask, np.array(LENGTHS), is_stream=True)
    names, parameters = zip(*model.trainable_parameters())
    loss = batch_loss(model, batch, smoothing)
    gradients = [g.numpy() for g in jt.grad(loss, list(parameters))]
    return loss.item(), dict(zip(names, gradients))


def relative(x: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(x - reference) / np.linalg.norm(reference))


def plans_of(model) -> list:
    """The plans of the blocks that ran as one operator."""
    fused = [m for m in model.modules() if type(m) in BLOCKS.values()]
    return [plan for block in fused for plan in vars(block).get("_plans", {}).values()]


SLOW = ("gpt2, every layer", "qwen2, heads of 128")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in CASES]
)
def test_losses_and_gradients_are_those_of_the_plain_layers(name, emulator, monkeypatch):
    config, lora = CASES[name]
    loss, gradients = loss_and_gradients(make(config, lora))
    monkeypatch.setattr(gpu_library, "emulated", emulator)
    model = make(config, lora)
    assert engine.prepare(model, keep_weights=False) == "bf16"
    found, fast = loss_and_gradients(model)
    assert len(plans_of(model)) == 2 and None not in plans_of(model)
    assert found == pytest.approx(loss, rel=2e-3)
    assert set(fast) == set(gradients)
    for name, gradient in gradients.items():
        assert relative(fast[name], gradient) < 3e-2, name


@pytest.mark.slow
def test_recomputed_blocks_give_the_same_gradients(gpu):
    config, lora = CASES["llama"]
    kept, again = make(config, lora), make(config, lora)
    engine.prepare(kept, "bf16")
    engine.prepare(again, "bf16", checkpoint_activations=True)
    (loss, gradients), (other, others) = loss_and_gradients(kept), loss_and_gradients(again)
    assert loss == other
    for name, gradient in gradients.items():
        np.testing.assert_array_equal(others[name], gradient)


def test_trained_norms_and_biases_get_their_gradients(emulator, monkeypatch):
    config, lora = CASES["gpt2"]

    def trained():
        model = make(config, {**lora, "bias": "all"})
        for name, parameter in model.named_parameters():
            if "ln_" in name:
                parameter.start_grad()
        return model

    _, gradients = loss_and_gradients(trained())
    monkeypatch.setattr(gpu_library, "emulated", emulator)
    model = trained()
    engine.prepare(model, "bf16")
    _, fast = loss_and_gradients(model)
    assert any(name.endswith("c_attn.bias") for name in gradients)
    for name, gradient in gradients.items():
        assert relative(fast[name], gradient) < 3e-2, name


def test_dropout_is_the_processors(emulator, monkeypatch):
    x = jt.array(np.random.default_rng(0).standard_normal((7, 33)).astype("f"))
    if native.problem() is not None:
        pytest.skip("no operators for this processor")
    found = []
    for library in (None, emulator):
        monkeypatch.setattr(gpu_library, "emulated", library)
        runtime.set_seed(5)
        drop = elementwise.FusedDropout(0.3)
        drop.train()
        found.append(drop(x).numpy())
    assert 0.1 < (found[0] == 0).mean() < 0.5
    np.testing.assert_allclose(found[1], found[0], rtol=1e-6)


@pytest.mark.slow
def test_what_the_card_does_not_compute_runs_as_plain_layers(emulator, monkeypatch):
    """Gemma 2's blocks have norms after attention and MLP, and heads of 256."""
    config = {
        **LLAMA, "model_type": "gemma2", "head_dim": 32, "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 32, "sliding_window": 8, "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
    }  # fmt: skip
    lora = {"target_modules": ["q_proj", "v_proj"]}
    loss, gradients = loss_and_gradients(make(config, lora))
    monkeypatch.setattr(gpu_library, "emulated", emulator)
    model = make(config, lora)
    engine.prepare(model, "bf16")
    found, fast = loss_and_gradients(model)
    assert not any(plans_of(model))
    assert native_model(model) is None
    assert found == pytest.approx(loss, rel=2e-3)
    for name, gradient in gradients.items():
        assert relative(fast[name], gradient) < 3e-2, name


@pytest.mark.parametrize("name", ["gpt2", "mistral, a window"])
def test_decoding_is_that_of_the_plain_layers(name, emulator, monkeypatch):
    config, lora = CASES[name]
    moves = [([0, 0, 1], [4, 5, 6]), ([1, 0, 2, 2], [7, 8, 9, 10])]

    def states(decoder):
        with jt.no_grad():
            decoder.enter([[1, 2, 3, 4, 5, 6, 7], [7, 8, 9]])
            yield np.array(decoder.hidden)
            for rows, tokens in moves:
                decoder.advance(np.array(rows), np.array(tokens))
                yield np.array(decoder.hidden)

    plain = make(config, lora)
    plain.eval()
    expected = list(states(Decoder(plain)))
    monkeypatch.setattr(gpu_library, "emulated", emulator)
    model = make(config, lora)
    engine.prepare(model, "bf16", keep_weights=False)
    model.eval()
    for found, reference in zip(states(NativeDecoder(native_model(model), model)), expected):
        assert relative(found, reference) < 2e-2


def test_a_resumed_row_is_the_whole_row(gpu):
    model = make(*CASES["llama"])
    engine.prepare(model, "bf16")
    model.eval()
    whole, resumed = (NativeDecoder(native_model(model), model) for _ in range(2))
    whole.enter([[1, 2, 3, 4, 5, 6]])
    resumed.enter([[1, 2, 3]])
    resumed.advance(np.array([0]), np.array([4]))
    resumed.advance(np.array([0]), np.array([9]))
    resumed.resume(4, [5, 6])
    assert relative(resumed.hidden, whole.hidden) < 1e-2


def test_the_best_words_are_those_of_the_logits(gpu):
    rng = np.random.default_rng(0)
    weight, hidden = (rng.standard_normal(s).astype("f") for s in ((203, 64), (5, 64)))
    # Numbers that bf16 holds, so that the logits are exact.
    weight, hidden = (np.round(8 * x) / 8 for x in (weight, hidden))
    hidden[4, 0] = np.nan
    banned, penalised = [[3, 3], [], [-1, 7], [0], []], [[5], [1, 1, 2], [], [9], []]
    from jlora.kernels.decoder import head_topk

    head = packed_linear.PackedWeight(jt.array(weight), False)
    values, ids = head_topk(hidden, head.address, 9, banned, penalised, 1.5)
    expected, places = log_softmax_topk_numpy(hidden @ weight.T, 9, banned, penalised, 1.5)
    np.testing.assert_array_equal(ids, places)
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-5)


def test_draws_are_those_of_the_logits(gpu):
    model = make(*CASES["llama"])
    engine.prepare(model, "bf16")
    model.eval()
    decoder = NativeDecoder(native_model(model), model)
    decoder.enter([[1, 2, 3, 4, 5, 6], [3, 4]])
    draws = [Draw(1.3, 0.8), Draw()]
    values, ids = decoder.best(2, [[1], []], draws=draws)
    with jt.no_grad():
        logits = model.lm_head_logits(jt.array(decoder.hidden)).numpy()
    expected, places = log_softmax_topk_numpy(logits, 2, [[1], []], draws=draws)
    np.testing.assert_array_equal(ids, places)
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-5)


def test_a_target_outside_the_vocabulary_has_no_loss(gpu):
    model = make(*CASES["gpt2"])
    engine.prepare(model, "bf16")
    hidden = jt.array(np.ones((2, 64), "f"))
    losses = model.get_base_model().target_losses(hidden, jt.array(np.array([3, 53], "i")))
    assert np.isnan(losses.numpy()).tolist() == [False, True]


def test_packed_weights_come_back_rounded(gpu):
    weight = np.random.default_rng(0).standard_normal((24, 40)).astype("f")
    for transposed in (False, True):
        packed = packed_linear.PackedWeight(jt.array(weight), transposed)
        np.testing.assert_allclose(packed.unpack(transposed), weight, rtol=2**-8)


FEWER_BITS = [pytest.param(k, marks=needs_products(k)) for k in ("int8", "int4")]


def hard_rows(n: int, k: int) -> np.ndarray:
    """Rows that are hard to round: far numbers, tiny ones, equal ones, zeros, one that is NaN."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((n, k)) * np.geomspace(1e-7, 30, n)[:, None]
    weight[3], weight[4, :40], weight[5, 7] = 0, 0.5, 90 * weight[5].std()
    weight[6] = rng.choice([-0.25, 0.25, 0.5], k)
    weight[7, 50] = np.nan
    return weight.astype("f")


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("kind", FEWER_BITS)
def test_weights_in_fewer_bits_are_the_processors(kind, transposed, emulator, monkeypatch):
    weight = hard_rows(32, 96)
    found = []
    for library in (None, emulator):
        monkeypatch.setattr(gpu_library, "emulated", library)
        given = jt.array(weight.T.copy() if transposed else weight)
        packed = packed_linear.PackedWeight(given, transposed, kind)
        kept = packed.unpack(transposed)
        found.append(kept.T if transposed else kept)
    np.testing.assert_allclose(found[1], found[0], rtol=1e-6, atol=1e-12)
    assert np.isnan(found[1][7]).any() and np.isfinite(np.delete(found[1], 7, 0)).all()
    # The last packed weight is the card's.
    x, dy = (np.random.default_rng(1).standard_normal((5, w)).astype("f") for w in (96, 32))
    kept = round_bf16(found[1][8:])
    y = packed(jt.array(x)).numpy()[:, 8:]
    np.testing.assert_allclose(y, round_bf16(x) @ kept.T, rtol=1e-4, atol=1e-4)


@needs_products("int4")
@pytest.mark.parametrize("kind", packed_linear.FORMS)
def test_a_gguf_files_blocks_are_taken_as_the_processor_takes_them(kind, emulator, monkeypatch):
    rng = np.random.default_rng(0)
    if kind == "Q4_K":  # any bytes, with scales of a usual size
        rows = rng.integers(0, 256, (9, 2, 144), np.uint8)
        rows[..., :4] = (rng.random((9, 2, 2)) / 64).astype(np.float16).view(np.uint8)
        rows = rows.reshape(9, -1)
    else:
        rows = quants.quantize(hard_rows(9, 512)[:7], GGMLQuantizationType[kind])
    source = LazyArray((len(rows), 512), "f", None, Blocks(kind, lambda: rows))
    found = []
    for library in (None, emulator):
        monkeypatch.setattr(gpu_library, "emulated", library)
        packed = packed_linear.PackedWeight(unread(source), False, "int4")
        assert packed.taken == kind
        found.append(packed.unpack(False))
    np.testing.assert_array_equal(found[1], found[0])


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("gpt2", "int4"),
        pytest.param("gpt2", "int8", marks=pytest.mark.slow),
        pytest.param("llama", "int4", marks=pytest.mark.slow),
        ("llama", "int8"),
    ],
)
def test_models_in_fewer_bits_compute_with_the_numbers_kept(name, precision, emulator, monkeypatch):
    """Against the plain layers with these numbers, which `restore` gives back."""
    config, lora = CASES[name]
    monkeypatch.setattr(gpu_library, "emulated", emulator)
    model = make(config, lora)
    assert engine.prepare(model, precision, keep_weights=False) == precision
    found, fast = loss_and_gradients(model)
    assert len(plans_of(model)) == 2 and None not in plans_of(model)
    model.eval()
    decoder = NativeDecoder(native_model(model), model)
    with jt.no_grad():
        decoder.enter([[1, 2, 3, 4, 5, 6, 7], [7, 8, 9]])
        decoder.advance(np.array([0, 0, 1]), np.array([4, 5, 6]))
    states = np.array(decoder.hidden)
    model.train()
    engine.restore(model)
    monkeypatch.setattr(gpu_library, "emulated", None)
    loss, gradients = loss_and_gradients(model)
    assert found == pytest.approx(loss, rel=2e-3)
    for name, gradient in gradients.items():
        assert relative(fast[name], gradient) < 3e-2, name
    model.eval()
    plain = Decoder(model)
    with jt.no_grad():
        plain.enter([[1, 2, 3, 4, 5, 6, 7], [7, 8, 9]])
        plain.advance(np.array([0, 0, 1]), np.array([4, 5, 6]))
    assert relative(states, np.array(plain.hidden)) < 2e-2


def test_what_the_card_has_not_is_refused(gpu):
    model = make(*CASES["gpt2"])
    for precision in ("fp32", "int8-both"):
        with pytest.raises(UserError, match="on a GPU use bf16, int8, int4 or plain"):
            engine.prepare(model, precision)
    for kind, columns in (("bf16", 41), ("int8", 41), ("int4", 40)):
        with pytest.raises(UserError, match=f"no {kind} product of 24 by {columns}"):
            packed_linear.PackedWeight(jt.zeros((24, columns)), False, kind)


def test_what_fails_on_the_card_is_one_line(gpu):
    with pytest.raises(UserError, match="the GPU failed in the card's memory"):
        gpu_library.DeviceMemory(1 << 50)
    assert gpu_library.DeviceMemory.of(np.arange(3)).numpy((3,), np.int64).tolist() == [0, 1, 2]


def test_a_call_without_memory_fails_and_the_next_does_not(gpu):
    """It ends where the memory is missing: a kernel that wrote there would end CUDA."""
    from jlora.kernels.decoder import head_topk

    rng = np.random.default_rng(0)
    head = packed_linear.PackedWeight(jt.array(rng.standard_normal((203, 64)).astype("f")), False)
    hidden = rng.standard_normal((400, 64)).astype("f")
    set_memory = gpu_library.library().emulator_memory
    set_memory(200_000)  # the logits take 324,800
    try:
        with pytest.raises(UserError, match="the GPU failed in the card's memory"):
            head_topk(hidden, head.address, 3)
    finally:
        set_memory(ctypes.c_int64(1 << 40))
    values, _ = head_topk(hidden[:2], head.address, 3)
    assert np.isfinite(values).all()


def test_a_change_of_any_header_compiles_the_library_anew():
    """The name of the compiled library says which sources it is of."""
    read, left = set(), [gpu_library.SOURCE]
    while left:
        path = left.pop()
        names = re.findall(r'^#include "(.+)"', path.read_text(), re.MULTILINE)
        found = {(path.parent / name).resolve() for name in names if (path.parent / name).is_file()}
        left += found - read
        read |= found
    outside = {path.stem for path in read if path.parent != gpu_library.FOLDER}
    assert outside == set(gpu_library.SHARED)


# --- the toolkit ----------------------------------------------------------------------------


def toolkit(folder: Path, version: int = 13) -> cuda_toolkit.Toolkit:
    """An installed CUDA with files that say what they are; its nvcc prints its arguments."""
    for name in ("bin", "include/cccl/cub", "lib64"):
        (folder / name).mkdir(parents=True)
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text('#!/bin/sh\nfor a in "$@"; do echo "$a"; done\n')
    nvcc.chmod(0o755)
    for name in (*cuda_toolkit.HEADERS, "cccl/cub/cub.cuh"):
        (folder / "include" / name).write_text(f"// the real {name}")
    for name in cuda_toolkit.LIBRARIES:
        (folder / "lib64" / f"{name}.so.{version}").touch()
    return cuda_toolkit.Toolkit(nvcc, (folder / "include",), (folder / "lib64",))


def test_a_toolkit_is_given_the_names_that_jittor_knows(tmp_path: Path):
    found = toolkit(tmp_path / "cuda")
    assert found.missing == [] and not found.has_cudnn
    nvcc = cuda_toolkit.set_up(found, tmp_path / "cache")
    home = nvcc.parent.parent
    assert (home / "lib64" / "libcublas.so").resolve().name == "libcublas.so.13"
    assert (home / "include" / "curand.h").read_text() == "// the real curand.h"
    for ours in ("cuda_runtime.h", "cub/cub.cuh"):
        text = (home / "include" / ours).read_text()
        assert f'#include "{tmp_path}/cuda/include/' in text and "CUDART_VERSION >= 13000" in text
    assert "NPP_MAX_32S" in (home / "include" / "npp.h").read_text()
    assert cuda_toolkit.set_up(found, tmp_path / "cache") == nvcc
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == [home.name]


def test_nvcc_gets_flags_that_it_knows(tmp_path: Path):
    nvcc = cuda_toolkit.set_up(toolkit(tmp_path / "cuda"), tmp_path / "cache")
    arguments = ["-std=c++14", "-arch=compute_90", "-code=sm_90", "-DX=a b"]
    told = subprocess.run([nvcc, *arguments], capture_output=True, text=True, check=True)
    lines = told.stdout.splitlines()
    assert lines[-5:] == [
        "-std=c++17", "-code=compute_90", "-arch=compute_90", "-code=sm_90", "-DX=a b",
    ]  # fmt: skip


def test_a_jlora_started_by_another_takes_its_toolkit(tmp_path: Path, monkeypatch):
    """Which is in its environment; of the links to it no second folder of links is made."""
    monkeypatch.setattr(machine, "gpu_problem", lambda: None)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr(cuda_toolkit, "_compilers", lambda: iter([str(found.nvcc)]))
    monkeypatch.delenv("nvcc_path", raising=False)
    found = toolkit(tmp_path / "cuda")
    nvcc = environment.jittor_variables()["nvcc_path"]
    assert nvcc.startswith(str(tmp_path / ".cache"))
    monkeypatch.setattr(cuda_toolkit, "_compilers", lambda: iter([nvcc]))
    monkeypatch.setenv("nvcc_path", nvcc)
    variables = environment.jittor_variables()
    assert "nvcc_path" not in variables and variables["conv_opt"] == "1"
    # Apart from a build for the processor, which Jittor would take instead.
    assert variables["cache_name"] == "jlora2-cuda"
    assert len(list((tmp_path / ".cache" / "jittor" / "jlora-cuda").iterdir())) == 1


def test_parts_that_are_missing_are_named(tmp_path: Path, monkeypatch):
    found = toolkit(tmp_path / "cuda")
    (tmp_path / "cuda" / "include" / "curand.h").unlink()
    (tmp_path / "cuda" / "lib64" / "libcublasLt.so.13").unlink()
    assert found.missing == ["curand.h", "libcublasLt.so"]
    monkeypatch.setattr(machine.glob, "glob", lambda pattern: ["/dev/nvidia0"])
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda name: None)
    monkeypatch.setattr(cuda_toolkit, "find", lambda: found)
    assert machine.gpu_problem() == (
        "there is an NVIDIA GPU but the CUDA toolkit lacks curand.h, libcublasLt.so"
    )
    monkeypatch.setattr(cuda_toolkit, "find", lambda: None)
    assert "no CUDA compiler" in machine.gpu_problem()
    # Only what `find` looks for helps; Jittor's own download is nowhere in it.
    assert "pip install nvidia-cuda-nvcc" in doctor._gpu(True).fix


def test_the_doctor_says_where_jittor_was_compiled_without_cuda(monkeypatch):
    monkeypatch.setattr(machine, "gpu_problem", lambda: None)
    monkeypatch.setattr(runtime.jt, "has_cuda", False)
    found = doctor._gpu(True)
    assert not found.ok and "did not compile for CUDA: the CPU is used" in found.detail
    assert re.search(r"rm /.*/jlora-\*\.json; the next start tries again", found.fix)
    assert list(Path(found.fix.split()[1]).parent.glob("jlora-*.json"))


def test_packages_of_nvidia_are_a_toolkit(tmp_path: Path, monkeypatch):
    toolkit(tmp_path / "nvidia" / "cu13")
    (tmp_path / "nvidia" / "cu13" / "lib64").rename(tmp_path / "nvidia" / "cu13" / "lib")
    monkeypatch.setattr(cuda_toolkit.sys, "path", [str(tmp_path)])
    monkeypatch.setenv("PATH", os.defpath)
    monkeypatch.delenv("nvcc_path", raising=False)
    found = cuda_toolkit.find()
    assert found.nvcc.stat().st_mode & stat.S_IXUSR and found.missing == []


def test_every_thread_is_told_of_its_failures(gpu):
    told = []

    def allocate():
        for _ in range(200):
            with contextlib.suppress(UserError):
                gpu_library.DeviceMemory(1 << 41)
                return
            told.append(1)

    threads = [threading.Thread(target=allocate) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(told) == 800 and gpu_library.library().gpu_failure() is None
    assert gpu_library.DeviceMemory(64).address


@pytest.mark.parametrize(("major", "known"), [(7, True), (8, True), (9, False)])
def test_cudnn_counts_where_jittor_knows_it(tmp_path: Path, major: int, known: bool):
    found = toolkit(tmp_path / "cuda")
    version = tmp_path / "cuda" / "include" / "cudnn_version.h"
    version.write_text(f"#define CUDNN_MAJOR {major}\n#define CUDNN_MINOR 1\n")
    assert not found.has_cudnn
    (tmp_path / "cuda" / "lib64" / "libcudnn_ops_infer.so.8").touch()
    assert found.has_cudnn is known


def test_the_device_is_chosen_by_name(monkeypatch):
    asked = []
    monkeypatch.setattr(runtime, "use_gpu", lambda wanted: asked.append(wanted))
    for device in ("auto", "cpu", "gpu"):
        monkeypatch.setenv("JLORA_DEVICE", device)
        runtime.choose_device()
    assert asked == [None, False, True]
    monkeypatch.setenv("JLORA_DEVICE", "cuda:1")
    with pytest.raises(UserError, match="JLORA_DEVICE=cuda:1: it is one of auto, cpu, gpu"):
        runtime.choose_device()


def test_several_processes_are_refused_on_a_gpu(monkeypatch):
    monkeypatch.setattr(runtime, "use_gpu", lambda wanted: True)
    monkeypatch.setattr(runtime.distributed, "world", lambda: type("World", (), {"size": 2}))
    with pytest.raises(UserError, match="start it without --nproc"):
        runtime.choose_device()


def test_old_cards_are_told_so(monkeypatch):
    class Flags:
        cuda_archs = (75,)

    monkeypatch.setattr(gpu_library, "jt", type("Jittor", (), {"flags": Flags}))
    with pytest.raises(UserError, match="capability is 7.5, and products in bf16 need 8.0"):
        gpu_library._compiled()
