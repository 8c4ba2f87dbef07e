"""Raw text -> token documents, tokenised once and cached on disk; the split into train and validation.

A document opens with BOS. A long text is cut into consecutive documents that share its ``source`` and its side of the
split; the split is by hash of the source text, never by window. Ids stay on disk, memory-mapped, until they are read.
"""

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megactx.framework.files import replacing

from .encoding import Encoder, batches
from .tokenizer import bos_id, tokenizer_hash

log = logging.getLogger(__name__)

TRAIN, VALIDATION = "train", "validation"
VALIDATION_PERCENT = 10
SAY_EVERY = 10.0  # seconds, while a corpus is tokenised
ROWS = 1000  # of a batch on disk, at most
ELSEWHERE = "set MEGACTX_CACHE to another folder; what was tokenised before is kept"


def cache_folder() -> Path:
    """Where tokenised corpora are kept: ``$MEGACTX_CACHE``, or ``~/.cache/megactx``."""
    return Path(os.environ.get("MEGACTX_CACHE", "~/.cache/megactx")).expanduser()


@dataclass(frozen=True)
class Part:
    """Some documents of a source, which are tokenised and kept together."""

    fingerprint: str
    documents: Callable[[], Iterable[dict]]  # -> dicts of the strings ``text``, ``domain``, ``source``


def parts_of(source) -> list[Part]:
    """The parts of a source, in order; a source without ``parts`` is one, of what it loads."""
    return source.parts() if hasattr(source, "parts") else [Part(source.fingerprint(), source.load)]


def as_dataset(documents: Iterable[dict]):
    """Dicts of strings -> ``datasets.Dataset`` with columns ``text``, ``domain``, ``source``."""
    import pyarrow as pa
    from datasets import Dataset

    names = ("text", "domain", "source")
    schema = pa.schema([(name, pa.string()) for name in names])
    parts = [
        pa.record_batch([pa.array([row[name] for row in rows], pa.string()) for name in names], schema=schema)
        for rows in batches(documents, lambda row: len(row["text"]), count=ROWS)
    ]
    return Dataset(pa.Table.from_batches(parts, schema=schema))


def tokenised(source, tokenizer):
    """Tokenise a source once; later calls read the cache. What was tokenised before a kill is not done again.

    Args:
        source: anything with ``fingerprint() -> str`` and ``load() -> Dataset(text, domain, source)``; one with
            ``parts()`` is kept part by part.
        tokenizer: a Hugging Face tokenizer.

    Returns:
        ``datasets.Dataset`` with ``input_ids`` (list of int32, without BOS), ``domain``, ``source``, ``split``.

    Raises:
        ValueError: there are no documents, or the cache may not be written.
        RunFailed: the disk of the cache is full.
    """
    from datasets import Dataset, concatenate_datasets

    parts, own = parts_of(source), tokenizer_hash(tokenizer)
    paths = [cache_folder() / f"{_key(part.fingerprint, own)}.arrow" for part in parts]
    missing = [(part, path) for part, path in zip(parts, paths, strict=True) if not path.exists()]
    if missing:
        encoder, told = Encoder(tokenizer), Told(len(missing))
        for part, path in missing:
            _write(part.documents(), path, encoder, told)
            told.done += 1
        told.end()
    rows = [Dataset.from_file(str(path)) for path in paths]
    if not any(map(len, rows)):
        raise ValueError("data: the source has no documents")
    return concatenate_datasets(rows) if len(rows) > 1 else rows[0]


def _key(fingerprint: str, tokenizer: str) -> str:
    return hashlib.sha256(f"v2 {fingerprint} {tokenizer}".encode()).hexdigest()[:20]


def _write(documents: Iterable[dict], path: Path, encoder: Encoder, told: "Told") -> None:
    write_rows(path, _encoded(documents, encoder), told)


def _encoded(documents: Iterable[dict], encoder: Encoder) -> Iterator[tuple[list, dict, int]]:
    for rows in batches(documents, lambda row: len(row["text"]), count=ROWS):
        columns = {name: [row[name] for row in rows] for name in ("text", "domain", "source")}
        texts = columns.pop("text")
        columns["split"] = [split_of(text) for text in texts]
        yield encoder(texts), columns, sum(map(len, texts))


def write_rows(path: Path, rows: Iterable[tuple[list, dict, int]], told: "Told") -> None:
    """Write ``input_ids``, ``domain``, ``source`` and ``split`` as an Arrow file, whole or not at all.

    Args:
        rows: some at a time: ids of each, int32 [t]; the other columns; and how many characters they were.
    """
    import pyarrow as pa
    from datasets import Features, List, Value

    strings = ("domain", "source", "split")
    features = Features({name: Value("string") for name in strings} | {"input_ids": List(Value("int32"))})
    with replacing(path, ELSEWHERE) as part, part.open("wb") as file:
        writer = pa.ipc.new_stream(file, features.arrow_schema)
        for ids, columns, characters in rows:
            if not ids:
                continue
            ends = np.cumsum([0, *map(len, ids)], dtype=np.int64)
            if ends[-1] >= 2**31:
                raise ValueError(f"data: {columns['source'][0]} has more than 2^31 tokens; cut it into several texts")
            values = ids[0] if len(ids) == 1 else np.concatenate(ids)
            lists = pa.ListArray.from_arrays(pa.array(ends.astype(np.int32)), pa.array(values))
            arrays = [pa.array(columns[name], pa.string()) for name in strings]
            writer.write_batch(pa.record_batch([*arrays, lists], schema=features.arrow_schema))
            told.more(characters)
        writer.close()


class Told:
    """A line from time to time about how far the tokenising is."""

    def __init__(self, parts: int):
        self.parts, self.done, self.characters = parts, 0, 0
        self.began = self.said = time.monotonic()

    def more(self, characters: int) -> None:
        self.characters += characters
        now = time.monotonic()
        if now - self.said >= SAY_EVERY:
            self.said = now
            log.info("tokenising: %s, part %d of %d", self._so_far(now), self.done + 1, self.parts)

    def end(self) -> None:
        if self.said > self.began:
            log.info("tokenised: %s", self._so_far(time.monotonic()))

    def _so_far(self, now: float) -> str:
        millions, seconds = self.characters / 1e6, now - self.began
        return f"{millions:.1f} million characters in {seconds:.0f} s ({millions / max(seconds, 1e-9):.1f} per second)"


def split_of(text: str) -> str:
    """The side of the split that a source text is on: a hash of the text decides, 90 / 10."""
    bucket = int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:4], "big") % 100
    return VALIDATION if bucket < VALIDATION_PERCENT else TRAIN


class Document(Mapping):
    """A document as a mapping: ``input_ids`` (int64 [T], BOS first), ``domain``, ``source``, ``text``.

    ``input_ids`` are made anew each time they are asked for: what is kept is a view of the ids on disk.
    """

    __slots__ = ("piece", "bos", "domain", "source", "text")
    NAMES = ("input_ids", "domain", "source", "text")

    def __init__(self, piece: np.ndarray, bos: int, domain: str, source: str, text: int):
        self.piece, self.bos, self.domain, self.source, self.text = piece, bos, domain, source, text

    @property
    def input_ids(self) -> np.ndarray:
        ids = np.empty(len(self.piece) + 1, dtype=np.int64)
        ids[0], ids[1:] = self.bos, self.piece
        return ids

    def __getitem__(self, name: str):
        if name not in self.NAMES:
            raise KeyError(name)
        return getattr(self, name)

    def __iter__(self):
        return iter(self.NAMES)

    def __len__(self) -> int:
        return len(self.NAMES)

    def __or__(self, other: Mapping) -> dict:
        return {**self, **other}


class IdsOf(Sequence):
    """The ids of documents, int64 [T] each, read when they are asked for."""

    def __init__(self, documents: Sequence[Mapping]):
        self.documents = documents

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.documents[index]["input_ids"]


def length_of(document: Mapping) -> int:
    """T, tokens of a document, without reading them where they are on disk."""
    return len(document.piece) + 1 if isinstance(document, Document) else len(document["input_ids"])


class Views(Sequence):
    """Ids of every row of ``tokenised``, int32 [t]: views of what is on disk, made when they are asked for.

    Attributes:
        lengths: t of each, int64.
    """

    def __init__(self, rows):
        chunks = rows.data.column("input_ids").chunks
        self._parts = [(chunk.values.to_numpy(zero_copy_only=False), chunk.offsets.to_numpy()) for chunk in chunks]
        self._ends = np.cumsum([len(offsets) - 1 for _, offsets in self._parts])
        counted = [np.diff(offsets).astype(np.int64) for _, offsets in self._parts]
        self.lengths = np.concatenate(counted) if counted else np.zeros(0, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(f"{index} of {len(self)} texts")
        part = int(np.searchsorted(self._ends, index, side="right"))
        values, offsets = self._parts[part]
        at = index - int(self._ends[part]) + len(offsets) - 1
        return values[offsets[at] : offsets[at + 1]]


def where(rows, column: str, value: str) -> np.ndarray:
    """Which rows of ``tokenised`` have this value, bool; the strings themselves would fill the memory."""
    import pyarrow.compute as pc

    return pc.equal(rows.data.column(column), value).to_numpy()


def cut(rows, split: str | None, tokenizer, min_tokens: int, max_tokens: int):
    """Cut the texts of one split (``None``: of both) into documents of ``min_tokens..max_tokens`` tokens, BOS included.

    Returns:
        ``(documents, dropped)``: a list of ``Document``, whose ``text`` is the index of the source text, and the number
        of texts that were too short.
    """
    if not 0 < min_tokens <= max_tokens:
        raise ValueError(f"data.min_tokens={min_tokens} is not allowed: 1 to data.max_tokens={max_tokens}")
    bos = bos_id(tokenizer)
    documents, dropped = [], 0
    columns = [rows.data.column(name).to_pylist() for name in ("split", "domain", "source")]
    about = zip(Views(rows), *columns, strict=True)
    for index, (ids, side, domain, source) in enumerate(about):
        if split is not None and side != split:
            continue
        pieces = [ids[start : start + max_tokens - 1] for start in range(0, len(ids), max_tokens - 1)]
        pieces = [piece for piece in pieces if len(piece) + 1 >= min_tokens]
        dropped += not pieces
        documents += [Document(piece, bos, domain, source, index) for piece in pieces]
    return documents, dropped
