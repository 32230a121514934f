"""The scores by name: how each is computed, and how it is printed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jlora.metrics.bleu import bleu
from jlora.metrics.cider import cider
from jlora.metrics.exact import exact_match
from jlora.metrics.nist import nist
from jlora.metrics.rouge import rouge_l
from jlora.metrics.sacre import chrf_pp, multi_bleu, sacre_bleu
from jlora.metrics.ter import mean_ter
from jlora.metrics.texts import Texts, each
from jlora.system.errors import UserError
from jlora.system.plugins import load_plugin, plugins

GROUP = "jlora.metrics"  # of entry points


@dataclass(frozen=True)
class Metric:
    """A score: its function, and its printed form ``value * scale`` with ``decimals`` digits.

    Attributes:
        key: its name in recipes and in scores.json.
        label: the heading of its column.
        lower_is_better: for the comparison with other systems.
        score: gives the score of texts; None: computed elsewhere (`jlora.metrics.accuracy`).
        java: whether it needs Java.
        meteor: whether it needs METEOR's own Java program.
    """

    key: str
    label: str = ""
    scale: float = 1.0
    decimals: int = 4
    lower_is_better: bool = False
    score: Callable[[Texts], float] | None = None
    java: bool = False
    meteor: bool = False

    def text(self, value: float | None, sign: bool = False) -> str:
        """The printed value; an en dash for a score that is not there."""
        if value is None:
            return "–"
        return f"{value * self.scale:{'+' if sign else ''}.{self.decimals}f}"

    def cell(self, scores: Mapping[str, Any]) -> str:
        """The printed value with its interval where ``scores`` has one: ``71.8 [68, 75]``."""
        ends = [scores.get(f"{self.key}_{end}") for end in ("low", "high")]
        text = self.text(scores.get(self.key))
        if self.key not in scores or None in ends:
            return text
        return f"{text} [{ends[0] * self.scale:.0f}, {ends[1] * self.scale:.0f}]"


def _meteor(texts: Texts) -> float:
    return texts.meteor.score(*texts.ptb)


def _meteor_webnlg(texts: Texts) -> float:
    return texts.meteor.score(*each(" ".join, *texts.nltk))


#: In the order of the paper's columns. Scales and digits are those of its tables 3, 4, 13 and 14
#: (arXiv 2106.09685), which call multi-BLEU and GenerationEval's METEOR plainly BLEU and MET;
#: chrF++ is printed as in WebNLG 2020.
TABLE = (
    Metric("BLEU", "BLEU", 100, 1, score=lambda texts: bleu(*texts.mteval)),
    Metric("multi-BLEU", "multi-BLEU", 100, 1, score=lambda texts: multi_bleu(*texts.prepared)),
    Metric("sacreBLEU", "sacreBLEU", 100, 1, score=lambda texts: sacre_bleu(*texts.plain)),
    Metric("NIST", "NIST", 1, 2, score=lambda texts: nist(*texts.mteval)),
    Metric("METEOR", "METEOR", 100, 1, score=_meteor, java=True, meteor=True),
    Metric("ROUGE_L", "ROUGE-L", 100, 1, score=lambda texts: rouge_l(*texts.ptb), java=True),
    Metric("CIDEr", "CIDEr", 1, 2, score=lambda texts: cider(*texts.ptb), java=True),
    Metric("METEOR-WebNLG", "METEOR", 1, 2, score=_meteor_webnlg, java=True, meteor=True),
    Metric("TER", "TER", 1, 2, True, score=lambda texts: mean_ter(*texts.nltk)),
    Metric("chrF++", "chrF++", 1, 3, score=lambda texts: chrf_pp(*texts.prepared)),
    Metric("exact_match", "Exact match", 100, 1, score=lambda texts: exact_match(*texts.plain)),
    Metric("accuracy", "Accuracy", 100, 1),
    Metric("generated_accuracy", "Accuracy, generated", 100, 1),
    Metric("majority", "Majority answer", 100, 1),
)
#: Of this package and of `register_metric`, by key.
_known = {metric.key: metric for metric in TABLE}


def register_metric(metric: Metric) -> Metric:
    """Make a metric known by its key, to recipes, `jlora evaluate` and reports.

    In a package of its own, an entry point of the group ``jlora.metrics`` does the same for every
    process: its name is the metric's key, its object the `Metric`.

    Raises:
        UserError: there is one of that name, or the name or the function cannot be used.
    """
    if metric.key in _known:
        raise UserError(f"there is a metric {metric.key!r} already; choose another name")
    if not metric.key.strip() or set(metric.key) & set("/, "):
        raise UserError(f"{metric.key!r} cannot name a metric; use no space, comma or slash")
    if not callable(metric.score):
        raise UserError(f"metric {metric.key!r} has no function `score`")
    _known[metric.key] = metric
    return metric


def metric_names() -> list[str]:
    """The scores that can be computed."""
    own = [key for key, metric in _known.items() if metric.score is not None]
    return list(dict.fromkeys([*own, *plugins(GROUP)]))


def find_metric(key: str) -> Metric | None:
    """The metric of that key, None where there is none.

    Raises:
        UserError: another package's metric cannot be used.
    """
    if key not in _known:
        found = load_plugin(GROUP, key, Metric)
        if found is None:
            return None
        if found.key != key:
            raise UserError(f"the entry point {key} ({GROUP}) holds the metric {found.key!r}")
        register_metric(found)
    return _known[key]
