"""Texts -> token ids, on all cores and in a memory that does not grow with the length of a text.

A library that encodes a text as a whole needs some 190 bytes for each of its bytes. So a long one is encoded in
overlapping pieces, and two neighbours are joined where both say the same of what is left and right of a place. A
tokenizer looks no further than a word or a few around, so the ids are those of the whole text.

Most byte-level BPE tokenizers split a text at every space anyway, before they encode it. Those are given to
``tiktoken`` slice by slice, which does the same merges five to eight times faster; slices with characters that the two
libraries might split in other ways stay with ``tokenizers``.
"""

import json
import os
import re
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

import numpy as np

WHOLE = 2**16  # characters up to which a text is encoded as a whole
PIECE = 2**15  # characters of a piece of a longer one
MARGIN = 2**9  # characters that a piece sees beyond each of its ends
BATCH = 2**18  # characters that are encoded at a time
SLICE = 2**14  # characters of a slice for tiktoken
# Where texts are cut into slices: in front of a space with something on both of its sides, of the last space in front
# of a letter, and of a sign or a new line behind a letter.
LETTER, SIGN = r" [A-Za-z_]", r"[!-&(-/:-@\[-^`{-~\n]"
WORD = re.compile(rf"(?<=\S)(?= \S)|(?<=\s)(?={LETTER})|(?<=[A-Za-z])(?={SIGN})")


class Encoder:
    """Encodes texts as ``tokenizer(text, add_special_tokens=False)`` does.

    Args:
        tokenizer: a Hugging Face tokenizer; one without a backend of the package ``tokenizers`` encodes text by text.
    """

    def __init__(self, tokenizer):
        self.tokenizer, self.backend = tokenizer, _plain_backend(tokenizer)

    @cached_property
    def merges(self) -> "_Merges | None":
        """Made for the first text that is long: it takes half a second."""
        return _Merges.of(self.backend) if _splits_at_spaces(self.backend) else None

    def __call__(self, texts: list[str]) -> list[np.ndarray]:
        """-> ids of each text, int32 [t]."""
        if self.backend is None:
            plain = {"add_special_tokens": False, "verbose": False}
            return [np.asarray(self.tokenizer(text, **plain)["input_ids"], dtype=np.int32) for text in texts]
        if sum(map(len, texts)) > WHOLE and self.merges is not None:
            return self._by_slices(texts)
        found: list = [None] * len(texts)
        short = [index for index, text in enumerate(texts) if len(text) <= WHOLE]
        for indices in batches(short, lambda index: len(texts[index])):
            encoded = self.backend.encode_batch_fast([texts[index] for index in indices], add_special_tokens=False)
            for index, one in zip(indices, encoded, strict=True):
                found[index] = np.asarray(one.ids, dtype=np.int32)
        return [self._long(text) if ids is None else ids for text, ids in zip(texts, found, strict=True)]

    def _by_slices(self, texts: list[str]) -> list[np.ndarray]:
        slices, ends = [], []
        for text in texts:
            starts = [0]
            while border := WORD.search(text, starts[-1] + SLICE):
                starts.append(border.start())
            slices += [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]
            ends.append(len(slices))
        with ThreadPoolExecutor(_cores()) as pool:  # tiktoken leaves Python's lock while it works
            found = list(pool.map(self._slice, slices))
        return [np.concatenate(found[start:end]) for start, end in zip([0, *ends], ends, strict=False)]

    def _slice(self, text: str) -> np.ndarray:
        ids = self.merges(text) if len(text) <= 2 * SLICE else None
        return self._long(text) if ids is None else ids

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


GPT2 = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
# The same behind a split that makes each digit a word: white space in front of one ends there.
DIGITS = r"""\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"""
TRIED = 0x2100  # code points below it are tried in both libraries; what has others stays with tokenizers


class _Merges:
    """The merges of a byte-level BPE in ``tiktoken``, for text whose characters both libraries split alike.

    Both take the pair of neighbours that is first in rank. ``tokenizers`` knows ranks of pairs, ``tiktoken`` ranks of
    what a pair becomes. Those are the same where each token comes from one pair, and is what its own text is encoded
    as: a pair of neighbours that could become a token in another way than by its merge does not come up then.

    Args:
        pattern: what splits a text into words.
        ranks: bytes of a token -> its rank.
        ids: rank -> id of the token, int32.
    """

    def __init__(self, pattern: str, ranks: dict[bytes, int], ids: np.ndarray):
        import tiktoken

        self.ids, self.other = ids, re.compile(f"[{chr(TRIED)}-\U0010ffff]")
        self.encoding = tiktoken.Encoding("merges", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})

    def __call__(self, text: str) -> np.ndarray | None:
        """-> ids, int32; ``None`` where the text has something that is not known to be split alike."""
        return None if self.other.search(text) else self._encode(text)

    def _encode(self, text: str) -> np.ndarray:
        return self.ids[self.encoding.encode_to_numpy(text, disallowed_special=())]

    @classmethod
    def of(cls, backend) -> "_Merges | None":
        rules = json.loads(backend.to_str())
        model, pattern = rules["model"], _pattern(rules["pre_tokenizer"])
        unlike = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
        if pattern is None or model["type"] != "BPE" or any(model.get(name) for name in unlike):
            return None
        letters, vocab = _byte_letters(), model["vocab"]
        pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
        tokens = [*letters, *(one + two for one, two in pairs)]
        if len({*tokens}) < len(tokens):
            return None
        alone = _model_alone(rules).encode_batch_fast(tokens, add_special_tokens=False)
        ranks = {
            bytes(letters[letter] for letter in token): rank
            for rank, (token, found) in enumerate(zip(tokens, alone, strict=True))
            if rank < len(letters) or found.ids == [vocab[token]]  # what its own text does not become never comes up
        }
        merges = cls(pattern, ranks, np.array([vocab.get(token, -1) for token in tokens], dtype=np.int32))
        odd = map(re.escape, merges._encoded_otherwise(backend))
        merges.other = re.compile(merges.other.pattern.replace("[", "[" + "".join(odd), 1))
        return merges

    def _encoded_otherwise(self, backend) -> list[str]:
        """Bytes that the vocabulary lacks; and the libraries may have tables of characters of different age."""
        tried = [f"a{c}b {c}1{c}{c} {c}'s '{c} {c}\r\n{c}." for c in map(chr, range(TRIED))]
        found = backend.encode_batch_fast(tried, add_special_tokens=False)
        return [text[1] for text, one in zip(tried, found, strict=True) if self._encode(text).tolist() != one.ids]


def _pattern(rule: dict) -> str | None:
    """What a pre-tokenizer splits at, as one regular expression; ``None`` where it is none of the usual ones."""
    steps = rule["pretokenizers"] if rule["type"] == "Sequence" else [rule]
    *first, last = steps
    if last["type"] != "ByteLevel" or last["add_prefix_space"] or len(first) > 1:
        return None
    if not first:
        return GPT2 if last["use_regex"] else None
    if first[0]["type"] == "Digits":
        return DIGITS if first[0]["individual_digits"] and last["use_regex"] else None
    plain = first[0]["type"] == "Split" and first[0]["behavior"] == "Isolated" and not first[0]["invert"]
    return first[0]["pattern"].get("Regex") if plain and not last["use_regex"] else None


def _byte_letters() -> dict[str, int]:
    """How a byte-level vocabulary writes the 256 bytes: a letter for each, in the order of the bytes."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {letter: byte for byte, letter in sorted(bytes_to_unicode().items())}


def _model_alone(rules: dict):
    """The merges without anything around them."""
    from tokenizers import Tokenizer

    bare = {
        name: None for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding")
    }
    model = rules["model"] | {"ignore_merges": False}
    return Tokenizer.from_str(json.dumps(rules | bare | {"added_tokens": [], "model": model}))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
