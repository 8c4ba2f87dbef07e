"""Tokens as text, piece by piece: whole characters, stop strings, and nothing that a terminal would obey."""

import re
from collections.abc import Iterable

LONGEST = 8  # tokens that may be waited for until they make a whole character
# Escape sequences that colour, move or rename; then every control character but tab and newline, and those that turn
# the direction of writing, with which a text can look like another one.
SEQUENCES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\|$)|[ -/]*[0-~])")
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


class Characters:
    """Ids -> text. An id may be a part of a character: it is kept until the character is whole."""

    def __init__(self, tokenizer):
        self.tokenizer, self.ids, self.told = tokenizer, [], ""

    def push(self, token: int) -> str:
        """-> what is certain now; it may be nothing."""
        self.ids.append(token)
        return self._told(waiting=len(self.ids) < LONGEST)

    def end(self) -> str:
        """-> what was kept back."""
        return self._told(waiting=False)

    def _told(self, waiting: bool) -> str:
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if waiting and text.endswith("\ufffd"):
            return ""
        new = text[len(self.told) :]
        # The last id stays as what comes before the next: some tokenizers write a word's space only between two ids.
        self.ids = self.ids[-1:]
        self.told = self.tokenizer.decode(self.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return new


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
        stop: strings that end it.
    """

    def __init__(self, tokenizer, ends: frozenset[int], stop: Iterable[str] = ()):
        self.characters, self.strings, self.ends = Characters(tokenizer), StopStrings(stop), ends
        self.stopped: str | None = None  # ``end``, or the stop string

    def push(self, token: int) -> str:
        """-> what can be told now."""
        text = self.strings.push(self.characters.push(token))
        self.stopped = self.strings.found or ("end" if token in self.ends else None)
        return text

    def rest(self) -> str:
        """-> what was kept back, when no more tokens come."""
        if self.strings.found:
            return ""
        text = self.strings.push(self.characters.end())
        return text + ("" if self.strings.found else self.strings.kept)


def printable(text: str) -> str:
    """Text without anything that a terminal would obey."""
    return CONTROLS.sub("", SEQUENCES.sub("", text))


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
