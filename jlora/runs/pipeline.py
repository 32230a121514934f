"""A whole run, stage by stage: data, training, decoding, scoring, report.

Every stage leaves its result in the run folder, and a resumed run skips what is there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from jlora import engine
from jlora.adapters import PartialModel, TunedModel, get_peft_model
from jlora.runs.answer import choice_logprobs, decode, encode_inputs
from jlora.runs.recipe import Recipe, dump_recipe, load_recipe
from jlora.data.batches import Example, TokenExample, check_vocabulary, encode_examples
from jlora.system.distributed import world
from jlora.system.errors import UserError
from jlora.system.files import check_writable, read_text, recover_directory, sha256_of, write_text
from jlora.layers import set_trainable
from jlora.training.loggers import ProgressLogger, check_loggers, make_logger, read_metrics
from jlora.metrics import check_metrics, evaluate_parts
from jlora.metrics.accuracy import accuracy, parse_choice
from jlora.models.hub import load, require_tokenizer
from jlora.runs.adapter_file import load_tuned, say
from jlora.report import environment
from jlora.report.html import write_report
from jlora.report.plots import loss_curve
from jlora.report.tables import score_table
from jlora.system.runtime import set_seed
from jlora.training.checkpoint import has_checkpoint
from jlora.data.tasks import ReferenceGroup, get_task
from jlora.training.loop import train


def open_run(run: Path, recipe: Recipe, resume: bool) -> Recipe:
    """Take up the recipe of the run that is there, or see that a new run can be there.

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


def split_file(recipe: Recipe, split: str) -> Path | None:
    """The file of a split: its own if the recipe names one, else of the folder; None: built in."""
    data, task = recipe.data, get_task(recipe.data.task)
    file = getattr(data, split)
    if file:
        return Path(file)
    if data.folder is None and task.built_in is not None:
        return None
    return task.find_data(data.folder, split)


def load_split(recipe: Recipe, split: str) -> list[Example]:
    """The examples of a split."""
    task, path = get_task(recipe.data.task), split_file(recipe, split)
    return task.built_in(split) if path is None else task.read(path, recipe.data.template)


def data_hashes(recipe: Recipe, *splits: str) -> dict[str, str]:
    """The sha256 of the file of each split, by its path."""
    there = [split for split in splits if split != "valid" or has_validation(recipe)]
    files = [split_file(recipe, split) for split in there]
    return {str(file): sha256_of(file) for file in files if file is not None}


def test_groups(recipe: Recipe) -> list[ReferenceGroup]:
    """The distinct test inputs with their references, evenly thinned to ``data.test_limit``."""
    groups = get_task(recipe.data.task).groups(load_split(recipe, "test"))
    limit = recipe.data.test_limit
    if limit is None or limit >= len(groups):
        return groups
    return [groups[index * len(groups) // limit] for index in range(limit)]


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


def has_validation(recipe: Recipe) -> bool:
    """Whether there is a validation split; training does without."""
    data, task = recipe.data, get_task(recipe.data.task)
    if data.valid is not None:
        return True
    if data.folder is None:
        if task.built_in is not None:
            return data.train is None
        if data.train is not None:  # what lies in the usual places is of other data
            return False
    try:
        task.find_data(data.folder, "valid")
    except UserError:
        return False
    return True


def encode_splits(recipe: Recipe, model: TunedModel) -> list[list[TokenExample]]:
    """Training and validation examples as tokens; the latter may be none.

    Raises:
        UserError: data are missing, broken, or do not fit the model.
    """
    data, tokenizer = recipe.data, model.tokenizer
    sets: list[list[TokenExample]] = []
    for split in ("train", "valid"):
        if split == "valid" and not has_validation(recipe):
            say("no validation data: the last adapter is the one to use")
            sets.append([])
            continue
        examples = load_split(recipe, split)
        if split == "train" and data.train_limit:
            examples = examples[: data.train_limit]
        if split == "valid":
            examples = examples[:: data.valid_stride]
        longest = min(recipe.train.max_length, model.config.max_positions)
        encoded = encode_examples(
            examples, tokenizer, longest, data.separator_id, data.end_id, data.max_prompt
        )
        check_vocabulary(encoded, model.config.vocab_size)
        cut = sum(example.cut > 0 for example in encoded)
        say(f"{len(encoded):,} {split} examples" + (f", {cut:,} prompts cut" if cut else ""))
        sets.append(encoded)
    return sets


def finetune(
    recipe: Recipe,
    run: Path,
    model: TunedModel,
    sets: Sequence[list[TokenExample]],
    resume: bool,
    command: str = "run",
) -> bool:
    """Train as the recipe says; whether the training is complete.

    Args:
        sets: training and validation examples, see `encode_splits`.
        command: the verb that goes on with this run after Ctrl-C.
    """
    trainable, total = model.get_nb_trainable_parameters()
    say(f"{trainable:,} trainable parameters of {total:,} ({100 * trainable / total:.3f} %)")

    def loggers(steps: int, start: int) -> list:
        settings = {"recipe": dump_recipe(recipe)}
        services = [make_logger(name, run.name, settings, run, start) for name in recipe.log]
        return [ProgressLogger(steps, start), *services]

    result = train(model, *sets, recipe.train, run, loggers, resume)
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


def encode_groups(recipe: Recipe, model, groups: Sequence[ReferenceGroup]) -> list[list[int]]:
    """The test inputs as tokens."""
    return encode_inputs(
        model,
        [group.prompt for group in groups],
        recipe.decode.max_new_tokens,
        recipe.data.separator_id,
        recipe.data.max_prompt,
        [group.keep for group in groups],
    )


def metric_names(recipe: Recipe) -> Sequence[str]:
    """The scores that a run computes."""
    return recipe.data.metrics or get_task(recipe.data.task).metrics


def answer_and_score(
    recipe: Recipe, model, groups: Sequence[ReferenceGroup], path: Path
) -> dict[str, float]:
    """Decode the test inputs into ``path`` and score them; of a task with choices see `choose`."""
    prompts = [group.prompt for group in groups]
    encoded = encode_groups(recipe, model, groups)
    predictions = decode(model, prompts, encoded, recipe.decode, recipe.data.end_id, path)
    texts = [prediction.prediction for prediction in predictions]
    if get_task(recipe.data.task).choices:
        return choose(recipe, model, groups, encoded, texts, path.with_suffix(".choices.jsonl"))
    references, parts = [group.references for group in groups], [group.part for group in groups]
    names = metric_names(recipe)
    return world().first(lambda: evaluate_parts(names, texts, references, parts))


def choose(
    recipe: Recipe,
    model,
    groups: Sequence[ReferenceGroup],
    encoded: Sequence[Sequence[int]],
    texts: Sequence[str],
    path: Path,
) -> dict[str, float]:
    """Accuracy of a task with choices, in two ways.

    ``accuracy`` and its relatives take the choice that the model holds likelier;
    ``generated_accuracy`` reads the choice off the generated text, and counts what cannot be read
    as wrong. ``path`` gets a line an input with both.
    """
    choices = get_task(recipe.data.task).choices
    logprobs = choice_logprobs(model, encoded, choices)
    chosen = [choices[index] for index in logprobs.argmax(1)]
    written = [parse_choice(text, choices) for text in texts]
    rows, gold, compared, generated = [], [], [], []
    for index, group in enumerate(groups):
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


def run_recipe(recipe: Recipe, run: Path, resume: bool = False) -> dict | None:
    """Train, decode the test inputs, score them and write the report.

    Several processes do it together (`jlora.system.distributed`); the first writes.

    Returns:
        ``{"before": scores or absent, "after": scores}``; None when training was interrupted.
    """
    here = world()
    recipe = here.first(lambda: open_run(run, recipe, resume))
    # Before hours of training: is all there that its end needs?
    if not get_task(recipe.data.task).choices:
        here.first(lambda: check_metrics(metric_names(recipe)))
    groups = test_groups(recipe)
    hashes = data_hashes(recipe, "train", "valid", "test")
    scores = here.first(lambda: read_scores(run))
    sets = None

    def check(model):
        """All texts as tokens, so that what does not fit is known before anything is written."""
        encode_groups(recipe, model, groups)
        found = encode_splits(recipe, model)
        if here.is_first and not (run / "config.yaml").exists():
            begin_run(run, recipe)
            environment.record(run, hashes)
        return found

    def score(model, key: str, path: Path) -> None:
        scores[key] = answer_and_score(recipe, model, groups, path)
        if here.is_first:
            write_text(run / "scores.json", json.dumps(scores, indent=1) + "\n")
            environment.record(run)

    if recipe.score_before and "before" not in scores:
        model = untouched(recipe)
        sets = check(model)
        say(f"the untouched model on {len(groups)} test inputs")
        score(model, "before", run / "predictions_before.jsonl")
        del model  # before the next one is loaded
    if "after" not in scores:
        model = build(recipe)
        sets = sets or check(model)
        started = here.first(lambda: resume and has_checkpoint(run))
        if not finetune(recipe, run, model, sets, started):
            return None
        best = run / "best"
        chosen = here.first(
            lambda: best if recipe.decode.adapter == "best" and best.is_dir() else run / "adapter"
        )
        say(f"the tuned model ({chosen.name} adapter) on {len(groups)} test inputs")
        # From the files, so that what is scored is what a user gets; the old model goes first.
        del model
        score(build(recipe, chosen), "after", run / "predictions.jsonl")
    if not here.is_first:
        return scores
    report = write_report(run, {group.prompt: group.references for group in groups})
    print(score_table(scores.get("before"), scores["after"]))
    say(f"report: {report}")
    return scores


def read_scores(run: Path) -> dict:
    """RUN/scores.json, empty before there is one."""
    path = run / "scores.json"
    if not path.exists():
        return {}
    try:
        return json.loads(read_text(path))
    except ValueError as error:
        raise UserError(f"{path}: not JSON; remove it to score again") from error
