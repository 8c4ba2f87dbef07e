"""The default source: text that every installation has. No network, no download.

The standard library and the installed torch, lightning and transformers packages: reference prose, long docstrings and
package descriptions as ``narrative``, Python modules as ``code``, JSON, CSV, INI, tables and interfaces as
``structured``. A module feeds one domain only, so that no text is in two of them.
"""

import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

from megactx.framework.files import IN_RUN, replacing

from . import renderings
from .documents import ELSEWHERE, cache_folder
from .files import CODE, NARRATIVE, STRUCTURED

STANDARD_LIBRARY = "python"
PACKAGES = ("torch", "lightning", "transformers")

SKIPPED_FOLDERS = re.compile(r"_?tests?|_?testing|idle_test|__.*|config-.*|site-packages|dist-packages|include|_vendor")
SKIPPED_FILES = re.compile(r"test_.*|.*_test\.py|_?testing.*|_sysconfigdata.*|conftest\.py")
GENERATED = ("automatically generated", "@generated")

DOMAIN_OF = {
    **dict.fromkeys((".txt", ".md", ".rst"), NARRATIVE),
    **dict.fromkeys((".json", ".csv", ".toml", ".ini", ".cfg", ".def", ".yaml", ".xml"), STRUCTURED),
}
LONGEST = 300_000  # characters of one file; longer ones are generated, or one list
LONG = 18_000  # texts of neighbouring files are joined until they have so many characters
SHORTEST = 4_000  # a joined rest that is shorter than this is left out
PER_FOLDER = 400_000  # characters that one folder gives to one domain, so that no folder dominates

REFERENCE = {"topics.py", "_torch_docs.py", "_tensor_docs.py"}  # reference texts as Python literals, of any length
DOCSTRING = re.compile(r'(?s)"""(.*?)"""')
TABLE_ROW = re.compile(r"""(?m)^[ \t]*["'(\[{0-9ub].*,[ \t]*(?:#.*)?\n""")


@dataclass
class Piece:
    """A text of one file, or of one table."""

    path: str
    text: str
    sha256: str


@dataclass
class Corpus:
    documents: list[dict] = field(default_factory=list)
    files: list[tuple[str, str]] = field(default_factory=list)


class Embedded:
    """Documents of the installed Python and of torch, lightning and transformers.

    Args:
        megabytes: the most text of one domain, in 1e6 characters; every package gets an equal share of it, and what
            one leaves over goes to the next.

    Raises:
        ValueError: a package is not installed, or ``megabytes`` is not above 0.
    """

    def __init__(self, megabytes: float = 8.0):
        if not megabytes > 0:
            raise ValueError(f"data.source.megabytes={megabytes} is not allowed: it must be above 0")
        self.megabytes = megabytes
        self.versions = {STANDARD_LIBRARY: platform.python_version()}
        for name in PACKAGES:
            try:
                self.versions[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError as error:
                raise ValueError(f"data=embedded: the package {name} is not installed; use data=files") from error

    def fingerprint(self) -> str:
        """Identity by the versions of Python and of the packages, by the settings, and by the rules of this file."""
        rules = [Path(module).read_bytes() for module in (__file__, renderings.__file__)]
        settings = repr((sorted(self.versions.items()), float(self.megabytes))).encode()
        return hashlib.sha256(b"".join([settings, *rules])).hexdigest()[:16]

    def load(self):
        """-> ``datasets.Dataset`` with string columns ``text``, ``domain``, ``source``."""
        from datasets import Dataset

        self.write_list(self._kept_list, ELSEWHERE)
        return Dataset.from_list(self._corpus.documents)

    def files(self) -> list[tuple[str, str]]:
        """-> sorted (path, sha256) of every file and table that the documents were made of."""
        if "_corpus" not in self.__dict__ and self._kept_list.exists():
            lines = self._kept_list.read_text(encoding="utf-8").splitlines()
            return [(path, digest) for digest, path in (line.split("  ", 1) for line in lines)]
        return self._corpus.files

    def write_list(self, path: str | Path, remedy: str = IN_RUN) -> None:
        """Write ``files()`` in the format of ``sha256sum``; ``remedy`` is what to do where that cannot be."""
        path = Path(path)
        lines = "".join(f"{digest}  {name}\n" for name, digest in self.files())
        with replacing(path, remedy) as part:
            part.write_text(lines, encoding="utf-8")

    @property
    def _kept_list(self) -> Path:
        # Beside the tokenised corpus: a run that reads the cache need not walk the packages for the list.
        return cache_folder() / f"embedded-{self.fingerprint()}.sha256"

    @functools.cached_property
    def _corpus(self) -> Corpus:
        packages = {name: _candidates(name) for name in (*PACKAGES, STANDARD_LIBRARY)}
        corpus, used = Corpus(), {}
        for domain in (NARRATIVE, CODE, STRUCTURED):
            left = int(self.megabytes * 1e6)
            # The smallest first, so that what it leaves over is known when the larger ones are served.
            order = sorted(packages, key=lambda name: sum(len(text) for *_, text in packages[name][domain]))
            for rank, name in enumerate(order):
                pieces = _select(packages[name][domain], domain, left // (len(order) - rank))
                for piece in pieces:
                    used[piece.path] = piece.sha256
                for text, source in _joined(pieces):
                    left -= len(text)
                    corpus.documents.append({"text": text, "domain": domain, "source": source})
        corpus.files = sorted(used.items())
        return corpus


def _candidates(package: str) -> dict[str, list]:
    """domain -> [(path, sha256, text)] of everything in a package that could be a document."""
    found = {NARRATIVE: [], CODE: [], STRUCTURED: []}
    root = Path(sysconfig.get_path("stdlib") if package == STANDARD_LIBRARY else folder_of(package))
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(f for f in folders if not SKIPPED_FOLDERS.fullmatch(f))
        for name in sorted(names):
            file = Path(folder, name)
            if file.suffix != ".py" and file.suffix not in DOMAIN_OF or SKIPPED_FILES.fullmatch(name):
                continue
            raw = file.read_bytes()
            text = _decoded(raw)
            if not text.strip() or any(mark in text[:3000] for mark in GENERATED):
                continue
            path = f"{package}/{file.relative_to(root).as_posix()}"
            if len(text) <= LONGEST or name in REFERENCE:
                found[_domain(path, text)].append((path, _sha256(raw), text))
    if package == STANDARD_LIBRARY:
        found[STRUCTURED] += [(f"{package}:{name}", _sha256(text.encode()), text) for name, text in renderings.tables()]
    else:
        about = importlib.metadata.distribution(package)
        for name, domain in (("METADATA", NARRATIVE), ("RECORD", STRUCTURED)):
            text = about.read_text(name) or ""
            found[domain].append((f"{package}.dist-info/{name}", _sha256(text.encode()), text))
    return found


def _domain(path: str, text: str) -> str:
    if not path.endswith(".py"):
        return DOMAIN_OF[Path(path).suffix]
    if Path(path).name in REFERENCE:
        return NARRATIVE
    if Path(path).name.startswith("configuration_") or sum(map(len, TABLE_ROW.findall(text))) > 0.5 * len(text):
        return STRUCTURED
    share = sum(map(len, DOCSTRING.findall(text))) / len(text)
    # Between prose and code are the documented interfaces: their signatures go to ``structured``.
    return NARRATIVE if share > 0.28 else CODE if share < 0.2 else STRUCTURED


def _select(candidates, domain: str, characters: int) -> list[Piece]:
    """Pieces in the order of their paths, picked by a hash of the path, up to so many characters."""
    pieces, per_folder, total = [], {}, 0
    for path, digest, text in sorted(candidates, key=lambda found: hashlib.sha256(found[0].encode()).digest()):
        if total >= characters:
            break
        folder = path.rpartition("/")[0]
        if per_folder.get(folder, 0) >= PER_FOLDER:
            continue
        texts = [text for text in _render(path, text, domain) if text.strip()]
        pieces += [Piece(path, text, digest) for text in texts]
        size = sum(map(len, texts))
        per_folder[folder] = per_folder.get(folder, 0) + size
        total += size
    return sorted(pieces, key=lambda piece: (piece.path, piece.text))


def _render(path: str, text: str, domain: str) -> list[str]:
    name = path.removeprefix(f"{STANDARD_LIBRARY}/").removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    if path.endswith("/METADATA"):
        return [text.partition("\n\n")[2]]  # the description; the fields before it repeat each other
    if path.endswith("/RECORD"):
        return [renderings.listing(text)]
    if not path.endswith(".py"):
        return [text]
    if path.endswith("topics.py"):
        return renderings.topics(text)
    if domain == NARRATIVE:
        return [renderings.prose(text, name)]
    if domain == CODE or sum(map(len, TABLE_ROW.findall(text))) > 0.5 * len(text):
        return [_without_licence(text)]
    return [renderings.interface(text, name)]


def _joined(pieces: list[Piece]) -> list[tuple[str, str]]:
    """Join neighbours, each under a line with its path, until a document is long enough. -> [(text, source)]"""
    documents, parts, size = [], [], 0
    for piece in pieces:
        if len(piece.text) >= LONG and size >= SHORTEST:
            documents.append(parts)
            parts, size = [], 0
        parts.append(piece)
        size += len(piece.text)
        if size >= LONG:
            documents.append(parts)
            parts, size = [], 0
    if size >= SHORTEST:
        documents.append(parts)
    return [
        ("\n\n".join(f"# {piece.path}\n\n{piece.text.strip()}" for piece in parts) + "\n", parts[0].path)
        for parts in documents
    ]


def folder_of(package: str) -> str:
    return str(Path(importlib.util.find_spec(package).origin).parent)  # finds a top-level package without importing it


def _sha256(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


def _decoded(raw: bytes) -> str:
    try:
        return raw.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError:
        return ""


def _without_licence(text: str) -> str:
    # The same 600 characters at the top of thousands of files teach nothing.
    head = re.match(r"(?:[ \t]*#.*\n|[ \t]*\n)+", text)
    return text[head.end() :] if head and re.search(r"(?i)copyright|licen[sc]e", head[0]) else text
