"""predictions.jsonl: what a model wrote for each input, with every beam hypothesis kept.

One line an input::

    {"prompt": "...", "prediction": "...", "hypotheses": [
        {"text": "...", "ids": [...], "logprob": -3.2, "length": 21, "finished": true}, ...]}

The length penalty of the reference's beam search only ranks hypotheses and never steers the search,
so `rerank` gives the predictions of any penalty without decoding again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from jlora.data.readers import json_lines, string_field
from jlora.decoding.hypothesis import Hypothesis
from jlora.system.console import say
from jlora.system.errors import UserError, kind_of
from jlora.system.files import atomic_path, check_writable, read_text, write_text


@dataclass(frozen=True)
class Prediction:
    """The text chosen for one input and the hypotheses it was chosen from."""

    prompt: str
    prediction: str
    hypotheses: list[Hypothesis] = field(default_factory=list)


def make_prediction(
    prompt: str,
    hypotheses: Iterable[Hypothesis],
    decode: Callable[[list[int]], str],
    length_penalty: float,
) -> Prediction:
    """Decode the hypotheses of a beam search and choose the best one.

    Args:
        hypotheses: what `jlora.decoding.beam.beam_search` found for one input.
        decode: token ids to text, without special tokens.
    """
    texts = [replace(each, text=decode(list(each.text_ids)).strip()) for each in hypotheses]
    return Prediction(prompt, best(texts, length_penalty).text, texts)


def best(hypotheses: Sequence[Hypothesis], length_penalty: float) -> Hypothesis:
    """The hypothesis with the highest score; of equals the first.

    Finished and unfinished ones compete, as at the end of the reference's search.
    """
    return max(hypotheses, key=lambda hypothesis: hypothesis.score(length_penalty))


def rerank(predictions: Sequence[Prediction], length_penalty: float) -> list[Prediction]:
    """Choose again for another length penalty; hypotheses keep their stored order.

    The result is what a new search would choose, unless the search was told to stop early
    (`BeamConfig.rank_up_to`) and the penalty is above that number.

    Raises:
        UserError: a prediction has no hypotheses (it was not made by beam search), or the penalty
            is no sensible number.
    """
    if not abs(length_penalty) <= 10:
        raise UserError(f"length penalty {length_penalty}: give a number from -10 to 10, as 0.8")
    for number, prediction in enumerate(predictions, start=1):
        if not prediction.hypotheses:
            raise UserError(
                f"prediction {number} has no hypotheses to rank; generate with beam search"
            )
    return [
        replace(prediction, prediction=best(prediction.hypotheses, length_penalty).text)
        for prediction in predictions
    ]


def write_predictions(path: str | Path, predictions: Sequence[Prediction]) -> None:
    """Write predictions.jsonl; whole or not at all.

    Raises:
        UserError: the file cannot be written, or a log-probability is not a finite number.
    """
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as handle:
        for number, prediction in enumerate(predictions, start=1):
            try:
                line = json.dumps(_row(prediction), ensure_ascii=False, allow_nan=False)
            except ValueError as error:
                raise UserError(
                    f"cannot write {path}: prediction {number} has a log-probability that is not "
                    "a finite number; the model gives NaN or infinity, check its adapter"
                ) from error
            handle.write(line + "\n")


def _row(prediction: Prediction) -> dict[str, Any]:
    """A line of the file; of each hypothesis the text comes first, as people look for it."""
    return {
        "prompt": prediction.prompt,
        "prediction": prediction.prediction,
        "hypotheses": [{"text": each.text, **asdict(each)} for each in prediction.hypotheses],
    }


def read_predictions(path: str | Path) -> list[Prediction]:
    """Read predictions.jsonl.

    Raises:
        UserError: a line is not a prediction (with file and line), or the file has none.
    """
    predictions = []
    form = '{"prompt": "...", "prediction": "..."}'
    for number, row in json_lines(path, form):
        prompt = string_field(row, "prompt", path, number, form)
        text = string_field(row, "prediction", path, number, form)
        hypotheses = row.get("hypotheses", [])
        if not isinstance(hypotheses, list):
            raise UserError(f"{path}:{number}: 'hypotheses' is not a list")
        parsed = [_hypothesis(item, f"{path}:{number}") for item in hypotheses]
        predictions.append(Prediction(prompt, text, parsed))
    return predictions


def check_out(out: str | Path) -> None:
    """Check before the decoding that its predictions can be written to ``out``.

    Raises:
        UserError: it is the name of the texts, which go beside it, or cannot be a file.
    """
    out = Path(out)
    if out.suffix == ".txt":
        raise UserError(
            f"{out}: the texts alone go to a file of that name, beside the predictions; give "
            f"{out.with_suffix('.jsonl')}"
        )
    if out.is_dir():
        raise UserError(f"{out} is a folder; give a file in it, as {out / 'predictions.jsonl'}")
    folder = next(each for each in out.absolute().parents if each.exists())
    check_writable(folder)


def save_predictions(out: str | Path, predictions: Sequence[Prediction]) -> None:
    """Write predictions.jsonl, and the texts alone beside it as metric scripts read them.

    Raises:
        UserError: as `write_predictions`.
    """
    write_predictions(out, predictions)
    write_lines(Path(out).with_suffix(".txt"), predictions)


class Unfinished:
    """What an interrupted decoding has finished: ``OUT.partial``, predictions as in OUT.

    ``OUT.partial.key`` says what they were made with. It is written before the first of them, so
    predictions never stand beside the key of another decoding.

    Args:
        out: where the predictions go in the end.
        key: tells apart decodings that differ in model, prompts or settings.
    """

    def __init__(self, out: Path, key: str):
        self.path = out.with_name(out.name + ".partial")
        self._key_path, self._key = out.with_name(out.name + ".partial.key"), key

    def read(self) -> list[Prediction]:
        """What an equal decoding has finished; what is of another one is removed."""
        kept = self._key_path.is_file() and read_text(self._key_path).strip() == self._key
        if kept and self.path.is_file():
            return read_predictions(self.path)
        if self.path.exists():
            say(f"{self.path} is of another adapter, model or setting; nothing of it is used")
        self.path.unlink(missing_ok=True)
        return []

    def write(self, predictions: Sequence[Prediction]) -> None:
        """Keep what is finished so far.

        Raises:
            UserError: as `write_predictions`.
        """
        if not self.path.exists():
            write_text(self._key_path, self._key + "\n")
        write_predictions(self.path, predictions)

    def remove(self) -> None:
        """Tidy up when everything is in OUT."""
        self.path.unlink(missing_ok=True)
        self._key_path.unlink(missing_ok=True)


def write_lines(path: str | Path, predictions: Sequence[Prediction]) -> None:
    """Write the predicted texts one a line, as metric scripts read them.

    Line ends inside a text become spaces, so that line n stays input n.

    Raises:
        UserError: the file cannot be written.
    """
    lines = [" ".join(prediction.prediction.split()) + "\n" for prediction in predictions]
    write_text(path, "".join(lines))


def _hypothesis(item: Any, where: str) -> Hypothesis:
    checks: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "text": ("a string", lambda value: isinstance(value, str)),
        "ids": (
            "a list of token ids",
            lambda value: isinstance(value, list) and all(map(_is_natural, value)),
        ),
        "logprob": (
            "a finite number",
            lambda value: type(value) in (int, float) and abs(value) < 1e30,
        ),
        "length": ("a number of tokens", lambda value: _is_natural(value) and value > 0),
        "finished": ("true or false", lambda value: isinstance(value, bool)),
    }
    if not isinstance(item, dict):
        raise UserError(f"{where}: a hypothesis is {kind_of(item)}, not an object")
    for key, (what, fits) in checks.items():
        if key not in item:
            raise UserError(f"{where}: a hypothesis has no key {key!r}")
        if not fits(item[key]):
            raise UserError(f"{where}: a hypothesis's {key!r} is not {what}")
    return Hypothesis(**{key: item[key] for key in checks})


def _is_natural(value: Any) -> bool:
    # bool is a kind of int in Python, and no token id; ids and lengths are int32 elsewhere.
    return type(value) is int and 0 <= value < 2**31
