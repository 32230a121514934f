"""A whole run, stage by stage: data, training, decoding, scoring, report.

Every stage leaves its result in the run folder, and a resumed run skips what is there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from jlora import engine
from jlora.adapters import PeftModel, get_peft_model
from jlora.beam import beam_search, search
from jlora.config import DataConfig, DecodeConfig, Recipe, dump_recipe, load_recipe
from jlora.data import Example, TokenExample, check_vocabulary, encode_examples, encode_prompts
from jlora.errors import UserError
from jlora.files import check_writable, read_text, recover_directory, write_text
from jlora.generate import GenerateConfig, generate
from jlora.loggers import ProgressLogger, check_loggers, make_logger, read_metrics
from jlora.metrics import evaluate_e2e, find_java
from jlora.models.hub import load, require_tokenizer
from jlora.opening import AdapterFile, open_model, say
from jlora.predictions import (
    Prediction,
    make_prediction,
    read_predictions,
    write_lines,
    write_predictions,
)
from jlora.report import environment
from jlora.report.html import write_report
from jlora.report.plots import loss_curve
from jlora.report.tables import score_table
from jlora.tasks import ReferenceGroup, get_task
from jlora.train import train


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
        for name in ("checkpoint", "adapter", "best"):
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


def load_split(recipe: Recipe, split: str) -> list[Example]:
    """Examples of a split: from its own file if the recipe names one, else from the folder."""
    data, task = recipe.data, get_task(recipe.data.task)
    file = getattr(data, split)
    return task.read(file) if file else task.load(data.folder, split)


def test_groups(recipe: Recipe) -> list[ReferenceGroup]:
    """The distinct test inputs with their references, evenly thinned to ``data.test_limit``."""
    groups = get_task(recipe.data.task).groups(load_split(recipe, "test"))
    limit = recipe.data.test_limit
    if limit is None or limit >= len(groups):
        return groups
    return [groups[index * len(groups) // limit] for index in range(limit)]


def build(recipe: Recipe, adapter: str | Path | None = None) -> PeftModel:
    """The recipe's model with a new adapter, or with a trained one."""
    say(f"loading {recipe.model}")
    base = load(recipe.model)
    require_tokenizer(base)
    if adapter is None:
        model = get_peft_model(base, recipe.lora)
    else:
        model = PeftModel.from_pretrained(base, adapter)
    precision = engine.prepare(
        model,
        recipe.precision,
        keep_weights=False,
        checkpoint_activations=recipe.checkpoint_activations,
    )
    reason = engine.choose_precision()[1] if recipe.precision == "auto" else "as asked for"
    say(f"precision {precision}: {reason}")
    return model


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


def encode_splits(recipe: Recipe, model: PeftModel) -> list[list[TokenExample]]:
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
        encoded = encode_examples(examples, tokenizer, longest, data.separator_id, data.end_id)
        check_vocabulary(encoded, model.config.vocab_size)
        cut = sum(example.cut > 0 for example in encoded)
        say(
            f"{len(encoded):,} {split} examples"
            + (f", {cut:,} prompts cut to {longest} tokens" if cut else "")
        )
        sets.append(encoded)
    return sets


def finetune(
    recipe: Recipe,
    run: Path,
    model: PeftModel,
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
    environment.record(run)
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


def encode_inputs(
    model, prompts: Sequence[str], max_new_tokens: int, separator_id: int | None
) -> list[list[int]]:
    """Prompts as tokens.

    Raises:
        UserError: one is too long for the model's context with the new tokens.
    """
    longest = model.config.max_positions - max_new_tokens + 1
    return encode_prompts(prompts, model.tokenizer, longest, separator_id)


def decode(
    model,
    prompts: Sequence[str],
    decode_config: DecodeConfig,
    separator_id: int | None,
    end_id: int | None,
    path: Path | None,
) -> list[Prediction]:
    """Answer prompts by beam search and write them to ``path`` (None: nowhere).

    Batches that an interrupted call has finished are kept in ``path`` with ``.partial`` and are
    not decoded again.
    """
    tokenizer = model.tokenizer
    end_id = tokenizer.eos_token_id if end_id is None else end_id
    config = decode_config.beam_config(end_id)
    encoded = encode_inputs(model, prompts, config.max_new_tokens, separator_id)
    partial = path and path.with_name(path.name + ".partial")
    done = {p.prompt: p for p in read_predictions(partial)} if partial and partial.exists() else {}
    # Prompts of like length are decoded together, as in training.
    waiting = sorted(
        (index for index, prompt in enumerate(prompts) if prompt not in done),
        key=lambda index: (len(encoded[index]), encoded[index]),
    )
    model.eval()
    from tqdm import tqdm

    with tqdm(total=len(prompts), initial=len(prompts) - len(waiting), desc="decoding",
              unit="input", mininterval=1 if sys.stderr.isatty() else 30) as bar:  # fmt: skip
        for place, hypotheses in search(model, [encoded[index] for index in waiting], config):
            prompt = prompts[waiting[place]]
            done[prompt] = make_prediction(
                prompt, hypotheses, tokenizer.decode, config.length_penalty
            )
            bar.update()
            if partial and bar.n % config.batch_size == 0:
                write_predictions(partial, list(done.values()))
    ordered = [done[prompt] for prompt in prompts]
    if path:
        save_predictions(path, ordered)
        partial.unlink(missing_ok=True)
    return ordered


def save_predictions(path: Path, predictions: Sequence[Prediction]) -> None:
    """Write predictions.jsonl, and the texts alone beside it as metric scripts read them."""
    write_predictions(path, predictions)
    write_lines(path.with_suffix(".txt"), predictions)


def answer(
    prompts: Sequence[str],
    model_name: str | None,
    adapter: AdapterFile | None,
    config: DecodeConfig | GenerateConfig,
    separator_id: int | None = None,
    end_ids: Sequence[int] | None = None,
    raw: bool = False,
    precision: str = "auto",
    path: Path | None = None,
) -> list[Prediction]:
    """Answer prompts with a model and, if given, its adapter.

    Args:
        model_name: None: the model that the adapter's run was made with.
        adapter: None: the model alone.
        config: beam search, or greedy decoding and sampling (whose end tokens are set here).
        separator_id: token after each prompt; None: as in the adapter's run, else the tokenizer's
            end token.
        end_ids: tokens that end a text; None: likewise.
        raw: no separator: the model goes on with the prompt's own text.
        precision: see `jlora.engine.prepare`.
        path: predictions.jsonl to write; None: none.

    Raises:
        UserError: no model, no such adapter, or prompts that do not fit.
    """
    model, recipe = open_model(model_name, adapter)
    tokenizer = require_tokenizer(model)
    engine.prepare(model, precision, keep_weights=False)
    model.eval()
    trained = recipe.data if recipe else DataConfig()
    separator_id = trained.separator_id if separator_id is None else separator_id
    end_ids = end_ids or [tokenizer.eos_token_id if trained.end_id is None else trained.end_id]
    if end_ids == [None]:
        raise UserError("the tokenizer names no end token; give --end-id")
    if isinstance(config, DecodeConfig) and not raw:
        config = replace(config, eos_token_ids=list(end_ids))
        return decode(model, prompts, config, separator_id, end_ids[0], path)
    if raw:
        encoded = tokenizer.encode_batch(list(prompts))
    else:
        encoded = encode_inputs(model, prompts, config.max_new_tokens, separator_id)
    if isinstance(config, DecodeConfig):
        config = replace(config, eos_token_ids=list(end_ids))
        found = beam_search(model, encoded, config.beam_config(end_ids[0]))
        penalty = config.length_penalty
    else:
        config = replace(config, eos_token_ids=tuple(end_ids))
        found = [[one] for one in generate(model, encoded, config)]
        penalty = 0.0
    predictions = [
        make_prediction(prompt, hypotheses, tokenizer.decode, penalty)
        for prompt, hypotheses in zip(prompts, found)
    ]
    if path:
        save_predictions(path, predictions)
    return predictions


def run_recipe(recipe: Recipe, run: Path, resume: bool = False) -> dict | None:
    """Train, decode the test inputs, score them and write the report.

    Returns:
        ``{"before": scores or absent, "after": scores}``; None when training was interrupted.
    """
    recipe = open_run(run, recipe, resume)
    # Before hours of training: is all there that its end needs?
    find_java()
    groups = test_groups(recipe)
    prompts = [group.prompt for group in groups]
    references = [group.references for group in groups]
    model = build(recipe)
    encode_inputs(model, prompts, recipe.decode.max_new_tokens, recipe.data.separator_id)
    sets = encode_splits(recipe, model)
    if not resume:
        begin_run(run, recipe)

    def answer_and_score(model: PeftModel, key: str, path: Path) -> None:
        scores = read_scores(run)
        if key in scores:
            return
        data = recipe.data
        predictions = decode(model, prompts, recipe.decode, data.separator_id, data.end_id, path)
        scores[key] = evaluate_e2e([p.prediction for p in predictions], references)
        write_text(run / "scores.json", json.dumps(scores, indent=1) + "\n")
        environment.record(run)

    if recipe.score_before:
        say(f"the untouched model on {len(prompts)} test inputs")
        with model.disable_adapter():
            answer_and_score(model, "before", run / "predictions_before.jsonl")
    if "after" not in read_scores(run):
        started = resume and (run / "checkpoint").is_dir()
        if not finetune(recipe, run, model, sets, started):
            return None
        best = recipe.decode.adapter == "best" and (run / "best").is_dir()
        chosen = run / ("best" if best else "adapter")
        say(f"the tuned model ({chosen.name} adapter) on {len(prompts)} test inputs")
        # From the files, so that what is scored is what a user gets; the old model goes first.
        del model
        model = build(recipe, chosen)
        answer_and_score(model, "after", run / "predictions.jsonl")
    scores = read_scores(run)
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
