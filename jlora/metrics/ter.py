"""TER (Snover et al. 2006): edits to turn a hypothesis into a reference, moves included."""

from __future__ import annotations

from collections.abc import Callable, Iterator


def mean_ter(hypotheses: list[list[str]], references: list[list[list[str]]]) -> float:
    """Mean over the sentences of the TER to the nearest reference; 0 is best, above 1 possible.

    As GenerationEval: `ter` of each sentence and reference, the least of each, their plain mean.
    (Snover's tercom and sacrebleu divide all edits by the mean reference lengths, and restrict
    phrases and how far they move, so that their numbers differ.)
    """
    least = [min(ter(words, one) for one in group) for words, group in zip(hypotheses, references)]
    return sum(least) / len(least)


def ter(hypothesis: list[str], reference: list[str]) -> float:
    """Edits per reference word: moved phrases, insertions, deletions and replacements, one each.

    Greedy, as the reference implementation pyter: as long as moving one phrase makes the edit
    distance smaller, the move that makes it smallest is done. A reference without words gives 1.
    """
    if not reference:
        return 1.0
    distance = edit_distance_to(reference)
    words = tuple(hypothesis)
    moved = 0
    left = distance(words)
    while left:
        distances = {other: distance(other) for other in _moves(words, reference)}
        nearest = min(distances.values(), default=left)
        if nearest >= left:
            break
        # Of equally good moves pyter takes the one whose words come last in the alphabet.
        words = max(other for other, value in distances.items() if value == nearest)
        left = nearest
        moved += 1
    return (moved + left) / len(reference)


def _moves(words: tuple[str, ...], reference: list[str]) -> Iterator[tuple[str, ...]]:
    """The words with one phrase moved to where the reference has it, for each such phrase.

    From each pair of equal words at different places the phrase goes on as long as both agree.
    """
    for start, word in enumerate(words):
        for target, other in enumerate(reference):
            if word != other or start == target:
                continue
            length = 1
            while (
                start + length < len(words)
                and target + length < len(reference)
                and words[start + length] == reference[target + length]
            ):
                length += 1
            rest = words[:start] + words[start + length :]
            yield rest[:target] + words[start : start + length] + rest[target:]


def edit_distance_to(reference: list[str]) -> Callable[[tuple[str, ...]], int]:
    """A function that gives the Levenshtein distance of words to ``reference``.

    Bit-parallel (Myers 1999, in the form of Hyyrö 2003): a column of the distance matrix is held as
    the bits of two integers that say where it rises and where it falls by one from row to row.
    """
    places: dict[str, int] = {}
    for index, word in enumerate(reference):
        places[word] = places.get(word, 0) | 1 << index
    last = 1 << len(reference) >> 1
    mask = (1 << len(reference)) - 1

    def distance(words: tuple[str, ...]) -> int:
        rises, falls = mask, 0
        result = len(reference)
        for word in words:
            equal = places.get(word, 0)
            diagonal = (((equal & rises) + rises) ^ rises) | equal | falls
            right_rises = falls | ~(diagonal | rises) & mask
            right_falls = rises & diagonal
            result += bool(right_rises & last) - bool(right_falls & last)
            right_rises = right_rises << 1 | 1  # the first row counts the words so far
            right_falls <<= 1
            rises = (right_falls | ~(diagonal | right_rises)) & mask
            falls = right_rises & diagonal & mask
        return result

    return distance
