"""What is followed: documents by name, each with a mark that changes when it does.

A source is a class: a change in the folder ``watched`` concerns it, ``marks`` looks, ``text`` reads a document.
"""

import email.policy
import hashlib
import mailbox
import re
from collections.abc import Callable
from email.message import EmailMessage
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

from megactx.data.files import Files
from megactx.framework.files import checksum, matches
from megactx.runtime.text import encodable

LARGEST = 2**26  # bytes of a file
BETWEEN = "\n\n"  # rows of one file
HEADERS = ("From", "To", "Date", "Subject")
ATOM = "{http://www.w3.org/2005/Atom}"


class Folder:
    """A folder of text files, or one file; a document is a file, by its path in the folder.

    Args:
        path: searched recursively; names that begin with a dot are left out.
    """

    def __init__(self, path: Path):
        self.path = path
        self.watched = path if path.is_dir() else path.parent
        self._marks: dict[Path, tuple[str, str]] = {}  # path -> state of the file, mark

    def marks(self) -> dict[str, str]:
        """Raises: OSError: the folder is gone."""
        single = self.path.is_file()
        files = [self.path] if single else sorted(self._files())
        self._marks = {path: self._mark(path) for path in files}
        return {
            path.name if single else str(path.relative_to(self.path)): mark for path, (_, mark) in self._marks.items()
        }

    def _mark(self, path: Path) -> tuple[str, str]:
        """Of the content, as long as nothing says that it is another one: neither size nor time of change does."""
        state = _state(path)
        if (known := self._marks.get(path)) is not None and known[0] == state:
            return known
        try:
            return state, checksum(path)
        except OSError:  # it cannot be read now
            return state, state

    def text(self, name: str) -> str:
        """Raises: ValueError: it is not text; OSError: it cannot be read now."""
        path = self.path if self.path.is_file() else self.path / name
        with path.open("rb"):  # what cannot be opened now may be later
            pass
        if path.stat().st_size == 0:
            return ""
        rows = [row["text"] for row in Files(str(path), max_bytes=LARGEST).documents()]
        return _checked(BETWEEN.join(rows), name)

    def _files(self) -> list[Path]:
        if not self.path.is_dir():
            raise FileNotFoundError(2, "there is no such folder", str(self.path))
        return [
            path
            for path in self.path.rglob("*")
            if path.is_file()
            and not path.is_symlink()  # it may lead out of the folder
            and not any(part.startswith(".") for part in path.relative_to(self.path).parts)
        ]


class Mbox:
    """A mailbox in one file; a document is a message, by its Message-ID."""

    def __init__(self, path: Path):
        self.path, self.watched = path, path.parent
        self._texts: dict[str, str] = {}
        self._seen = ""

    def marks(self) -> dict[str, str]:
        """Raises: OSError: the file is gone."""
        if (seen := _state(self.path)) != self._seen:
            self._texts, self._seen = self._read(), seen
        return {name: _digest(text) for name, text in self._texts.items()}

    def text(self, name: str) -> str:
        """Raises: ValueError: it is not text."""
        return _checked(self._texts[name], name)

    def _read(self) -> dict[str, str]:
        found = {}
        box = mailbox.mbox(self.path, factory=_message, create=False)
        try:
            for number, message in enumerate(box):
                text = _mail(message)
                name = str(message["Message-ID"] or "").strip() or f"message {number}"
                found[name if name not in found else f"{name} {_digest(text)}"] = text
        finally:
            box.close()
        return found


class Feed:
    """RSS and Atom files; a document is an entry, by its file and id.

    Args:
        path: a file or a glob.
    """

    def __init__(self, path: Path):
        self.path, self.watched = path, path.parent
        self._entries: dict[str, str] = {}

    def marks(self) -> dict[str, str]:
        """Raises: ValueError: a file is no feed."""
        self._entries = {}
        for path in sorted(matches(self.path)):
            for name, text in _entries(path):
                self._entries.setdefault(f"{path.name} {name}", text)
        return {name: _digest(text) for name, text in self._entries.items()}

    def text(self, name: str) -> str:
        """Raises: ValueError: it is not text."""
        return _checked(self._entries[name], name)


KINDS: dict[str, Callable] = {"folder": Folder, "mbox": Mbox, "feed": Feed}


def _state(path: Path) -> str:
    found = path.stat()
    return f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns} {found.st_ino}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _checked(text: str, name: str) -> str:
    if "\0" in text:
        raise ValueError(f"{name}: binary, not text (a NUL byte at character {text.index(chr(0))})")
    return encodable(text)


def _message(file) -> EmailMessage:
    return email.message_from_binary_file(file, policy=email.policy.default)


def _mail(message: EmailMessage) -> str:
    lines = [f"{name}: {' '.join(str(message[name]).split())}" for name in HEADERS if message[name]]
    body = message.get_body(("plain", "html"))
    content = "" if body is None else _content(body)
    if body is not None and body.get_content_type() == "text/html":
        content = _plain(content)
    return "\n".join([*lines, "", content.replace("\r\n", "\n").replace("\0", "\ufffd").strip()])


def _content(body) -> str:
    try:
        return str(body.get_content())
    except (LookupError, ValueError):  # a character set that nobody knows
        return (body.get_payload(decode=True) or b"").decode("utf-8", "replace")


def _entries(path: Path) -> list[tuple[str, str]]:
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path}: larger than {LARGEST:,} bytes")
    raw = path.read_bytes()
    if re.search(rb"<!(DOCTYPE|ENTITY)", raw, re.IGNORECASE):  # no feed needs one, and it can be a bomb
        raise ValueError(f"{path}: a feed with a DOCTYPE is not read")
    try:
        root = ElementTree.fromstring(raw)
    except ElementTree.ParseError as error:
        raise ValueError(f"{path}: no feed ({error})") from error
    found = []
    for entry in [*root.iter("item"), *root.iter(f"{ATOM}entry")]:

        def told(*names: str, entry=entry) -> str:
            return next((t.strip() for name in names if (t := entry.findtext(name)) and t.strip()), "")

        title, date = told("title", f"{ATOM}title"), told("pubDate", f"{ATOM}updated", f"{ATOM}published")
        text = _plain(told("description", f"{ATOM}content", f"{ATOM}summary"))
        name = told("guid", "link", f"{ATOM}id") or _digest(title + text)
        found.append((name, "\n".join(line for line in (title, date) if line) + f"\n\n{text}"))
    if not found and root.tag not in ("rss", f"{ATOM}feed"):
        raise ValueError(f"{path}: no feed, its root is {root.tag}")
    return found


class _Words(HTMLParser):
    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.found: list[str] = []
        self.silent = 0

    def handle_starttag(self, tag, _):
        self.silent += tag in ("script", "style")
        if tag in ("p", "br", "li", "div", "tr"):
            self.found.append("\n")

    def handle_endtag(self, tag):
        self.silent -= tag in ("script", "style") and self.silent > 0

    def handle_data(self, data):
        if not self.silent:
            self.found.append(data)


def _plain(html: str) -> str:
    words = _Words()
    words.feed(html)
    words.close()
    lines = (" ".join(line.split()) for line in "".join(words.found).split("\n"))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()
