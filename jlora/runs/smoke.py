"""`jlora run RECIPE --smoke`: the whole pipeline of a recipe in seconds, to check that it runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from jlora.data.pull_models import cache_folder
from jlora.models.hub import find_local
from jlora.models.random_gpt2 import SIZES, write_random_gpt2
from jlora.runs.recipe import Recipe
from jlora.system.console import say
from jlora.system.errors import UserError

STEPS = 5  # enough that the trainer sees the adapter move


def smoke(recipe: Recipe) -> Recipe:
    """The recipe with a few steps, inputs and tokens, and everything else as it is.

    A GPT-2 whose weights are not on this machine gets random ones of its real shape.
    """
    small = Recipe(**vars(recipe))
    small.model = stand_in(recipe.model)
    small.data = replace(recipe.data, train_limit=8, valid_stride=10**9, test_limit=2)
    small.train = replace(
        recipe.train,
        steps=STEPS,
        batch_size=min(2, recipe.train.batch_size),
        log_every=1,
        valid_every=0,
        save_every=STEPS,
        optim=replace(recipe.train.optim, warmup_steps=1),
    )
    small.decode = replace(recipe.decode, num_beams=2, max_new_tokens=8, batch_size=2)
    return small


def stand_in(model: str) -> str:
    """The model itself, or random weights of its shape for a GPT-2 that is not on this machine.

    Raises:
        UserError: the file of random weights cannot be written.
    """
    name = model.rpartition("/")[2]
    if name not in SIZES or find_local(model) is not None:
        return model
    path = random_file(name)
    if not path.is_file():
        say(f"{model} is not on this machine: random weights of its shape go to {path}")
        write_random_gpt2(name, path)
    return str(path)


def random_file(name: str) -> Path:
    """Where the random weights of a size are kept; they may be deleted at any time."""
    if name not in SIZES:
        raise UserError(f"{name} is no size of GPT-2; there are {', '.join(SIZES)}")
    return cache_folder() / "random" / f"{name}-pytorch_model.bin"
