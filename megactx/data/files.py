"""Documents from files: txt, md, source code, csv, json, jsonl, parquet; a file, a folder or a glob; gz too."""

import codecs
import glob
import gzip
import hashlib
import logging
import re
import zlib
from pathlib import Path

from .documents import cache_folder

log = logging.getLogger(__name__)

NARRATIVE, CODE, STRUCTURED = "narrative", "code", "structured"
DOMAINS = (NARRATIVE, CODE, STRUCTURED)  # of a user's text
MIXED, ADVERSARIAL = "mixed", "adversarial"  # of documents that are made from such text, see ``Composed``
ALL_DOMAINS = (*DOMAINS, MIXED, ADVERSARIAL)

# Rows of these hold one document each, with a text column; every other file is one document.
ROW_FORMATS = {".jsonl": "json", ".parquet": "parquet"}
DOMAIN_OF = {
    **dict.fromkeys((".txt", ".md", ".rst", ".text"), NARRATIVE),
    **dict.fromkeys((".py", ".js", ".ts", ".c", ".h", ".cc", ".cpp", ".rs", ".go", ".java", ".sh"), CODE),
    **dict.fromkeys((".json", ".csv", ".tsv", ".toml", ".yaml", ".yml", ".xml", ".ini"), STRUCTURED),
}
MARKUP = (".md", ".rst")
MUCH_CODE = 1 / 3  # share of the lines in code blocks from which on such a text is structured
RULES = 2  # of the domain by ending; part of every fingerprint, so that other rules are another corpus
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
        text_column: the column of jsonl and parquet rows that holds the text.
        max_bytes: size limit of one file, after decompression.

    Raises:
        ValueError: no such file, an unknown domain, or, at ``load``, a file that is empty, cut short, too large, not
            UTF-8, or without such a column; it names the file and the setting.
    """

    def __init__(self, path: str, domain: str | None = None, text_column: str = "text", max_bytes: int = 2**33):
        self.domain, self.text_column, self.max_bytes = domain, text_column, max_bytes
        if not path:
            raise ValueError("data.path is not set: give a file, a folder or a glob, e.g. data.path=texts/")
        if domain is not None:
            check_domain(domain)
        self.path = str(path)
        self.paths = _find(self.path)

    def fingerprint(self) -> str:
        """Identity of the files by name, size and time of change, and of the settings."""
        digest = hashlib.sha256(repr((self.domain, self.text_column, RULES)).encode())
        for path in self.paths:
            stat = path.stat()
            digest.update(f"{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()[:16]

    def load(self):
        """-> ``datasets.Dataset`` with string columns ``text``, ``domain``, ``source``."""
        from datasets import concatenate_datasets

        parts = []
        for kind in ("json", "parquet", None):
            paths = [path for path in self.paths if ROW_FORMATS.get(_ending(path)) == kind]
            if paths:
                parts.append(self._rows(kind, paths) if kind else self._whole(paths))
        return concatenate_datasets(parts)

    def _rows(self, kind, paths):
        from datasets import load_dataset

        for path in paths:
            self._check_rows(path)
        try:
            rows = load_dataset(
                kind, data_files=[str(path) for path in paths], split="train", cache_dir=str(cache_folder() / "rows")
            )
        except Exception as error:  # datasets wraps every parse error in its own classes
            cause = error.__cause__ or error
            raise ValueError(f"data.path={self.path}: cannot be read as {kind} ({cause})") from error
        if self.text_column not in rows.column_names:
            raise ValueError(
                f"data.text_column={self.text_column}: {paths[0].name} has no such column, it has {rows.column_names}"
            )
        domain = self.domain or (NARRATIVE if "domain" not in rows.column_names else None)
        keep = {self.text_column, "domain", "source"}
        rows = rows.remove_columns([name for name in rows.column_names if name not in keep])
        if self.text_column != "text":
            rows = rows.rename_column(self.text_column, "text")
        self._check_texts(rows)
        if domain is not None:
            if "domain" in rows.column_names:
                rows = rows.remove_columns("domain")
            rows = rows.add_column("domain", [domain] * len(rows))
        for found in rows.unique("domain"):
            check_domain(found, f"data.path={self.path}: a row's domain")
        if "source" not in rows.column_names:
            rows = rows.add_column("source", [f"{paths[0].name}#{i}" for i in range(len(rows))])
        return rows.select_columns(["text", "domain", "source"])

    def _check_texts(self, rows) -> None:
        kind = str(getattr(rows.features["text"], "dtype", "list"))
        if kind not in ("string", "large_string"):
            raise ValueError(f"data.text_column={self.text_column}: holds {kind}, not text, in data.path={self.path}")
        column = rows.data.column("text")
        if column.null_count:
            row = column.is_null().to_pylist().index(True)
            raise ValueError(f"data.path={self.path}: row {row} has no {self.text_column}; mend or remove it")

    def _whole(self, paths):
        from datasets import Dataset

        documents = []
        for path in paths:
            if text := self._read(path):
                domain = self.domain or _domain(_ending(path), text)
                documents.append({"text": text, "domain": domain, "source": str(path)})
            elif len(self.paths) == 1:
                raise ValueError(f"data.path={path}: the file is empty")
            else:
                log.warning("data.path=%s: the file is empty; left out", path)
        if not documents:
            raise ValueError(f"data.path={self.path}: all of its files are empty")
        return Dataset.from_list(documents)

    def _read(self, path: Path) -> str:
        raw, size = [], 0
        for chunk in _chunks(path):
            raw.append(chunk)
            size += len(chunk)
            self._check_limit(path, size)
        try:
            return b"".join(raw).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"data.path={path}: not UTF-8 text ({error})") from error

    def _check_rows(self, path: Path) -> None:
        """Refuse a file of rows that is too large or not UTF-8, before anything of it reaches memory or a cache."""
        size = 0
        if _ending(path) == ".parquet":
            for size in _parquet_sizes(path):
                self._check_limit(path, size)
            return
        decoder = codecs.getincrementaldecoder("utf-8")()
        for chunk in _chunks(path):
            size += len(chunk)
            self._check_limit(path, size)
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError as error:
                raise ValueError(f"data.path={path}: not UTF-8 text ({error})") from error
        if size == 0:
            raise ValueError(f"data.path={path}: the file is empty")

    def _check_limit(self, path: Path, size: int) -> None:
        if size > self.max_bytes:
            raise ValueError(f"data.path={path}: larger than data.max_bytes={self.max_bytes} when decompressed")


def check_domain(domain, setting: str = "data.domain") -> None:
    """Refuse a domain that does not exist, by name."""
    if domain not in DOMAINS:
        raise ValueError(f"{setting}={domain} is not allowed: one of {', '.join(DOMAINS)}")


def code_share(text: str) -> float:
    """Share of the lines with text that are in code blocks: fenced (Markdown), or indented under ``::`` (reST)."""
    lines = [line.expandtabs() for line in text.splitlines() if line.strip()]
    code, fence, indent = 0, None, None  # the fence that is open; the column of the line that ended with "::"
    for line in lines:
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
    return code / max(1, len(lines))


def _domain(ending: str, text: str) -> str:
    if ending in MARKUP and code_share(text) >= MUCH_CODE:
        return STRUCTURED
    return DOMAIN_OF.get(ending, NARRATIVE)


def _chunks(path: Path):
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            while chunk := file.read(2**22):
                yield chunk
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"data.path={path}: cannot be read ({error})") from error


def _parquet_sizes(path: Path):
    """Bytes decoded so far, batch by batch: what the footer says about sizes is only a claim."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    size = 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                size += batch.nbytes
                yield size
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"data.path={path}: cannot be read as parquet ({error})") from error


def _ending(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else (suffixes[-1] if suffixes else "")


def _find(path: str) -> list[Path]:
    known = set(DOMAIN_OF) | set(ROW_FORMATS)
    here = Path(path).expanduser()
    if here.is_dir():
        found = sorted(p for p in here.rglob("*") if p.is_file() and _ending(p) in known and "MANIFEST" not in p.name)
        what = f"the folder holds none of {', '.join(sorted(known))}"
    else:
        found = (
            [here]
            if here.is_file()
            else sorted(Path(p) for p in glob.glob(str(here), recursive=True) if Path(p).is_file())
        )
        what = "no such file, and no file matches it as a glob"
    if not found:
        raise ValueError(f"data.path={path}: {what}")
    full = [file for file in found if file.stat().st_size > 0]
    for file in set(found) - set(full):
        log.warning("data.path=%s: the file is empty; left out", file)
    if not full:
        raise ValueError(f"data.path={found[0]}: the file is empty")
    return full
