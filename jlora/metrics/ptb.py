"""The Penn Treebank tokeniser of Stanford CoreNLP 3.4.1, as the MS-COCO caption metrics use it."""

from __future__ import annotations

from jlora.metrics.java import JavaProcess, jar
from jlora.system.errors import UserError

ARGUMENTS = ["-Xmx512m", "-XX:+UseSerialGC", "-Dfile.encoding=UTF-8"]
DROPPED = frozenset("'' ' `` ` -LRB- -RRB- -LCB- -RCB- . ? ! , : - -- ... ;".split())


def ptb_tokenize(sentences: list[str], java: str | None = None) -> list[str]:
    """Lower-case, split into Penn Treebank tokens, drop punctuation, join with single spaces.

    Bracket names are not dropped: with ``-lowerCase`` the tokeniser prints ``-lrb-``, and the
    MS-COCO script only drops ``-LRB-``.

    Args:
        sentences: one line each, without line breaks.

    Raises:
        UserError: Java does not work, or it returns a different number of lines.
    """
    arguments = [
        *ARGUMENTS,
        "-cp",
        str(jar("tokenizer/stanford-corenlp-3.4.1.jar")),
        "edu.stanford.nlp.process.PTBTokenizer",
        "-preserveLines",
        "-lowerCase",
    ]
    with JavaProcess("the PTB tokeniser", arguments, java=java) as process:
        output = process.finish("\n".join(sentences).encode("utf-8", errors="replace"))
    lines = output.decode("utf-8", errors="replace").split("\n")
    # The answer ends with a line break, unless the last sentence is empty.
    if len(lines) - len(sentences) not in (0, 1):
        raise UserError(
            f"the PTB tokeniser ({process.java}) gave {len(lines)} lines for {len(sentences)} "
            "sentences; look for control characters in them, or try another Java (JAVA_HOME)"
        )
    return [
        " ".join(word for word in line.rstrip().split(" ") if word not in DROPPED)
        for line in lines[: len(sentences)]
    ]
