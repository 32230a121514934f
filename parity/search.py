"""Beam search step by step in PyTorch, by microsoft/LoRA's rules or by transformers'.

One prompt at a time, with whole sequences through the model at every step and all candidates
sorted: slow and simple. Common parts are written once, and `Rules` lists all differences of the two
searches.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rules:
    """The differences between the two searches.

    Attributes:
        before_softmax: bans and the repetition penalty change logits before the softmax, so that
            the remaining tokens share the probability of the banned ones; else they change
            log-probabilities, which then do not sum to 1.
        prompt_counts: n-grams and repetitions are also searched in the prompt.
        replace_finished: a finished beam is replaced by the next best candidate, so that
            ``num_beams`` unfinished ones remain; else only the other beams continue, and their
            candidates fill the free places in the next step.
    """

    before_softmax: bool
    prompt_counts: bool
    replace_finished: bool


MICROSOFT = Rules(before_softmax=True, prompt_counts=False, replace_finished=False)
TRANSFORMERS = Rules(before_softmax=False, prompt_counts=True, replace_finished=True)


def search(model, prompt: list[int], settings: dict, rules: Rules):
    """All hypotheses of a prompt, and the margin of the closest decision.

    Returns:
        [(ids, sum of log-probabilities)] in the order found, and the smallest difference of two
        scores whose order affected the result: below about 1e-5 rounding may reverse it.
    """
    import torch

    ends, beams = settings["eos_token_ids"], settings["num_beams"]
    live, found, margin = [([], 0.0)], [], float("inf")
    for step in range(settings["max_new_tokens"]):
        with torch.no_grad():
            rows = torch.tensor([prompt + ids for ids, _ in live])
            logits = model(rows, use_cache=False).logits[:, -1].double()
        candidates = []
        for (ids, score), row in zip(live, logits):
            if not rules.before_softmax:
                row = row.log_softmax(0)
            seen = prompt + ids if rules.prompt_counts else ids
            row = penalised(row, seen, settings["repetition_penalty"])
            row[banned(seen, settings["no_repeat_ngram_size"])] = -float("inf")
            if step < settings["min_length"]:
                row[ends] = -float("inf")
            if rules.before_softmax:
                row = row.log_softmax(0)
            totals = (score + row).tolist()
            candidates += [(ids + [token], total) for token, total in enumerate(totals)]
        candidates.sort(key=lambda candidate: -candidate[1])
        margin = min(margin, candidates[beams - 1][1] - candidates[beams][1])
        best = candidates[:beams]
        last = step + 1 == settings["max_new_tokens"]
        found += [c for c in best if c[0][-1] in ends] + [
            c for c in best if c[0][-1] not in ends and last
        ]
        if rules.replace_finished:
            going_on = [c for c in candidates if c[0][-1] not in ends]
            margin = min(margin, going_on[beams - 1][1] - going_on[beams][1])
            live = going_on[:beams]
        else:
            live = [c for c in best if c[0][-1] not in ends]
        if not live:
            break
    return found, margin


def penalised(row, seen: list[int], penalty: float):
    """The repetition penalty of CTRL, applied once to every token that has occurred."""
    row = row.clone()
    for token in set(seen):
        row[token] *= penalty if row[token] < 0 else 1 / penalty
    return row


def banned(seen: list[int], size: int) -> list[int]:
    """Tokens that would repeat an n-gram of this size."""
    if size == 0:
        return []
    grams = zip(*(seen[i:] for i in range(size)))
    end = tuple(seen[len(seen) - size + 1 :])
    return sorted({gram[-1] for gram in grams if gram[:-1] == end})


def ranked(found, length_penalty: float):
    """Best first by score / length ** length_penalty, as (ids, sum), and the smallest gap."""

    def score(hypothesis):
        ids, total = hypothesis
        return total / len(ids) ** length_penalty

    order = sorted(found, key=score, reverse=True)
    gaps = (score(a) - score(b) for a, b in zip(order, order[1:]))
    return order, min(gaps, default=float("inf"))
