"""Answering prompts: with a run's settings, or with a model and an adapter that a command names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from jlora import engine
from jlora.data.batches import TokenExample, encode_prompts
from jlora.data.chat_template import built_in_names
from jlora.data.conversations import Conversation
from jlora.data.end_tokens import find_ends
from jlora.data.readers import shorten
from jlora.decoding.beam import BeamConfig, search
from jlora.decoding.decoder import check_prompts, room
from jlora.decoding.hypothesis import Hypothesis
from jlora.decoding.predictions import (
    Prediction,
    Unfinished,
    make_prediction,
    save_predictions,
)
from jlora.decoding.sampling import GenerateConfig, sample, stream
from jlora.decoding.text_stream import stripped, up_to_stop
from jlora.models.hub import outline, require_tokenizer
from jlora.runs.adapter_file import AdapterFile, base_name, open_model
from jlora.runs.chat import Chat, check_end_ids
from jlora.runs.form import Form
from jlora.runs.recipe import DataConfig
from jlora.system.distributed import world
from jlora.system.errors import UserError
from jlora.system.files import sha256_of
from jlora.system.progress import progress
from jlora.system.runtime import jt
from jlora.training.loop import make_batch, target_losses

BATCHES_APART = 8  # that a process decodes before it meets the others


def decode(
    model,
    prompts: Sequence[str],
    encoded: Sequence[Sequence[int]],
    config: BeamConfig | GenerateConfig,
    path: Path | None,
    source: Any = None,
) -> list[Prediction]:
    """Answer prompts and write them to ``path`` (None: nowhere), as jsonl and as text.

    What an interrupted call has finished is kept beside ``path`` and is not decoded again, if model
    and settings are the same. Several processes divide the prompts; all return all predictions.

    Args:
        encoded: the tokens of each prompt, the separator included.
        config: how to search or to draw; its end tokens must be given.
        source: what the model is, see `describe_source`; only what is decoded for an equal one is
            taken up again.
    """
    tokenizer, here = model.tokenizer, world()
    work = None if path is None else Unfinished(path, fingerprint(source, encoded, config))
    done: dict[int, Prediction] = here.first(
        lambda: place_predictions(prompts, encoded, work.read() if work else [])
    )
    # Prompts of like length are decoded together, as in training.
    waiting = [index for index in by_length(encoded) if index not in done]
    beams = isinstance(config, BeamConfig)
    penalty, stops = (config.length_penalty, ()) if beams else (0.0, config.stops)

    def text_of(ids: list[int]) -> str:
        return up_to_stop(tokenizer.decode(ids), stops)

    model.eval()
    # Several processes come together now and then, so that what is done can be kept.
    together = len(waiting) if here.size == 1 else here.size * config.batch_size * BATCHES_APART
    before = len(prompts) - len(waiting)
    with progress(len(prompts), "decoding", "input", done=before, leave=True) as bar:
        for start in range(0, len(waiting), together or 1):
            mine, found = here.mine(waiting[start : start + together]), {}
            for index, hypotheses in hypotheses_of(model, encoded, mine, config):
                found[index] = make_prediction(prompts[index], hypotheses, text_of, penalty)
                bar.update()
                if work and here.size == 1 and bar.n % config.batch_size == 0:
                    work.write(list({**done, **found}.values()))
            for each in here.gather(found):
                done.update(each)
            bar.update(len(done) - bar.n)
            if work and here.size > 1 and here.is_first:
                work.write(list(done.values()))
    ordered = [done[index] for index in range(len(prompts))]
    if work and here.is_first:
        save_predictions(path, ordered)
        work.remove()
    return ordered


def hypotheses_of(
    model, encoded: Sequence[Sequence[int]], numbers: Sequence[int], config
) -> Iterator[tuple[int, list[Hypothesis]]]:
    """Decode some of the prompts; yields the number of each with its hypotheses."""
    some = [encoded[number] for number in numbers]
    if isinstance(config, BeamConfig):
        found = search(model, some, config)
    else:
        found = sample(model, some, config, numbers)
    for place, hypotheses in found:
        yield numbers[place], hypotheses


def by_length(encoded: Sequence[Sequence[int]]) -> list[int]:
    """Numbers of the prompts, shortest first; equal ones in their order."""
    return sorted(range(len(encoded)), key=lambda index: (len(encoded[index]), encoded[index]))


def place_predictions(
    prompts: Sequence[str], encoded: Sequence[Sequence[int]], kept: Sequence[Prediction]
) -> dict[int, Prediction]:
    """The numbers of prompts that were decoded before, in the order in which they are decoded."""
    numbers: dict[str, list[int]] = {}
    for index in by_length(encoded):
        numbers.setdefault(prompts[index], []).append(index)
    found = {}
    for prediction in kept:
        if numbers.get(prediction.prompt):
            found[numbers[prediction.prompt].pop(0)] = prediction
    return found


def describe_source(model, precision: str, adapter: AdapterFile | Path | None = None) -> dict:
    """What decides a model's answers: its weight file, its adapter, the precision; as JSON.

    Args:
        adapter: an adapter, or the folder of one.
    """
    weights = getattr(model, "source", None)
    known = [str(model.name_or_path), precision]
    if weights is not None and Path(weights).exists():
        stat = Path(weights).stat()
        known += [str(weights), stat.st_size, stat.st_mtime_ns]
    if isinstance(adapter, AdapterFile):
        known += [adapter.lora_alpha, adapter.enable_lora]
        adapter = adapter.folder
    files = []
    if adapter is not None:
        files = sorted(adapter.iterdir()) if adapter.is_dir() else [adapter]
    return {"model": known, "adapter": {f.name: sha256_of(f) for f in files if f.is_file()}}


def fingerprint(source: Any, encoded: Sequence[Sequence[int]], config: Any) -> str:
    """Hash of all that decides a decoding: model, prompts and settings."""
    settings = asdict(config)
    del settings["batch_size"]  # of no effect on the answers
    values = [source, type(config).__name__, settings, [list(map(int, ids)) for ids in encoded]]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def answer(
    prompts: Sequence[str],
    model_name: str | None,
    adapter: AdapterFile | None,
    config: BeamConfig | GenerateConfig,
    form: Form = Form(),  # noqa: B008 (frozen)
    precision: str = "auto",
    path: Path | None = None,
    keeps: Sequence[int] | None = None,
    asked: Sequence[Conversation] | None = None,
) -> list[Prediction]:
    """Answer prompts with a model and, if given, its adapter.

    Args:
        model_name: None: the model that the adapter's run was made with.
        adapter: None: the model alone.
        config: beam search, or greedy decoding and sampling (whose end tokens are set here).
        form: how prompts become tokens.
        precision: see `jlora.engine.prepare`.
        path: predictions.jsonl to write; None: none.
        keeps: `jlora.data.batches.Example.keep` of each prompt; such prompts are cut as in
            training.
        asked: the conversations that the prompts are the ends of, where they have more to them.

    Raises:
        UserError: no model, no such adapter, or prompts that do not fit.
    """
    model, encoded, config = ready(
        prompts, model_name, adapter, config, form, precision, keeps, asked
    )
    return decode(
        model, prompts, encoded, config, path, path and describe_source(model, precision, adapter)
    )


def ready(
    prompts: Sequence[str],
    model_name: str | None,
    adapter: AdapterFile | None,
    config: BeamConfig | GenerateConfig,
    form: Form,
    precision: str,
    keeps: Sequence[int] | None = None,
    asked: Sequence[Conversation] | None = None,
) -> tuple[Any, list[list[int]], Any]:
    """The model, the tokens of the prompts and all settings; see `answer`.

    All is checked before the weights are read.
    """
    name = base_name(model_name, adapter)
    seen = outline(name).model  # enough to see whether all fits, before a minute of loading
    tokenizer = require_tokenizer(seen)
    trained = adapter.recipe.data if adapter and adapter.recipe else DataConfig()
    end_ids, stops = form.end_ids or config.eos_token_ids, ()
    if form.chat or form.plain:
        ends = find_ends(tokenizer, form.chat and form.chat.template)
        own = [] if trained.end_id is None else [trained.end_id]
        end_ids, stops = end_ids or [*ends.ids, *own], ends.texts
    else:
        end_ids = end_ids or [end_token(seen, trained.end_id)]
    if stops and isinstance(config, BeamConfig):
        raise UserError(
            f"{form.chat.template.name} ends an answer by the text {stops[0]!r}, at which beam "
            "search does not stop; take --method greedy or sample"
        )
    if asked and not form.chat:
        check_turns(asked)
    context = seen.config.max_positions
    check_end_ids(end_ids, seen.config.vocab_size)
    longest = context - (0 if form.shorten else config.max_new_tokens - 1)
    if form.chat or form.plain:
        if form.chat:
            asked = asked or [one_turn(prompt) for prompt in prompts]
            encoded = [chat_tokens(form.chat, each, tokenizer) for each in asked]
        else:
            encoded = [[*tokenizer.begin_ids, *tokenizer.encode(prompt)] for prompt in prompts]
        check_lengths(prompts, encoded, longest)
    else:
        separator = trained.separator_id if form.separator_id is None else form.separator_id
        max_prompt = trained.max_prompt if keeps else None
        encoded = encode_prompts(prompts, tokenizer, longest, separator, max_prompt, keeps)
    if form.shorten:
        most = min(room(seen, prompt) for prompt in encoded)
        config = replace(config, max_new_tokens=min(config.max_new_tokens, most))
    check_prompts(seen, encoded, config.max_new_tokens)
    del seen  # see Outline
    model = open_model(name, adapter)
    engine.prepare(model, precision, keep_weights=False)
    config = replace(config, eos_token_ids=tuple(end_ids))
    if stops:
        config = replace(config, stops=(*config.stops, *stops))
    return model, encoded, config


def one_turn(prompt: str) -> Conversation:
    return Conversation("", [{"role": "user", "content": prompt}])


def check_turns(asked: Sequence[Conversation]) -> None:
    """Raises: UserError: a conversation of several messages, which needs a chat template."""
    for each in asked:
        if len(each.messages) > 1:
            raise UserError(
                f"{each.place}: a conversation, and there is no chat template; choose one with "
                f"--chat-template: {', '.join(built_in_names())}, or a file"
            )


def chat_tokens(chat: Chat, asked: Conversation, tokenizer: Any) -> list[int]:
    if asked.text is not None:
        raise UserError(
            f"{asked.place}: a whole text, which no chat template asks; leave --chat-template out"
        )
    try:
        return chat.encode(asked.messages, tokenizer, asked.tools)
    except UserError as error:
        raise UserError(f"{asked.place}: {error}" if asked.place else str(error)) from error


def check_lengths(prompts: Sequence[str], encoded: Sequence[Sequence[int]], longest: int) -> None:
    """Raises: UserError: a prompt has more tokens than ``longest``."""
    for number, (prompt, ids) in enumerate(zip(prompts, encoded), start=1):
        if len(ids) > longest:
            raise UserError(
                f"prompt {number} ({shorten(prompt)!r}) has {len(ids)} tokens, and {longest} fit "
                "before the new tokens; shorten it, ask for fewer new tokens or take a model with "
                "a longer context"
            )


def stream_answer(
    prompt: str,
    model_name: str | None,
    adapter: AdapterFile | None,
    config: GenerateConfig,
    form: Form,
    precision: str = "auto",
) -> Iterator[str]:
    """The answer to one prompt piece by piece; all together it is that of `answer`.

    Raises:
        UserError: as `answer`.
    """
    model, (encoded,), config = ready([prompt], model_name, adapter, config, form, precision)
    model.eval()
    return stripped(stream(model, model.tokenizer, encoded, config))


def end_token(model, end_id: int | None) -> int:
    """The token that ends a completion.

    Args:
        end_id: as a recipe says it; None: the tokenizer's.

    Raises:
        UserError: the tokenizer names none.
    """
    end_id = model.tokenizer.eos_token_id if end_id is None else end_id
    if end_id is None:
        raise UserError("the tokenizer names no end token; give --end-id")
    return end_id


def choice_logprobs(
    model,
    encoded: Sequence[Sequence[int]],
    choices: Sequence[str],
    batch_size: int = 16,
) -> np.ndarray:
    """How likely the model holds each answer: sums of log p of its tokens, (prompts, choices).

    The end token does not count: an untouched model does not know that it is due.

    Args:
        encoded: prompts as tokens, the separator included.
        choices: answers as texts.

    Raises:
        UserError: a prompt leaves no room for an answer in the model's context.
    """
    ends = model.tokenizer.encode_after([" " + choice for choice in choices])
    longest, context = max(map(len, ends)), model.config.max_positions
    for number, ids in enumerate(encoded, start=1):
        if len(ids) + longest - 1 > context:
            raise UserError(
                f"input {number} has {len(ids)} tokens, which with the {longest} of an answer "
                f"exceed the model's context of {context}; shorten it (data.max_prompt)"
            )
    # Equal prompts with other answers stand together; like lengths too, as in training. The longest
    # come first: what Jittor keeps of freed memory serves smaller arrays, never larger ones.
    order = sorted(range(len(encoded)), key=lambda index: -len(encoded[index]))
    found = np.zeros((len(encoded), len(choices)), np.float32)
    model.eval()
    batches, parts = [order[i : i + batch_size] for i in range(0, len(order), batch_size)], []
    with jt.no_grad():
        for rows in world().mine(batches):
            examples = [
                TokenExample([*encoded[row], *end], len(encoded[row]))
                for row in rows
                for end in ends
            ]
            losses = target_losses(model, make_batch(model, examples)).numpy()
            counts = np.array([len(end) for _ in rows for end in ends])
            starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
            parts.append(-np.add.reduceat(losses, starts).reshape(len(rows), len(choices)))
    for rows, part in zip(batches, world().interleave(parts)):
        found[rows] = part
    return found
