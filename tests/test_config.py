"""Recipes: reading, writing, and errors with advice."""

from __future__ import annotations

import dataclasses
import functools
import math

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from jlora.adapters import LoraConfig
from jlora.runs.recipe import (
    DataConfig,
    DecodeConfig,
    Recipe,
    apply_override,
    dump_recipe,
    find_recipe,
    load_recipe,
    make_recipe,
)
from jlora.system.errors import UserError
from jlora.training.adamw import OptimConfig
from jlora.training.loggers import LOGGERS
from jlora.training.loop import TrainConfig


def load_text(tmp_path, text, overrides=()):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path, overrides)


def message(values) -> str:
    with pytest.raises(UserError) as error:
        make_recipe(values, "here")
    assert "\n" not in str(error.value)
    return str(error.value)


# Reading and writing -----------------------------------------------------------------------------

# Jittor makes the processor flush denormal numbers, which Hypothesis would refuse to work with.
floats = functools.partial(st.floats, allow_subnormal=False)
numbers = floats(1e-12, 1e6) | st.integers(1, 9)
words = st.text(min_size=1).filter(str.strip)
# Texts that YAML could take for something else.
snares = st.sampled_from(["1e-3", "1.0", "yes", "null", "0x1F", "12:30", "~", "2020-01-01", "- a"])
names = words | snares
limits = st.none() | st.integers(1, 10**6)
recipes = st.builds(
    Recipe,
    model=names,
    data=st.builds(
        DataConfig,
        task=st.sampled_from(["e2e", "jsonl", "restaurants"]),
        folder=st.none() | names,
        train=st.none() | names,
        separator_id=st.none() | st.integers(0, 10**5),
        train_limit=limits,
        valid_stride=st.integers(1, 99),
    ),
    lora=st.builds(
        LoraConfig,
        r=st.integers(1, 512),
        lora_alpha=numbers,
        lora_dropout=floats(0, 0.99),
        target_modules=st.none() | names | st.lists(names, min_size=1),
        rank_pattern=st.dictionaries(names, st.integers(1, 64), max_size=2),
        alpha_pattern=st.dictionaries(names, numbers, max_size=2),
        init_lora_weights=st.sampled_from([True, False, "gaussian"]),
        use_rslora=st.booleans(),
        enable_lora=st.none() | st.lists(st.booleans(), min_size=1, max_size=3),
    ),
    train=st.builds(
        TrainConfig,
        steps=limits,
        epochs=numbers,
        label_smoothing=floats(0, 0.99),
        shuffle=st.booleans(),
        optim=st.builds(OptimConfig, lr=numbers, eps=numbers, beta2=floats(0, 0.9999)),
    ),
    decode=st.builds(
        DecodeConfig,
        length_penalty=floats(-2, 2),
        eos_token_ids=st.none() | st.lists(st.integers(0, 10**5), min_size=1),
    ),
    precision=st.sampled_from(["auto", "plain", "fp32", "bf16"]),
    score_before=st.booleans(),
    log=st.lists(st.sampled_from(sorted(LOGGERS)), unique=True),
)


@settings(max_examples=40, deadline=None)
@given(recipes)
def test_what_is_dumped_is_read_back(tmp_path_factory, recipe):
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_bytes(dump_recipe(recipe).encode("utf-8", "surrogatepass"))
    assert load_recipe(path) == recipe


def test_a_dump_is_plain_yaml_with_every_setting():
    values = yaml.safe_load(dump_recipe(Recipe(model="m")))
    assert values["model"] == "m"
    for name, kind in (("data", DataConfig), ("train", TrainConfig), ("decode", DecodeConfig)):
        assert set(values[name]) == {item.name for item in dataclasses.fields(kind)}


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.0e-3", "0.001", ".001", "'1e-3'", "+1e-3"])
def test_numbers_as_people_write_them(tmp_path, text):
    recipe = load_text(tmp_path, f"model: m\ntrain: {{optim: {{lr: {text}}}}}\n")
    assert recipe.train.optim.lr == 0.001
    assert load_text(tmp_path, "model: m\n", [f"train.optim.lr={text}"]) == recipe


def test_a_whole_number_may_be_written_as_a_power():
    values: dict = {"model": "m"}
    apply_override(values, "train.steps=1e3")
    assert make_recipe(values, "here").train.steps == 1000


def test_an_empty_group_has_the_defaults(tmp_path):
    recipe = load_text(tmp_path, "model: m\ntrain:\n  # steps: 3\n  optim:\nlora:\n")
    assert recipe == Recipe(model="m")


def test_overrides(tmp_path):
    text = "model: m\ntrain: {steps: 3, epochs: 2}\n"
    recipe = load_text(
        tmp_path, text, ["train.steps=null", "lora.target_modules=[a, b]", "data.folder='1'"]
    )
    assert (recipe.train.steps, recipe.train.epochs) == (None, 2)
    assert (recipe.lora.target_modules, recipe.data.folder) == (["a", "b"], "1")


# Recipes that come along -------------------------------------------------------------------------


def test_recipes_of_the_package_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = find_recipe("e2e-smollm2-135m")
    assert path == find_recipe("recipes/e2e-smollm2-135m.yaml")
    for each in path.parent.glob("*.yaml"):
        assert load_recipe(find_recipe(each.stem)).model


def test_the_real_run(tmp_path):
    """The settings of the run whose PyTorch counterpart's numbers are known."""
    recipe = load_recipe(find_recipe("e2e-smollm2-135m"))
    optim = recipe.train.optim
    assert (recipe.lora.r, recipe.lora.lora_alpha, recipe.lora.lora_dropout) == (4, 32, 0.1)
    assert (optim.lr, optim.warmup_steps, optim.weight_decay, optim.eps) == (1e-3, 100, 0.01, 1e-8)
    assert (recipe.train.batch_size, recipe.train.steps, recipe.train.label_smoothing) == (
        16, 1200, 0.1,
    )  # fmt: skip
    assert (recipe.data.separator_id, recipe.data.end_id, recipe.data.valid_stride) == (0, 0, 12)
    decode = recipe.decode
    assert (decode.num_beams, decode.length_penalty, decode.no_repeat_ngram_size) == (10, 0.8, 4)


def test_a_file_goes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "e2e-smollm2-135m").write_text("model: mine\n")
    assert load_recipe(find_recipe("e2e-smollm2-135m")).model == "mine"


# Errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"model": "m", "trian": {}}, "here: unknown setting trian; did you mean train?"),
        ({"model": "m", "train": {"optim": {"weight_decy": 1}}},
         "here: unknown setting train.optim.weight_decy; did you mean train.optim.weight_decay?"),
        ({"model": "m", 3: 4}, "here: unknown setting 3; known are model, method"),
        ({"model": "m", "lora": [1]}, "here: lora is a group of settings; write lora.NAME=VALUE"),
        ({"model": None}, "here: no model given"),
        ({"model": " "}, "here: model is empty"),
        ({"model": ["m"]}, "here: model is ['m']: should be a valid string"),
        ({"model": "m", "train": {"steps": "x", "seed": 1.5}},
         "here: train.steps is 'x': should be a valid integer"),
        ({"model": "m", "train": {"steps": True}}, "train.steps is True; give a value"),
        ({"model": "m", "lora": {"r": 0}}, "here: r must be a whole number above 0, not 0"),
        ({"model": "m", "lora": {"target_modules": 3}},
         "lora.target_modules is 3: should be a valid list, or should be a valid string"),
        ({"model": "m", "train": {"optim": {"lr": math.nan}}}, "here: lr must be above 0, not nan"),
        ({"model": "m", "train": {"optim": {"schedule": "cos"}}}, "'cos' is not one of linear"),
        ({"model": "m", "decode": {"rank_up_to": 0.5}}, "rank_up_to is 0.5, but must be >= 0.8"),
        ({"model": "m", "data": {"valid_stride": 0}}, "data.valid_stride must be at least 1"),
        ({"model": "m", "data": {"max_prompt": 0}}, "data.max_prompt must be at least 1"),
        ({"model": "m", "data": {"template": "jlora"}}, "task e2e has no prompt templates"),
        ({"model": "m", "data": {"metrics": ["BLUE"]}}, "no metric 'BLUE'; did you mean BLEU"),
        ({"model": "m", "data": {"task": "boolq", "template": "x"}}, "no prompt template 'x'"),
        (
            {"model": "m", "data": {"task": "boolq", "metrics": ["BLEU"]}},
            "task boolq is scored by accuracy alone",
        ),
        ({"model": "m", "method": "ful"}, "method 'ful' is not one of lora, full"),
        ({"model": "m", "top_layers": 0}, "top_layers must be at least 1"),
        ({"model": "m", "log": "wandb"}, "log is 'wandb': should be a valid list"),
    ],
)  # fmt: skip
def test_errors(values, said):
    assert said in message(values)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: m\ntrain: true\ndata: folder\niters: 600\n", "mlx-lm (train: true, data: a path"),
        ("model: m\ntrain: true\n", "looks like a file of mlx-lm (train: true)"),
        ("base_model: m\nadapter: lora\ndatasets: []\nlora_r: 8\n", "Axolotl (base_model, adapter"),
        (
            "model_name_or_path: m\nstage: sft\nfinetuning_type: lora\n",
            "LLaMA-Factory (model_name_or_path",
        ),
        ("checkpoint_dir: c\nlora_r: 8\nlora_query: true\n", "LitGPT (checkpoint_dir"),
        (
            "model: {_component_: a.b}\ntokenizer: {_component_: c.d}\n",
            "torchtune (tokenizer, model._component_",
        ),
    ],
    ids=lambda value: value.split(" (")[0][-13:],
)
def test_files_of_other_trainers(tmp_path, text, said):
    with pytest.raises(UserError, match=r"recipe\.yaml: this looks like a file of") as error:
        load_text(tmp_path, text)
    assert said in str(error.value) and "jlora finetune" in str(error.value)


def test_what_is_a_slip_is_not_taken_for_another_trainers_file(tmp_path):
    for text, said in (
        ("model: m\ndata: folder\n", "data is a group of settings; write data.NAME=VALUE"),
        ("model: m\niters: 3\n", "unknown setting iters"),
    ):
        with pytest.raises(UserError, match=said):
            load_text(tmp_path, text)


def test_the_file_and_the_options_are_named(tmp_path):
    with pytest.raises(UserError, match=r"recipe\.yaml: unknown setting a"):
        load_text(tmp_path, "model: m\na: 1\n")
    with pytest.raises(UserError, match=r"recipe\.yaml with the options given: unknown setting a"):
        load_text(tmp_path, "model: m\n", ["a=1"])


@given(st.text())
@settings(deadline=None, max_examples=60)
def test_no_override_ends_in_a_traceback(text):
    values: dict = {"model": "m"}
    try:
        apply_override(values, text)
        make_recipe(values, "here")
    except UserError as error:
        assert str(error)
