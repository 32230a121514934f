"""Beam search, greedy decoding and sampling on random models, GPT-2's and Llama's.

jlora's beam search follows microsoft/LoRA, whose rules are not transformers' (`parity.search.Rules`
names the three differences). The two agree, beam for beam and in their scores, where

- no end token can be generated, so that no beam finishes early;
- end tokens are allowed in the last step only (``min_length``), so that no finished beam has to be
  replaced;
- there is one beam, which is greedy search;

each with ``renormalize_logits=True`` where tokens are banned, ``early_stopping="never"`` (or the
search may stop before the best is found), no repetition penalty (transformers applies it to
log-probabilities, the reference to logits), and, for ``no_repeat_ngram_size``, prompts of tokens
that are never generated, because transformers looks at the prompt too.

Where beams finish before the last step, no setting of transformers gives the reference's result.
Then the comparison is with `parity.search` in PyTorch. That function itself is checked with
transformers' rules: it must find what ``transformers.generate`` finds in the same case.

With random weights some decisions are close. A prompt with a decision closer than `CLOSEST` is left
out on both sides, since rounding may change it; at least two thirds of the prompts must remain.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from parity.case import Case
from parity.random_models import load_reference, make_model
from parity.sampling import our_chances, reference_chances
from parity.search import MICROSOFT, ranked, search
from parity.texts import pack_numbers, unpack_numbers
from parity.transformers_search import check_search, generate_beams

CLOSEST = 1e-4
PENALTIES = (0.0, 0.8, 0.9, 1.0)
PROMPTS = 24
SEARCH = {
    "eos_token_ids": [], "num_beams": 4, "max_new_tokens": 12, "min_length": 0,
    "no_repeat_ngram_size": 0, "repetition_penalty": 1.0,
}  # fmt: skip
NO_END, LAST, ONE = (
    "Beams without end token: transformers'",
    "Beams that end in the last step: transformers'",
    "One beam: transformers'",
)
PEER, GREEDY = "Beam search by microsoft/LoRA's rules", "Greedy decoding"
CHANCES = "Sampling: probabilities of a step"
#: row -> name -> (kind of model, settings of the search)
SEARCHES = {
    NO_END: {
        "gpt2": ("gpt2", {"num_beams": 8}),
        "llama": ("llama", {"num_beams": 5}),
        "ngrams": ("gpt2", {"no_repeat_ngram_size": 2}),
    },
    LAST: {
        "gpt2": ("gpt2", {"eos_token_ids": [3, 8], "min_length": 11}),
        "llama": ("llama", {"eos_token_ids": [3], "min_length": 11, "num_beams": 6}),
    },
    ONE: {
        "gpt2": ("gpt2", {"eos_token_ids": [3, 8], "num_beams": 1, "no_repeat_ngram_size": 3}),
        "llama": ("llama", {"eos_token_ids": [3, 8, 9], "num_beams": 1}),
    },
    PEER: {
        "recipe": ("gpt2", {"num_beams": 10, "no_repeat_ngram_size": 4, "eos_token_ids": [3, 8]}),
        "llama": ("llama", {"num_beams": 6, "eos_token_ids": [3, 8, 9]}),
        "min-length": ("llama", {"num_beams": 5, "eos_token_ids": [3, 8], "min_length": 4}),
        "bigrams": ("gpt2", {"no_repeat_ngram_size": 2, "eos_token_ids": [3]}),
        "unigrams": ("llama", {"no_repeat_ngram_size": 1, "eos_token_ids": [3]}),
        "repetition": ("gpt2", {"repetition_penalty": 1.3, "eos_token_ids": [3]}),
        "encouraged": ("llama", {"repetition_penalty": 0.8, "eos_token_ids": [3, 8]}),
        "everything": ("llama", {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3,
                                 "min_length": 3, "eos_token_ids": [3, 8], "num_beams": 7}),
        "two-beams": ("gpt2", {"num_beams": 2, "eos_token_ids": [3, 8]}),
        "tiny-gpt2": ("tiny-gpt2", {"num_beams": 3, "eos_token_ids": [3], "max_new_tokens": 8}),
        "tiny-llama": ("tiny-llama", {"num_beams": 3, "eos_token_ids": [3, 8],
                                      "no_repeat_ngram_size": 2, "max_new_tokens": 8}),
    },
    GREEDY: {
        "gpt2": ("gpt2", {"eos_token_ids": [3, 8]}),
        "llama": ("llama", {"eos_token_ids": [3]}),
        "repetition": ("llama", {"eos_token_ids": [3], "repetition_penalty": 1.3}),
    },
}  # fmt: skip
WARPS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "top-k": {"top_k": 5, "temperature": 1.5},
    "top-p": {"top_p": 0.8, "temperature": 1.3},
    "all": {"temperature": 2.0, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.4},
}


def cases(seed: int) -> list[Case]:
    found = []
    for row, entries in SEARCHES.items():
        for name, (kind, changes) in entries.items():
            settings = {"kind": kind, "search": {**SEARCH, **changes}}
            name = f"{list(SEARCHES).index(row)}-{name}"
            found.append(Case(row, name, settings, 5e-6, golden=kind.startswith("tiny")))
    for name, warp in WARPS.items():
        kind = "llama" if name in ("all", "top-k") else "gpt2"
        found.append(Case(CHANCES, f"sampling-{name}", {"kind": kind, "warp": warp}, 1e-4))
    return found


def inputs(case: Case, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Prompts of several lengths; with blocked n-grams, of tokens that are never generated."""
    first, last = (50, 60) if case.settings["kind"] == "gpt2" else (0, 24)
    lengths = rng.integers(1, 9, 8 if case.golden else PROMPTS)
    prompts = [rng.integers(first, last, n).tolist() for n in lengths]
    return {**pack_numbers("prompts", prompts), "seed": rng.integers(0, 2**31, 1)}


def reference(case: Case, inputs: dict[str, np.ndarray], folder: Path) -> dict[str, np.ndarray]:
    make_model(case.settings["kind"], int(inputs["seed"][0]), folder / "model")
    model = load_reference(folder / "model")
    prompts = unpack_numbers("prompts", inputs)
    if case.row == CHANCES:
        return reference_chances(model, prompts, case.settings["warp"])
    results, kept = [], []
    for number, prompt in enumerate(prompts):
        result, margin = _find(model, prompt, case)
        if margin > CLOSEST:
            results.append(result)
            kept.append(number)
    if 3 * len(kept) < 2 * len(prompts):
        raise AssertionError(f"{len(prompts) - len(kept)} prompts are too close to call")
    (folder / "kept.json").write_text(json.dumps(kept))
    return _arrays(results)


def _find(model, prompt: list[int], case: Case):
    """All hypotheses by the reference of the case's row, and the closest decision's margin."""
    settings = case.settings["search"]
    if case.row == GREEDY:
        return generate_beams(model, prompt, {**settings, "num_beams": 1}, renormalise=False)
    found, margin = search(model, prompt, settings, MICROSOFT)
    margin = min([margin, *(_lead(found, penalty) for penalty in PENALTIES)])
    if case.row == PEER:
        check_search(model, prompt, settings, CLOSEST)
        return found, margin
    return generate_beams(model, prompt, settings, renormalise=True)[0], margin


def _lead(found, length_penalty: float) -> float:
    """The margin between the best result and the next one."""
    order, _ = ranked(found, length_penalty)
    return ranked(order[:2], length_penalty)[1]


def _arrays(results) -> dict[str, np.ndarray]:
    """All hypotheses of each prompt, in the order of their ids, and the best by each penalty."""
    everything = [each for found in results for each in sorted(found)]
    arrays = {
        **pack_numbers("all", [ids for ids, _ in everything]),
        "sums": np.array([score for _, score in everything]),
        "counts": np.array([len(found) for found in results]),
    }
    for penalty in PENALTIES:
        best = [ranked(found, penalty)[0][0] for found in results]
        arrays.update(pack_numbers(f"best_{penalty}", [ids for ids, _ in best]))
    return arrays


def ours(case: Case, inputs: dict[str, np.ndarray], folder: Path) -> dict[str, np.ndarray]:
    import jlora
    from jlora.decoding.beam import BeamConfig, beam_search, rank
    from jlora.decoding.sampling import GenerateConfig, generate

    model = jlora.load(folder / "model")
    prompts = unpack_numbers("prompts", inputs)
    if case.row == CHANCES:
        return our_chances(model, prompts, case.settings["warp"])
    settings = dict(case.settings["search"])
    settings["eos_token_ids"] = tuple(settings["eos_token_ids"])
    if case.row == GREEDY:
        for name in ("num_beams", "min_length", "no_repeat_ngram_size"):
            del settings[name]
        config = GenerateConfig(batch_size=5, **settings)
        found = [[hypothesis] for hypothesis in generate(model, prompts, config)]
    else:
        found = beam_search(model, prompts, BeamConfig(batch_size=5, **settings))
    found = [found[number] for number in json.loads((folder / "kept.json").read_text())]
    arrays = _arrays([[(h.ids, h.logprob) for h in hypotheses] for hypotheses in found])
    for penalty in PENALTIES:
        best = [rank(hypotheses, penalty)[0].ids for hypotheses in found]
        arrays.update(pack_numbers(f"best_{penalty}", best))
    return arrays


STAGES = [("reference", reference), ("jlora", ours)]
