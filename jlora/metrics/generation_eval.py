"""The texts that WebNLG's and DART's metrics are computed on in microsoft/LoRA.

There `gpt2_decode.py --tokenize --lower --ref_num 6` writes the outputs and the first
`MAX_REFERENCES` references of each input (see `prepare`), and WebNLG's GenerationEval scores those
files:

- multi-BLEU by Moses' ``multi-bleu-detok.perl`` on the prepared texts,
- METEOR 1.5 (``-l en -norm``) and TER (pyter) on the prepared texts after NLTK's tokeniser,
- chrF++ by Popović's script on the prepared texts.

For an input with fewer than six references the first one is repeated in the missing files, which
changes none of the four scores. (GenerationEval itself would write empty lines; those count as a
reference in multi-BLEU's nearest length and as an error rate of 1 in TER.)

One thing is not followed: GenerationEval takes the line break at the end of its files for one more,
empty input. That adds an error rate of 1 to TER's mean, and makes METEOR refuse files with several
references.
"""

from __future__ import annotations

import re

MAX_REFERENCES = 6

_NOT_A_WORD = re.compile(r"(\W)")
_CONTRACTION = re.compile(r"\b(?:(can)(not)|(gim|lem)(me)|(gon|wan)(na)|(got)(ta))\b")


def prepare(text: str) -> str:
    """The text in lower case, with spaces around every character that belongs to no word.

    ``"Don't, 3.5"`` -> ``"don ' t , 3 . 5"``. A prepared text stays as it is.
    """
    return " ".join(_NOT_A_WORD.sub(r" \1 ", text.lower()).split())


def word_tokenize(prepared: str) -> list[str]:
    """The words that NLTK's ``word_tokenize`` makes of a prepared text.

    Punctuation is separated already, so only two of NLTK's rules have an effect: a straight
    quotation mark becomes two backquotes, and contractions written as one word (``cannot``) are
    split.
    """
    split = _CONTRACTION.sub(lambda match: " ".join(filter(None, match.groups())), prepared)
    return split.replace('"', "``").split()
