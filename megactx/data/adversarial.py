"""Adversarial documents, made from real text (curriculum stage 3).

A gist is easily good where the text goes on as expected. These documents ask for what it loses first: which of two
almost equal blocks was it, which number, which spelling.

Every kind is a pure function ``(ids, rng, block, vocabulary) -> ids``: int64 [T] that opens with BOS in, as many tokens
out, BOS first. Where a text leaves no room for a kind, it comes back as it is; ``disturbed`` then takes the next one.
"""

import numpy as np

EVERY = 8  # blocks for each passage that comes back, and for each pair of neighbours
LONGEST = 4  # blocks of a passage that comes back
NOISE = (0.02, 0.1)  # share of the characters that are disturbed, drawn for every document
LETTERS = 4  # shorter words are rarely facts
NUMBERS = 8  # a text with fewer number tokens has no numbers to speak of
MARKS = ("Ġ", "▁")  # how byte-level BPE and SentencePiece write the space before a word
LAYOUT = ("Ċ", "ĉ", "č")  # how byte-level BPE writes newline, tab and carriage return: as letters


class Vocabulary:
    """Which ids of a tokenizer are numbers or whole words, and which may stand for each other.

    Args:
        tokenizer: a Hugging Face tokenizer that encodes special-token strings as text.

    ``shape`` int64 [V]: ids of the same shape above 0 are alike, numbers of as many digits or words in the same case.
    ``number`` bool [V]. ``alike`` shape -> its ids, ascending; ``rank`` int64 [V], the place of an id among them.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        # Sorted, because the vocabulary comes in another order in every process.
        tokens = sorted((index, token) for token, index in tokenizer.get_vocab().items())
        size = tokens[-1][0] + 1
        self.shape, self.rank = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64)
        self.number, self.goes_on = np.zeros(size, dtype=bool), np.zeros(size, dtype=bool)
        codes, alike = {}, {}
        for index, token in tokens:
            marked = token.startswith(MARKS)
            body = token[1:] if marked else token
            self.goes_on[index] = not marked and (body[:1].isalnum() or body[:1] == "_") and body[:1] not in LAYOUT
            if (shape := _shape(body, marked)) is not None:
                self.number[index] = body.isdigit()
                self.shape[index] = codes.setdefault(shape, len(codes) + 1)
                alike.setdefault(self.shape[index], []).append(index)
        self.alike = {shape: np.asarray(ids) for shape, ids in alike.items()}
        for ids in self.alike.values():
            self.rank[ids] = np.arange(len(ids))

    def facts(self, ids: np.ndarray) -> np.ndarray:
        """-> int64 [T]: the shape where a token is a number or a whole word, 0 elsewhere."""
        ends = np.append(~self.goes_on[ids[1:]], False)  # the text may go on behind its last token
        return np.where(self.number[ids] | ends, self.shape[ids], 0)


def _shape(body: str, marked: bool):
    if not body.isascii():
        return None
    if body.isdigit():
        return marked, len(body)
    if marked and len(body) >= LETTERS and body.isalpha():
        return "lower" if body.islower() else "upper" if body.isupper() else "title" if body.istitle() else None
    return None


def repeated(ids, rng, block: int, vocabulary=None, aligned: bool | None = None) -> np.ndarray:
    """Passages come back later, near distances as often as far ones on a log scale.

    Args:
        aligned: whole blocks that come back on the block grid, or passages of half a block to four blocks that come
            back at another offset to it; ``None`` draws one of the two for the whole document.
    """
    aligned = bool(rng.random() < 0.5) if aligned is None else aligned
    out = ids
    for _ in range(max(1, len(ids) // block // EVERY)):
        out = _come_back(out, rng, block, aligned or block == 1)
    return out


def _come_back(ids, rng, block, aligned):
    unit = block if aligned else 1
    total = len(ids) // unit
    shortest, longest = (1, LONGEST) if aligned else (max(2, block // 2), LONGEST * block)
    longest = min(longest, (total - 1) // 2)
    if longest < shortest:
        return ids
    count = int(rng.integers(shortest, longest + 1))
    first = int(rng.integers(1, total - 2 * count + 1))
    gap = int(np.exp(rng.uniform(0, np.log(total - first - 2 * count + 1)))) - 1
    if not aligned and (count + gap) % block == 0:
        count -= 1
    start, at = first * unit, (first + count + gap) * unit
    return np.concatenate([ids[:at], ids[start : start + count * unit], ids[at:]])[: len(ids)]


def noisy(ids, rng, block: int, vocabulary: Vocabulary) -> np.ndarray:
    """Some characters are replaced by others of the text, dropped, or swapped with the next; spaces stay.

    The text is decoded and encoded again; it takes more tokens then, and is cut.
    """
    tokenizer = vocabulary.tokenizer
    characters = list(tokenizer.decode(ids[1:].tolist(), clean_up_tokenization_spaces=False))
    places = np.asarray([i for i, character in enumerate(characters) if not character.isspace()], dtype=np.int64)
    count = int(np.ceil(len(places) * rng.uniform(*NOISE)))
    if not count:
        return ids
    chosen = np.sort(rng.choice(places, count, replace=False))
    what, other = rng.integers(3, size=count), rng.integers(len(places), size=count)
    alphabet = [characters[place] for place in places]
    for place, kind, letter in zip(chosen.tolist(), what.tolist(), other.tolist(), strict=True):
        if kind == 0:
            characters[place] = alphabet[letter]
        elif kind == 1:
            characters[place] = ""
        elif not "".join(characters[place + 1 : place + 2]).isspace():
            characters[place : place + 2] = characters[place : place + 2][::-1]
    encoded = tokenizer("".join(characters), add_special_tokens=False, verbose=False)["input_ids"]
    out = np.concatenate([ids[:1], np.asarray(encoded, dtype=np.int64)])[: len(ids)]
    return np.concatenate([out, ids[len(out) :]])  # dropped characters may have left it short


def renumbered(ids, rng, block: int, vocabulary: Vocabulary) -> np.ndarray:
    """In a passage of half the document every number becomes another random one of as many digits."""
    places = np.flatnonzero(vocabulary.number[ids])
    if len(places) < NUMBERS:
        return ids
    length = max(1, len(ids) // 2)
    start = int(rng.choice(places)) - int(rng.integers(length))
    places = places[(places >= start) & (places < start + length)]
    out = ids.copy()
    for shape in np.unique(vocabulary.shape[ids[places]]):
        alike = vocabulary.alike[shape]
        if len(alike) > 1:
            here = places[vocabulary.shape[ids[places]] == shape]
            step = rng.integers(1, len(alike), size=len(here))  # never back to itself
            out[here] = alike[(vocabulary.rank[ids[here]] + step) % len(alike)]
    return out


def near_identical(ids, rng, block: int, vocabulary: Vocabulary) -> np.ndarray:
    """Some blocks are followed by a copy in which exactly one fact differs; both are on the block grid.

    The fact is a number or a word, exchanged for another one of the same document. Blocks that have one are taken
    first; where there are too few of them, any token is exchanged.
    """
    whole = len(ids) // block
    pairs = max(1, whole // EVERY)
    room = whole - pairs - 1  # blocks 1..room still end within the document when copies have moved them
    if room < 1:
        return ids
    facts = vocabulary.facts(ids)
    order = 1 + rng.permutation(room)
    has_fact = facts[: whole * block].reshape(whole, block).any(axis=1)[order]
    chosen = np.concatenate([order[has_fact], order[~has_fact]])[:pairs]
    parts, done = [], 0
    for index in np.sort(chosen).tolist():
        end = (index + 1) * block
        place, token = _exchange(ids, facts, end - block, end, rng, vocabulary)
        if place is not None:
            copy = ids[end - block : end].copy()
            copy[place - end + block] = token
            parts += [ids[done:end], copy]
            done = end
    return np.concatenate([*parts, ids[done:]])[: len(ids)]


def _exchange(ids, facts, start, end, rng, vocabulary):
    """-> (place, id): a token of start..end-1 and another one of the document that may stand there; or None twice."""
    places = np.arange(start, end)
    number = vocabulary.number[ids[start:end]]
    fact = facts[start:end] > 0
    groups = [places[fact & number], places[fact & ~number]]
    for group in (*(groups if rng.random() < 0.5 else groups[::-1]), places):
        for place in rng.permutation(group):
            # Any token may stand for any other only where no fact does: the last group.
            alike = facts == facts[place] if group is not places else np.arange(len(ids)) > 0
            others = np.unique(ids[alike & (ids != ids[place])])
            if len(others):
                return int(place), int(rng.choice(others))
    return None, None


KINDS = (repeated, noisy, renumbered, near_identical)


def disturbed(ids, rng, block: int, vocabulary: Vocabulary, first: int | None = None) -> np.ndarray:
    """A document of one kind; the next kind where the text leaves no room for that one.

    Args:
        first: index in ``KINDS`` of the kind that is tried first; ``None`` draws it.

    Returns:
        int64 [T] that differs from ``ids``, or ``ids`` where no kind can change anything.
    """
    first = int(rng.integers(len(KINDS))) if first is None else first
    for turn in range(len(KINDS)):
        out = KINDS[(first + turn) % len(KINDS)](ids, rng, block, vocabulary)
        if not np.array_equal(out, ids):
            return out
    return ids
