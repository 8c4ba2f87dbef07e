"""Facts told in a text in place of as many of its tokens, so that all cases of a history share the rest of it.

history    s0 s0 s0 s1 s1 s1 s1 s2 s2 s2 s3 s3 ...          tokens of sentences
a case     s0 s0 s0 f0 f0 f0 f0 f0 s2 s2 s3 s3 ...          a fact from the beginning of a sentence on
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence

AROUND = 8  # tokens either side of a seam that tell whether a tokenizer reads it as it was put together


class Fact(str):
    """A sentence that is told between those of a history."""


def tokens_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def begun(sentences: list[str], tokenizer) -> tuple[list[int], list[int]]:
    """Tokens of sentences, and where each begins among them."""
    found = tokenizer(" ".join(sentences), add_special_tokens=False, return_offsets_mapping=True)
    ends, starts, at = [end for _, end in found["offset_mapping"]], [], 0
    for sentence in sentences:
        starts.append(bisect_right(ends, at))
        at += len(sentence) + 1
    return found["input_ids"], starts


def nearest(places: Sequence[int], wanted: int, first: int, last: int) -> Iterator[int]:
    """Ascending places from ``first`` to ``last``, the nearest to ``wanted`` first."""
    low, high = bisect_left(places, first), bisect_right(places, last)
    right = min(max(bisect_left(places, wanted), low), high)
    left = right - 1
    while left >= low or right < high:
        if right >= high or (left >= low and wanted - places[left] <= places[right] - wanted):
            yield places[left]
            left -= 1
        else:
            yield places[right]
            right += 1


def in_place(units: list[str], tokenizer) -> tuple[str, list[tuple[int, int]]]:
    """A text of sentences with ``Fact`` among them, each of which takes the place of as many tokens, from the beginning
    of the nearest sentence on where that cuts no word and the tokenizer reads it as it is meant, else of a word. What
    follows begins within a sentence. Facts keep their order.

    Args:
        units: sentences and facts.

    Returns:
        The text, and the span of each fact, of characters.

    Raises:
        ValueError: there is no room for all of the facts; says how many tokens there are.
    """
    sentences, facts = [], []  # of a fact: how many sentences stand before it, its tokens, its text
    for unit in units:
        if isinstance(unit, Fact):
            facts.append((len(sentences), tokens_of(tokenizer, f" {unit}"), unit))
        else:
            sentences.append(unit)
    ids, starts = begun(sentences, tokenizer)
    out, at, later = [], 0, sum(len(own) for _, own, _ in facts)
    for before, own, text in facts:
        later -= len(own)
        wanted, last = [*starts, len(ids)][before], len(ids) - 2 * later - len(own)
        # Text that comes again and again may have no sentence that can be left out with so many tokens.
        for place in (place for where in (starts, range(len(ids))) for place in nearest(where, wanted, at, last)):
            one = own if place else tokens_of(tokenizer, text)
            piece = [*ids[max(at, place - AROUND) : place], *one, *ids[place + len(one) :][:AROUND]]
            said = tokenizer.decode(piece)
            apart = (f" {text}" if place else text) + " " * (place + len(one) < len(ids))  # no word is cut in two
            if apart in said and tokens_of(tokenizer, said) == piece:
                break
        else:
            raise ValueError(f"there is no room for {len(facts)} facts in place of others among {len(ids)} tokens")
        out += [*ids[at:place], *one]
        at = place + len(one)
    out += ids[at:]
    context, spans, at = tokenizer.decode(out), [], 0
    for _, _, text in facts:
        at = context.index(text, at)
        spans.append((at, at + len(text)))
        at += len(text)
    return context, spans
