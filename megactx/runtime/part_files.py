"""Parts of a session's window: where they lie, which version of them is read, and what every token of them is from.

    NAME=PATH[:SHARE]     a session's folder, a part of ``apps.follow``, a preset, a tree, or the URL of a published one

A part is opened where it lies, to be read only: nothing is copied, no lock is held, and only the pages that a window
touches are read. Its *version* names the database and how often it was saved. ``newer`` looks at the folder, which
costs microseconds, so a session does it at every refocus; a server is asked every ``EVERY`` seconds.
"""

import json
import math
import re
import time
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch

from megactx.framework.errors import RunFailed
from megactx.memory import MegaContextTree, storage
from megactx.memory.published import PublishedPages, place_of
from megactx.parts.models import Models

from .text import LONGEST, printable, text_of

SESSION, TREE, PRESET, PACKAGE = "session.json", "tree", "preset.json", "package.json"
OLDER, GONE = "as it was before", "deleted"  # of a file that was read again behind what is there, or is no more
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
SHARE = re.compile(r"[0-9]*\.?[0-9]+")
EVERY = 30.0  # seconds between two questions to a server whether something new was published


@dataclass(frozen=True)
class Wanted:
    """A part that a session is to read.

    Args:
        name: of up to 64 letters, digits, - and _.
        path: its folder, or a URL.
        share: of the budget; ``None``: an equal part of what the others leave of half.
        pinned: the only version that is read; ``None``: the newest.

    Raises:
        ValueError: a name or a share that is not allowed.
    """

    name: str
    path: Path | str
    share: float | None = None
    pinned: str | None = None

    def __post_init__(self):
        if not isinstance(self.name, str) or not NAME.fullmatch(self.name):
            raise ValueError(f"part={self.name!r} is not allowed: a name has up to 64 letters, digits, - and _")
        if self.share is not None and not (math.isfinite(self.share) and 0 < self.share <= 0.5):
            raise ValueError(f"part {self.name}: share={self.share:g} is not allowed: above 0, at most 0.5")
        place = place_of(self.path)
        object.__setattr__(self, "path", place.expanduser().absolute() if isinstance(place, Path) else place)

    @classmethod
    def parse(cls, text: str) -> "Wanted":
        """``NAME=PATH[:SHARE]``, as a command line has it."""
        name, equals, path = text.partition("=")
        front, colon, last = path.rpartition(":")
        share = None
        if colon and SHARE.fullmatch(last) and not re.fullmatch(r"\w+://[^/]*", front):  # of a URL that is a port
            path, share = front, float(last)
        if not equals or not path:
            raise ValueError(f"part={text!r} is not allowed: NAME=PATH or NAME=PATH:SHARE")
        return cls(name, path, share)

    def as_dict(self) -> dict:
        """For a file."""
        return {"name": self.name, "path": str(self.path), "share": self.share, "pinned": self.pinned}


class Origin(NamedTuple):
    """What a token is from."""

    file: str  # or what the source calls its documents
    line: int  # from 1, of the text that was read
    time: float  # when it was taken up, seconds since 1970; 0: nobody knows
    state: str = ""  # ``OLDER`` or ``GONE``: it is not so any more

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" + (f" ({self.state})" if self.state else "")


class OpenPart:
    """A part that is open.

    Args:
        wanted: which one.
        models: base LM and GistNet that read it.
        keys: whether its blocks are searched by keys.

    Attributes:
        tree: read only.
        version: of what is read.
        closed: its gists stay closed: it is a preset.
        licence: of its text, as its folder says; empty where it says none.
        note: why a newer version is not read; empty where there is none.

    Raises:
        ValueError: there is no tree, a damaged one, or one of other models; or its version is not the pinned one.
    """

    def __init__(self, wanted: Wanted, models: Models, keys: bool = False):
        self.wanted, self.models, self.keys, self.note = wanted, models, keys, ""
        self.folder = folder_of(wanted.path)
        try:
            seen = self._look()
            device = models.base.model.device
            self.tree = MegaContextTree.load(
                self.folder,
                models.gistnet,
                models.base,
                device=device,
                keys=models.keys if keys else None,
                read_only=True,
            )
        except (ValueError, OSError) as error:
            raise ValueError(f"part {wanted.name}: {error}") from error
        self._asked = time.monotonic()
        if self.tree.rows != 1:
            raise ValueError(f"part {wanted.name}: {wanted.path} has {self.tree.rows} rows, a part has 1")
        self.version = _version(self.folder, self.tree)
        if wanted.pinned not in (None, self.version):
            self.close()
            raise ValueError(
                f"part {wanted.name}: {wanted.path} has version {self.version} now, and {wanted.pinned} is pinned;"
                " drop the part or name it again"
            )
        self._seen = (*seen[:2], *self._look()[2:])
        notes = self._notes()
        self.closed, self.licence = notes["closed"], notes["licence"]
        self.origins = Origins(notes["spans"], self.tree.block_size)

    @property
    def name(self) -> str:
        return self.wanted.name

    def newer(self) -> "OpenPart":
        """The same part as its folder has it now: another object where that has changed, else this one. What cannot be
        opened is told by ``note``, and this version is read on."""
        if self.wanted.pinned is not None:
            return self
        if isinstance(self.folder, str):
            if time.monotonic() - self._asked < EVERY:
                return self
            self._asked = time.monotonic()
        try:
            seen = self._look()
            if seen == self._seen:
                return self
            self._seen = seen  # what cannot be opened is tried again when it changes
            found = OpenPart(self.wanted, self.models, self.keys)
        except (ValueError, OSError, RunFailed) as error:
            self.note = str(error)
            return self
        self.note = ""
        if found.version == self.version:
            found.close()
            return self
        return found

    def with_wanted(self, wanted: Wanted) -> "OpenPart":
        """The same tree under other terms."""
        other = OpenPart.__new__(OpenPart)
        other.__dict__.update(self.__dict__ | {"wanted": wanted})
        return other

    def pin(self) -> "OpenPart":
        """The same part, of which no newer version is read."""
        return self.with_wanted(replace(self.wanted, pinned=self.version))

    def origin(self, token: int, count: int = 1) -> Origin | None:
        """What the first of so many tokens is from of which it is noted; ``None``: of none."""
        return self.origins.of(token, self.text, count)

    def text(self, start: int, stop: int) -> str:
        """Tokens start .. stop - 1 as text, special tokens left out.

        Raises:
            ValueError: some of them were taken away, or cannot be read.
        """
        at = torch.arange(start, stop, device=self.tree.device)
        if self.tree.compacted and (self.tree.floors(torch.zeros_like(at), torch.zeros_like(at), at) > 0).any():
            raise ValueError(f"part {self.name}: of tokens {start} to {stop - 1} some were taken away")
        first = max(0, start - LONGEST)
        ids = self.tree.levels[0].span("token", first, stop)[0].tolist()
        return text_of(self.models.base.tokenizer, ids[start - first :], ids[: start - first])

    def close(self) -> None:
        """Give its file free."""
        if self.tree.cache is not None:
            self.tree.cache.close()
            self.tree.cache.file.close()

    def _look(self) -> tuple:
        """What changes when somebody saves there, or publishes."""
        tree = getattr(self, "tree", None)
        if isinstance(self.folder, str):
            return () if tree is None else (None, None, tree.cache.file.manifest()["data"])
        manifest = (self.folder / storage.MANIFEST).stat()
        state = [manifest.st_mtime_ns, manifest.st_ino]
        # Of a database that is open a counter says whether others have written; a new one has a new manifest.
        return (*state, tree.cache.file.changes() if tree is not None and tree.cache is not None else None)

    def _notes(self) -> dict:
        """What is said of it beside its pages; a part without its notes is a part still."""
        file = getattr(self.tree.cache, "file", None)
        if not isinstance(file, PublishedPages):
            return noted(self.wanted.path, int(self.tree.lengths[0]))
        try:
            found, stop = file.notes(), int(self.tree.lengths[0])
            spans = [Span.of(row) for row in found.get("spans", [])]  # who published it may be a stranger
            if all(0 <= span.first < span.stop <= stop for span in spans):
                licence = _one_line(found.get("licence", ""))
                return {"closed": bool(found.get("closed")), "licence": licence, "spans": spans}
        except (ValueError, TypeError, AttributeError, RunFailed):
            pass
        return {"closed": False, "licence": "", "spans": []}


class Span(NamedTuple):
    """Tokens first .. stop - 1, which are from one file."""

    first: int
    stop: int
    file: str
    time: float
    lines: list[int] | int  # in which each block begins, or of the first token
    state: str = ""

    @classmethod
    def of(cls, row: list) -> "Span":
        """What was read from a file.

        Raises:
            TypeError, ValueError: it is damaged.
        """
        first, stop, file, when, lines, state = row
        lines = [int(line) for line in lines] if isinstance(lines, list) else int(lines)
        return cls(int(first), int(stop), str(file), float(when), lines, str(state))


class Origins:
    """Which tokens are from which file.

    Args:
        spans: in ascending order.
        block: tokens of a block.
    """

    def __init__(self, spans: list[Span], block: int):
        self.spans, self.block = spans, block
        self.firsts = [span.first for span in spans]
        self._counted: dict[int, list[int]] = {}  # of a span, ends of lines before each of its blocks

    def of(self, token: int, text, count: int = 1) -> Origin | None:
        """What the first of ``count`` tokens is from of which it is noted; ``None``: of none.

        Args:
            text: (first token, end) -> the text between: lines are counted in it.
        """
        place = bisect_right(self.firsts, token) - 1
        if place < 0 or token >= self.spans[place].stop:  # between two files
            place, stop = place + 1, token + count
            if place == len(self.firsts) or self.firsts[place] >= stop:
                return None
            token = self.firsts[place]
        span, lines = self.spans[place], self.spans[place].lines
        if isinstance(lines, list):
            line = lines[min((token - span.first) // self.block, len(lines) - 1)]
        else:
            line = lines + self._newlines(place, token, text)
        return Origin(span.file, line, span.time, span.state)

    def _newlines(self, place: int, token: int, text) -> int:
        """Ends of lines in a span before a token; those of whole blocks are counted once."""
        first, stop = self.spans[place][:2]
        if place not in self._counted:
            blocks = range(first, stop, self.block)
            counts = [_newlines(text, at, min(at + self.block, stop)) for at in blocks]
            self._counted[place] = [0, *accumulate(counts)]
        number = (token - first) // self.block
        begun = first + number * self.block
        return self._counted[place][number] + (_newlines(text, begun, token) if token > begun else 0)


def _newlines(text, start: int, stop: int) -> int:
    """Ends of lines in tokens start .. stop - 1; none where these were taken away."""
    try:
        return text(start, stop).count("\n")
    except ValueError:
        return 0


def ingested(about: dict) -> list[Span]:
    """What ``apps.ingest`` has noted in a session; sessions of earlier days note nothing.

    Raises:
        TypeError, ValueError, KeyError, AttributeError: it is damaged.
    """
    found = [
        Span(
            int(first), int(stop), name, float(time), int(line), OLDER if kind == "older" else GONE * ("gone" in known)
        )
        for name, known in about.get("ingested", {}).items()
        for kind in ("spans", "older")
        for first, stop, line, time in known.get(kind, [])
    ]
    return sorted(found)


class Conflict(NamedTuple):
    """Parts that have the same file.

    Args:
        file: its path.
        winner: name of the part whose blocks may be opened: a pinned one, else the one that took the file up last.
        others: names of the parts whose blocks of it stay closed.
    """

    file: str
    winner: str
    others: tuple[str, ...]


def conflicts(parts: Iterable[OpenPart]) -> list[Conflict]:
    """Files that more than one part has."""
    having: dict[str, dict[OpenPart, float]] = {}
    for part in parts:
        for span in part.origins.spans:
            if not span.state:
                own = having.setdefault(span.file, {})
                own[part] = max(own.get(part, 0.0), span.time)
    out = []
    for file, times in having.items():
        if len(times) > 1:
            first, *others = sorted(times, key=lambda p: (p.wanted.pinned is not None, times[p]), reverse=True)
            out.append(Conflict(file, first.name, tuple(part.name for part in others)))
    return out


def overruled(parts: Iterable[OpenPart]) -> dict[str, tuple[tuple[int, int], ...]]:
    """Of each part the spans of tokens that stay closed: another has them newer, or they are not so any more."""
    parts = [*parts]
    lost = {(name, conflict.file) for conflict in conflicts(parts) for name in conflict.others}
    out = {}
    for part in parts:
        spans: list[list[int]] = []
        for span in part.origins.spans:
            if not (span.state or (part.name, span.file) in lost):
                continue
            if spans and spans[-1][1] == span.first:
                spans[-1][1] = span.stop
            else:
                spans.append([span.first, span.stop])
        out[part.name] = tuple(map(tuple, spans))
    return out


def folder_of(path: Path | str) -> Path | str:
    """Where the tree of a part lies."""
    if isinstance(path, str):
        return path
    return path / TREE if (path / SESSION).is_file() or (path / PRESET).is_file() else path


def _version(folder: Path | str, tree: MegaContextTree) -> str:
    if tree.cache is not None and isinstance(tree.cache.file, PublishedPages):
        return tree.cache.file.data
    if tree.home is None:  # shards, as earlier versions wrote them
        return str(storage.read_manifest(folder).get("data", "shards"))
    file, commit = tree.home
    return f"{file.path.stem.removeprefix('pages-')}-{commit}"


def noted(path: Path, tokens: int) -> dict:
    """What is noted beside a part by a session, a preset, a package, or ``apps.follow``, as plain JSON: ``closed``,
    whether its gists stay closed, ``licence``, empty where none is known, and ``spans`` of its tokens."""
    return {"closed": (path / PRESET).is_file(), "licence": _licence(path), "spans": _spans(path, tokens)}


def _licence(path: Path) -> str:
    """What a session, a preset, a package or the table of a followed source says of its text."""
    for name in (path / SESSION, path / PRESET, path / PACKAGE, path.with_name(f"{path.name}.json")):
        try:
            said = json.loads(name.read_text(encoding="utf-8"))
            said = said["about"] if name.name == SESSION else said
            if isinstance(licence := said.get("licence"), str) and licence.strip():
                return _one_line(licence)[:200]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass  # a part without its notes is a part still
    return ""


def _spans(path: Path, tokens: int) -> list[Span]:
    folder = folder_of(path)
    try:
        if (path / SESSION).is_file():
            about = json.loads((path / SESSION).read_text(encoding="utf-8"))["about"]
            return [span for span in ingested(about) if span.stop <= tokens]
        if (path / PRESET).is_file():
            about = json.loads((path / PRESET).read_text(encoding="utf-8"))
            return [Span(0, tokens, str(about["file"]), float(about["time"]), 1)]
        if card := _card(path):
            ends = [(source["start"], source["start"] + source["tokens"], source["name"]) for source in card["sources"]]
            return [Span(a, b, _one_line(name), 0.0, 1) for a, b, name in ends if a < b <= tokens]
        for name in (f"{folder.name}.json", f"{folder.name}.next.json"):  # between a tree's save and its table's
            if not (table := folder.with_name(name)).is_file():
                continue
            said, spans, first = json.loads(table.read_text(encoding="utf-8")), [], 0
            for document in said["documents"]:
                stop, file = first + document["tokens"], document["name"]
                file = str(Path(said["root"]) / file) if said.get("root") else file
                spans.append(Span(first, stop, file, document["at"], document["lines"]))
                first = stop
            if spans and first == tokens:
                return spans
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # a part without its notes is a part still
    return []


def _card(path: Path) -> dict:
    """Of a package, as it was checked when it was installed; empty of any other folder."""
    try:
        found = json.loads((path / PACKAGE).read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def _one_line(text: str) -> str:
    """Of a stranger: it stays within its line."""
    return " ".join(printable(str(text)).split())
