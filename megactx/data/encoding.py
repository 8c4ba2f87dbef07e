"""Texts -> token ids, on all cores and in a memory that does not grow with the length of a text.

A library that encodes a text as a whole needs some 190 bytes for each of its bytes. So a long one is encoded in
overlapping pieces, and two neighbours are joined where both say the same of what is left and right of a place. A
tokenizer looks no further than a word or a few around, so the ids are those of the whole text.
"""

from array import array
from bisect import bisect_left
from collections.abc import Iterator

import numpy as np

WHOLE = 2**16  # characters up to which a text is encoded as a whole
PIECE = 2**15  # characters of a piece of a longer one
MARGIN = 2**9  # characters that a piece sees beyond each of its ends
BATCH = 2**18  # characters that are encoded at a time


class Encoder:
    """Encodes texts as ``tokenizer(text, add_special_tokens=False)`` does.

    Args:
        tokenizer: a Hugging Face tokenizer; one without a backend of the package ``tokenizers`` encodes text by text.
    """

    def __init__(self, tokenizer):
        self.tokenizer, self.backend = tokenizer, _plain_backend(tokenizer)

    def __call__(self, texts: list[str]) -> list[np.ndarray]:
        """-> ids of each text, int32 [t]."""
        if self.backend is None:
            return [
                np.asarray(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int32)
                for text in texts
            ]
        found: list = [None] * len(texts)
        short = [index for index, text in enumerate(texts) if len(text) <= WHOLE]
        for indices in _batches(short, lambda index: len(texts[index])):
            encoded = self.backend.encode_batch_fast([texts[index] for index in indices], add_special_tokens=False)
            for index, one in zip(indices, encoded, strict=True):
                found[index] = np.asarray(one.ids, dtype=np.int32)
        return [self._long(text) if ids is None else ids for text, ids in zip(texts, found, strict=True)]

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
        for starts in _batches(range(0, len(text), PIECE), lambda start: PIECE):
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


def _batches(items, size) -> Iterator[list]:
    batch, total = [], 0
    for item in items:
        if batch and total + size(item) > BATCH:
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += size(item)
    if batch:
        yield batch


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
