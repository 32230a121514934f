"""How byte-level BPE tokenizers split a text into words, by the names that GGUF files give it.

A name stands for what a model's tokenizer.json has under ``normalizer`` and ``pre_tokenizer``, and
whether a word that is a token as it stands is merged at all. The expressions are those of the
models' own tokenizer.json, so a tokenizer from a GGUF file gives the ids that the model was trained
with. (llama.cpp rewrites some for its own engine and knows no normal forms.)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

DIGITS = "digits"  # a step that splits every numeral off, instead of an expression

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
# A word is upper case letters and then lower case ones: "camelCase" is two words.
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+ENDING|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*ENDING"
    r"|NUMBER| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = CASED.replace("ENDING", "").replace("NUMBER", r"\p{N}")
GPT4O = CASED.replace("ENDING", "(?i:'s|'t|'re|'ve|'m|'ll|'d)?").replace("NUMBER", r"\p{N}{1,3}")
#: Letters that have a case, as DeepSeek's file lists them.
DEEPSEEK_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1"
    "\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd"
    "\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d"
    "\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4"
    "\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec"
    "\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b"
    "\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787"
    "\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2"
    "\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
DEEPSEEK_SIGNS = "!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002"
DEEPSEEK_CHINESE = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"


@dataclass(frozen=True)
class PreTokenizer:
    """What happens to a text before the merges.

    Attributes:
        steps: expressions, or `DIGITS`, one after the other; what each finds is a piece by itself.
        gpt2_words: whether GPT-2's expression comes last.
        nfc: whether the text is brought into normal form C first.
        ignore_merges: whether a word that is a token is taken as it is, though no merges lead
            there.
    """

    steps: tuple[str, ...] = ()
    gpt2_words: bool = False
    nfc: bool = False
    ignore_merges: bool = False


KINDS = {
    "gpt2": PreTokenizer(gpt2_words=True),
    "smollm": PreTokenizer((DIGITS,), gpt2_words=True),
    "llama3": PreTokenizer((LLAMA3,), ignore_merges=True),
    "qwen2": PreTokenizer((QWEN2,), nfc=True),
    "olmo": PreTokenizer(gpt2_words=True, nfc=True),
    "gpt4": PreTokenizer((LLAMA3,)),
    "gpt4o": PreTokenizer((GPT4O,)),
    "tekken": PreTokenizer((TEKKEN,), ignore_merges=True),
    "deepseek": PreTokenizer(
        (
            "[\r\n]",
            rf"\s?[{DEEPSEEK_LETTERS}]+",
            rf"\s?[{DEEPSEEK_SIGNS}]+",
            r"\s+$",
            DEEPSEEK_CHINESE,
            DIGITS,
        )
    ),
    "deepseek coder": PreTokenizer(
        ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", DEEPSEEK_CHINESE, DIGITS)
    ),
}
#: `tokenizer.ggml.pre` -> key of `KINDS`. The first name of a kind is the one that is written.
GGUF_PRE = {
    "gpt-2": "gpt2",
    "phi-2": "gpt2",
    "smollm": "smollm",
    "starcoder": "smollm",
    "refact": "smollm",
    "command-r": "smollm",
    "llama-bpe": "llama3",
    "llama3": "llama3",
    "llama-v3": "llama3",
    "qwen2": "qwen2",
    "deepseek-r1-qwen": "qwen2",
    "olmo": "olmo",
    "dbrx": "gpt4",  # OLMo 2, Phi-4
    "smaug-bpe": "gpt4",
    "glm4": "gpt4",
    "chatglm-bpe": "gpt4",
    "gpt-4o": "gpt4o",  # Phi-4-mini
    "llama4": "gpt4o",
    "tekken": "tekken",
    "deepseek-llm": "deepseek",
    "deepseek-coder": "deepseek coder",
}


def byte_level_bpe(
    vocab: dict[str, int],
    merges: list[tuple[str, ...]],
    kind: str,
    special: Sequence[str],
    extra: Sequence[str] = (),
) -> Any:
    """A byte-level BPE tokenizer whose texts are split as one of `KINDS`."""
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    own = KINDS[kind]
    backend = Backend(models.BPE(vocab=vocab, merges=merges, ignore_merges=own.ignore_merges))
    steps = [
        pre_tokenizers.Digits(individual_digits=True)
        if step is DIGITS
        else pre_tokenizers.Split(Regex(step), behavior="isolated")
        for step in own.steps
    ]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=own.gpt2_words)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, last]) if steps else last
    if own.nfc:
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    backend.add_tokens([AddedToken(t, special=False, normalized=False) for t in extra])
    return backend


def kind_of(settings: dict[str, Any]) -> str | None:
    """The key of `KINDS` of a tokenizer.json; None: it splits texts in another way."""
    if settings["model"]["type"] != "BPE":
        return None
    own = split_settings(settings)
    for kind in KINDS:
        if own == split_settings(json.loads(byte_level_bpe({}, [], kind, []).to_str())):
            return kind
    return None


def split_settings(settings: dict[str, Any]) -> list[Any]:
    """The settings of a tokenizer.json that determine how text is split before the merges."""
    model = settings["model"]
    affixes = [model.get("continuing_subword_prefix"), model.get("end_of_word_suffix")]
    return [
        _plain(settings["pre_tokenizer"]),
        _plain(settings["normalizer"]),
        model.get("ignore_merges", False),
        [affix or "" for affix in affixes],
    ]


def _plain(step: Any) -> Any:
    """One form for settings that mean the same."""
    if not isinstance(step, dict):
        return step
    # Changes the reported positions of tokens, not the tokens.
    step = {key: value for key, value in step.items() if key != "trim_offsets"}
    inner = "pretokenizers" if "pretokenizers" in step else "normalizers"
    if step.get("type") == "Sequence":
        steps = [_plain(each) for each in step[inner]]
        return steps[0] if len(steps) == 1 else {"type": "Sequence", inner: steps}
    # Keeping what is found, of an expression that finds everything: every one of `KINDS` that
    # stands alone does.
    if step.get("type") == "Split" and step.get("behavior") == "Removed" and step.get("invert"):
        return {**step, "behavior": "Isolated", "invert": False}
    return step
