"""The recipes that come along: each can be read, says what its row says, and passes --smoke."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from jlora.cli import main
from jlora.data.tasks import get_task
from jlora.models.hub import load
from jlora.models.random_gpt2 import SIZES, write_random_gpt2
from jlora.runs.recipe import find_recipe, find_sweep, load_recipe
from jlora.runs.smoke import smoke
from jlora.runs.sweep import file_cases
from jlora.system.errors import UserError

FOLDER = find_recipe("demo").parent
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
ROWS = [f"{task}-gpt2-{size}" for task in ("e2e", "webnlg", "dart") for size in ("medium", "large")]


@pytest.mark.parametrize("name", NAMES)
def test_it_can_be_read_and_shrunk(name):
    recipe = load_recipe(find_recipe(name))
    small = smoke(load_recipe(find_recipe(name), ["model=some-model"]))
    assert small.train.steps < 10 and small.data.test_limit < 10
    # Nothing but the size is another: what is trained and how stays the recipe's.
    assert (small.method, small.lora, small.train.optim.lr) == (
        recipe.method, recipe.lora, recipe.train.optim.lr,
    )  # fmt: skip
    assert recipe.data.task in name or name in ("demo", "wikisql-smollm2-135m")


def test_there_is_one_for_each_row():
    assert set(NAMES) >= {
        *ROWS, *(f"{row}-full" for row in ROWS), "boolq-gpt2-medium", "boolq-gpt2-large",
        *(f"{task}-smollm2-135m" for task in ("e2e", "webnlg", "dart", "boolq")),
    }  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_table_11_of_the_paper(name):
    recipe = load_recipe(find_recipe(name))
    task = name.partition("-")[0]
    weight_decay, dropout, smoothing = (0.0, 0.0, 0.0) if task == "dart" else (0.01, 0.1, 0.1)
    assert recipe.lora.r == 4 and recipe.lora.lora_alpha == 32
    assert recipe.lora.enable_lora == [True, False, True]
    assert recipe.lora.lora_dropout == dropout
    assert recipe.train.label_smoothing == smoothing
    assert recipe.train.optim.weight_decay == weight_decay
    assert recipe.train.optim.lr == 2e-4 and recipe.train.optim.warmup_steps == 500
    assert recipe.train.batch_size == 8 and recipe.train.epochs == 5
    assert recipe.decode.num_beams == 10 and recipe.decode.no_repeat_ngram_size == 4
    assert recipe.decode.length_penalty == 0.8


def test_every_setting_of_a_row_is_visible():
    """A GPT-2 recipe names each setting of its optimiser and search; defaults cannot change it."""
    for name in ROWS:
        text = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
        assert set(text["train"]["optim"]) >= {
            "lr", "warmup_steps", "schedule", "beta1", "beta2", "eps", "weight_decay", "variant",
        }  # fmt: skip
        assert set(text["decode"]) >= {"num_beams", "length_penalty", "no_repeat_ngram_size"}


@pytest.mark.parametrize("name", ["matrices-gpt2", "matrices-llama"])
def test_the_sweep_over_matrices_has_equal_parameters(name):
    base = "e2e-gpt2-medium" if "gpt2" in name else "e2e-smollm2-135m"
    widths = (
        {"attn.c_attn": (1024, 3072), "attn.c_proj": (1024, 1024)}
        if "gpt2" in name
        else {
            "q_proj": (576, 576),
            "k_proj": (576, 192),
            "v_proj": (576, 192),
            "o_proj": (576, 576),
        }
    )
    counts = set()
    cases = file_cases(find_sweep(name))
    assert set(cases) == {"q", "k", "v", "o", "qk", "qv", "qkvo"}
    for overrides in cases.values():
        lora = load_recipe(find_recipe(base), overrides).lora
        count = 0
        for module in lora.target_modules:
            rank = lora.rank_pattern.get(module, lora.r)
            inputs, outputs = widths[module]
            if module == "attn.c_attn":
                blocks = sum(lora.enable_lora)
                count += blocks * rank * (inputs + outputs // 3)
            else:
                count += rank * (inputs + outputs)
            alpha = lora.alpha_pattern.get(module, lora.lora_alpha)
            assert alpha / rank == lora.lora_alpha / lora.r
        counts.add(count)
    assert len(counts) == 1
    with pytest.raises(UserError, match="jlora comes with matrices-gpt2"):
        find_sweep("matrices")


def test_random_weights_have_the_real_shape_and_load_as_a_bare_file(tmp_path, monkeypatch):
    monkeypatch.setitem(SIZES, "gpt2", (64, 2))  # the real one is 500 MB
    monkeypatch.setenv("JLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("jlora.models.hub.pull", refuse)
    path = tmp_path / "gpt2-pytorch_model.bin"
    write_random_gpt2("gpt2", path)
    model = load(path)
    assert model.config.n_layer == 2 and model.config.n_embd == 64
    assert sum(p.numel() for p in model.parameters()) == (50257 + 1024) * 64 + 2 * 49984 + 128
    monkeypatch.chdir(tmp_path)
    assert load("gpt2").config.n_layer == 2  # microsoft/LoRA's name of the file
    with pytest.raises(UserError, match="no size of GPT-2"):
        write_random_gpt2("gpt2-huge", path)


def refuse(name):
    raise UserError(f"no network for {name}")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if "large" not in name])
def test_smoke(name, tmp_path, shared_data):
    """The whole pipeline; GPT-2 with random weights, WebNLG and DART on their development part."""
    argv = ["run", name, "--smoke", "--out", str(tmp_path / "run")]
    task = load_recipe(find_recipe(name)).data.task
    if not has_splits(task, shared_data):
        file = shared_data / task / "dev.json"
        for split in ("train", "valid", "test"):
            argv += ["--set", f"data.{split}={json.dumps(str(file))}"]
    assert main(argv) == 0
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert scores["after"]
    assert (tmp_path / "run" / "report.html").is_file()


def has_splits(task: str, data: Path) -> bool:
    try:
        get_task(task).find_data(data, "train")
    except UserError:
        return False
    return True
