"""A conversation's keys and values, kept from turn to turn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from jlora.decoding.decoder import angle_limit, check_prompts, decoder_of, room
from jlora.decoding.sampling import GenerateConfig, next_tokens


class Session:
    """Answers one prompt after the other; what two of them begin with is computed once.

    So nothing need be known of how a chat template grows: where it changes earlier turns (as those
    do that drop old thoughts) the keys up to the change are kept.

    Args:
        model: as for `jlora.decoding.sampling.generate`; not to be changed afterwards.
    """

    def __init__(self, model):
        self._model = model
        self._decoder = None
        self._limit = angle_limit(model.config)
        self._held: list[int] = []  # the tokens whose keys and values the decoder has

    def tokens(
        self, prompt: Sequence[int], config: GenerateConfig, number: int = 0
    ) -> Iterator[int]:
        """The tokens of the answer, the end token included; it may be left at any time.

        Args:
            number: decides the draws together with the seed, so that turns differ.

        Raises:
            UserError: as `generate`.
        """
        check_prompts(self._model, [prompt], config.max_new_tokens)
        kept = self._common(prompt)
        if self._is_long(self._held) != self._is_long(prompt):
            kept = 0
        self._held = []  # unknown until the prompt has been run
        if kept:
            self._decoder.resume(kept, prompt[kept:])
        else:
            self._decoder = decoder_of(self._model)
            self._decoder.enter([prompt])
        self._held = list(prompt)
        unread: list[int] = []  # the newest token, which the decoder reads when it is asked again
        found = next_tokens(self._decoder, self._model, [prompt], [0], config, [number])
        for _, token, _ in found:
            self._held += unread
            unread = [token]
            yield token

    def _is_long(self, text: Sequence[int]) -> bool:
        """Whether its keys are turned by the angles of long texts."""
        return self._limit is not None and len(text) > self._limit

    def room(self, prompt: Sequence[int]) -> int:
        """How many tokens can follow ``prompt``; below 1 it does not fit the model's context."""
        return room(self._model, prompt)

    def _common(self, prompt: Sequence[int]) -> int:
        """Tokens at the beginning of ``prompt`` that need not be run; its last one always is."""
        most = min(len(self._held), len(prompt) - 1)
        return next((n for n in range(most) if self._held[n] != prompt[n]), most)
