"""The benchmarks' arithmetic and their way of asking processes; no timings."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from benchmarks import finetune, finetune_sides, lora_code, scale, sides, size, training, work
from jlora.runs.recipe import find_recipe, load_recipe


def test_flops_of_a_step_counted_one_product_at_a_time():
    config = {**work.GPT2, "n_embd": 8, "n_layer": 2, "n_head": 2, "vocab_size": 50}
    lengths, targets = np.array([3, 5]), 4
    forward = 0
    for length in lengths:
        for _ in range(config["n_layer"]):
            forward += sum(2 * length * i * o for i, o in ((8, 24), (8, 8), (8, 32), (32, 8)))
    head = 2 * targets * 8 * 50
    # Half of the T x T scores lie below the diagonal; two products forward, four backward.
    attention = sum(6 * 2 * length * length * 8 / 2 for length in lengths) * config["n_layer"]
    assert work.training_flops(config, lengths, targets) == 2 * forward + 2 * head + attention


def test_flops_of_the_llama_family_follow_its_layers():
    config = work.MODELS["smollm2-135m"]
    one = work.training_flops(config, np.array([1]), 0)
    weights = 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)
    assert one == pytest.approx(4 * weights, rel=1e-3)


def test_batches_have_the_lengths_and_targets_asked_for(tmp_path):
    path = tmp_path / "batches.npz"
    rng, lengths, starts = np.random.default_rng(0), [np.array([3, 5])], [np.array([1, 4])]
    work.write_batches(path, rng, 11, lengths, starts)
    arrays = np.load(path)
    assert arrays["mask0"].tolist() == [[0, 1, 1, 0, 0], [0, 0, 0, 0, 1]]
    assert arrays["lengths0"].tolist() == [3, 5] and arrays["ids0"][0, 3:].tolist() == [0, 0]
    # A target is the next input.
    assert arrays["targets0"][1, :4].tolist() == arrays["ids0"][1, 1:].tolist()


def test_sides_answer_every_round_and_a_dead_one_is_named(monkeypatch):
    monkeypatch.setitem(sides.PYTHON, "here", sys.executable)
    side = sides.Side("peak", "peak", "here", {"rows": 4, "n": 8, "k": 8})
    sides.alternate([side], rounds=3, warmup=1)
    assert len(side.seconds) == 3 and side.first_seconds > 0 and side.peak_mb > 1
    with pytest.raises(RuntimeError, match="missing ended with exit code 1"):
        sides.Side("missing", "no_such_module", "here", {}).start()


def test_slow_sides_do_fewer_rounds_and_those_apart_run_alone(monkeypatch):
    log = []

    def answer(self, what):
        log.append((self.name, what))
        return {"seconds": 2.0, "peak_mb": 1.0, "extra": {}}

    monkeypatch.setattr(sides.Side, "start", lambda self: log.append((self.name, "start")))
    monkeypatch.setattr(sides.Side, "stop", lambda self: log.append((self.name, "stop")))
    monkeypatch.setattr(sides.Side, "_ask", answer)
    plain, slow = sides.Side("a", "", "", {}), sides.Side("b", "", "", {}, most_rounds=1)
    apart = sides.Side("c", "", "", {}, most_rounds=2, apart=True, part=0.25)
    sides.alternate([apart, plain, slow], rounds=3, warmup=2)
    assert [len(side.seconds) for side in (plain, slow, apart)] == [3, 1, 2]
    assert [log.count((name, "round")) for name in "abc"] == [5, 2, 3]  # the warm-up included
    assert log.index(("c", "start")) > max(log.index((name, "stop")) for name in "ab")
    assert plain.median == 2 and apart.median == 8


def test_a_straight_line_is_found_and_a_bent_one_shows():
    x = [64, 128, 256, 512]
    fixed, slope, off = scale.straight_line(x, [10 + 0.5 * n for n in x])
    assert (fixed, slope) == pytest.approx((10, 0.5)) and off == pytest.approx(0, abs=1e-9)
    bent = scale.straight_line(x, [n**1.5 for n in x])[2]
    assert bent[0] > 0.05 and bent[1] < -0.05 and bent[3] > 0.05
    assert scale.relative_cost([10, 20], [4.0, 6.0]) == pytest.approx([4 / 3, 1])
    assert scale.growth([10, 20], [4.0, 6.0]) == pytest.approx([1, 0.75])


def test_padded_rows_fit_the_memory_that_is_free():
    small, medium = work.MODELS["gpt2-small"], work.MODELS["gpt2-medium"]
    assert training.rows_that_fit(small, 512, 22 << 30) == 8
    assert training.rows_that_fit(medium, 512, 22 << 30) == 4
    assert training.rows_that_fit(medium, 512, 1 << 30) == 1  # at least one


def test_microsofts_code_takes_part_for_gpt2_alone(tmp_path):
    chosen = argparse.Namespace(
        precisions=["bf16"], peers=["PEFT bf16", "microsoft/LoRA, padded to 512"],
        lora_code=tmp_path, slow_rounds=2, padded_rows=2,
    )  # fmt: skip
    source = tmp_path / "examples" / "NLG" / "src"
    source.mkdir(parents=True)
    (source / "model.py").touch()
    batches = work.even_batches(tmp_path / "batches.npz", 11, rows=8, tokens=4)
    found = training.training_sides("gpt2-small", batches, chosen)
    names = ["jlora bf16", "PEFT bf16", "microsoft/LoRA, padded to 512 (2 of 8 rows, scaled)"]
    assert [side.name for side in found] == names
    assert found[2].part == 0.25 and found[2].apart and found[2].spec["rows"] == 2
    found = training.training_sides("smollm2-135m", batches, chosen)
    assert [side.name for side in found] == names[:2]


def test_without_network_the_clone_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(lora_code, "ADDRESS", str(tmp_path / "nowhere"))
    with pytest.raises(SystemExit, match="could not be cloned.*--lora-code"):
        lora_code.clone(tmp_path / "LoRA")


def test_lines_by_folder_and_their_change_since_main(tmp_path):
    def commit(message):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        for words in (["add", "-A"], [*identity, "commit", "-qm", message]):
            subprocess.run(["git", *words], cwd=tmp_path, check=True)

    def shown():
        base = size.base_commit(tmp_path)
        before = size.committed_lines(tmp_path, base) if base else None
        table = size.table(size.working_lines(tmp_path), before)
        return [" ".join(line.split()) for line in table.splitlines()]

    (tmp_path / "jlora" / "kernels").mkdir(parents=True)
    (tmp_path / "jlora" / "__init__.py").write_text("one = 1\n")
    (tmp_path / "jlora" / "kernels" / "a.py").write_text("x\ny\n")
    (tmp_path / "jlora" / "kernels" / "b.h").write_text("1\n2\n3")
    counts = ["lines Python C++", "jlora 1", "jlora/kernels 2 3", "the package 3 3"]
    assert shown() == counts  # no repository
    if shutil.which("git") is None:
        pytest.skip("no git")
    subprocess.run(["git", "init", "-q", "-b", "main"], cwd=tmp_path, check=True)
    commit("first")
    assert shown() == counts  # no commit before it, as in a shallow clone
    (tmp_path / "jlora" / "kernels" / "a.py").write_text("x\n")
    (tmp_path / "jlora" / "kernels" / "c.cc").write_text("4\n")
    changed = ["lines Python C++", "jlora 1", "jlora/kernels 1 (-1) 4 (+1)"]
    changed.append("the package 2 (-1) 4 (+1)")
    assert shown() == changed  # the working tree against main
    commit("second")
    assert shown() == changed  # main against the commit before it
    shutil.rmtree(tmp_path / ".git")
    assert shown()[-1] == "the package 2 4"


#: What mlx-lm 0.32.2 prints; its colours stand in angle brackets.
MLX_LM = """\
Trainable parameters: 0.968% (1.303M/134.515M)
  <1>iter   train_loss     tok/s     tokens<0>
  <38;5;244>   1<0>    <1;35>val<0> <1>3.235<0>    <38;5;244>236.83s<0>
  <38;5;244>   1<0>    <1;32>3.390 ▼<0>    <1>   55<0>    <38;5;244>  0.4k<0>
  <38;5;244>   2<0>    <1;33>3.587 ▲<0>    <1>1,059<0>    <38;5;244>  1.0k<0>
  <1;32>save<0>  <38;5;244>0000002_adapters.safetensors<0>
  <38;5;244>   3<0>    <1;35>val<0> <1>2.101<0>    <38;5;244>2.83s<0>
"""


def test_losses_are_read_from_what_mlx_lm_prints():
    lines = MLX_LM.replace("<", "\x1b[").replace(">", "m").splitlines()
    steps, valid = finetune_sides.mlx_losses([(float(i), line) for i, line in enumerate(lines)])
    assert steps == [(3.0, 3.39), (4.0, 3.587)] and valid == [3.235, 2.101]
    many = [(2.0 * i, 3.0) for i in range(finetune_sides.WARM_UP + 3)]
    run = finetune_sides.timed(many, finetune_sides.Run())
    assert run.seconds == [2.0] * 3 and len(run.losses) == finetune_sides.WARM_UP + 3


def test_an_adapter_of_mlx_lm_becomes_one_of_peft(tmp_path):
    rng = np.random.default_rng(0)
    a, b = rng.random((576, 8)).astype("f"), rng.random((8, 192)).astype("f")
    name = "model.layers.14.self_attn.k_proj"
    save_file({f"{name}.lora_a": a, f"{name}.lora_b": b}, tmp_path / "mlx.safetensors")
    recipe = load_recipe(find_recipe("wikisql-smollm2-135m"))
    finetune_sides.save_as_peft(tmp_path / "mlx.safetensors", recipe, tmp_path / "peft")
    found = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["k_proj"]
    scale = config["lora_alpha"] / config["r"]
    up, down = (found[f"base_model.model.{name}.lora_{x}.weight"] for x in "BA")
    np.testing.assert_allclose(scale * up @ down, 20.0 * (a @ b).T, rtol=1e-6)


def test_a_side_without_its_environment_is_left_out_and_said(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(finetune, "MLX", tmp_path)
    assert not finetune.installed("mlx-lm") and finetune.installed("jlora bf16")
    assert "mlx-lm: left out" in capsys.readouterr().out
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    assert finetune.installed("mlx-lm, its own BLAS") and not finetune.installed("mlx-lm")
    assert "libmkl_rt.so is missing" in capsys.readouterr().out


def test_times_alone_need_few_validation_texts(tmp_path):
    for name in ("train", "valid"):
        (tmp_path / f"{name}.jsonl").write_text("{}\n" * 20)
    folder = finetune.few_to_validate(tmp_path, tmp_path / "few")
    lines = {file.name: len(file.read_text().splitlines()) for file in folder.iterdir()}
    assert lines == {"train.jsonl": 20, "valid.jsonl": finetune.FEW}


def test_a_comparison_that_was_cut_goes_on(tmp_path):
    made = []

    def train() -> finetune.Run:
        made.append(1)
        return finetune.Run(losses=[3.0, 2.5], after=2.25, peak_mb=100.0)

    first = finetune.kept(tmp_path / "kept", "one.json", train)
    assert finetune.kept(tmp_path / "kept", "one.json", train) == first and len(made) == 1
    assert finetune.kept(None, "one.json", train) == first and len(made) == 2  # nothing is kept


def test_a_failed_training_shows_its_last_lines():
    lines, peak = finetune.follow([sys.executable, "-c", "print(1); print(2)"])
    assert [line for _, line in lines] == ["1", "2"] and peak > 1
    with pytest.raises(RuntimeError, match="no such data"):
        finetune.follow([sys.executable, "-c", "raise SystemExit('no such data')"])
    with pytest.raises(RuntimeError, match="killed, as for want of memory"):
        finetune.follow([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])


def test_the_table_has_means_and_their_spread():
    runs = [finetune.Run([9.0] * 10 + [x] * 50, [0.5], None, x, x + 1, x, 10.0) for x in (1.0, 2.0)]
    row = finetune.table({"a": runs, "b": runs[:1], "c": []}, 60).splitlines()[-3:]
    assert (
        row[0]
        == "| a |  | 1.500 ± 0.707 | 2.500 ± 0.707 | 1.500 ± 0.707 | 1.500 ± 0.707 | 0.50 | 10 |"
    )
    assert row[1] == "| b |  | 1.000 | 2.000 | 1.000 | 1.000 | 0.50 | 10 |"
    assert row[2] == "| c | failed |" + " |" * 6
