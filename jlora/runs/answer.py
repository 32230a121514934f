"""Answering prompts: with a run's settings, or with a model and an adapter that a command names."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from jlora import engine
from jlora.decoding.beam import search
from jlora.runs.recipe import DataConfig, DecodeConfig
from jlora.data.batches import TokenExample, encode_prompts
from jlora.system.distributed import world
from jlora.system.errors import UserError
from jlora.decoding.sampling import GenerateConfig, generate
from jlora.models.hub import require_tokenizer
from jlora.runs.adapter_file import AdapterFile, open_model
from jlora.decoding.predictions import (
    Prediction,
    make_prediction,
    read_predictions,
    write_lines,
    write_predictions,
)
from jlora.system.runtime import jt
from jlora.training.loop import make_batch, target_losses


def encode_inputs(
    model,
    prompts: Sequence[str],
    max_new_tokens: int,
    separator_id: int | None,
    max_prompt: int | None = None,
    keeps: Sequence[int] | None = None,
) -> list[list[int]]:
    """Prompts as tokens; see `jlora.data.batches.encode_prompts`.

    Raises:
        UserError: one is too long for the model's context with the new tokens.
    """
    longest = model.config.max_positions - max_new_tokens + 1
    return encode_prompts(prompts, model.tokenizer, longest, separator_id, max_prompt, keeps)


def decode(
    model,
    prompts: Sequence[str],
    encoded: Sequence[Sequence[int]],
    decode_config: DecodeConfig,
    end_id: int | None,
    path: Path | None,
) -> list[Prediction]:
    """Answer prompts by beam search and write them to ``path`` (None: nowhere).

    Batches that an interrupted call has finished are kept in ``path`` with ``.partial`` and are
    not decoded again. Several processes divide the prompts; all return all predictions.

    Args:
        prompts: different ones.
        encoded: the tokens of each, see `encode_inputs`.
    """
    tokenizer = model.tokenizer
    end_id = tokenizer.eos_token_id if end_id is None else end_id
    config = decode_config.beam_config(end_id)
    here = world()
    partial = path and path.with_name(path.name + ".partial")
    done = here.first(
        lambda: (
            {p.prompt: p for p in read_predictions(partial)} if partial and partial.exists() else {}
        )
    )
    # Prompts of like length are decoded together, as in training.
    waiting = sorted(
        (index for index, prompt in enumerate(prompts) if prompt not in done),
        key=lambda index: (len(encoded[index]), encoded[index]),
    )
    model.eval()
    from tqdm import tqdm

    # Several processes come together now and then, so that what is done can be kept.
    together = len(waiting) if here.size == 1 else here.size * config.batch_size * BATCHES_APART
    with tqdm(total=len(prompts), initial=len(prompts) - len(waiting), desc="decoding",
              unit="input", mininterval=1 if sys.stderr.isatty() else 30) as bar:  # fmt: skip
        for start in range(0, len(waiting), together or 1):
            mine, found = here.mine(waiting[start : start + together]), {}
            for place, hypotheses in search(model, [encoded[index] for index in mine], config):
                prompt = prompts[mine[place]]
                found[prompt] = make_prediction(
                    prompt, hypotheses, tokenizer.decode, config.length_penalty
                )
                bar.update()
                if partial and here.size == 1 and bar.n % config.batch_size == 0:
                    write_predictions(partial, list({**done, **found}.values()))
            for each in here.gather(found):
                done.update(each)
            bar.update(len(done) - bar.n)
            if partial and here.size > 1 and here.is_first:
                write_predictions(partial, list(done.values()))
    ordered = [done[prompt] for prompt in prompts]
    if path and here.is_first:
        save_predictions(path, ordered)
        partial.unlink(missing_ok=True)
    return ordered


BATCHES_APART = 8  # that a process decodes before it meets the others


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
    precision: str = "auto",
    path: Path | None = None,
    keeps: Sequence[int] | None = None,
) -> list[Prediction]:
    """Answer prompts with a model and, if given, its adapter.

    Args:
        model_name: None: the model that the adapter's run was made with.
        adapter: None: the model alone.
        config: beam search, or greedy decoding and sampling (whose end tokens are set here).
        separator_id: token after each prompt; None: as in the adapter's run, else the tokenizer's
            end token; `jlora.data.batches.NO_SEPARATOR`: the model goes on with the prompt's own text.
        end_ids: tokens that end a text; None: likewise.
        precision: see `jlora.engine.prepare`.
        path: predictions.jsonl to write; None: none.
        keeps: `jlora.data.batches.Example.keep` of each prompt; such prompts are cut as in training.

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
    longest = trained.max_prompt if keeps else None
    encoded = encode_inputs(model, prompts, config.max_new_tokens, separator_id, longest, keeps)
    if isinstance(config, DecodeConfig):
        config = replace(config, eos_token_ids=list(end_ids))
        return decode(model, prompts, encoded, config, end_ids[0], path)
    config = replace(config, eos_token_ids=tuple(end_ids))
    predictions = [
        make_prediction(prompt, [text], tokenizer.decode, 0.0)
        for prompt, text in zip(prompts, generate(model, encoded, config))
    ]
    if path and world().is_first:
        save_predictions(path, predictions)
    return predictions


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
    """
    ends = model.tokenizer.encode_after([" " + choice for choice in choices])
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
