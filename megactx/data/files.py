"""Documents from files: txt, md, source code, csv, json, jsonl, parquet; a file, a folder or a glob; gz too."""

import gzip
import hashlib
import json
import logging
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from megactx.framework.files import checksum, matches

from .documents import Part, as_dataset
from .encoding import batches

log = logging.getLogger(__name__)

NARRATIVE, CODE, STRUCTURED = "narrative", "code", "structured"
DOMAINS = (NARRATIVE, CODE, STRUCTURED)  # of a user's text
MIXED, ADVERSARIAL = "mixed", "adversarial"  # of documents that are made from such text, see ``Composed``
ALL_DOMAINS = (*DOMAINS, MIXED, ADVERSARIAL)

# Rows of these hold one document each, with a text column; every other file is one document.
ROW_FORMATS = {".jsonl": "json", ".ndjson": "json", ".parquet": "parquet"}
DOMAIN_OF = {
    **dict.fromkeys((".txt", ".md", ".rst", ".text"), NARRATIVE),
    **dict.fromkeys((".py", ".js", ".ts", ".c", ".h", ".cc", ".cpp", ".rs", ".go", ".java", ".sh"), CODE),
    **dict.fromkeys((".json", ".csv", ".tsv", ".toml", ".yaml", ".yml", ".xml", ".ini"), STRUCTURED),
}
MARKUP = (".md", ".rst")
MUCH_CODE = 1 / 3  # share of the lines in code blocks from which on such a text is structured
RULES = 4  # of the text and the domain by ending; part of every fingerprint, so that other rules are another corpus
GROUP = 2**24  # bytes of files that are tokenised and kept together
PARQUET_BATCH = 2**22  # bytes of rows that are read at a time
FENCE = re.compile(r" *(```+|~~~+)")
# A literal block of reST: a line that ends with "::", but of the directives only those that hold code.
LITERAL = re.compile(
    r"( *)(?:\.\. (?:code|code-block|sourcecode|parsed-literal|testcode|doctest)::.*|(?!\.\. ).*::)\s*"
)


class Files:
    """Documents of local files.

    Args:
        path: a file, a folder (searched recursively) or a glob.
        domain: the domain of every document; ``None`` takes a ``domain`` column, or else the file's ending. Markdown
            and reST of which a third of the lines is code are ``structured``, else ``narrative``.
        text_column: the column of jsonl and parquet rows that holds the text. Of the others only ``domain`` and
            ``source`` are read.
        max_bytes: size limit of one file, after decompression.

    Raises:
        ValueError: no such file, an unknown domain, or, at ``documents`` and ``load``, a file that is empty, cut short,
            too large, not UTF-8, or without such a column; it names the file, the row and the setting.
    """

    def __init__(self, path: str, domain: str | None = None, text_column: str = "text", max_bytes: int = 2**33):
        self.domain, self.text_column, self.max_bytes = domain, text_column, max_bytes
        if not path:
            raise ValueError("data.path is not set: give a file, a folder or a glob, e.g. data.path=texts/")
        if domain is not None:
            check_domain(domain)
        self.path = str(path)
        self.paths = _find(self.path)
        self._digests: dict[Path, tuple[tuple, str]] = {}

    def fingerprint(self) -> str:
        """Identity of the files by name and content, and of the settings."""
        return hashlib.sha256(" ".join(part.fingerprint for part in self.parts()).encode()).hexdigest()[:16]

    def parts(self) -> list[Part]:
        """A large file, or small ones that follow each other, at a time; all of them in the order of ``documents``."""
        groups = batches(self._in_order(), lambda path: path.stat().st_size, GROUP)
        return [Part(self._identity(group), partial(self._checked, group)) for group in groups]

    def documents(self) -> Iterator[dict]:
        """Dicts of the strings ``text``, ``domain``, ``source``, one at a time: rows first, then whole files."""
        return self._checked(self._in_order())

    def load(self):
        """-> ``datasets.Dataset`` with string columns ``text``, ``domain``, ``source``, in memory."""
        return as_dataset(self.documents())

    def _in_order(self) -> list[Path]:
        order = {kind: number for number, kind in enumerate(ROW_FORMATS)}
        return sorted(self.paths, key=lambda path: order.get(ending(path), len(order)))  # as they are within each

    def _identity(self, paths: list[Path]) -> str:
        digest = hashlib.sha256(repr((self.domain, self.text_column, RULES)).encode())
        for path in paths:
            digest.update(f"{path}\0{self._digest(path)}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def _digest(self, path: Path) -> str:
        """Of the content: neither the size nor the time of change tells that a text is another one."""
        state = _state(path)
        if self._digests.get(path, ((), ""))[0] != state:
            try:
                self._digests[path] = state, checksum(path)
            except OSError as error:
                raise ValueError(f"data.path={path}: cannot be read ({error})") from error
        return self._digests[path][1]

    def _checked(self, paths: list[Path]) -> Iterator[dict]:
        count = 0
        for path in paths:
            before = _state(path)
            for document in self._documents(path):
                count += 1
                yield document
            known = self._digests.get(path)
            if _state(path) != before or (known and known[0] != before):
                raise ValueError(f"data.path={path}: the file was changed while it was read; start again")
        if not count and len(paths) == len(self.paths):
            raise ValueError(f"data.path={self.path}: all of its files are empty")

    def _documents(self, path: Path) -> Iterator[dict]:
        kind = ROW_FORMATS.get(ending(path))
        if kind is None:
            text = self._read(path)
            about = {"domain": self.domain or _domain(ending(path), text), "source": str(path)}
            found = [{"text": text, **about}] if text else []
        else:
            found = self._rows(path, self._json(path) if kind == "json" else self._parquet(path))
        empty = True
        for document in found:
            empty = False
            yield document
        if empty and len(self.paths) == 1:
            raise ValueError(f"data.path={path}: the file is empty")
        if empty:
            log.warning("data.path=%s: the file is empty; left out", path)

    def _rows(self, path: Path, rows: Iterable[dict]) -> Iterator[dict]:
        for number, row in enumerate(rows):
            text, where = row.get(self.text_column), f"data.path={path}: row {number} (from 0)"
            if self.text_column not in row:
                raise ValueError(f"{where} has no column data.text_column={self.text_column}, it has {[*row]}")
            if text is None:
                raise ValueError(f"{where} has no {self.text_column}; mend or remove it")
            if not isinstance(text, str):
                raise ValueError(f"{where} holds {_shown(text)}, not text, as data.text_column={self.text_column}")
            domain, source = (None if name == self.text_column else row.get(name) for name in ("domain", "source"))
            domain = self.domain or (NARRATIVE if domain is None else domain)
            check_domain(domain, f"{where}: domain")
            source = f"{path.name}#{number}" if source is None else _string(source)
            if not _encodable(text) or not _encodable(source):
                raise ValueError(f"{where} has half of a surrogate pair, which is not UTF-8 text; mend or remove it")
            yield {"text": text, "domain": domain, "source": source}

    def _json(self, path: Path) -> Iterator[dict]:
        number = 0
        for line in self._chunks(path, "readline", self.max_bytes + 1):
            try:
                text = line.decode("utf-8-sig" if number == 0 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"data.path={path}: row {number} is not UTF-8 text ({error})") from error
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"data.path={path}: row {number} cannot be read as json ({error})") from error
            if not isinstance(row, dict):
                raise ValueError(f"data.path={path}: row {number} holds {_shown(row)}; a row is an object on a line")
            yield row
            number += 1

    def _parquet(self, path: Path) -> Iterator[dict]:
        """Rows of the columns that are asked for. What the footer says about sizes is only a claim: it is counted."""
        import pyarrow
        from pyarrow.parquet import ParquetFile

        size = 0
        try:
            with ParquetFile(path) as file:
                names = file.schema_arrow.names
                if twice := next((n for n in (self.text_column, "domain", "source") if names.count(n) > 1), None):
                    raise ValueError(f"data.path={path}: it has the column {twice} {names.count(twice)} times")
                if self.text_column not in names:
                    raise ValueError(f"data.text_column={self.text_column}: {path} has no such column, it has {names}")
                about = file.metadata
                each = sum(about.row_group(index).total_byte_size for index in range(about.num_row_groups))
                rows = max(1, min(1024, PARQUET_BATCH * about.num_rows // max(1, each)))
                columns = [name for name in {self.text_column: 0, "domain": 0, "source": 0} if name in names]
                for batch in file.iter_batches(batch_size=rows, columns=columns):
                    size += batch.nbytes
                    self._check_limit(path, size)
                    for index in range(batch.num_rows):
                        yield {name: batch.column(name)[index].as_py() for name in batch.schema.names}
        except UnicodeDecodeError as error:
            raise ValueError(f"data.path={path}: not UTF-8 text ({error})") from error
        except (OSError, pyarrow.ArrowException) as error:
            raise ValueError(f"data.path={path}: cannot be read as parquet ({error})") from error

    def _read(self, path: Path) -> str:
        try:
            return b"".join(self._chunks(path)).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"data.path={path}: not UTF-8 text ({error})") from error

    def _chunks(self, path: Path, how: str = "read", most: int = 2**20) -> Iterator[bytes]:
        size = 0
        try:
            with (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rb") as file:
                while chunk := getattr(file, how)(most):
                    size += len(chunk)
                    self._check_limit(path, size)
                    yield chunk
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"data.path={path}: cannot be read ({error})") from error

    def _check_limit(self, path: Path, size: int) -> None:
        if size > self.max_bytes:
            raise ValueError(f"data.path={path}: larger than data.max_bytes={self.max_bytes} when decompressed")


def check_domain(domain, setting: str = "data.domain") -> None:
    """Refuse a domain that does not exist, by name."""
    if domain not in DOMAINS:
        raise ValueError(f"{setting}={domain} is not allowed: one of {', '.join(DOMAINS)}")


def code_share(text: str) -> float:
    """Share of the lines with text that are in code blocks: fenced (Markdown), or indented under ``::`` (reST)."""
    code, count, fence, indent = 0, 0, None, None  # the fence that is open; the column of the line that ended with "::"
    for line in _text_lines(text):
        line = line.expandtabs()
        count += 1
        if indent is not None and len(line) - len(line.lstrip()) <= indent:
            indent = None
        code += fence is not None or indent is not None
        if fence is not None:
            if line.strip().startswith(fence) and not line.strip().strip(fence[0]):
                fence = None
        elif indent is None:
            if found := FENCE.match(line):
                code += 1
                fence = found[1]
            elif found := LITERAL.fullmatch(line):
                indent = len(found[1])
    return code / max(1, count)


def _text_lines(text: str) -> Iterator[str]:
    """Lines with text; some of them at a time, for a list of all would take more room than the text."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + 2**16) + 1 or len(text)
        yield from (line for line in text[start:end].splitlines() if line.strip())
        start = end


def _domain(ending: str, text: str) -> str:
    if ending in MARKUP and code_share(text) >= MUCH_CODE:
        return STRUCTURED
    return DOMAIN_OF.get(ending, NARRATIVE)


def _shown(value) -> str:
    """What a row holds, for a message."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:40] + '...'}"


def _string(value) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _state(path: Path) -> tuple[int, ...]:
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def ending(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else (suffixes[-1] if suffixes else "")


def _find(path: str) -> list[Path]:
    """All files of a path that hold text; what is left out is said."""
    here = Path(path) if os.path.lexists(path) else Path(os.path.expanduser(path))  # "~x" may be a name
    if here.is_dir():
        found = _known(path, _walk(path, here))
        what = f"the folder holds none of {', '.join(sorted({*DOMAIN_OF, *ROW_FORMATS}))}"
    elif here.is_file():
        found, what = [here], ""
    else:
        matched = matches(here)
        found = sorted(p for p in matched if p.is_file())
        what = "no such file, and no file matches it as a glob"
        # With ** every folder on the way is matched, and what is in it too.
        if "**" not in path and (folders := [str(p) for p in matched if p.is_dir()]):
            log.warning("data.path=%s: it matches folders, which are left out: %s", path, some(sorted(folders)))
    if not found:
        raise ValueError(f"data.path={path}: {what}")
    full = [file for file in found if file.stat().st_size > 0]
    for file in sorted(set(found) - set(full)):
        log.warning("data.path=%s: the file is empty; left out", file)
    if not full:
        raise ValueError(f"data.path={found[0]}: the file is empty")
    return full


def _walk(path: str, here: Path) -> list[Path]:
    """Every file in a folder, behind links too."""

    def refuse(error: OSError):
        raise ValueError(f"data.path={path}: {error.filename} cannot be read ({error.strerror})") from error

    found, seen = [], {here.resolve()}
    for folder, folders, names in os.walk(here, onerror=refuse, followlinks=True):
        for name in [*folders]:
            real = Path(folder, name).resolve()
            if Path(folder, name).is_symlink() and real in seen:
                folders.remove(name)  # a link back to where its documents are read already
            seen.add(real)
        found += [Path(folder, name) for name in names]
    return sorted(found)


def _known(path: str, found: list[Path]) -> list[Path]:
    known = [p for p in found if ending(p) in DOMAIN_OF or ending(p) in ROW_FORMATS]
    left = Counter(ending(p) or p.name for p in set(found) - set(known))
    if known and left:
        endings = some([f"{ending} ({count})" for ending, count in sorted(left.items())])
        log.warning(
            "data.path=%s: files that are no known text are left out: %s; name them to read them", path, endings
        )
    gone = [str(p) for p in known if not p.is_file()]
    if gone:
        raise ValueError(f"data.path={path}: no file to read, or a link that leads nowhere: {some(gone)}")
    return known


def some(names: list) -> str:
    """The first ten names, and how many more there are."""
    return ", ".join(map(str, names[:10])) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
