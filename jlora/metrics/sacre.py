"""Scores that sacrebleu computes: BLEU as Moses' script, sacreBLEU's standard form, and chrF++.

All scores are fractions. References are one list for each input, of any length.
"""

from __future__ import annotations

from itertools import zip_longest


def multi_bleu(hypotheses: list[str], references: list[list[str]]) -> float:
    """Corpus BLEU-4 of prepared texts (`jlora.metrics.generation_eval`), between 0 and 1.

    Equal to Moses' ``multi-bleu-detok.perl``, which tokenises as mteval-v13a does, keeps case,
    takes the shorter of two equally near reference lengths, and does not smooth: without a single
    matching 4-gram the score is 0.
    """
    return _bleu(hypotheses, references, smoothing="none")


def sacre_bleu(hypotheses: list[str], references: list[list[str]]) -> float:
    """sacreBLEU (Post 2018) of plain texts, between 0 and 1.

    Its signature is ``case:mixed|eff:no|tok:13a|smooth:exp``: the text with its case, all
    references, zero precisions smoothed as in mteval-v13a.
    """
    return _bleu(hypotheses, references, smoothing="exp")


def chrf_pp(hypotheses: list[str], references: list[list[str]]) -> float:
    """Corpus chrF++ (Popović 2017) of prepared texts, between 0 and 1.

    The mean of the F2 scores of character 1- to 6-grams and word 1- and 2-grams, each against the
    reference that fits its sentence best. Equal to Popović's chrF++.py as GenerationEval has it,
    which is sacrebleu's ``eps_smoothing``; sacrebleu's default takes the F2 score of the mean
    precision and recall instead, a little higher.
    """
    from sacrebleu.metrics import CHRF

    metric = CHRF(word_order=2, eps_smoothing=True)
    return metric.corpus_score(hypotheses, _streams(references)).score / 100


def _bleu(hypotheses: list[str], references: list[list[str]], smoothing: str) -> float:
    from sacrebleu.metrics import BLEU

    # force: no warning about texts that look tokenised, as prepared ones do.
    metric = BLEU(tokenize="13a", smooth_method=smoothing, force=True)
    return metric.corpus_score(hypotheses, _streams(references)).score / 100


def _streams(references: list[list[str]]) -> list[tuple[str | None, ...]]:
    """sacrebleu's form: all first references, all second ones, ..., None where there is none."""
    return list(zip_longest(*references))
