"""A tree that others read from a web server or an object store, page by page.

    PLACE/manifest.json              names the rest, and says what tree it is
    PLACE/table-1f0c....bin          the page table, which comes over when the tree is opened
    PLACE/pages-1f0c....-000.bin     pages one behind the other: each is a range of bytes

``publishing`` writes that folder; any server of files that answers ranges will do, and ``fsspec`` fetches. A page has
the bytes and the checksum that it has in the tree's database, so a tree is published without its models. What was
fetched is kept in a ``DiskCache``. Names are new with each publication, and that before stays, so nobody reads half of
each.

The other way would be SQLite itself over ranges (apsw has its file layer in Python). A page of 74 kB is a list of 18
blocks there, each of which names the next, below three more of an index; here it is one request.
"""

import hashlib
import json
import re
from functools import cache
from pathlib import Path

import numpy as np

from megactx.data.documents import cache_folder
from megactx.framework.errors import RunFailed
from megactx.framework.extra import extra

from .disk_cache import DISK, DiskCache
from .page_file import LARGEST, Missing, checked, page_id

FORMAT = 3  # of a manifest; 1 and 2 are those of ``storage``
MANIFEST, TABLE, NOTES, PAGES = "manifest.json", "table-{}.bin", "notes-{}.json", "pages-{}-{:03d}.bin"
DATA = re.compile(r"[0-9a-f]{16}")
MAGIC = b"megactx1"
ROW = np.dtype(
    [("id", "<u8"), ("offset", "<u8"), ("size", "<u4"), ("shard", "<u4"), ("zipped", "u1"), ("checksum", "V16")]
)
LEAST = 2**16  # bytes of a request: small pages bring their neighbours
SMALL = 2**24  # bytes of a manifest, at most
NOTED = 2**28  # bytes of notes, at most
READERS = 8  # requests at once
PATIENCE = 20.0  # seconds for a server to say something
URL = re.compile(r"(https?|s3)://[^\s?#@]+")


class Unreachable(RunFailed):
    """A page did not come over. It may the next time."""


def place_of(text: str | Path) -> str | Path:
    """A folder of this machine, or a URL as it is.

    Raises:
        ValueError: a URL that is not allowed.
    """
    if isinstance(text, Path) or "://" not in text:
        return Path(text)
    if not URL.fullmatch(text):
        raise ValueError(
            f"{text} is not allowed: a published tree is at http://, https:// or s3://, and its address has no user, no"
            " password, no ? and no #; where s3 asks who you are, the environment says it"
        )
    return text.rstrip("/")


class PublishedPages:
    """The pages of a published tree, read only; any number of threads may ask. It is read as a ``PageFile`` is.

    Args:
        place: a URL, or a folder of this machine.
        disk: bytes that all trees from elsewhere may take on this disk; 0: nothing is kept.

    Attributes:
        data: which publication it is.

    Raises:
        ValueError: there is none, it may not be read, it is damaged, or the server answers no ranges.
    """

    tier, readers = "remote", READERS

    def __init__(self, place: str | Path, disk: int = DISK):
        self.where, self.kept = str(place), None
        self.files, self.root = _filesystem(place)
        if not isinstance(place, Path) and disk > 0:
            self.kept = kept(disk)
        try:
            manifest = self.manifest()
            self.data, self.about_tree = manifest["data"], manifest["tree"]
            if not isinstance(self.data, str) or not DATA.fullmatch(self.data):
                raise ValueError(f"{MANIFEST} is damaged (data is {self.data!r})")
            self.rows = self._table(int(manifest["pages"]), manifest["table"])
            self._notes = int(manifest["notes"][0]), manifest["notes"][1]
        except Unreachable as error:
            raise ValueError(str(error).removeprefix(f"{self.where}: ")) from error
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{MANIFEST} is damaged ({type(error).__name__}: {error})") from error
        self.ids = np.ascontiguousarray(self.rows["id"])

    def manifest(self) -> dict:
        """What is published there now."""
        content = self._bytes(MANIFEST, 0, SMALL)
        try:
            manifest = json.loads(content)
        except ValueError as error:
            raise ValueError(f"{MANIFEST} is damaged ({error})") from error
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            found = manifest.get("format") if isinstance(manifest, dict) else None
            raise ValueError(f"{MANIFEST} is none of a published tree: format is {found!r}, {FORMAT} is needed")
        return manifest

    def _table(self, pages: int, digest: str) -> np.ndarray:
        name, size = TABLE.format(self.data), pages * ROW.itemsize
        content = self._bytes(name, len(MAGIC), len(MAGIC) + size)
        if len(content) == len(MAGIC) + size and content.startswith(MAGIC):
            raise ValueError("the server sends whole files where a range of bytes was asked for; it must answer ranges")
        if len(content) != size or sha256(MAGIC + content) != digest:
            raise ValueError(f"the page table {name} is damaged: its checksum is not that of {MANIFEST}")
        rows = np.frombuffer(content, ROW)
        if pages and (rows["size"].max() > LARGEST or (np.diff(rows["id"].astype(np.int64)) <= 0).any()):
            raise ValueError(f"the page table {name} is damaged: its pages are not in order, or too large")
        return rows

    def notes(self) -> dict:
        """What was noted when it was published.

        Raises:
            ValueError: it is damaged.
            Unreachable: it did not come over.
        """
        size, digest = self._notes
        content = self._bytes(NOTES.format(self.data), 0, min(size, NOTED) or 1)
        if sha256(content) != digest:
            raise ValueError(f"{NOTES.format(self.data)} is damaged: its checksum is not that of {MANIFEST}")
        return json.loads(content)

    def about(self, name: str):
        """What is said of the tree."""
        return self.about_tree if name == "tree" else None

    def again(self) -> "PublishedPages":
        return self

    def changes(self) -> int:
        """A publication never changes."""
        return 0

    def close(self) -> None:
        """Nothing is held: others may read through the same connections."""

    def size(self) -> int:
        """Bytes of all pages, where they lie."""
        return int(self.rows["size"].sum())

    def found(self, lod: int, part: str, number: int) -> tuple[str, bytes]:
        """The tier that had a page, and its bytes.

        Raises:
            ValueError: it is not there, or not what was published.
            Unreachable: it did not come over.
        """
        own = page_id(lod, part, number)
        place = int(np.searchsorted(self.ids, np.uint64(own)))
        if place == len(self.ids) or int(self.ids[place]) != own:
            raise Missing("it is missing")
        row = self.rows[place]
        if self.kept is not None and (value := self.kept.get(self.data, own)) is not None:
            try:
                return "disk", checked(own, value, row["checksum"].tobytes(), row["zipped"])
            except ValueError:
                self.kept.drop(self.data, own)
        return self.tier, self._fetch(place)

    def numbers(self, lod: int, part: str) -> list[int]:
        """Which pages of a part there are."""
        first = page_id(lod, part, 0)
        start, stop = np.searchsorted(self.ids, np.array([first, first + (1 << 48)], np.uint64))
        return [int(own) - first for own in self.ids[start:stop]]

    def get(self, lod: int, part: str, number: int) -> bytes:
        """The bytes of a page; see ``found``."""
        return self.found(lod, part, number)[1]

    def _fetch(self, place: int) -> bytes:
        """A page, and where it is small those behind it, which are kept."""
        row, end = self.rows[place], place + 1
        start = stop = int(row["offset"])
        stop += int(row["size"])
        least = 0 if self.kept is None else min(LEAST, self.kept.budget // 8)
        while end < len(self.rows) and stop - start < least:
            other = self.rows[end]
            if other["shard"] != row["shard"] or int(other["offset"]) != stop:
                break
            stop, end = stop + int(other["size"]), end + 1
        name = PAGES.format(self.data, int(row["shard"]))
        try:
            content = self._bytes(name, start, stop)
        except FileNotFoundError as error:
            raise ValueError(f"it is missing: {name} is not there; if it was published anew, open it again") from error
        if len(content) > stop - start:
            raise Unreachable(f"{self.where}: the server sends whole files where a range of bytes was asked for")
        good = []
        for other in self.rows[place:end]:
            at, own = int(other["offset"]) - start, int(other["id"])
            value = content[at : at + int(other["size"])]
            try:
                whole = checked(own, value, other["checksum"].tobytes(), 0)
                good.append((own, whole))
            except ValueError:
                if own == int(row["id"]):
                    raise
        if self.kept is not None:
            self.kept.put(self.data, good)
        return checked(good[0][0], good[0][1], row["checksum"].tobytes(), row["zipped"])

    def _bytes(self, name: str, start: int, stop: int) -> bytes:
        """A range of a file, tried twice.

        Raises:
            FileNotFoundError: there is no such file.
            Unreachable: it did not come over.
            ValueError: nobody may read it.
        """
        last = None
        for _ in range(2):
            try:
                return self.files.cat_file(f"{self.root}/{name}", start=start, end=stop)
            except FileNotFoundError as error:
                if name == MANIFEST or name.startswith("table"):
                    raise ValueError(f"there is no published tree, {name} is missing (404)") from error
                raise
            except Exception as error:  # of whatever library fsspec fetches with
                status = getattr(error, "status", None)
                if isinstance(error, PermissionError) or status in (401, 403):
                    raise Unreachable(f"{self.where}: {name} may not be read (403)") from error
                if status == 416:  # a range behind the end
                    raise ValueError("it is damaged: its file is cut") from error
                last = error
        said = str(last) or "no answer"
        raise Unreachable(
            f"{self.where}: {name} did not come over ({type(last).__name__}: {said}). What is in memory and on this"
            " disk can be read on"
        ) from last


@cache
def kept(budget: int) -> DiskCache:
    """The cache of this process, and of all others of this person."""
    return DiskCache(cache_folder() / "published.db", budget)


def _filesystem(place: str | Path):
    import fsspec

    protocol = "file" if isinstance(place, Path) else place.partition("://")[0]
    with extra(str(place), "remote"):
        if protocol in ("http", "https"):
            import aiohttp

            timeout = aiohttp.ClientTimeout(total=None, sock_connect=PATIENCE, sock_read=PATIENCE)
            files = fsspec.filesystem(protocol, client_kwargs={"timeout": timeout})
        elif protocol == "s3":
            patience = {"connect_timeout": PATIENCE, "read_timeout": PATIENCE}
            files = fsspec.filesystem(protocol, config_kwargs=patience)
        else:
            files = fsspec.filesystem(protocol)
    return files, str(place.absolute()) if isinstance(place, Path) else place


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
