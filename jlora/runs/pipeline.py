"""A whole run, stage by stage: data, training, decoding, scoring, report.

Every stage leaves its result in the run folder, and a resumed run skips what is there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from jlora import engine
from jlora.adapters import PartialModel, TunedModel, get_peft_model
from jlora.data.end_tokens import find_ends
from jlora.data.tasks import get_task
from jlora.layers import set_trainable
from jlora.metrics import check_metrics, evaluate_parts
from jlora.metrics.accuracy import accuracy, parse_choice
from jlora.models.hub import load, require_tokenizer
from jlora.report import environment
from jlora.report.html import write_report
from jlora.report.plots import loss_curve
from jlora.report.tables import score_table
from jlora.runs.adapter_file import load_tuned, tuned_folder
from jlora.runs.answer import choice_logprobs, decode, describe_source, end_token
from jlora.runs.memory_check import check_fits
from jlora.runs.recipe import Recipe, dump_recipe, load_recipe
from jlora.runs.run_data import RunData, load_data
from jlora.system.console import say
from jlora.system.distributed import world
from jlora.system.errors import UserError
from jlora.system.files import check_writable, recover_directory, write_text
from jlora.system.json_files import read_object
from jlora.system.runtime import set_seed
from jlora.training.checkpoint import has_checkpoint
from jlora.training.loggers import ProgressLogger, check_loggers, make_logger, read_metrics
from jlora.training.loop import train


def open_run(run: Path, recipe: Recipe, resume: bool) -> Recipe:
    """The recipe of the run that is there, if it goes on, or check that a new run can be there.

    A new run writes nothing before `begin_run`, so what goes wrong earlier leaves nothing behind.

    Raises:
        UserError: a new run would overwrite an old one, there is nothing to resume, or a logger
            is not installed.
    """
    check_loggers(recipe.log)
    config = run / "config.yaml"
    if resume:
        if not config.is_file():
            raise UserError(f"{run}: no run to resume there; start it without --resume")
        for name in ("adapter", "best"):
            recover_directory(run / name)
        return load_recipe(config)
    if config.exists():
        raise UserError(
            f"{run} holds a run already; add --resume to go on with it, or choose another --out"
        )
    return recipe


def begin_run(run: Path, recipe: Recipe) -> None:
    """Make the run folder with the recipe in it.

    Raises:
        UserError: the folder cannot be made or written.
    """
    check_writable(run)
    write_text(run / "config.yaml", dump_recipe(recipe))


def keep_template(run: Path, data: RunData) -> None:
    """Put the chat template of the training into the run, and into the adapters that it has."""
    if data.template is not None:
        for folder in (run, run / "adapter", run / "best"):
            if folder.is_dir():
                data.template.save(folder)


def build(recipe: Recipe, tuned: str | Path | None = None) -> TunedModel:
    """The recipe's model, about to be tuned as the recipe says or tuned already.

    Args:
        tuned: folder of what a training wrote; None for a new adapter.
    """
    base = _load_base(recipe)
    if tuned is not None:
        model = load_tuned(base, tuned)
    elif recipe.method == "lora":
        set_seed(recipe.train.seed)  # of lora_A's first values
        model = get_peft_model(base, recipe.lora)
    else:
        model = PartialModel(base, recipe.method, recipe.top_layers)
    _prepare(recipe, model)
    return model


def untouched(recipe: Recipe):
    """The recipe's model as it was downloaded."""
    base = _load_base(recipe)
    set_trainable(base, ())
    _prepare(recipe, base)
    return base


def _load_base(recipe: Recipe):
    say(f"loading {recipe.model}")
    engine.release()
    base = load(recipe.model)
    require_tokenizer(base)
    return base


def _prepare(recipe: Recipe, model) -> None:
    precision = engine.prepare(
        model,
        recipe.precision,
        keep_weights=False,
        checkpoint_activations=recipe.checkpoint_activations,
    )
    reason = engine.choose_precision()[1] if recipe.precision == "auto" else "as asked for"
    say(f"precision {precision}: {reason}")
    forms = engine.taken_forms(model)
    rounded = forms.pop("", 0)
    for form, count in sorted(forms.items()):
        how = "scales rounded to float16" if form == "Q4_K" else "as they are"
        say(f"{count} weights taken over from {form}, {how}; {rounded} rounded from float32")


def finetune(
    recipe: Recipe, run: Path, model: TunedModel, data: RunData, resume: bool, command: str = "run"
) -> bool:
    """Train as the recipe says; whether the training is complete.

    Args:
        command: the verb that goes on with this run after Ctrl-C.
    """
    trainable, total = model.get_nb_trainable_parameters()
    say(f"{trainable:,} trainable parameters of {total:,} ({100 * trainable / total:.3f} %)")

    if recipe.method == "lora" and not recipe.lora.lora_variant.is_plain:
        say(
            f"variant {recipe.lora.variant_name}: its layers run one by one, so a step takes 1.3 "
            "to 1.5 times LoRA's processor time, and more memory (docs/adapters.md)"
        )

    def loggers(steps: int, start: int) -> list:
        settings = {"recipe": dump_recipe(recipe)}
        services = [make_logger(name, run.name, settings, run, start) for name in recipe.log]
        return [ProgressLogger(steps, start), *services]

    if resume and world().is_first:
        changes = environment.rounding_changes(run)
        if changes:
            say(
                f"the run began elsewhere ({', '.join(changes)}): from here on it equals an "
                "unbroken one up to rounding, not bit for bit"
            )
    result = train(model, data.train, data.valid, recipe.train, run, loggers, resume)
    if world().is_first:
        environment.record(run, total_steps=result.total_steps)
        loss_curve(read_metrics(run / "metrics.jsonl"), run / "loss.png")
    if result.interrupted:
        say(
            f"stopped after step {result.progress.step} of {result.total_steps}; everything is "
            f"saved. Go on with: jlora {command} --resume --out {run}"
        )
    elif result.progress.best_valid_loss is not None:
        say(
            f"validation loss {result.progress.best_valid_loss:.4f} "
            f"(best, at step {result.progress.best_step})"
        )
    return not result.interrupted


def answer_and_score(
    recipe: Recipe, model, data: RunData, path: Path, adapter: Path | None
) -> dict[str, float]:
    """Decode the test inputs into ``path`` and score them; of a task with choices see `choose`.

    Args:
        adapter: the folder that the model was tuned from; None: it is untouched.
    """
    config, prompts = recipe.decode, [group.prompt for group in data.groups]
    ends = config.eos_token_ids
    if not ends and data.template is not None:
        ends = find_ends(model.tokenizer, data.template).ids
    ends = ends or [end_token(model, recipe.data.end_id)]
    predictions = decode(
        model,
        prompts,
        data.prompts,
        replace(config, eos_token_ids=list(ends)),
        path,
        describe_source(model, recipe.precision, adapter),
    )
    texts = [prediction.prediction for prediction in predictions]
    if data.task.choices:
        return choose(model, data, texts, path.with_suffix(".choices.jsonl"))
    references = [group.references for group in data.groups]
    parts = [group.part for group in data.groups]
    return world().first(lambda: evaluate_parts(data.metrics, texts, references, parts))


def choose(model, data: RunData, texts: Sequence[str], path: Path) -> dict[str, float]:
    """Accuracy of a task with choices, in two ways.

    ``accuracy`` and its relatives take the choice that the model holds likelier;
    ``generated_accuracy`` reads the choice off the generated text, and counts what cannot be read
    as wrong. ``path`` gets a line an input with both.
    """
    choices = data.task.choices
    logprobs = choice_logprobs(model, data.prompts, choices)
    chosen = [choices[index] for index in logprobs.argmax(1)]
    written = [parse_choice(text, choices) for text in texts]
    rows, gold, compared, generated = [], [], [], []
    for index, group in enumerate(data.groups):
        for reference in group.references:  # an input may be asked twice
            gold.append(reference)
            compared.append(chosen[index])
            generated.append(written[index])
        rows.append(
            {
                "prompt": group.prompt,
                "gold": group.references,
                "logprobs": dict(zip(choices, map(float, logprobs[index]))),
                "chosen": chosen[index],
                "generated": texts[index],
                "read_as": written[index],
            }
        )
    if world().is_first:
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    by_text = accuracy(generated, gold, choices)
    return {
        **accuracy(compared, gold, choices),
        **{f"generated_{name}": by_text[name] for name in ("accuracy", "unparseable")},
    }


def open_data(recipe: Recipe, test: bool, check_memory: bool) -> RunData:
    """The recipe's data as tokens, before any weights are read.

    Args:
        test: whether test inputs are answered after the training.
        check_memory: whether to refuse a run that does not fit this machine, or its GPU.

    Raises:
        UserError: data or model are missing or broken or do not fit each other, or the run does not
            fit.
    """
    data = load_data(recipe, test)
    if check_memory:
        world().first(lambda: check_fits(recipe, data))
    return data


def train_recipe(
    recipe: Recipe, run: Path, resume: bool = False, check_memory: bool = False
) -> Path | None:
    """`jlora finetune`: train and write the report; no decoding.

    Returns:
        The folder of the adapter to use; None when training was interrupted.
    """
    here = world()
    recipe = here.first(lambda: open_run(run, recipe, resume))
    data = open_data(recipe, False, check_memory)
    recipe = data.recipe
    model = build(recipe)
    if here.is_first and not resume:
        begin_run(run, recipe)
        keep_template(run, data)
        environment.record(run, data.hashes)
    started = here.first(lambda: resume and has_checkpoint(run))
    if not finetune(recipe, run, model, data, started, command="finetune"):
        return None
    if here.is_first:
        keep_template(run, data)
        write_report(run)
    return here.first(lambda: tuned_folder(run, recipe))


def run_recipe(
    recipe: Recipe, run: Path, resume: bool = False, check_memory: bool = False
) -> dict | None:
    """Train, decode the test inputs, score them and write the report.

    Several processes do it together (`jlora.system.distributed`); the first writes.

    Args:
        check_memory: see `open_data`.

    Returns:
        ``{"before": scores or absent, "after": scores}``; None when training was interrupted.
    """
    here = world()
    recipe = here.first(lambda: open_run(run, recipe, resume))
    # Before hours of training: is all there that its end needs?
    task = get_task(recipe.data.task)
    if not task.choices:
        here.first(lambda: check_metrics(recipe.data.metrics or task.metrics))
    data = open_data(recipe, True, check_memory)
    recipe = data.recipe
    scores = here.first(lambda: read_scores(run))

    def begin() -> None:
        if here.is_first and not (run / "config.yaml").exists():
            begin_run(run, recipe)
            keep_template(run, data)
            environment.record(run, data.hashes)

    def score(model, key: str, path: Path, adapter: Path | None = None) -> None:
        scores[key] = answer_and_score(recipe, model, data, path, adapter)
        if here.is_first:
            write_text(run / "scores.json", json.dumps(scores, indent=1) + "\n")
            environment.record(run)

    if recipe.score_before and "before" not in scores:
        model = untouched(recipe)
        begin()
        say(f"the untouched model on {len(data.groups)} test inputs")
        score(model, "before", run / "predictions_before.jsonl")
        del model  # before the next one is loaded
    if "after" not in scores:
        model = build(recipe)
        begin()
        started = here.first(lambda: resume and has_checkpoint(run))
        if not finetune(recipe, run, model, data, started):
            return None
        chosen = here.first(lambda: tuned_folder(run, recipe))
        if here.is_first:
            keep_template(run, data)
        say(f"the tuned model ({chosen.name} adapter) on {len(data.groups)} test inputs")
        # From the files, so that what is scored is what a user gets; the old model goes first.
        del model
        score(build(recipe, chosen), "after", run / "predictions.jsonl", chosen)
    if not here.is_first:
        return scores
    report = write_report(run, data.references)
    print(score_table(scores.get("before"), scores["after"]))
    say(f"report: {report}")
    return scores


def read_scores(run: Path) -> dict:
    """RUN/scores.json, empty before there is one."""
    path = run / "scores.json"
    if not path.exists():
        return {}
    return read_object(path, "remove it to score again")
