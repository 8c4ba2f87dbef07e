"""Tokens as text, piece by piece: whole characters, stop strings, and nothing that a terminal would obey."""

import codecs
import re
from collections.abc import Iterable, Iterator, Sequence

PRIVATE = 0xF0000  # the first of the characters that Unicode gives no meaning
LONGEST = 16  # ids that are decoded together at most, where none of them makes a whole character
LEAST = 4  # ids that hold all bytes of a character, which are at most four
# Escape sequences that colour, move or rename; then every control character but tab and newline, and those that turn
# the direction of writing, with which a text can look like another one.
SEQUENCES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\|$)|[ -/]*[0-~])")
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


class Characters:
    """Ids -> text, exactly as ``decode`` gives it for all of them; a part of a character is kept until it is whole.

    A tokenizer with byte fallback (Llama, Mistral, Gemma) writes rare characters as ids of one byte each, and decodes a
    run of such ids as a whole: one wrong byte makes each of them a replacement sign. What was told of a run before its
    wrong byte came is not taken back.

    Args:
        tokenizer: of the base LM.
        before: what stands before the first id that is told, as many ids of it as are at hand; ``()``: nothing does.
    """

    def __init__(self, tokenizer, before: Sequence[int] = ()):
        self.tokenizer = tokenizer
        self.silent = frozenset(special_tokens(tokenizer))
        self.values = _byte_values(tokenizer)
        self.context: list[int] = []  # told ids that the next ones are decoded behind: some write a space between two
        self.ids: list[int] = []  # behind them, a part of which may be told
        self.told = 0  # characters of the text of ``context`` and ``ids``
        self.bytes = b""  # of a run of single bytes, not yet told
        self.broken = False  # that run holds a wrong byte
        before = [token for token in before if token not in self.silent][-LONGEST:]
        while len(before) > 1 and 0x80 <= self.values.get(before[0], 0) < 0xC0:  # the middle of a character
            before = before[1:]
        for token in before:
            self.push(token)

    def push(self, token: int) -> str:
        """-> what is certain now; it may be nothing."""
        if token in self.silent:
            return ""
        if token in self.values:
            return self._byte(token)
        begun, self.broken = self._broken(), False
        self.ids.append(token)
        return begun + self._certain(waiting=True)

    def end(self) -> str:
        """-> what was kept back."""
        return self._broken() + self._certain(waiting=False)

    def _byte(self, token: int) -> str:
        self.bytes += bytes([self.values[token]])
        if self.broken:
            return self._broken()
        self.ids.append(token)
        try:
            whole = bool(codecs.getincrementaldecoder("utf-8")().decode(self.bytes))
        except UnicodeDecodeError:
            self.broken = True
            return self._broken()
        if not whole:
            return ""
        self.bytes = b""
        return self._certain(waiting=False)

    def _broken(self) -> str:
        """What is left of a run of bytes that makes no character: a replacement sign for each."""
        if not self.bytes:
            return ""
        count, self.bytes = len(self.bytes), b""
        self.ids = []
        return "\ufffd" * count

    def _certain(self, waiting: bool) -> str:
        text = decode(self.tokenizer, [*self.context, *self.ids])
        # Of bytes that are no character yet the last one is the only sign that more bytes may change.
        unsure = waiting and text.endswith("\ufffd")
        new, self.told = text[self.told : len(text) - unsure], max(self.told, len(text) - unsure)
        if not unsure or len(self.ids) >= LONGEST:
            self._forget(unsure)
        return new

    def _forget(self, unsure: bool) -> None:
        """Decode what comes behind the newest ids only. An id that has no text alone needs those before it."""
        rest = self.ids[-LEAST:] if unsure else self.ids
        if text := decode(self.tokenizer, rest):
            self.context, self.told = rest, len(text) - unsure
        else:
            self.context = [*self.context, *rest][-LONGEST:]
            self.told = len(decode(self.tokenizer, self.context))
        self.ids = []


def decode(tokenizer, ids: Iterable[int]) -> str:
    """Ids -> text without special tokens, and no space of it is taken away."""
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def text_of(tokenizer, ids: Sequence[int], before: Sequence[int] = ()) -> str:
    """Text of ids as it stands behind others, the newest of ``before``: with the space between them that both make."""
    silent = special_tokens(tokenizer)
    before = [token for token in before if token not in silent]
    for size in range(1, min(LEAST, len(before)) + 1):
        known = decode(tokenizer, before[-size:])
        text = decode(tokenizer, [*before[-size:], *ids])
        begins = size == len(before)  # an id that is a space alone has no text there
        if (known or begins) and "\ufffd" not in known and text.startswith(known):  # no part of a character
            return text[len(known) :]
    return decode(tokenizer, ids)


def filling(tokenizer) -> int:
    """The id of a line's end: what stands behind a text so that it is whole blocks."""
    return tokenizer("\n", add_special_tokens=False)["input_ids"][-1]


def special_tokens(tokenizer) -> dict[int, str]:
    """The special tokens of a tokenizer, id -> string."""
    named = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    return named | {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def _byte_values(tokenizer) -> dict[int, int]:
    """Ids of a single byte each, as tokenizers with byte fallback have them -> the byte."""
    known = {f"<0x{value:02X}>": value for value in range(256)}
    ids = {i: value for name, value in known.items() if (i := tokenizer.convert_tokens_to_ids(name)) is not None}
    ids = {i: value for i, value in ids.items() if tokenizer.convert_ids_to_tokens(i) in known}  # not the unknown token
    letter = next((i for i, value in ids.items() if value == ord("A")), None)
    return ids if letter is not None and decode(tokenizer, [letter]) == "A" else {}


class StopStrings:
    """Text up to the first of some strings; what may become one of them is kept back.

    Args:
        strings: none of them empty.

    Raises:
        ValueError: an empty one, which would stop everything at once.
    """

    def __init__(self, strings: Iterable[str]):
        self.strings, self.kept, self.found = list(strings), "", None
        if "" in self.strings:
            raise ValueError("stop='' is not allowed: a stop string has at least one character")

    def push(self, text: str) -> str:
        """-> what comes before a stop string for certain. ``found`` names the one that was met."""
        self.kept += text
        places = [(self.kept.find(string), string) for string in self.strings if string in self.kept]
        if places:
            place, self.found = min(places)
            out, self.kept = self.kept[:place], ""
            return out
        longest = max((len(string) for string in self.strings), default=1) - 1
        for size in range(min(longest, len(self.kept)), 0, -1):
            if any(string.startswith(self.kept[-size:]) for string in self.strings):
                out, self.kept = self.kept[:-size], self.kept[-size:]
                return out
        out, self.kept = self.kept, ""
        return out


class Answer:
    """What is told of an answer while it is decoded, and when it is over.

    Args:
        tokenizer: of the base LM.
        ends: ids with which the model ends an answer.
        stop: strings that end it; a special token in one is met as the token, though it is never told.
        before: the newest ids of the history, at least ``LONGEST`` of them where there are so many.
    """

    def __init__(self, tokenizer, ends: frozenset[int], stop: Iterable[str] = (), before: Sequence[int] = ()):
        stop = list(stop)
        special = {i: text for i, text in special_tokens(tokenizer).items() if any(text in string for string in stop)}
        # A special token in a stop string is one sign of its own, which no text has.
        self.signs = {i: chr(PRIVATE + n) for n, i in enumerate(sorted(special))}
        self.names = {string: string for string in stop}
        for name in stop:
            string = name
            for i in sorted(special, key=lambda i: len(special[i]), reverse=True):
                string = string.replace(special[i], self.signs[i])
            self.names[string] = name
        self.characters, self.strings = Characters(tokenizer, before), StopStrings(self.names)
        self.ends = ends
        self.stopped: str | None = None  # ``end``, or the stop string

    def push(self, token: int) -> str:
        """-> what can be told now."""
        text = self._without_signs(self.strings.push(self.characters.push(token) + self.signs.get(token, "")))
        found = self.strings.found
        self.stopped = self.names[found] if found else ("end" if token in self.ends else None)
        return text

    def rest(self) -> str:
        """-> what was kept back, when no more tokens come."""
        if self.strings.found:
            return ""
        text = self.strings.push(self.characters.end())
        return self._without_signs(text + ("" if self.strings.found else self.strings.kept))

    def _without_signs(self, text: str) -> str:
        return text.translate({ord(sign): None for sign in self.signs.values()})


def printable(text: str) -> str:
    """Text without anything that a terminal would obey."""
    return CONTROLS.sub("", SEQUENCES.sub("", text))


def parts_of(text: str, size: int) -> Iterator[str]:
    """A text in parts of at most ``size`` characters, cut behind a line where there is one."""
    start = 0
    while start < len(text):
        end = min(start + size, len(text))
        if end < len(text) and (line := text.rfind("\n", start, end)) > start:
            end = line + 1
        yield text[start:end]
        start = end


def encodable(text: str) -> str:
    """The text itself.

    Raises:
        ValueError: it holds half characters (lone surrogates), which no UTF-8 text does.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"text: not valid Unicode ({error.reason} at character {error.start})") from error
    return text


def from_bytes(raw: bytes, name: str) -> str:
    """UTF-8 bytes as text.

    Raises:
        ValueError: they are not UTF-8, or hold NUL bytes, as binary files do; ``name`` says whose.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    if "\0" in text:
        raise ValueError(f"{name}: binary, not text (a NUL byte at character {text.index(chr(0))})")
    return text
