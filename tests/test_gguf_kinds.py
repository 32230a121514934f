"""The number types of GGUF files: read as the gguf package has them, written as llama.cpp would."""

from __future__ import annotations

import struct
import tracemalloc

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, quants
from test_formats import LLAMA, keyed
from tiny_models import tiny_llama, weights

from jlora.adapters.export_gguf import export_gguf
from jlora.formats.gguf_file import open_gguf, read_gguf, read_tensors
from jlora.formats.gguf_kinds import MIXTURES, READ, WRITTEN, check_written, kind_of, quantize
from jlora.formats.rounding import narrow, widen
from jlora.system.errors import UserError

RANDOM = np.random.default_rng(5)


def test_the_package_dequantizes_all_that_is_read():
    assert set(READ) <= {kind.name for kind in quants._type_traits} | {"F32", "F16"}


def random_blocks(kind: str, rows: int, blocks: int) -> np.ndarray:
    """Bytes of a tensor (rows, blocks * block size) that dequantize to finite numbers.

    Scales are 16-bit floats at places that depend on the type: bytes under 0x3C keep them finite.
    """
    size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]][1]
    return RANDOM.integers(0, 0x3C, (rows, blocks * size)).astype(np.uint8)


def write(path, tensors, **values):
    """A GGUF file of raw tensors: name -> (type, array as the writer takes it)."""
    writer = GGUFWriter(path, "llama")
    for key, value in keyed("llama", {**LLAMA, **values}).items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
    for name, (kind, data) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", [k for k in READ if k not in ("F32", "F16", "BF16")])
def test_every_quantized_type_is_read_as_the_package_has_it(tmp_path, kind):
    data = random_blocks(kind, 3, 2)
    path = write(tmp_path / "m.gguf", {"token_embd.weight": (kind, data)})
    found = read_tensors(path, open_gguf(path))["token_embd.weight"].read()
    with np.errstate(all="ignore"):
        expected = quants.dequantize(data, GGMLQuantizationType[kind])
    assert found.dtype == np.float32 and found.shape == expected.shape
    assert np.isfinite(expected).all() and type(found) is np.ndarray
    np.testing.assert_array_equal(found, expected)


def test_what_is_read_is_no_part_of_the_file(tmp_path):
    """The package gives views of the mapped file, which Jittor does not take."""
    array = RANDOM.standard_normal((3, 64)).astype("f")
    for kind in ("F32", "F16", "BF16"):
        path = write(tmp_path / "m.gguf", {"token_embd.weight": (kind, quantize(array, kind))})
        found = read_tensors(path, open_gguf(path))["token_embd.weight"].read()
        path.write_bytes(bytes(path.stat().st_size))
        assert type(found) is np.ndarray and np.abs(found - array).max() < 0.02


def test_a_q4_k_block_by_hand(tmp_path):
    """One block of 256: d, dmin (float16), 8 scales and 8 minima of 6 bits, then 4-bit numbers."""
    scales, minima = np.arange(8) * 3 + 1, np.arange(8) * 2  # up to 22: the lower 4 of 6 bits and 2
    packed = np.zeros(12, np.uint8)
    packed[:4], packed[4:8] = scales[:4] & 63, minima[:4] & 63
    packed[8:] = (scales[4:] & 15) | ((minima[4:] & 15) << 4)
    packed[:4] |= (scales[4:] >> 4 << 6).astype(np.uint8)
    packed[4:8] |= (minima[4:] >> 4 << 6).astype(np.uint8)
    numbers = RANDOM.integers(0, 16, (8, 32))
    # Two groups of 32 share bytes: the even one in the low halves.
    halves = (numbers[0::2] | numbers[1::2] << 4).astype(np.uint8)
    block = np.float16([0.5, 0.25]).tobytes() + packed.tobytes() + halves.tobytes()
    data = np.frombuffer(block, np.uint8)[None]
    path = write(tmp_path / "m.gguf", {"token_embd.weight": ("Q4_K", data)})
    found = read_tensors(path, open_gguf(path))["token_embd.weight"]
    expected = 0.5 * scales[:, None] * numbers - 0.25 * minima[:, None]
    np.testing.assert_array_equal(found, expected.reshape(1, 256).astype("f"))


def test_reading_needs_one_tensor_beside_the_result(tmp_path):
    tensors = {
        f"blk.{layer}.ffn_down.weight": ("Q6_K", random_blocks("Q6_K", 256, 2))
        for layer in range(8)
    }
    path = write(tmp_path / "m.gguf", tensors)
    reader = open_gguf(path)
    read_tensors(path, reader)  # tables of the package
    tracemalloc.start()
    found = read_tensors(path, reader)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    sizes = [array.nbytes for array in found.values()]
    assert peak < sum(sizes) + 2.5 * max(sizes)


def test_a_row_that_does_not_divide_into_blocks_is_one_line(tmp_path):
    path = write(tmp_path / "m.gguf", {"token_embd.weight": ("Q4_K", random_blocks("Q4_K", 2, 1))})
    whole = path.read_bytes()
    shape = struct.pack("<QQ", 256, 2)
    assert whole.count(shape) == 1
    for width in (255, 128, 32, 0):
        path.write_bytes(whole.replace(shape, struct.pack("<QQ", width, 2)))
        with pytest.raises(UserError, match="m.gguf") as error:
            read_gguf(path)
        assert "\n" not in str(error.value)


def test_a_truncated_k_quant_is_one_line(tmp_path):
    path = write(tmp_path / "m.gguf", {"token_embd.weight": ("Q6_K", random_blocks("Q6_K", 4, 1))})
    whole = path.read_bytes()
    for cut in (25, 33, 210, 840):  # the last 24 are padding
        path.write_bytes(whole[:-cut])
        with pytest.raises(UserError, match="damaged or incomplete"):
            read_gguf(path)


@pytest.mark.parametrize(("number", "said"), [(4, "type 4"), (99, "type 99"), (9, "Q8_1")])
def test_an_unknown_type_is_refused_by_its_name(tmp_path, number, said):
    """4 was withdrawn from llama.cpp, 99 may come; Q8_1 exists but in no file."""
    path = write(tmp_path / "m.gguf", {"token_embd.weight": ("Q5_1", random_blocks("Q5_1", 4, 3))})
    whole = path.read_bytes()
    head = struct.pack("<QQI", 96, 4, int(GGMLQuantizationType.Q5_1))
    assert whole.count(head) == 1
    path.write_bytes(whole.replace(head, struct.pack("<QQI", 96, 4, number)) + bytes(400))
    with pytest.raises(UserError, match=f"token_embd.weight is quantized as {said}; only F32, "):
        read_gguf(path)


# Writing -----------------------------------------------------------------------------------------


def test_the_mixture_is_llama_quantize_s():
    def kinds(name, width=512, kind="Q4_K_M", layers=16, tied=False):
        return [kind_of(name.format(i), (64, width), kind, layers, tied) for i in range(layers)]

    # The first and last eighth, and every third of the others.
    more = [0, 1, 4, 7, 10, 13, 14, 15]
    expected = ["Q6_K" if i in more else "Q4_K" for i in range(16)]
    for name in ("blk.{}.attn_v.weight", "blk.{}.ffn_down.weight", "blk.{}.attn_qkv.weight"):
        assert kinds(name) == expected
    assert set(kinds("blk.{}.attn_q.weight")) == {"Q4_K"}
    assert set(kinds("blk.{}.attn_q.weight", width=96)) == {"Q5_0"}
    assert set(kinds("blk.{}.attn_q.weight", width=96, kind="Q5_K_M")) == {"Q5_1"}
    assert set(kinds("blk.{}.attn_q.weight", width=90)) == {"F16"}
    assert set(kinds("blk.{}.attn_q.weight", kind="Q6_K")) == {"Q6_K"}
    assert kind_of("output.weight", (9, 512), "Q4_K_M", 16, False) == "Q6_K"
    assert kind_of("output.weight", (9, 96), "Q4_K_M", 16, False) == "Q8_0"
    assert kind_of("token_embd.weight", (9, 512), "Q4_K_M", 16, False) == "Q4_K"
    assert kind_of("token_embd.weight", (9, 512), "Q4_K_M", 16, True) == "Q6_K"
    assert kind_of("output_norm.weight", (512,), "Q4_K_M", 16, True) == "F32"


def test_k_quants_need_their_package_and_say_so(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "libgguf", None)
    for kind in WRITTEN:
        if kind in MIXTURES:
            with pytest.raises(UserError, match=rf"{kind.lower()} needs the package libgguf: pip"):
                check_written(kind)
        else:
            check_written(kind)


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K"])
def test_k_quants_keep_what_their_bits_can(kind):
    pytest.importorskip("libgguf")
    array = RANDOM.standard_normal((7, 512)).astype("f")
    stored = quantize(array, kind)
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    assert stored.dtype == np.uint8 and stored.shape == (7, 512 // block * size)
    error = np.sqrt(np.square(widen(stored, kind) - array).mean())
    assert error < {"Q4_K": 0.08, "Q5_K": 0.04, "Q6_K": 0.02}[kind]
    with pytest.raises(UserError, match="too large"):
        narrow("w", np.full((1, 256), 1e10, "f"), kind)


def test_a_q4_k_m_file_is_read_again(tmp_path):
    pytest.importorskip("libgguf")
    wide = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 8}
    model = tiny_llama(**wide, num_key_value_heads=2, num_hidden_layers=2)
    written = export_gguf(model, tmp_path / "m.gguf", "q4_k_m", tokenizer=False)
    assert written.loss is None
    reader = open_gguf(tmp_path / "m.gguf")
    kinds = {t.name: t.tensor_type.name for t in reader.tensors}
    assert kinds["blk.0.attn_q.weight"] == "Q4_K" and kinds["blk.1.attn_v.weight"] == "Q6_K"
    assert kinds["blk.0.attn_output.weight"] == "Q5_0"  # rows of 32
    assert reader.fields["general.file_type"].contents() == 15
    found = read_gguf(tmp_path / "m.gguf").tensors
    for name, array in weights(model).items():
        scale = np.abs(array).max()
        assert np.abs(found[name] - array).max() < 0.15 * scale, name
