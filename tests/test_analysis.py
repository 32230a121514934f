"""What `jlora analyze` measures, held against cases whose answer is known."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from jlora.adapters import LoraConfig, get_peft_model
from jlora.analysis.study import analyze
from jlora.analysis.subspaces import (
    amplification,
    directions,
    low_rank_svd,
    random_similarity,
    similarity,
)
from jlora.analysis.tables import most_of
from jlora.analysis.updates import Update, read_updates
from jlora.cli import main
from jlora.formats.safetensors_file import read_safetensors, write_safetensors
from jlora.formats.torch_write import write_torch
from jlora.models.hub import load
from jlora.runs.adapter_file import AdapterFile


def orthonormal(rows, width, seed):
    """(rows, width) orthonormal rows."""
    gaussian = np.random.default_rng(seed).standard_normal((width, rows))
    return np.linalg.qr(gaussian)[0].T


def update_of(A, B, scaling=1.0):
    return Update("h.0.layer", None, A, B, scaling, slice(0, len(B)), len(B))


def known(U, values, V, scaling=2.0, seed=0):
    """The update sum_k values_k U_k V_k^T, its factors mixed by a random matrix."""
    mix = np.random.default_rng(seed).standard_normal((len(values), len(values)))
    return update_of(mix @ V, (U.T * values) @ np.linalg.inv(mix) / scaling, scaling)


# The mathematics ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", [2.0, 0.125, -3.0])
def test_the_svd_of_known_factors(scaling):
    U, V, values = orthonormal(3, 20, 1), orthonormal(3, 15, 2), np.array([5.0, 1.0, 0.25])
    left, found, right = low_rank_svd(known(U, values, V, scaling))
    np.testing.assert_allclose(found, values, rtol=1e-10)
    # A pair of singular vectors is known up to a common sign.
    for k in range(3):
        np.testing.assert_allclose(np.outer(left[k], right[k]), np.outer(U[k], V[k]), atol=1e-10)


@pytest.mark.parametrize(
    ("r", "out", "width"), [(4, 30, 20), (12, 10, 20), (12, 20, 10), (1, 1, 5)]
)
def test_the_svd_is_that_of_the_whole_matrix(r, out, width):
    random = np.random.default_rng(3)
    update = update_of(random.standard_normal((r, width)), random.standard_normal((out, r)), 1.5)
    dW = 1.5 * update.B @ update.A
    U, values, V = low_rank_svd(update)
    k = min(r, out, width)
    assert U.shape == (k, out) and values.shape == (k,) and V.shape == (k, width)
    np.testing.assert_allclose(values, np.linalg.svd(dW, compute_uv=False)[:k], rtol=1e-9)
    np.testing.assert_allclose((U.T * values) @ V, dW, atol=1e-10)


def test_what_directions_are():
    U, V = orthonormal(3, 20, 1), orthonormal(3, 15, 2)
    update = known(U, np.array([3.0, 2.0, 1.0]), V, seed=5)
    ordered = np.abs(directions(update, "dW") @ V.T)
    np.testing.assert_allclose(ordered, np.eye(3), atol=1e-10)
    for matrix, whole in (("A", V), ("B", U)):
        found = directions(update, matrix)
        np.testing.assert_allclose(found @ found.T, np.eye(3), atol=1e-10)
        # The same space, in an order of its own.
        np.testing.assert_allclose(found.T @ found, whole.T @ whole, atol=1e-10)
        factor = update.A if matrix == "A" else update.B.T
        strengths = np.linalg.norm(factor @ found.T, axis=0)
        np.testing.assert_allclose(strengths, np.linalg.svd(factor, compute_uv=False), rtol=1e-9)


def test_similarity_of_equal_and_orthogonal_subspaces():
    both = orthonormal(6, 15, 0)
    np.testing.assert_allclose(similarity(both[:4], both[:4]), np.ones((4, 4)), atol=1e-12)
    np.testing.assert_allclose(similarity(both[:2], both[2:]), np.zeros((2, 4)), atol=1e-12)


def test_similarity_by_hand():
    first, second = np.eye(5)[[0, 1]], np.eye(5)[[0, 2, 1]]
    np.testing.assert_allclose(similarity(first, second), [[1, 1, 1], [1, 0.5, 1]], atol=1e-15)
    turned = np.array([[math.cos(0.3), math.sin(0.3), 0, 0, 0]])
    np.testing.assert_allclose(similarity(first[:1], turned), [[math.cos(0.3) ** 2]])


def test_random_directions_share_what_chance_gives():
    rng, width = np.random.default_rng(0), 100
    mean = np.mean([random_similarity(4, 8, width, rng) for _ in range(400)], axis=0)
    i, j = np.ogrid[1:5, 1:9]
    np.testing.assert_allclose(mean, np.maximum(i, j) / width, rtol=0.15)


def test_amplification_of_a_constructed_weight():
    U, V, strengths = orthonormal(8, 12, 1), orthonormal(8, 10, 2), 2.0 ** -np.arange(8)
    W = (U.T * strengths) @ V
    update = known(U[[5, 3]], np.array([4.0, 3.0]), V[[5, 3]])
    found = amplification(update, W, np.random.default_rng(0))
    assert found.directions == 2
    assert found.change == pytest.approx(5.0)
    assert found.weight == pytest.approx(np.linalg.norm(strengths))
    assert found.in_update == pytest.approx(math.hypot(strengths[5], strengths[3]))
    assert found.in_own == pytest.approx(math.hypot(1.0, 0.5))
    assert found.factor == pytest.approx(5.0 / math.hypot(strengths[5], strengths[3]))
    # Left and right directions that W does not join are not in W, however strong each is.
    crossed = amplification(known(U[[0]], np.ones(1), V[[1]]), W, np.random.default_rng(0))
    assert crossed.in_update == pytest.approx(0.0, abs=1e-12) and crossed.factor > 1e10


def test_amplification_of_all_directions_and_of_chance():
    random = np.random.default_rng(1)
    W = random.standard_normal((10, 14))
    full = known(orthonormal(10, 10, 1), np.ones(10), orthonormal(10, 14, 2))
    found = amplification(full, W, random)
    assert found.in_own == pytest.approx(np.linalg.norm(W))
    few = known(orthonormal(4, 10, 1), np.ones(4), orthonormal(4, 14, 2))
    squares = [amplification(few, W, random).in_random ** 2 for _ in range(400)]
    assert np.mean(squares) == pytest.approx(np.square(W).sum() * 16 / 140, rel=0.1)


def test_a_change_of_nothing_has_no_directions():
    nothing = update_of(np.ones((2, 5)), np.zeros((4, 2)))
    assert amplification(nothing, np.ones((4, 5)), np.random.default_rng(0)) is None
    # Unused rank is not counted: its directions are rounding errors.
    one = known(orthonormal(2, 12, 1), np.array([3.0, 1e-9]), orthonormal(2, 10, 2))
    assert amplification(one, np.ones((12, 10)), np.random.default_rng(0)).directions == 1


def test_most_of_the_change():
    assert most_of(np.array([3.0, 1.0, 0.0])) == 1  # 9 of 10
    assert most_of(np.array([2.9, 1.0, 0.0])) == 2
    assert most_of(np.zeros(3)) == 0


# Adapters as they are on the disk ----------------------------------------------------------------


@pytest.fixture(scope="module")
def adapters(tiny_model, tmp_path_factory):
    """(folder, the changes by key in (out, in)) of adapters with random matrices, by name."""
    settings = {
        "fused": {"r": 2, "lora_alpha": 6, "enable_lora": [True, False, True]},
        "plain": {"r": 3, "lora_alpha": 6, "target_modules": ["c_attn", "c_proj"],
                  "rank_pattern": {"mlp.c_proj": 5}, "alpha_pattern": {"h.1.attn.c_proj": 1},
                  "use_rslora": True},
        "embedding": {"r": 2, "lora_alpha": 2, "target_modules": ["wte", "mlp.c_fc"]},
    }  # fmt: skip
    made = {}
    for seed, (name, values) in enumerate(settings.items()):
        random = np.random.default_rng(seed)
        model = get_peft_model(load(tiny_model), LoraConfig(**values))
        tensors = model.adapter_tensors()
        model.set_adapter_tensors(
            {key: random.standard_normal(a.shape).astype(np.float32) for key, a in tensors.items()}
        )
        folder = tmp_path_factory.mktemp("adapters") / name
        model.save_pretrained(folder)
        if name == "fused":
            model.save_loralib(folder.with_suffix(".pt"))
        changes = {
            key: layer.delta_weight().numpy().T for key, layer in model.lora_layers().items()
        }
        made[name] = (folder, changes)
    return made


@pytest.mark.parametrize("name", ["fused", "plain", "embedding"])
def test_updates_are_the_changes_of_the_layers(adapters, name):
    folder, changes = adapters[name]
    found = {layer: np.zeros_like(change) for layer, change in changes.items()}
    updates = read_updates(folder, folder).updates
    for update in updates:
        assert update.outputs == len(changes[update.layer])
        found[update.layer][update.rows] += update.scaling * update.B @ update.A
    for layer, change in changes.items():
        np.testing.assert_allclose(found[layer], change, rtol=1e-5, atol=1e-6)
    assert [update.depth for update in updates] == sorted(update.depth for update in updates)


def test_blocks_of_fused_layers_are_told_apart(adapters):
    folder, _ = adapters["fused"]
    updates = read_updates(folder, folder).updates
    layers = [f"transformer.h.{i}.attn.c_attn" for i in (0, 1)]
    assert [u.key for u in updates] == [f"{n}[{b}]" for n in layers for b in ("query", "value")]
    assert [u.kind for u in updates[:2]] == ["attn.c_attn[query]", "attn.c_attn[value]"]
    assert all(update.A.shape == (2, 32) and update.B.shape == (32, 2) for update in updates)
    file = folder.with_suffix(".pt")
    for ours, theirs in zip(updates, read_updates(file, file, 6, [True, False, True]).updates):
        assert (ours.key, ours.scaling, ours.rows) == (theirs.key, theirs.scaling, theirs.rows)
        np.testing.assert_array_equal(ours.A, theirs.A)
        np.testing.assert_array_equal(ours.B, theirs.B)


@pytest.mark.parametrize("name", ["fused", "plain", "embedding"])
def test_a_whole_study(adapters, tiny_model, tmp_path, capsys, name):
    folder, changes = adapters[name]
    out = tmp_path / "out"
    argv = ["analyze", folder, "--other", folder, "--model", tiny_model, "--out", out]
    assert main([str(word) for word in argv]) == 0
    assert "phi(i, j)" in capsys.readouterr().out
    drawn = ("spectrum", "similarity", "similarity-layers", "amplification")
    assert {path.name for path in out.iterdir()} == {"analysis.json", *(f"{n}.png" for n in drawn)}
    assert all((out / f"{n}.png").read_bytes().startswith(b"\x89PNG") for n in drawn)
    study = json.loads((out / "analysis.json").read_text())
    assert set(study["similarity"]) == set(study["adapters"][0]["layers"])
    for phi in study["similarity"].values():
        np.testing.assert_allclose(phi, 1.0, atol=1e-3)  # of A, which is the same

    weights = dict(load(tiny_model).named_parameters())
    for update in read_updates(folder, folder).updates:
        measured = study["adapters"][1]["layers"][update.key]
        dW = changes[update.layer][update.rows].astype(np.float64)
        W = weights[f"{update.layer}.weight"].numpy().T[update.rows].astype(np.float64)
        U, values, V = np.linalg.svd(dW, full_matrices=False)
        r = measured["rank"]
        np.testing.assert_allclose(measured["singular_values"], values[:r], rtol=1e-4)
        strength = np.linalg.norm(U[:, :r].T @ W @ V[:r].T)
        table = measured["amplification"]
        assert table["weight"] == pytest.approx(np.linalg.norm(W), rel=1e-5)
        assert table["change"] == pytest.approx(np.linalg.norm(dW), rel=1e-5)
        assert table["in_update"] == pytest.approx(strength, rel=1e-3)
        assert table["factor"] == pytest.approx(np.linalg.norm(dW) / strength, rel=1e-3)
        assert table["in_update"] <= table["in_own"] * (1 + 1e-6)


def test_a_run_knows_its_model_and_layers_can_be_chosen(tiny_run, capsys):
    study = analyze([AdapterFile(tiny_run)], layers=r"\.1\.attn")
    assert list(study.layers[0]) == ["transformer.h.1.attn.c_attn"]
    assert study.layers[0]["transformer.h.1.attn.c_attn"].amplification.factor > 0
    assert main(["analyze", str(tiny_run / "best"), "--layers", "c_attn"]) == 0
    assert "||dW||" in capsys.readouterr().out


def test_without_its_base_a_study_has_no_amplification(adapters, capsys):
    study = analyze([AdapterFile(adapters["fused"][0])])
    assert all(layer.amplification is None for layer in study.layers[0].values())
    assert "give --model" in capsys.readouterr().err


# What users get wrong ----------------------------------------------------------------------------


def refused(capsys, *argv):
    assert main(["analyze", *(str(word) for word in argv)]) == 2
    err = capsys.readouterr().err.splitlines()
    return err[-1]


def test_layers_that_are_not_there(adapters, capsys):
    folder, _ = adapters["fused"]
    assert "'(' is no regular expression" in refused(capsys, folder, "--layers", "(")
    line = refused(capsys, folder, "--layers", "q_proj")
    assert "none of the 4 layers" in line and "transformer.h.0.attn.c_attn[query]" in line


def test_adapters_of_other_layers_or_widths(adapters, tmp_path, capsys):
    fused, plain = adapters["fused"][0], adapters["plain"][0]
    assert "LoRA on different layers" in refused(capsys, fused, "--other", plain)
    wide = copied(
        plain, tmp_path / "wide", lambda name, a: np.tile(a, (1, 2 if "_A" in name else 1))
    )
    assert "are of different models" in refused(capsys, plain, "--other", wide)


def test_a_base_that_is_not_the_adapters(adapters, tiny_model, tmp_path, capsys):
    import tiny

    folder = adapters["fused"][0]
    other = tiny.write_model(tmp_path / "other", seed=1)
    assert "made for the base model" in refused(capsys, folder, "--model", other)
    assert main(["analyze", str(folder), "--model", str(other), "--force"]) == 0
    narrow = tiny.write_model(tmp_path / "narrow", width=16)
    line = refused(capsys, folder, "--model", narrow, "--force")
    assert "(96, 32)" in line and "(48, 16)" in line
    assert "no such file or folder" in refused(capsys, folder, "--model", "./nowhere")


def copied(folder, target, change):
    """The adapter with its arrays changed."""
    target.mkdir()
    for name in ("adapter_config.json", "jlora_adapter.json"):
        (target / name).write_text((folder / name).read_text())
    tensors = read_safetensors(folder / "adapter_model.safetensors")
    changed = {name: np.ascontiguousarray(change(name, a)) for name, a in tensors.items()}
    write_safetensors(target / "adapter_model.safetensors", changed)
    return target


def test_damaged_adapters(adapters, tmp_path, capsys):
    plain = adapters["plain"][0]
    broken = copied(plain, tmp_path / "nan", lambda name, a: a * np.nan)
    assert "NaN or infinity" in refused(capsys, broken)
    uneven = copied(plain, tmp_path / "uneven", lambda name, a: a[:2] if "_A" in name else a)
    assert "are no pair of matrices" in refused(capsys, uneven)
    renamed = copied(plain, tmp_path / "half", lambda name, a: a)
    tensors = read_safetensors(renamed / "adapter_model.safetensors")
    only_A = {name: a for name, a in tensors.items() if "lora_A" in name}
    write_safetensors(renamed / "adapter_model.safetensors", only_A)
    assert "lora_B None are no pair" in refused(capsys, renamed)


def test_an_untrained_adapter_is_all_zero_and_no_crash(adapters, tiny_model, tmp_path, capsys):
    zero = copied(
        adapters["fused"][0], tmp_path / "zero", lambda name, a: a * (0 if "_B" in name else 1)
    )
    argv = ["analyze", zero, "--model", tiny_model, "--out", tmp_path / "out"]
    assert main([str(word) for word in argv]) == 0
    layers = json.loads((tmp_path / "out" / "analysis.json").read_text())["adapters"][0]["layers"]
    assert all(layer["amplification"] is None for layer in layers.values())


def test_a_loralib_file_needs_its_settings(adapters, tmp_path, capsys):
    file = adapters["fused"][0].with_suffix(".pt")
    assert "--lora-alpha" in refused(capsys, file)
    assert "--enable-lora 1,0,1" in refused(capsys, file, "--lora-alpha", 6)
    line = refused(capsys, file, "--lora-alpha", 6, "--enable-lora", "1,1,1")
    assert "LoRA on 2 blocks, but enable_lora has 3" in line
    one = ("--lora-alpha", 6, "--enable-lora", "1,0,0")
    assert "jlora convert" in refused(capsys, file, *one)
    empty = tmp_path / "bias.pt"
    write_torch(empty, {"transformer.h.0.attn.c_attn.bias": np.zeros(3, np.float32)}, None)
    assert "no loralib adapter" in refused(capsys, empty, "--lora-alpha", 6)
    folder = adapters["fused"][0]
    assert "leave out --lora-alpha" in refused(capsys, folder, "--lora-alpha", 6)


def test_a_file_and_a_folder_can_be_compared(adapters):
    folder = adapters["fused"][0]
    argv = ["analyze", folder.with_suffix(".pt"), "--other", folder]
    argv += ["--lora-alpha", 6, "--enable-lora", "1,0,1", "--of", "dW"]
    assert main([str(word) for word in argv]) == 0
