"""From (prompt, completion) texts to token batches with loss masks.

The layout is microsoft/LoRA's (`examples/NLG/src/data_utils.py`)::

    ids     = encode(prompt) + [separator] + encode_after(" " + completion) + [end]
    inputs  = ids[:-1]
    targets = ids[1:]        # shifted here, not in the model
    mask    = 1 where the target is a completion token or the end, 0 over the prompt

Differences, all intended:

- A batch is one row with all examples (`stream`) where the model can read this, without padding;
  else rows are padded to the longest of the batch (`collate`), not to 512.
- A batch has examples of similar length.
- An input that is too long loses tokens from its *prompt*, where the reference cuts on the right
  and so loses the answer. They are cut from the prompt's end, or from in front of the part that
  must be kept, such as a question after its passage (`Example.keep`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jlora.data.readers import shorten
from jlora.system.errors import UserError

NO_SEPARATOR = -1  # as a separator_id: the completion follows the prompt at once


@dataclass(frozen=True)
class Example:
    """One training pair as text.

    Attributes:
        part: the part of the dataset that it belongs to ("seen"), for scores of each part.
        keep: number of characters at the prompt's end that are kept if the prompt is too long (a
            question after its passage); 0: a long prompt is cut at its end.
    """

    prompt: str
    completion: str
    part: str | None = None
    keep: int = 0


@dataclass(frozen=True)
class TokenExample:
    """One training pair as token ids.

    Attributes:
        ids: prompt, separator, completion and end token.
        prompt_length: tokens before the completion, including the separator; the loss counts
            ``ids[prompt_length:]``.
        cut: number of prompt tokens that were dropped to fit the example into ``max_length``.
        spans: where the loss counts other tokens than these: (first, past the last) in ``ids``, in
            order, the first of them at ``prompt_length``. A conversation has several answers.
    """

    ids: list[int]
    prompt_length: int
    cut: int = 0
    spans: tuple[tuple[int, int], ...] = ()

    @property
    def input_length(self) -> int:
        """Tokens that the model reads: all but the last."""
        return len(self.ids) - 1

    @property
    def trained(self) -> tuple[tuple[int, int], ...]:
        """Where in ``ids`` the tokens stand that count in the loss."""
        return self.spans or ((self.prompt_length, len(self.ids)),)

    @property
    def target_count(self) -> int:
        """How many tokens count in the loss."""
        return sum(end - start for start, end in self.trained)

    def mask(self) -> np.ndarray:
        """1 where the target ``ids[1:]`` counts in the loss, (input_length,) float32."""
        mask = np.zeros(self.input_length, np.float32)
        for start, end in self.trained:
            mask[max(0, start - 1) : end - 1] = 1.0  # target t is ids[t + 1]
        return mask


@dataclass
class Batch:
    """Rows padded on the right to the length T of the longest, or one stream.

    A stream is a single row (B = 1) with the examples one after another.

    Attributes:
        input_ids: (B, T) int32.
        targets: (B, T) int32, ``input_ids`` shifted by one.
        mask: (B, T) float32, 1 where the target counts in the loss.
        lengths: (examples,) int32, real input tokens of each.
        is_stream: whether this is a stream.
        first_row: the number of tokens, with padding, that other processes have of this batch
            before these; dropout numbers the tokens from here.
    """

    input_ids: np.ndarray
    targets: np.ndarray
    mask: np.ndarray
    lengths: np.ndarray
    is_stream: bool = False
    first_row: int = 0


# Encoding ------------------------------------------------------------------------------------


def encode_example(
    example: Example,
    tokenizer,
    max_length: int | None = None,
    separator_id: int | None = None,
    end_id: int | None = None,
    max_prompt: int | None = None,
) -> TokenExample:
    """Encode one example; see `encode_examples`."""
    return encode_examples([example], tokenizer, max_length, separator_id, end_id, max_prompt)[0]


def encode_examples(
    examples: Sequence[Example],
    tokenizer,
    max_length: int | None = None,
    separator_id: int | None = None,
    end_id: int | None = None,
    max_prompt: int | None = None,
) -> list[TokenExample]:
    """Encode examples in the reference's layout.

    Args:
        max_length: maximum of input tokens (``len(ids) - 1``), not above the model's context. A
            longer example loses tokens from its prompt: from the prompt's end, or from before the
            characters that `Example.keep` protects. Separator and completion are never cut.
            `TokenExample.cut` is the number of dropped tokens.
        separator_id: token between prompt and completion; default the tokenizer's end token;
            `NO_SEPARATOR` for none.
        end_id: token after the completion; default the tokenizer's end token.
        max_prompt: maximum of prompt tokens, without the separator; longer prompts are cut
            likewise.

    Raises:
        UserError: a completion, or the part of a prompt that must be kept, does not fit;
            ``max_prompt`` is below 1; there is no end token.
    """
    separator = _separator(separator_id, tokenizer)
    end_id = _special_id(end_id, tokenizer, "end_id")
    _check_max_prompt(max_prompt)
    # Prompts repeat (E2E's 42,061 training rows have 4,862 prompts); completions hardly do.
    distinct = list(dict.fromkeys(example.prompt for example in examples))
    ids_of = dict(zip(distinct, tokenizer.encode_batch(distinct)))
    prompts = [ids_of[example.prompt] for example in examples]
    completions = _encode_after(tokenizer, [" " + example.completion for example in examples])
    encoded = []
    for number, (example, prompt, completion) in enumerate(
        zip(examples, prompts, completions), start=1
    ):
        room = len(prompt) if max_prompt is None else max_prompt
        if max_length is not None:
            # ids = prompt + separator + completion + end, and the model reads all but the end.
            room = min(room, max_length - 1 - len(completion))
            if room < min(1, len(prompt)):
                raise UserError(
                    f"example {number} ({shorten(example.completion)!r}): its completion of "
                    f"{len(completion)} tokens leaves no room for the prompt in max_length "
                    f"{max_length}; raise max_length or drop the example"
                )
        kept = _cut_prompt(prompt, example.prompt, example.keep, room, tokenizer, number)
        if not kept and not separator:
            raise UserError(
                f"example {number} ({shorten(example.completion)!r}) has no prompt and no "
                "separator to begin from; set data.separator_id to a token"
            )
        encoded.append(
            TokenExample(
                ids=[*kept, *separator, *completion, end_id],
                prompt_length=len(kept) + len(separator),
                cut=len(prompt) - len(kept),
            )
        )
    return encoded


def encode_prompts(
    prompts: Sequence[str],
    tokenizer,
    max_length: int | None = None,
    separator_id: int | None = None,
    max_prompt: int | None = None,
    keeps: Sequence[int] | None = None,
) -> list[list[int]]:
    """Encode prompts for generation: ``encode(prompt) + [separator]``, as in training.

    Args:
        max_length: maximum of prompt tokens with the separator: the model's context minus the
            tokens to be generated.
        max_prompt: maximum of prompt tokens without the separator, as in training.
        keeps: `Example.keep` of each prompt. Prompts with a part to keep are cut as in training.

    Raises:
        UserError: a prompt is too long and has no `Example.keep`: without its end it would be a
            different question. Or the part that must be kept does not fit.
    """
    separator = _separator(separator_id, tokenizer)
    _check_max_prompt(max_prompt)
    encoded = []
    for number, (prompt, ids, keep) in enumerate(
        zip(prompts, tokenizer.encode_batch(list(prompts)), keeps or [0] * len(prompts)), start=1
    ):
        limits = [] if max_length is None else [max_length - 1]
        limits += [] if max_prompt is None else [max_prompt]
        room = min(limits, default=len(ids))
        if len(ids) > room and keep <= 0:
            way_out = (
                "raise data.max_prompt"
                if room == max_prompt
                else "ask for fewer new tokens or take a model with a longer context"
            )
            raise UserError(
                f"prompt {number} ({shorten(prompt)!r}) has {len(ids) + 1} tokens with the "
                f"separator, and {room + 1} fit before the new tokens; shorten it, or {way_out}"
            )
        encoded.append([*_cut_prompt(ids, prompt, keep, room, tokenizer, number), *separator])
    return encoded


def _cut_prompt(
    ids: list[int], prompt: str, keep: int, room: int, tokenizer, number: int
) -> list[int]:
    """A prompt's tokens, cut to ``room`` tokens; its last ``keep`` characters are never cut.

    These are tokenised separately only if something is cut: a prompt that fits is not changed.
    """
    if len(ids) <= room:
        return ids
    if keep <= 0:
        return ids[:room]
    (front,) = tokenizer.encode_batch([prompt[:-keep]])
    (end,) = _encode_after(tokenizer, [prompt[-keep:]])
    if len(end) > room:
        raise UserError(
            f"prompt {number}: its end ({shorten(prompt[-keep:])!r}), which must stay, has "
            f"{len(end)} tokens, and {max(room, 0)} fit; raise the limit (train.max_length, "
            "data.max_prompt) or drop the example"
        )
    return [*front[: room - len(end)], *end]


def _encode_after(tokenizer, texts: list[str]) -> list[list[int]]:
    """`Tokenizer.encode_after`; a user's own tokenizer may only have `encode_batch`."""
    return getattr(tokenizer, "encode_after", tokenizer.encode_batch)(texts)


def _check_max_prompt(max_prompt: int | None) -> None:
    if max_prompt is not None and max_prompt < 1:
        raise UserError(f"max_prompt must be at least 1 token, or unset, not {max_prompt}")


def check_vocabulary(token_examples: Sequence[TokenExample], vocab_size: int) -> None:
    """Check the ids before an embedding look-up reads outside its table.

    Raises:
        UserError: an id is not in the model's vocabulary: the tokenizer belongs to another model.
    """
    for number, example in enumerate(token_examples, start=1):
        if max(example.ids) >= vocab_size or min(example.ids) < 0:
            bad = next(token for token in example.ids if not 0 <= token < vocab_size)
            raise UserError(
                f"example {number} has token id {bad}, and the model's vocabulary has {vocab_size} "
                "words; the tokenizer (or separator_id/end_id) is another model's"
            )


def _separator(separator_id: int | None, tokenizer) -> list[int]:
    if separator_id is None:
        # A merged model has the separator with which it was trained.
        separator_id = getattr(tokenizer, "separator_id", None)
    if separator_id == NO_SEPARATOR:
        return []
    return [_special_id(separator_id, tokenizer, "separator_id")]


def _special_id(given: int | None, tokenizer, name: str) -> int:
    token_id = tokenizer.eos_token_id if given is None else given
    if token_id is None:
        raise UserError(f"the tokenizer names no end token; set {name} to a token id")
    return int(token_id)


# Order and batches -----------------------------------------------------------------------------

# Rows are sorted by length within windows of this many batches: enough that the lengths of a batch
# are almost equal, few enough that a batch is still close to a random draw.
WINDOW_BATCHES = 50


def epoch_batches(
    lengths: Sequence[int],
    batch_size: int,
    seed: int,
    epoch: int,
    group_by_length: bool = True,
    shuffle: bool = True,
) -> list[list[int]]:
    """The batches of one epoch as lists of row numbers; every row is in exactly one.

    The result depends on the arguments alone (NumPy's PCG64 seeded by ``(seed, epoch)``), so a
    resumed run gets the batches that an uninterrupted one would have got. The last batch may be
    shorter.

    Args:
        lengths: tokens of each row.
        group_by_length: put rows of similar length in a batch; the batches are then shuffled.
        shuffle: False keeps the rows in the file's order (microsoft/LoRA shuffles);
            ``group_by_length`` then has no effect.

    Raises:
        UserError: no rows, a batch size below 1, or a negative seed.
    """
    if len(lengths) == 0:
        raise UserError("no examples to make batches of; check the data file")
    if batch_size < 1:
        raise UserError(f"batch size {batch_size}: must be at least 1")
    if seed < 0:
        raise UserError(f"seed {seed}: must not be negative")
    if not shuffle:
        return _chunks(range(len(lengths)), batch_size)
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths))
    if not group_by_length:
        return _chunks(order, batch_size)
    sizes = np.asarray(lengths)
    batches = []
    for window in _chunks(order, batch_size * WINDOW_BATCHES):
        by_length = np.argsort(sizes[window], kind="stable")
        batches += _chunks(np.asarray(window)[by_length], batch_size)
    return [batches[index] for index in generator.permutation(len(batches))]


def _chunks(rows: Sequence[int] | np.ndarray, size: int) -> list[list[int]]:
    return [[int(row) for row in rows[start : start + size]] for start in range(0, len(rows), size)]


class BatchOrder:
    """The rows of the batch of each step, over all epochs.

    For a resumed run the batches are those that the uninterrupted run would have got.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        seed: int,
        group_by_length: bool = True,
        shuffle: bool = True,
    ):
        self._batches_of = functools.partial(
            epoch_batches, lengths, batch_size, seed,
            group_by_length=group_by_length, shuffle=shuffle,
        )  # fmt: skip
        self._epoch = 0
        self._batches = self._batches_of(epoch=0)
        self.per_epoch = len(self._batches)

    def batch(self, step: int) -> list[int]:
        """Row numbers of batch ``step``, counted from 0 over all epochs."""
        epoch, index = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            self._batches = self._batches_of(epoch=epoch)
            self._epoch = epoch
        return self._batches[index]


def shares(lengths: Sequence[int], processes: int) -> list[slice]:
    """Cut a batch into one slice for each process, with about equally many tokens in each.

    Args:
        lengths: tokens of each example.
    """
    ends = np.cumsum([0, *lengths])
    cuts = [int(np.abs(ends - ends[-1] * i / processes).argmin()) for i in range(processes + 1)]
    return [slice(start, end) for start, end in zip(cuts, cuts[1:])]


def collate(
    token_examples: Sequence[TokenExample], pad_id: int, length: int = 0, first_row: int = 0
) -> Batch:
    """Pad rows on the right to the longest of them; see `Batch` for shapes and dtypes.

    Padded targets are ``pad_id`` too (a valid index), with mask 0.

    Args:
        length: the length to pad to, if it is larger than the longest row.
        first_row: see `Batch`.
    """
    lengths = np.array([example.input_length for example in token_examples], dtype=np.int32)
    shape = (len(token_examples), max(length, int(lengths.max())))
    input_ids = np.full(shape, pad_id, dtype=np.int32)
    targets = np.full(shape, pad_id, dtype=np.int32)
    mask = np.zeros(shape, dtype=np.float32)
    for row, example in enumerate(token_examples):
        length = example.input_length
        input_ids[row, :length] = example.ids[:-1]
        targets[row, :length] = example.ids[1:]
        mask[row, :length] = example.mask()
    return Batch(input_ids, targets, mask, lengths, first_row=first_row)


def stream(token_examples: Sequence[TokenExample], first_row: int = 0) -> Batch:
    """All examples one after another in a single row, without padding; see `Batch`."""
    inputs = [example.ids[:-1] for example in token_examples]
    targets = [example.ids[1:] for example in token_examples]
    counts = [example.mask() for example in token_examples]
    return Batch(
        np.concatenate(inputs).astype(np.int32)[None],
        np.concatenate(targets).astype(np.int32)[None],
        np.concatenate(counts).astype(np.float32)[None],
        np.array([len(ids) for ids in inputs], dtype=np.int32),
        is_stream=True,
        first_row=first_row,
    )
