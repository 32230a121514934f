"""TER (Snover et al. 2006): edits to turn a hypothesis into a reference, moves included."""

from __future__ import annotations

from collections.abc import Callable, Iterator


def mean_ter(hypotheses: list[list[str]], references: list[list[list[str]]]) -> float:
    """Mean over the sentences of the TER to the nearest reference; 0 is best, above 1 possible.

    As GenerationEval: the smallest `ter` of each sentence over its references, and their plain
    mean.
    (Snover's tercom and sacrebleu divide all edits by the mean reference lengths, and limit the
    phrases that move and how far, so their numbers differ.)
    """
    least = [min(ter(words, one) for one in group) for words, group in zip(hypotheses, references)]
    return sum(least) / len(least)


def ter(hypothesis: list[str], reference: list[str]) -> float:
    """Edits per reference word; moving a phrase or inserting, deleting, replacing a word is one.

    Greedy, as in the reference implementation pyter: while moving one phrase reduces the edit
    distance, the move that reduces it most is made. A reference without words gives 1.
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

    A phrase begins at a pair of equal words at different places and is as long as both agree.
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

    Bit-parallel (Myers 1999, in the form of Hyyrö 2003): a column of the distance matrix is stored
    in the bits of two integers: in which rows it is one more, and in which one less, than in the
    row above.
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
