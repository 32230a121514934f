"""The checkpoint readers: right values from every layout, one UserError from every damaged file."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jlora.formats import gguf_file, safetensors_file, torch_file
from jlora.formats.gguf_file import read_gguf
from jlora.formats.safetensors_file import (
    read_metadata,
    read_safetensors,
    read_sharded,
    write_safetensors,
)
from jlora.formats.torch_file import read_torch, read_torch_sharded
from jlora.system.errors import UserError

RANDOM = np.random.default_rng(0)


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name in expected:
        assert found[name].dtype == expected[name].dtype, name
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def one_line(error) -> str:
    """The message of a UserError, which must be a single line."""
    assert "\n" not in str(error.value)
    return str(error.value)


# Safetensors -------------------------------------------------------------------------------------


def raw_safetensors(path, header, data=b""):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_safetensors_round_trip_keeps_dtypes_shapes_and_metadata(tmp_path):
    tensors = {
        "a": RANDOM.standard_normal((3, 4)).astype(np.float32),
        "b": RANDOM.standard_normal(5).astype(np.float16),
        "c": np.arange(6, dtype=np.int64).reshape(1, 6),
        "scalar": np.float32(2.5).reshape(()),
        "empty": np.zeros((0, 3), np.float32),
        "flag": np.array([True, False]),
        # Not contiguous: the writer must not save the memory behind the view.
        "transposed": RANDOM.standard_normal((2, 3)).astype(np.float32).T,
    }
    path = tmp_path / "new" / "model.safetensors"
    write_safetensors(path, tensors, {"format": "pt", "note": "x"})
    assert_same(read_safetensors(path), tensors)
    assert read_metadata(path) == {"format": "pt", "note": "x"}
    assert [p.name for p in path.parent.iterdir()] == ["model.safetensors"]


def test_safetensors_bfloat16_is_widened_to_float32(tmp_path):
    # 1.0, -2.0, 3.140625 and infinity in bfloat16.
    bits = np.array([0x3F80, 0xC000, 0x4049, 0x7F80], "<u2")
    header = {"w": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]}}
    path = raw_safetensors(tmp_path / "m.safetensors", header, bits.tobytes())
    expected = np.array([[1.0, -2.0], [3.140625, np.inf]], np.float32)
    assert_same(read_safetensors(path), {"w": expected})


@pytest.mark.parametrize("piece", [1, 5, 12, 13])
def test_safetensors_bfloat16_is_read_by_the_piece(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(safetensors_file, "PIECE", piece)
    bits = RANDOM.integers(0, 1 << 16, 14).astype("<u2")
    tensors = {
        "none": {"dtype": "BF16", "shape": [0, 4], "data_offsets": [0, 0]},
        "a": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]},
        "w": {"dtype": "BF16", "shape": [4, 3], "data_offsets": [4, 28]},
    }
    found = read_safetensors(raw_safetensors(tmp_path / "m", tensors, bits.tobytes()))
    wide = bits.astype(np.uint32) << 16
    for name, expected in (("a", wide[:2]), ("w", wide[2:].reshape(4, 3))):
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name].view(np.uint32), expected)
    assert found["none"].shape == (0, 4)


def test_safetensors_of_an_unknown_dtype_name_the_tensor(tmp_path):
    header = {"w8": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}
    path = raw_safetensors(tmp_path / "m.safetensors", header, b"\0\0")
    with pytest.raises(UserError, match="w8 has dtype F8_E4M3") as error:
        read_safetensors(path)
    one_line(error)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello",
        b"\xff" * 64,
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 4) + b"{abc",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n",
    ],
)
def test_files_that_are_no_safetensors_are_one_line_errors(tmp_path, content):
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"m\.safetensors") as error:
        read_safetensors(path)
    one_line(error)


@pytest.mark.parametrize("offsets", [[0, 400], [4, 8], [8, 0], [0, 7], [-8, 0]])
def test_safetensors_with_wrong_offsets_are_refused(tmp_path, offsets):
    header = {"w": {"dtype": "F32", "shape": [2], "data_offsets": offsets}}
    path = raw_safetensors(tmp_path / "m.safetensors", header, b"\0" * 8)
    with pytest.raises(UserError, match=r"m\.safetensors"):
        read_safetensors(path)


def test_missing_and_unwritable_files_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_safetensors(tmp_path / "absent.safetensors")
    with pytest.raises(UserError, match="cannot read"):
        read_safetensors(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_safetensors(tmp_path / "file" / "m.safetensors", {"a": np.zeros(1, np.float32)})


@pytest.fixture(scope="module")
def small_safetensors(tmp_path_factory):
    path = tmp_path_factory.mktemp("prefix") / "m.safetensors"
    write_safetensors(path, {"a": np.ones((2, 3), np.float32), "b": np.arange(4)})
    return path


def test_every_prefix_of_safetensors_is_refused(small_safetensors):
    data = small_safetensors.read_bytes()
    cut = small_safetensors.with_name("cut.safetensors")
    for length in range(len(data)):
        cut.write_bytes(data[:length])
        with pytest.raises(UserError):
            read_safetensors(cut)


def write_shards(folder, suffix, write):
    one, two = f"m-00001-of-00002.{suffix}", f"m-00002-of-00002.{suffix}"
    tensors = {"a": np.ones(2, np.float32), "b": np.full(3, 2, np.float32)}
    write(folder / one, {"a": tensors["a"]})
    write(folder / two, {"b": tensors["b"]})
    index = folder / f"m.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"a": one, "b": two}}))
    return index, tensors


def test_sharded_safetensors(tmp_path):
    index, tensors = write_shards(tmp_path, "safetensors", write_safetensors)
    assert_same(read_sharded(index), tensors)
    index.write_text(json.dumps({"weight_map": {"a": "m-00001-of-00002.safetensors", "c": "gone"}}))
    with pytest.raises(UserError, match="1 of 2 files .* missing: gone"):
        read_sharded(index)
    index.write_text(json.dumps({"weight_map": {"lost": "m-00001-of-00002.safetensors"}}))
    with pytest.raises(UserError, match="not in the files it names, first lost"):
        read_sharded(index)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "{"]
)
def test_a_malformed_index_is_a_user_error(tmp_path, text):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(UserError, match=r"index\.json"):
        read_sharded(index)


def test_an_index_cannot_point_outside_its_folder(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "../secret.safetensors"}}')
    with pytest.raises(UserError, match="outside its folder"):
        read_sharded(index)


# PyTorch files, written by hand as torch.save would ---------------------------------------------


class Named:
    """Pickles as the global ``module name`` of a package that is not installed."""

    def __init__(self, module, name):
        self.module, self.name = module, name


class Call:
    """Pickles as a call of a `Named` with arguments."""

    def __init__(self, function, *args):
        self.function, self.args = function, args


class Reference:
    """Pickles as a persistent id: a storage."""

    def __init__(self, *pid):
        self.pid = pid


class TorchPickler(pickle._Pickler):
    """Python's own pickler, taught the objects above (the C one cannot be)."""

    def persistent_id(self, thing):
        return thing.pid if isinstance(thing, Reference) else None

    def save(self, thing, save_persistent_id=True):
        if isinstance(thing, Named):
            self.write(b"c" + f"{thing.module}\n{thing.name}\n".encode())
        elif isinstance(thing, Call):
            self.save(thing.function)
            self.save(thing.args)
            self.write(pickle.REDUCE)
        else:
            super().save(thing, save_persistent_id)


def dumps(thing) -> bytes:
    buffer = io.BytesIO()
    TorchPickler(buffer, 2).dump(thing)
    return buffer.getvalue()


STORAGE_NAMES = {
    "f4": "FloatStorage",
    "f2": "HalfStorage",
    "f8": "DoubleStorage",
    "i8": "LongStorage",
}


def reference(key, values, kind=None, legacy=False):
    storage = Named("torch", kind or STORAGE_NAMES[values.dtype.str[1:]])
    pid = ("storage", storage, key, "cpu", len(values))
    return Reference(*pid, None) if legacy else Reference(*pid)


def tensor(storage, offset, shape, stride):
    rebuild = Named("torch._utils", "_rebuild_tensor_v2")
    return Call(rebuild, storage, offset, shape, stride, False, OrderedDict())


def write_zip(path, tree, storages):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", dumps(tree))
        archive.writestr("archive/byteorder", "little")
        for key, values in storages.items():
            archive.writestr(f"archive/data/{key}", values.tobytes())
        archive.writestr("archive/version", "3\n")


def write_legacy(path, tree, storages):
    with open(path, "wb") as handle:
        system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
        for thing in (0x1950A86A20F9469CFC6C, 1001, system, tree, list(storages)):
            handle.write(dumps(thing))
        for values in storages.values():
            handle.write(struct.pack("<q", len(values)) + values.tobytes())


LAYOUTS = pytest.mark.parametrize("layout", ["zip", "legacy"])


def write_torch(path, layout, make_tree, storages):
    """Write a tree made of references to storages in one of the two layouts."""
    legacy = layout == "legacy"
    refs = {key: reference(key, values, None, legacy) for key, values in storages.items()}
    (write_legacy if legacy else write_zip)(path, make_tree(refs), storages)
    return path


def write_arrays(path, tensors, layout="zip"):
    """A state dict of contiguous float arrays."""
    storages = {str(i): a.ravel() for i, a in enumerate(tensors.values())}

    def tree(refs):
        state = OrderedDict()
        for key, (name, array) in zip(refs, tensors.items()):
            stride = np.zeros(array.shape, np.int8).strides  # contiguous, counted in elements
            state[name] = tensor(refs[key], 0, array.shape, stride)
        return state

    return write_torch(path, layout, tree, storages)


@LAYOUTS
def test_torch_values_views_and_dtypes(tmp_path, layout):
    base = RANDOM.standard_normal(24).astype(np.float32)
    storages = {
        "0": base,
        "1": RANDOM.standard_normal(4).astype(np.float16),
        "2": np.arange(3, dtype=np.int64),
    }

    def tree(refs):
        parameter = Named("torch._utils", "_rebuild_parameter")
        return OrderedDict(
            whole=tensor(refs["0"], 0, (4, 6), (6, 1)),
            transposed=tensor(refs["0"], 0, (6, 4), (1, 6)),
            part=tensor(refs["0"], 7, (2, 2), (6, 2)),
            half=Call(parameter, tensor(refs["1"], 0, (4,), (1,)), True, OrderedDict()),
            whole_numbers=tensor(refs["2"], 0, (3,), (1,)),
            scalar=tensor(refs["0"], 5, (), ()),
            empty=tensor(refs["0"], 0, (0, 2), (2, 1)),
        )

    found = read_torch(write_torch(tmp_path / "m.bin", layout, tree, storages))
    table = base.reshape(4, 6)
    expected = {
        "whole": table,
        "transposed": table.T,
        "part": table[1:3, 1:5:2],
        "half": storages["1"],
        "whole_numbers": storages["2"],
        "scalar": base[5].reshape(()),
        "empty": np.zeros((0, 2), np.float32),
    }
    assert_same(found, expected)


@LAYOUTS
def test_torch_bfloat16(tmp_path, layout):
    bits = np.array([0x3F80, 0xC000], "<u2")
    ref = reference("0", bits, "BFloat16Storage", layout == "legacy")
    write = write_legacy if layout == "legacy" else write_zip
    write(tmp_path / "m.bin", {"w": tensor(ref, 0, (2,), (1,))}, {"0": bits})
    assert_same(read_torch(tmp_path / "m.bin"), {"w": np.array([1, -2], np.float32)})


@LAYOUTS
@pytest.mark.parametrize("key", ["model_state_dict", "state_dict"])
def test_torch_nested_state_dict(tmp_path, layout, key):
    values = np.ones(2, np.float32)

    def tree(refs):
        size = Call(Named("torch", "Size"), (1, 2))
        return {key: {"w": tensor(refs["0"], 0, (2,), (1,))}, "step": 3, "size": size}

    found = read_torch(write_torch(tmp_path / "m.pt", layout, tree, {"0": values}))
    assert_same(found, {"w": values})


@LAYOUTS
@pytest.mark.parametrize(
    ("module", "name"),
    [("os", "system"), ("posix", "system"), ("builtins", "eval"), ("torch.hub", "load")],
)
def test_a_pickle_that_would_run_a_command_is_refused_by_name(tmp_path, layout, module, name):
    proof = tmp_path / "proof"
    bomb = Call(Named(module, name), f"touch {proof}")
    path = write_torch(tmp_path / "m.bin", layout, lambda refs: {"w": bomb}, {})
    with pytest.raises(UserError, match=f"refused, .* {module}.{name}") as error:
        read_torch(path)
    one_line(error)
    assert not proof.exists()


def test_a_plain_malicious_pickle_is_refused(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'proof'}",)

    (tmp_path / "m.bin").write_bytes(pickle.dumps(Bomb(), 2))
    with pytest.raises(UserError, match="system"):
        read_torch(tmp_path / "m.bin")
    assert not (tmp_path / "proof").exists()


@LAYOUTS
@pytest.mark.parametrize(
    ("offset", "shape", "stride"),
    [
        (0, (5,), (1,)),
        (1, (4,), (1,)),
        (-1, (2,), (1,)),
        (0, (2, 2), (3, 1)),
        (0, (2,), (-1,)),
        (0, (2, 2), (1,)),
        (0, (1000, 1000), (0, 0)),
        (0, (-1,), (1,)),
        (1 << 62, (1,), (1,)),
    ],
)
def test_tensors_that_reach_past_their_storage_are_refused(tmp_path, layout, offset, shape, stride):
    def tree(refs):
        return {"weight_x": tensor(refs["0"], offset, shape, stride)}

    path = write_torch(tmp_path / "m.bin", layout, tree, {"0": np.ones(4, np.float32)})
    with pytest.raises(UserError, match="weight_x is damaged") as error:
        read_torch(path)
    one_line(error)


def test_a_storage_shorter_than_it_says_is_refused(tmp_path):
    ref = reference("0", np.ones(4, np.float32))
    write_zip(tmp_path / "m.bin", {"w": tensor(ref, 0, (4,), (1,))}, {"0": np.ones(3, np.float32)})
    with pytest.raises(UserError, match="damaged or incomplete"):
        read_torch(tmp_path / "m.bin")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"not a checkpoint", "not a file of torch.save"),
        (b"\0" * 257 + b"ustar" + b"\0" * 250, "tar"),
        (pickle.dumps({"w": 1}, 2), "none of torch.save"),
        (dumps(0x1950A86A20F9469CFC6C) + dumps(1002), "unknown version"),
        (b"PK\x03\x04 not a zip", "damaged or incomplete"),
    ],
)
def test_files_that_are_no_torch_files(tmp_path, content, message):
    (tmp_path / "m.bin").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_torch(tmp_path / "m.bin")
    one_line(error)


def test_zip_without_tensors(tmp_path):
    with zipfile.ZipFile(tmp_path / "plain.bin", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(UserError, match=r"without torch's data\.pkl"):
        read_torch(tmp_path / "plain.bin")
    write_zip(tmp_path / "m.bin", {"epoch": 3}, {})
    with pytest.raises(UserError, match="no weights inside .found: epoch"):
        read_torch(tmp_path / "m.bin")


@LAYOUTS
def test_every_prefix_of_a_torch_file_is_refused(tmp_path, layout):
    path = tmp_path / "m.bin"
    write_arrays(path, {"a": np.ones((2, 2), np.float32)}, layout)
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(UserError) as error:
            read_torch(path)
        one_line(error)


@pytest.fixture(scope="module")
def small_torch_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    arrays = {"a": np.ones((2, 3), np.float32)}
    return [write_arrays(folder / f"{layout}.bin", arrays, layout) for layout in ("zip", "legacy")]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_changed_byte_never_gives_anything_but_tensors_or_a_user_error(
    small_torch_files, small_safetensors, data
):
    path = data.draw(st.sampled_from([*small_torch_files, small_safetensors]))
    content = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] = data.draw(st.integers(0, 255))
    changed = path.with_name(f"changed{path.suffix}")
    changed.write_bytes(content)
    reader = read_safetensors if path.suffix == ".safetensors" else read_torch
    try:
        found = reader(changed)
    except UserError:
        return
    assert all(isinstance(array, np.ndarray) for array in found.values())


@pytest.mark.parametrize("layout", ["zip", "legacy", "safetensors"])
def test_a_turned_bit_gives_tensors_or_a_user_error(
    small_torch_files, small_safetensors, tmp_path, layout
):
    files = dict(zip(("zip", "legacy", "safetensors"), [*small_torch_files, small_safetensors]))
    content = bytearray(files[layout].read_bytes())
    reader = read_safetensors if layout == "safetensors" else read_torch
    changed = tmp_path / files[layout].name
    for position in range(len(content)):
        for bit in range(8):
            content[position] ^= 1 << bit
            changed.write_bytes(content)
            content[position] ^= 1 << bit
            try:
                found = reader(changed)
            except UserError:
                continue
            assert all(isinstance(array, np.ndarray) for array in found.values())


def test_sharded_torch(tmp_path):
    index, tensors = write_shards(tmp_path, "bin", write_arrays)
    assert_same(read_torch_sharded(index), tensors)


# GGUF --------------------------------------------------------------------------------------------


def write_gguf(path, architecture, values, tensors, kinds=None, tokenizer=None):
    """A small GGUF file; ``kinds`` quantizes some tensors, ``tokenizer`` is metadata as read."""
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    writer = GGUFWriter(path, architecture)
    for key, value in (tokenizer or {}).items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            (writer.add_string if isinstance(value, str) else writer.add_uint32)(key, value)
    for key, value in values.items():
        if isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_uint32(key, value)
    for name, array in tensors.items():
        kind = GGMLQuantizationType[(kinds or {}).get(name, "F32")]
        if kind.name == "F32":
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def permute(rows, heads):
    """llama.cpp's own conversion of q_proj and k_proj rows."""
    shape = rows.shape
    return rows.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def normal(*shape):
    return RANDOM.standard_normal(shape).astype(np.float32)


LLAMA = {
    "block_count": 1,
    "context_length": 64,
    "embedding_length": 32,
    "feed_forward_length": 64,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 50000.0,
}


def llama_tensors():
    return {
        "token_embd.weight": normal(10, 32),
        "output_norm.weight": normal(32),
        "blk.0.attn_q.weight": normal(32, 32),
        "blk.0.attn_k.weight": normal(16, 32),
        "blk.0.attn_v.weight": normal(16, 32),
        "blk.0.ffn_down.weight": normal(32, 64),
    }


def keyed(architecture, values):
    return {f"{architecture}.{key}": value for key, value in values.items()}


def test_gguf_llama_rows_names_and_config(tmp_path):
    raw = llama_tensors()
    stored = dict(raw)
    stored["blk.0.attn_q.weight"] = permute(raw["blk.0.attn_q.weight"], 4)
    stored["blk.0.attn_k.weight"] = permute(raw["blk.0.attn_k.weight"], 2)
    values = {**keyed("llama", LLAMA), "tokenizer.ggml.eos_token_id": 7}
    model = read_gguf(write_gguf(tmp_path / "m.gguf", "llama", values, stored))
    expected = {
        "model.embed_tokens.weight": raw["token_embd.weight"],
        "model.norm.weight": raw["output_norm.weight"],
        "model.layers.0.self_attn.q_proj.weight": raw["blk.0.attn_q.weight"],
        "model.layers.0.self_attn.k_proj.weight": raw["blk.0.attn_k.weight"],
        "model.layers.0.self_attn.v_proj.weight": raw["blk.0.attn_v.weight"],
        "model.layers.0.mlp.down_proj.weight": raw["blk.0.ffn_down.weight"],
    }
    assert_same(model.tensors, expected)
    config = model.config
    assert config["rms_norm_eps"] == 1e-5 and config["rope_theta"] == 50000.0
    assert (config["vocab_size"], config["head_dim"], config["eos_token_id"]) == (10, 8, 7)
    assert config["tie_word_embeddings"] is True and config["attention_bias"] is False
    assert "rope_scaling" not in config


def test_gguf_qwen2_keeps_its_rows_and_its_own_head(tmp_path):
    raw = {**llama_tensors(), "output.weight": normal(10, 32), "blk.0.attn_q.bias": normal(32)}
    model = read_gguf(write_gguf(tmp_path / "m.gguf", "qwen2", keyed("qwen2", LLAMA), raw))
    name = "model.layers.0.self_attn.q_proj"
    np.testing.assert_array_equal(model.tensors[f"{name}.weight"], raw["blk.0.attn_q.weight"])
    np.testing.assert_array_equal(model.tensors[f"{name}.bias"], raw["blk.0.attn_q.bias"])
    assert model.config["tie_word_embeddings"] is False
    assert "attention_bias" not in model.config  # it would ask for a bias on o_proj as well


def test_gguf_gpt2_is_transposed_to_conv1d(tmp_path):
    raw = {
        "token_embd.weight": normal(10, 32),
        "output.weight": normal(10, 32),
        "position_embd.weight": normal(64, 32),
        "blk.0.attn_qkv.weight": normal(96, 32),
        "blk.0.attn_qkv.bias": normal(96),
        "blk.0.ffn_down.weight": normal(32, 128),
    }
    values = {k: LLAMA[k] for k in ("block_count", "context_length", "embedding_length")}
    values |= {
        "attention.head_count": 4,
        "feed_forward_length": 128,
        "attention.layer_norm_epsilon": 1e-5,
    }
    model = read_gguf(write_gguf(tmp_path / "m.gguf", "gpt2", keyed("gpt2", values), raw))
    expected = {
        "transformer.wte.weight": raw["token_embd.weight"],
        "transformer.wpe.weight": raw["position_embd.weight"],
        "transformer.h.0.attn.c_attn.weight": raw["blk.0.attn_qkv.weight"].T,
        "transformer.h.0.attn.c_attn.bias": raw["blk.0.attn_qkv.bias"],
        "transformer.h.0.mlp.c_proj.weight": raw["blk.0.ffn_down.weight"].T,
    }
    assert_same(model.tensors, expected)
    assert (model.config["n_positions"], model.config["n_inner"]) == (64, 128)


@pytest.mark.parametrize(
    ("kind", "step"),
    # Half the largest distance of two neighbouring values, for numbers up to 4.
    [("F16", 2e-3), ("BF16", 1.6e-2), ("Q8_0", 1.7e-2), ("Q4_0", 0.51), ("Q4_1", 0.28)],
)
def test_gguf_quantizations(tmp_path, kind, step):
    raw = llama_tensors()
    raw["token_embd.weight"] = np.clip(raw["token_embd.weight"], -4, 4)
    kinds = {"token_embd.weight": kind}
    path = write_gguf(tmp_path / "m.gguf", "llama", keyed("llama", LLAMA), raw, kinds)
    found = read_gguf(path).tensors["model.embed_tokens.weight"]
    assert found.dtype == np.float32 and found.shape == (10, 32)
    assert np.abs(found - raw["token_embd.weight"]).max() < step


def test_gguf_q4_1_block_by_hand(tmp_path):
    """One block of 32: float16 scale and minimum, then 4-bit numbers, low halves first."""
    from gguf import GGMLQuantizationType, GGUFWriter

    numbers = np.arange(32) % 16
    block = (
        np.float16([0.5, -1.0]).tobytes()
        + (numbers[:16] | numbers[16:] << 4).astype(np.uint8).tobytes()
    )
    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    data = np.frombuffer(block, np.uint8).reshape(1, 20)
    writer.add_tensor("token_embd.weight", data, raw_dtype=GGMLQuantizationType.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path = tmp_path / "m.gguf"
    tensors = gguf_file.read_tensors(path, gguf_file.open_gguf(path))
    expected = (numbers * 0.5 - 1.0).astype(np.float32).reshape(1, 32)
    assert_same(tensors, {"token_embd.weight": expected})


def test_gguf_llama3_rope_scaling_is_recovered(tmp_path):
    # Llama 3.2 1B: head size 64, theta 500000, factor 32.
    wavelengths = 2 * np.pi * 500000.0 ** (np.arange(0, 64, 2) / 64)
    factors = np.ones(32)
    for i, length in enumerate(wavelengths):
        if length > 8192:
            factors[i] = 32
        elif length > 8192 / 4:
            smooth = (8192 / length - 1) / 3
            factors[i] = 1 / ((1 - smooth) / 32 + smooth)
    values = {**LLAMA, "rope.freq_base": 500000.0, "attention.key_length": 64}
    raw = {"token_embd.weight": normal(10, 32), "rope_freqs.weight": factors.astype(np.float32)}
    path = write_gguf(tmp_path / "m.gguf", "llama", keyed("llama", values), raw)
    assert read_gguf(path).config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    raw["rope_freqs.weight"][12] *= 1.5
    path = write_gguf(tmp_path / "n.gguf", "llama", keyed("llama", values), raw)
    with pytest.raises(UserError, match="not those of Llama 3"):
        read_gguf(path)


def test_gguf_that_cannot_be_used_says_why(tmp_path):
    def message(architecture="llama", values=LLAMA, tensors=None, kinds=None):
        path = tmp_path / "m.gguf"
        values = keyed(architecture, values)
        write_gguf(path, architecture, values, tensors or llama_tensors(), kinds)
        with pytest.raises(UserError) as error:
            read_gguf(path)
        return one_line(error)

    assert "architecture 'mamba'" in message("mamba")
    odd = {"token_embd.weight": normal(4, 32), "blk.0.ffn_gate_exps.weight": normal(2, 32)}
    assert "blk.0.ffn_gate_exps.weight has no place" in message(tensors=odd)
    assert "lacks llama.block_count" in message(
        values={k: v for k, v in LLAMA.items() if k != "block_count"}
    )
    assert "lacks token_embd.weight" in message(tensors={"output_norm.weight": normal(32)})
    assert "rotary scaling 'yarn'" in message(values={**LLAMA, "rope.scaling.type": "yarn"})


def test_a_gguf_factor_without_a_type_is_linear_as_in_llama_cpp(tmp_path):
    for number, key in enumerate(("rope.scaling.factor", "rope.scale_linear")):
        values = keyed("llama", {**LLAMA, key: 4.0})
        path = write_gguf(tmp_path / f"{number}.gguf", "llama", values, llama_tensors())
        assert read_gguf(path).config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    values = keyed("llama", {**LLAMA, "rope.scaling.factor": 4.0, "rope.scaling.type": "none"})
    path = write_gguf(tmp_path / "none.gguf", "llama", values, llama_tensors())
    assert "rope_scaling" not in read_gguf(path).config


@pytest.mark.parametrize(
    ("key", "bad", "fine"),
    [
        ("attention.causal", False, True),
        ("attention.scale", 0.5, 0.0),
        ("attention.value_length", 16, 8),
        ("expert_count", 8, 0),
        ("final_logit_softcapping", 30.0, 0.0),
        ("logit_scale", 2.0, 1.0),
        ("rope.dimension_count", 4, 8),
        ("attention.head_count_kv", [2, 2], 2),
        ("feed_forward_length", 0, 64),
    ],
)
def test_a_gguf_setting_that_changes_results_is_refused_by_its_name(tmp_path, key, bad, fine):
    values = {**LLAMA, "attention.key_length": 8}
    for value in (fine, bad):
        path = tmp_path / "m.gguf"
        write_gguf(path, "llama", keyed("llama", {**values, key: value}), llama_tensors())
        if value is fine:
            read_gguf(path)
    with pytest.raises(UserError, match=rf"llama\.{key} is .* which is not supported"):
        read_gguf(path)


def test_damaged_gguf_is_one_line(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", "llama", keyed("llama", LLAMA), llama_tensors())
    data = path.read_bytes()
    for length in [*range(0, 400, 7), *range(400, len(data) - 1, 1009)]:
        path.write_bytes(data[:length])
        with pytest.raises(UserError) as error:
            read_gguf(path)
        one_line(error)


def test_the_allowed_callables_are_only_those_of_tensors():
    names = {f"{module}.{name}" for module, name in torch_file.ALLOWED}
    assert names == {
        "collections.OrderedDict",
        "torch._utils._rebuild_tensor",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_parameter",
        "torch.Size",
    }
