"""Documents of a data set on a hub, or of a local folder in the same layout, read as a stream."""

import hashlib
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from megactx.framework.config.types import Count, declared
from megactx.framework.errors import FULL, RunFailed
from megactx.framework.files import checksum

from .documents import Part, as_dataset
from .files import NARRATIVE, check_domain, some

log = logging.getLogger(__name__)

DROP, JOIN = "drop", "join"
RULES = 3  # of what a row gives; part of every fingerprint
ABOUT = {"README.md", ".gitattributes", ".git", ".cache", "dataset_infos.json"}  # about a data set, not of it
PATTERN = re.compile(r"[\[\]*?]|::")


@declared("data")
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
        name: str | None,
        subset: str | None = None,
        split: str = "train",
        text_column: str = "text",
        domain: str = NARRATIVE,
        streaming: bool = True,
        max_documents: Count = 2000,
        min_characters: int = 0,
        short_rows: Literal[DROP, JOIN] = DROP,
    ):
        if not name:
            raise ValueError("data.name is not set: give the name of a data set, or a local folder")
        check_domain(domain)
        self.name, self.subset, self.split = str(name), subset, split
        self.text_column, self.domain, self.streaming = text_column, domain, streaming
        self.max_documents, self.min_characters, self.short_rows = max_documents, min_characters, short_rows

    def fingerprint(self) -> str:
        """Identity by the settings, and by the content of the files where the data set is a local folder."""
        digest = hashlib.sha256(json.dumps([RULES, vars(self)], sort_keys=True).encode())
        for path in self._local():
            digest.update(f"{path}\0{checksum(path)}\n".encode())
        return digest.hexdigest()[:16]

    def parts(self) -> list[Part]:
        return [Part(self.fingerprint(), self.documents)]

    def load(self):
        """-> ``datasets.Dataset`` with string columns ``text``, ``domain``, ``source``, in memory."""
        return as_dataset(self.documents())

    def documents(self) -> Iterator[dict]:
        """Dicts of the strings ``text``, ``domain``, ``source``, one at a time. A row without text is left out.

        Raises:
            ValueError: the data set cannot be reached or read, has no such column, or no long enough text.
            RunFailed: there is no room for what is downloaded.
        """
        where, count = f"data.name={self.name} (subset={self.subset}, split={self.split})", 0
        local = self._local()
        if odd := next((path for path in local if PATTERN.search(str(path.resolve()))), None):
            raise ValueError(f"{where}: [ ] * ? and :: in {odd} are taken for a pattern; rename it, or use data=files")
        # A local folder is always read as it is: the copy that the library keeps may be older than the files.
        self._say_left_out(where, local)
        for document in self._documents(self._checked(where, self.streaming or bool(local)), where):
            count += 1
            yield document
        if not count:
            raise ValueError(f"{where}: no text has data.min_characters={self.min_characters} characters")

    def _checked(self, where: str, streaming: bool) -> Iterator[dict]:
        try:
            yield from self._rows(streaming)
        except Exception as error:  # the libraries below raise a class of their own for every way to fail
            if columns := _without(error):
                raise ValueError(f"data.text_column={self.text_column}: {where} has only {columns}") from error
            if (full := _full(error)) is not None:
                remedy = "make room in the cache of data sets, or set HF_HOME elsewhere, or data.streaming=true"
                raise RunFailed(f"{where}: there is no room for it ({full}); {remedy}") from error
            cause = str(error).strip().splitlines()[:1] or [type(error).__name__]
            raise ValueError(f"{where}: the data set cannot be reached or read ({cause[0]})") from error

    def _rows(self, streaming: bool) -> Iterator[dict]:
        """Rows with the column that is asked for; others may have other types in each file.

        The library lets a column be chosen in parquet alone. Of json it gives all, with one type for all rows; so each
        line is read by itself. In csv it guesses types, 007 is a number and NA nothing: the text is taken as it is.
        """
        from datasets import load_dataset, load_dataset_builder

        builder = load_dataset_builder(self.name, self.subset)
        files = (builder.config.data_files or {}).get(self.split)
        if type(builder.config).__name__ == "JsonConfig" and files:
            for file in files:
                yield from _json_rows(file, streaming)
            return
        chosen = {"columns": [self.text_column]} if hasattr(builder.config, "columns") else {}
        if hasattr(builder.config, "converters"):  # csv, tsv
            chosen = {"converters": {self.text_column: _cell}, "na_filter": False}
        yield from load_dataset(self.name, self.subset, split=self.split, streaming=streaming, **chosen)

    def _say_left_out(self, where: str, local: list[Path]) -> None:
        """The library reads files of one ending, and where one is named after a split only such: it says nothing."""
        from datasets import load_dataset_builder

        if not local:
            return
        try:
            chosen = load_dataset_builder(self.name, self.subset).config.data_files or {}
        except Exception:  # it is told where the rows are read
            return
        read = {
            Path(str(file).partition("::")[2] or str(file)).resolve() for files in chosen.values() for file in files
        }
        left = [path for path in local if path.resolve() not in read and not ABOUT & {path.name, *path.parts}]
        if left:
            log.warning("%s: files that are of no split are left out: %s; data=files reads them", where, some(left))

    def _local(self) -> list[Path]:
        folder = Path(self.name).expanduser()
        return sorted(p for p in folder.rglob("*") if p.is_file()) if folder.is_dir() else []

    def _documents(self, rows, where: str) -> Iterator[dict]:
        wanted = f"data.text_column={self.text_column}: {where}: row"
        parts, size, first, count, without = [], 0, 0, 0, []
        for index, row in enumerate(rows):
            if self.text_column not in row:
                raise ValueError(f"{wanted} {index} has only {sorted(row)}")
            text = row[self.text_column]
            if text is None:
                without.append(index)
                continue
            if not isinstance(text, str):
                raise ValueError(f"{wanted} {index} holds {type(text).__name__}, not text")
            if not text.strip() or (self.short_rows == DROP and len(text) < self.min_characters):
                continue
            first = first if parts else index
            parts.append(text)
            size += len(text)
            if size >= self.min_characters:
                yield {"text": "\n\n".join(parts), "domain": self.domain, "source": f"{self.name}#{first}"}
                parts, size, count = [], 0, count + 1
            if count == self.max_documents:
                break
        if without:
            log.warning(
                "data.name=%s: %d rows have no %s and are left out, the first is row %d",
                *(self.name, len(without), self.text_column, without[0]),
            )


def _cell(text: str) -> str | None:
    return text or None


def _json_rows(file: str, streaming: bool) -> Iterator[dict]:
    """Objects line by line; a file that is one array or object is read as a whole."""
    from datasets import load_dataset

    where = {"data_files": {"train": [file]}, "split": "train", "streaming": streaming}
    lines = (row["text"] for row in load_dataset("text", **where) if row["text"].strip())
    try:
        first = json.loads(next(lines, "{}"))
    except ValueError:
        first = None
    if not isinstance(first, dict):  # read by the library, text like 007 or 2020-01-01 would be a number or a date
        for text in load_dataset("text", sample_by="document", **where):
            yield from _objects(file, text["text"])
        return
    if first:
        yield first
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{file}: row {number} (from 0) cannot be read as json: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{file}: row {number} (from 0) is no object")
        yield row


def _objects(file: str, text: str) -> list[dict]:
    """The rows of a file that is one array of objects, or one object."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{file} cannot be read as json: {error}") from error
    rows = found if isinstance(found, list) else [found]
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"{file}: row {number} (from 0) is no object")
    return rows


def _without(error: BaseException | None) -> list[str]:
    """The columns that there are, where an error is about one that there is not."""
    while error is not None:
        if (found := str(error).partition("No match for FieldRef"))[1]:
            lines = found[2].partition(" in ")[2].splitlines()
            return sorted(line.partition(":")[0] for line in lines if ":" in line and not line.startswith("__"))
        error = error.__cause__ or error.__context__
    return []


def _full(error: BaseException | None) -> OSError | None:
    """The full disk that an error is about, however often it was wrapped."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return error
        error = error.__cause__ or error.__context__
    return None
