"""Sources into their parts: what has changed is read, what fails is tried again, what cannot be read is noted."""

import json
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from megactx.framework import files
from megactx.framework.errors import verdict
from megactx.parts.models import Models

from .part import Part
from .sources import Folder

FIRST, MOST, TRIES = 1.0, 300.0, 5  # seconds before it is tried again, at most so many, and how often
BATCH = 2**21  # characters that are taken up at a time: what a kill loses


@dataclass
class Failure:
    """Of a document, or with the name ``""`` of a source.

    Attributes:
        mark: that the document had; another one is tried at once.
        dead: it is not tried again while it is as it is.
    """

    mark: str
    why: str
    tries: int = 1
    again: float = 0.0
    dead: bool = False


@dataclass
class Followed:
    """A source.

    Attributes:
        changed: when its part last changed, seconds since 1970.
        counts: what has been done with documents: ``added``, ``changed``, ``removed``, ``failed``.
    """

    name: str
    source: object
    part: Part
    failures: dict[str, Failure] = field(default_factory=dict)
    changed: float = 0.0
    counts: Counter = field(default_factory=Counter)


class Follower:
    """Keeps parts as their sources are.

    Args:
        memory: folder of the parts and of ``dead.json``.
        sources: name -> source.

    Raises:
        ValueError: a part is held by another process, damaged, or of other models.
    """

    def __init__(self, memory: Path, models: Models, sources: dict[str, object]):
        self.memory = memory
        self.followed: dict[str, Followed] = {}
        memory.mkdir(parents=True, exist_ok=True)
        try:
            for name, source in sources.items():
                self.followed[name] = Followed(name, source, Part(memory / name, models, _root(source)))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give the parts free."""
        for followed in self.followed.values():
            followed.part.close()

    def look(self, name: str) -> bool:
        """Bring one part up to date; -> whether it changed. What fails waits, and hinders nothing else."""
        followed, now, changed = self.followed[name], time.monotonic(), False
        if (failure := followed.failures.get("")) is not None and failure.again > now:
            return False
        try:
            marks = followed.source.marks()
            new, gone = self._differing(followed, marks, now)
            for batch in _batches(followed, marks, new, self._failed):
                self._take(followed, batch, set())
                changed = True
            if gone:
                self._take(followed, {}, gone)
                changed = True
            followed.failures.pop("", None)
            for document in [*followed.failures]:
                if document and document not in marks:
                    del followed.failures[document]
        except Exception as error:  # the folder is gone, the disk is full: all of the source is tried again
            self._failed(followed, "", "", error)
        self._write_dead()
        return changed

    def due(self) -> list[str]:
        """Sources with something to be tried again now."""
        now = time.monotonic()
        return [
            name
            for name, followed in self.followed.items()
            if any(not failure.dead and failure.again <= now for failure in followed.failures.values())
        ]

    def state(self) -> dict[str, dict]:
        """Numbers of each source, and what it fails of."""
        found = {}
        for name, followed in self.followed.items():
            failure = followed.failures.get("")
            found[name] = {
                "documents": len(followed.part.documents),
                "tokens": sum(document.tokens for document in followed.part.documents),
                "changed": followed.changed,
                "waiting": sum(not f.dead for n, f in [*followed.failures.items()] if n),
                "dead": sum(f.dead for n, f in [*followed.failures.items()] if n),
                "error": None if failure is None else failure.why,
                **{what: followed.counts[what] for what in ("added", "replaced", "removed", "failed")},
            }
        return found

    def _differing(self, followed: Followed, marks: dict[str, str], now: float) -> tuple[list[str], set[str]]:
        known, new = followed.part.marks, []
        for name, mark in marks.items():
            failure = followed.failures.get(name)
            waits = failure is not None and failure.mark == mark and (failure.dead or failure.again > now)
            if known.get(name) != mark and not waits:
                new.append(name)
        return new, set(known) - set(marks)

    def _take(self, followed: Followed, batch: dict[str, tuple[str, str]], gone: set[str]) -> None:
        known = followed.part.marks
        followed.part.change(batch, gone)
        for name in batch:
            followed.counts["replaced" if name in known else "added"] += 1
            followed.failures.pop(name, None)
        followed.counts["removed"] += len(gone)
        followed.changed = time.time()

    def _failed(self, followed: Followed, name: str, mark: str, error: Exception) -> None:
        """What is wrong with a text stays wrong; what the system refuses may be gone in a while."""
        before = followed.failures.get(name)
        tries = before.tries + 1 if before is not None and before.mark == mark else 1
        again = time.monotonic() + min(MOST, FIRST * 2 ** (tries - 1))
        dead = bool(name) and (isinstance(error, ValueError) or tries >= TRIES)
        followed.failures[name] = Failure(mark, verdict(error)[1], tries, again, dead)
        followed.counts["failed"] += 1
        print(f"megactx: {followed.name} {name}: {verdict(error)[1]}", file=sys.stderr, flush=True)

    def _write_dead(self) -> None:
        """What was left out, and why, for a person to look at."""
        dead = [
            {"source": followed.name, "document": name, "why": failure.why, "tries": failure.tries}
            for followed in self.followed.values()
            for name, failure in followed.failures.items()
            if failure.dead
        ]
        text, path = json.dumps(dead, indent=1) + "\n", self.memory / "dead.json"
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            try:
                files.write(path, text)
            except Exception as error:  # a full disk has been told of already
                print(f"megactx: {verdict(error)[1]}", file=sys.stderr, flush=True)


def _root(source: object) -> Path | None:
    """The folder of a source whose documents are files."""
    return source.watched if isinstance(source, Folder) else None


def _batches(followed: Followed, marks: dict[str, str], names: list[str], failed):
    """name -> (mark, text), so many at a time; what cannot be read is left out."""
    batch, size = {}, 0
    for name in names:
        try:
            text = followed.source.text(name)
        except Exception as error:
            failed(followed, name, marks[name], error)
            continue
        batch[name], size = (marks[name], text), size + len(text)
        if size >= BATCH:
            yield batch
            batch, size = {}, 0
    if batch:
        yield batch
