"""Documents of a data set on a hub, or of a local folder in the same layout, read as a stream."""

import hashlib
import json
from pathlib import Path

from .files import NARRATIVE, check_domain

DROP, JOIN = "drop", "join"


class Hub:
    """Documents of any data set that ``datasets.load_dataset`` takes without remote code.

    Args:
        name: the data set, ``owner/name``, or a local folder of data files.
        subset: the configuration of the data set, where it has several.
        split: the split of the data set that is read; ours, by document, comes after.
        text_column: the column that holds the text.
        domain: the domain of every document.
        streaming: read rows as they come, instead of downloading everything first.
        max_documents: reading stops after so many documents.
        min_characters: shorter rows are short; most of Wikipedia is.
        short_rows: ``drop`` short rows, or ``join`` neighbours until they are long enough.
    """

    def __init__(
        self,
        name: str,
        subset: str | None = None,
        split: str = "train",
        text_column: str = "text",
        domain: str = NARRATIVE,
        streaming: bool = True,
        max_documents: int = 2000,
        min_characters: int = 0,
        short_rows: str = DROP,
    ):
        if not name:
            raise ValueError("data.name is not set: give the name of a data set, or a local folder")
        if max_documents < 1:
            raise ValueError(f"data.max_documents={max_documents} is not allowed: it must be 1 or more")
        if short_rows not in (DROP, JOIN):
            raise ValueError(f"data.short_rows={short_rows} is not allowed: {DROP} or {JOIN}")
        check_domain(domain)
        self.name, self.subset, self.split = str(name), subset, split
        self.text_column, self.domain, self.streaming = text_column, domain, streaming
        self.max_documents, self.min_characters, self.short_rows = max_documents, min_characters, short_rows

    def fingerprint(self) -> str:
        """Identity by the settings, and by the files where the data set is a local folder."""
        digest = hashlib.sha256(json.dumps(vars(self), sort_keys=True).encode())
        folder = Path(self.name).expanduser()
        if folder.is_dir():
            for path in sorted(p for p in folder.rglob("*") if p.is_file()):
                stat = path.stat()
                digest.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()[:16]

    def load(self):
        """-> ``datasets.Dataset`` with string columns ``text``, ``domain``, ``source``.

        Raises:
            ValueError: the data set cannot be reached or read, has no such column, or no long enough text.
        """
        from datasets import Dataset, load_dataset

        where = f"data.name={self.name} (subset={self.subset}, split={self.split})"
        try:
            rows = load_dataset(self.name, self.subset, split=self.split, streaming=self.streaming)
            documents = self._documents(rows)
        except _MissingColumn as error:
            raise ValueError(
                f"data.text_column={self.text_column}: {where} has no such column of texts, {error}"
            ) from None
        except Exception as error:  # the libraries below raise a class of their own for every way to fail
            cause = str(error).strip().splitlines()[:1] or [type(error).__name__]
            raise ValueError(f"{where}: the data set cannot be reached or read ({cause[0]})") from error
        if not documents:
            raise ValueError(f"{where}: no text has data.min_characters={self.min_characters} characters")
        return Dataset.from_list(documents)

    def _documents(self, rows) -> list[dict]:
        documents, parts, size, first = [], [], 0, 0
        for index, row in enumerate(rows):
            text = row.get(self.text_column)
            if not isinstance(text, str):
                raise _MissingColumn(f"row {index} has {sorted(row)}")
            if not text.strip() or (self.short_rows == DROP and len(text) < self.min_characters):
                continue
            first = first if parts else index
            parts.append(text)
            size += len(text)
            if size >= self.min_characters:
                documents.append({"text": "\n\n".join(parts), "domain": self.domain, "source": f"{self.name}#{first}"})
                parts, size = [], 0
            if len(documents) == self.max_documents:
                break
        return documents


class _MissingColumn(Exception):
    pass
