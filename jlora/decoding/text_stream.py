"""Tokens to text, piece by piece: whole characters only, and nothing of a stop text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence


class TextStream:
    """The text of tokens that come one by one.

    What is shown never changes: a character of several tokens waits for its last one, and the
    beginning of a stop text for what follows. All pieces together are the text of all the tokens
    up to the first stop text, see `up_to_stop`.

    Args:
        tokenizer: its ``decode`` is called with ids.
        stops: texts that end the answer and are not part of it.
        after: tokens that stand before the first one and are not shown.

    Attributes:
        stopped: whether a stop text came; nothing more is shown then.
        ended: whether `pieces` met an end token or a stop text.
    """

    def __init__(self, tokenizer, stops: Sequence[str] = (), after: Sequence[int] = ()):
        self._decode, self._stops = tokenizer.decode, tuple(stops)
        self._ids: list[int] = list(after)
        # A word's text depends on what stands before it (SentencePiece drops the first space), so
        # the tokens of the piece before are decoded again.
        self._before, self._done = 0, len(self._ids)
        self._waiting = ""  # whole characters that may begin a stop text
        self.stopped = self.ended = False

    def pieces(self, tokens: Iterable[int], ends: Sequence[int] = ()) -> Iterator[str]:
        """The text of ``tokens`` as it becomes known, up to an end token or a stop text."""
        for token in tokens:
            if token in ends:
                self.ended = True
                break
            piece = self.add(token)
            if piece:
                yield piece
            if self.stopped:
                break
        piece = self.finish()
        if piece:
            yield piece
        self.ended |= self.stopped

    def add(self, token: int) -> str:
        """What can be shown now that ``token`` is there, often nothing."""
        if self.stopped:
            return ""
        self._ids.append(token)
        text = self._new_text()
        if not text or text.endswith("\ufffd"):  # half a character
            return ""
        self._before, self._done = self._done, len(self._ids)
        return self._show(text)

    def finish(self) -> str:
        """What was waiting, when no more tokens come."""
        if self.stopped:
            return ""
        text = self._show(self._new_text())
        if not self.stopped:
            text, self._waiting = text + self._waiting, ""
        self._before = self._done = len(self._ids)
        return text

    def _new_text(self) -> str:
        shown = self._decode(self._ids[self._before : self._done])
        return self._decode(self._ids[self._before :])[len(shown) :]

    def _show(self, text: str) -> str:
        text = self._waiting + text
        if any(stop in text for stop in self._stops):
            self.stopped, self._waiting = True, ""
            return up_to_stop(text, self._stops)
        held = max((_begun(text, stop) for stop in self._stops), default=0)
        self._waiting = text[len(text) - held :]
        return text[: len(text) - held]


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of ``text`` begin ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)


def pieces(
    tokens: Iterable[int], tokenizer, ends: Sequence[int] = (), stops: Sequence[str] = ()
) -> Iterator[str]:
    """`TextStream.pieces` of a stream of its own."""
    return TextStream(tokenizer, stops).pieces(tokens, ends)


def stripped(found: Iterable[str]) -> Iterator[str]:
    """``found`` without the spaces and line ends round the whole, as predictions are stored."""
    begun, held = False, ""
    for piece in found:
        text = held + piece if begun else piece.lstrip()
        shown = text.rstrip()
        held = text[len(shown) :]
        if shown:
            begun = True
            yield shown


def up_to_stop(text: str, stops: Sequence[str]) -> str:
    """``text`` up to the stop text in it that is complete first, and so up to the same one however
    the text came. Of those that end at one place the longest counts.
    """
    found = [(text.find(stop), stop) for stop in stops]
    ends = [(place + len(stop), place) for place, stop in found if place >= 0]
    return text[: min(ends)[1]] if ends else text
