"""Texts -> token ids, on all cores and in a memory that does not grow with the length of a text.

A library that encodes a text as a whole needs some 190 bytes for each of its bytes. So a long one is encoded in
overlapping pieces, and two neighbours are joined where both say the same of what is left and right of a place. A
tokenizer looks no further than a word or a few around, so the ids are those of the whole text.

Most byte-level tokenizers split a text at every space anyway, before they encode it: for those a word is encoded once.
"""

import json
import re
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from itertools import chain

import numpy as np

WHOLE = 2**16  # characters up to which a text is encoded as a whole
PIECE = 2**15  # characters of a piece of a longer one
MARGIN = 2**9  # characters that a piece sees beyond each of its ends
BATCH = 2**18  # characters that are encoded at a time
SLICE = 2**17  # characters that are cut into words at a time
KNOWN = 2**22  # characters of words whose ids are remembered
LINE = 2**12  # characters of new words that are encoded as one text
# Where texts are cut into words: in front of a space with something on both of its sides, of the last space in front of
# a letter, and of a sign or a new line behind a letter.
LETTER, SIGN = r" [A-Za-z_]", r"[!-&(-/:-@\[-^`{-~\n]"
WORD = re.compile(rf"(?<=\S)(?= \S)|(?<=\s)(?={LETTER})|(?<=[A-Za-z])(?={SIGN})")
BEHIND_ALL, BEHIND_A_LETTER = re.compile(LETTER), re.compile(rf" \S|{SIGN}")
ANY = " x"  # a word that may stand behind any other


class Encoder:
    """Encodes texts as ``tokenizer(text, add_special_tokens=False)`` does.

    Args:
        tokenizer: a Hugging Face tokenizer; one without a backend of the package ``tokenizers`` encodes text by text.
    """

    def __init__(self, tokenizer):
        self.tokenizer, self.backend = tokenizer, _plain_backend(tokenizer)
        self.size = 0  # characters of what is known
        self.known: dict[str, list[int]] | None = {} if self.backend and _splits_at_spaces(self.backend) else None

    def __call__(self, texts: list[str]) -> list[np.ndarray]:
        """-> ids of each text, int32 [t]."""
        if self.backend is None:
            plain = {"add_special_tokens": False, "verbose": False}
            return [np.asarray(self.tokenizer(text, **plain)["input_ids"], dtype=np.int32) for text in texts]
        if self.known is not None:
            return [self._by_words(text) for text in texts]
        found: list = [None] * len(texts)
        short = [index for index, text in enumerate(texts) if len(text) <= WHOLE]
        for indices in batches(short, lambda index: len(texts[index])):
            encoded = self.backend.encode_batch_fast([texts[index] for index in indices], add_special_tokens=False)
            for index, one in zip(indices, encoded, strict=True):
                found[index] = np.asarray(one.ids, dtype=np.int32)
        return [self._long(text) if ids is None else ids for text, ids in zip(texts, found, strict=True)]

    def _by_words(self, text: str) -> np.ndarray:
        """Words come back: each is encoded once, and remembered."""
        ids, start = array("i"), 0
        while start < len(text):
            border = WORD.search(text, start + SLICE)
            end = border.start() if border else len(text)
            if end - start > 2 * SLICE:  # without a space
                ids.extend(self._long(text[start:end]))
            else:
                words = WORD.split(text[start:end])
                self._learn(words)
                ids.extend(chain.from_iterable(map(self.known.__getitem__, words)))
            start = end
        return np.asarray(ids)

    def _learn(self, words: list[str]) -> None:
        """Encode those that are not known: many at a time, side by side as in a text, for a call takes long."""
        if self.size > KNOWN:
            self.known.clear()
            self.size = 0
        lines: list[list[str]] = [[]]
        room = LINE
        for word in dict.fromkeys(words):
            if word in self.known:
                continue
            fits = BEHIND_ALL.match(word) or BEHIND_A_LETTER.match(word)
            if room < 0 or not fits:
                lines.append([])
                room = LINE if fits else -1
            if fits and not BEHIND_ALL.match(word):
                lines[-1].append(ANY)
            lines[-1].append(word)
            room -= len(word)
        encoded = self.backend.encode_batch(["".join(line) for line in lines], add_special_tokens=False)
        for line, one in zip(lines, encoded, strict=True):
            piece, place = _Piece(0, one), 0
            for word in line:
                self.known[word] = piece.between(place, place + len(word))
                place += len(word)
            self.size += place

    def _long(self, text: str) -> np.ndarray:
        ids, place, left = array("i"), 0, None  # ``place``: the character up to which the ids are taken
        for start, begin, right in self._pieces(text):
            if left is not None:
                seam = _seam(left, right, start)
                if seam is None:  # one word that is longer than the overlap: cut it
                    seam = start
                    left = self._encoded(text, left.begin, start)
                    right = self._encoded(text, start, begin + PIECE + 2 * MARGIN)
                ids.extend(left.between(place, seam))
                place = seam
            left = right
        ids.extend(left.between(place, len(text) + 1))
        return np.asarray(ids)

    def _pieces(self, text: str) -> Iterator[tuple[int, int, "_Piece"]]:
        """(first character, the same with its margin, the encoded piece), in order."""
        for starts in batches(range(0, len(text), PIECE), lambda start: PIECE):
            begins = [max(0, start - MARGIN) for start in starts]
            parts = [text[begin : start + PIECE + MARGIN] for start, begin in zip(starts, begins, strict=True)]
            encoded = self.backend.encode_batch(parts, add_special_tokens=False)
            for start, begin, one in zip(starts, begins, encoded, strict=True):
                yield start, begin, _Piece(begin, one)

    def _encoded(self, text: str, begin: int, end: int) -> "_Piece":
        return _Piece(begin, self.backend.encode(text[begin:end], add_special_tokens=False))


class _Piece:
    """Ids of a piece, and the characters of the whole text at which they start."""

    def __init__(self, begin: int, encoded):
        self.begin, self.ids = begin, encoded.ids
        self.starts = [begin + first for first, _ in encoded.offsets]

    def between(self, first: int, last: int) -> list[int]:
        return self.ids[bisect_left(self.starts, first) : bisect_left(self.starts, last)]

    def borders(self, first: int, last: int) -> set[tuple[int, int, int, int]]:
        """Where a token ends and another one starts: the start and the id of both."""
        low, high = (bisect_left(self.starts, place) for place in (first, last))
        here = list(zip(self.starts[low:high], self.ids[low:high], strict=True))
        return {(*one, *two) for one, two in zip(here, here[1:], strict=False) if one[0] < two[0]}


def _seam(left: _Piece, right: _Piece, start: int) -> int | None:
    """The border nearest to ``start`` that both pieces have; ``None`` where they agree nowhere."""
    window = (start - MARGIN, start + MARGIN)
    common = left.borders(*window) & right.borders(*window)
    return min((border[2] for border in common), key=lambda place: (abs(place - start), place), default=None)


def batches(items: Iterable, size: Callable[[object], int], most: int = BATCH, count: int = 2**31) -> Iterator[list]:
    """Neighbours together: so many that their sizes are ``most`` in all, or one that has more; ``count`` at most."""
    batch, total = [], 0
    for item in items:
        if batch and (len(batch) == count or total + size(item) > most):
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += size(item)
    if batch:
        yield batch


CLASSES = ("a", "B", "(", '"', "é", "7", ".", "'", "s", "_", "\n", "\r", "\t", " ", "\xa0", "你", "🙂", "\u0301")


def _splits_at_spaces(backend) -> bool:
    """Whether the words of ``WORD`` can be encoded alone.

    They can where a text is split there before it is encoded, whatever is around, and where nothing else looks further:
    no normaliser, no token that somebody has added. That is tried with all kinds of characters on both sides.
    """
    rules = json.loads(backend.to_str())
    added = [token for token in rules["added_tokens"] if not (token["special"] and backend.encode_special_tokens)]
    if backend.normalizer is not None or backend.pre_tokenizer is None or added or rules["model"].get("dropout"):
        return False

    def split(text: str) -> list[str]:
        return [part for part, _ in backend.pre_tokenizer.pre_tokenize_str(text)]

    spaces = [one for one in CLASSES if one.isspace()]
    before = [one + two for one in CLASSES for two in CLASSES]
    before += [one + two for one in spaces for two in before if two.isspace()]
    text = "".join(
        f"x{one} {two}" for one in before for two in ("a", "7", ".", "'s", "é", "你", "🙂", "_1", "\u0301", '("', "),")
    )
    alone: dict[str, list[str]] = {}
    for word in WORD.split(text):
        alone.setdefault(word, split(word))
    return split(text) == [part for word in WORD.split(text) for part in alone[word]]


def _plain_backend(tokenizer):
    """A copy of the backend that neither cuts nor fills up, and takes a user's text for text."""
    from tokenizers import Tokenizer

    own = getattr(tokenizer, "backend_tokenizer", None)
    if own is None:
        return None
    backend = Tokenizer.from_str(own.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = bool(getattr(tokenizer, "split_special_tokens", False))
    return backend
