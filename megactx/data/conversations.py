"""Sources of conversations: rows of a file or of a hub's data set, each with the turns of a talk.

    {"messages": [{"role": "user", "content": "What is a gist?"}, {"role": "assistant", "content": "One vector."}]}

That is the layout of smoltalk and of most sets for chat. A source has ``fingerprint()`` and ``documents()``, dicts of
``messages`` and ``source``, and ``load()``, the same as a ``datasets.Dataset``.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from megactx.framework.config.types import Count

from .documents import Part
from .files import ROW_FORMATS, Files, ending, some
from .hub import Hub

log = logging.getLogger(__name__)

LAYOUT = 'a list of turns, each with "role" and "content" as text'


class Conversations:
    """What sources of conversations have in common: a subclass has ``fingerprint`` and ``documents``."""

    def parts(self) -> list[Part]:
        return [Part(self.fingerprint(), self.documents)]

    def load(self):
        """-> ``datasets.Dataset`` with ``messages``, a list of ``role`` and ``content``, and ``source``, in memory."""
        from datasets import Dataset, Features, List, Value

        turn = {"role": Value("string"), "content": Value("string")}
        features = Features({"messages": List(turn), "source": Value("string")})
        return Dataset.from_list(list(self.documents()), features=features)


class ConversationFiles(Conversations, Files):
    """Conversations of local files: rows of jsonl (ndjson) and parquet.

    Args:
        path: a file, a folder (searched recursively) or a glob.
        column: of a row, with its turns.

    Raises:
        ValueError: no such file, or, at ``documents``, a row that is no conversation; it names the file and the row.
    """

    def __init__(self, path: str | None, column: str = "messages"):
        if not path:
            raise ValueError("conversations.path is not set: give a file, a folder or a glob of jsonl or parquet")
        with _renamed():
            super().__init__(path, text_column=column)
            left = [path for path in self.paths if ending(path) not in ROW_FORMATS]
            self.paths = [path for path in self.paths if ending(path) in ROW_FORMATS]
        if not self.paths:
            raise ValueError(f"conversations.path={path}: there is no {', '.join(ROW_FORMATS)} file")
        if left:
            log.warning("conversations.path=%s: files without rows are left out: %s", path, some(left))

    def fingerprint(self) -> str:
        with _renamed():
            return super().fingerprint()

    def parts(self) -> list[Part]:
        return Files.parts(self)

    def documents(self) -> Iterator[dict]:
        return self._checked(self._in_order())

    def _checked(self, paths) -> Iterator[dict]:
        with _renamed():
            yield from super()._checked(paths)

    def _rows(self, path, rows: Iterable[dict]) -> Iterator[dict]:
        for number, row in enumerate(rows):
            turns = checked(row.get(self.text_column), f"data.path={path}: row {number} (from 0)", self.text_column)
            yield {"messages": turns, "source": f"{path.name}#{number}"}


class ConversationHub(Conversations, Hub):
    """Conversations of any data set that ``datasets.load_dataset`` takes without remote code.

    Args:
        name: the data set, ``owner/name``, or a local folder of data files.
        subset: the configuration of the data set, where it has several.
        split: the split of the data set that is read; ours comes after.
        column: of a row, with its turns.
        streaming: read rows as they come, instead of downloading everything first.
        max_conversations: reading stops after so many.
    """

    def __init__(
        self,
        name: str | None,
        subset: str | None = None,
        split: str = "train",
        column: str = "messages",
        streaming: bool = True,
        max_conversations: Count = 20000,
    ):
        with _renamed():
            super().__init__(
                name, subset, split, text_column=column, streaming=streaming, max_documents=max_conversations
            )

    def documents(self) -> Iterator[dict]:
        with _renamed():
            yield from super().documents()

    def _documents(self, rows, where: str) -> Iterator[dict]:
        for index, row in enumerate(rows):
            if index == self.max_documents:
                return
            turns = checked(row.get(self.text_column), f"{where}: row {index}", self.text_column)
            yield {"messages": turns, "source": f"{self.name}#{index}"}


class Together(Conversations):
    """Conversations of several sources.

    Args:
        sources: name -> source.
    """

    def __init__(self, sources: dict):
        self.sources = dict(sources)

    def fingerprint(self) -> str:
        return fingerprint_of(self.sources)

    def parts(self) -> list[Part]:
        return [part for source in self.sources.values() for part in source.parts()]

    def documents(self) -> Iterator[dict]:
        for part in self.parts():
            yield from part.documents()


def fingerprint_of(sources: dict) -> str:
    """Of several sources by name."""
    parts = [f"{name}={source.fingerprint()}" for name, source in sorted(sources.items())]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]


def checked(turns, where: str, column: str) -> list[dict]:
    """The turns of a row, with nothing else in them.

    Raises:
        ValueError: they are no conversation; it begins with ``where``.
    """
    what = f"{where}: conversations.column={column}"
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{what} holds {_shown(turns)}, wanted is {LAYOUT}")
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict) or not all(isinstance(turn.get(name), str) for name in ("role", "content")):
            raise ValueError(f"{what}, turn {number} (from 0) is {_shown(turn)}, wanted is {LAYOUT}")
        try:
            turn["content"].encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{what}, turn {number} (from 0) has half of a surrogate pair, which is no text"
            ) from error
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def _shown(value) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:60]}..."


@contextmanager
def _renamed():
    """Errors of a source of texts, with the names that the settings have here."""
    names = {"text_column": "column", "max_documents": "max_conversations"}
    try:
        yield
    except ValueError as error:
        text = str(error)
        for old, new in names.items():
            text = text.replace(f"data.{old}", f"conversations.{new}")
        raise ValueError(text.replace("data.", "conversations.")) from error
