"""The pages of a tree in one SQLite database: what is on disk of them, whole and checked.

A page's row has its bytes and a checksum over its name and its bytes. A transaction is there as a whole or not at all,
whatever stops the process. Readers go on while a writer writes (write-ahead log). SQLite was measured against LMDB,
shards of safetensors and a file of its own with a page table, see ``benchmarks/storage_engines.py``.

B rows, N entries of a page.
"""

import hashlib
import json
import os
import sqlite3
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

PARTS = ("body", "facts", "key", "signals")
CHECK = 16  # bytes of a checksum
LARGEST = 2**28  # bytes of a page that was zipped: who made the file may be a stranger
TABLES = {
    "page": "id INTEGER PRIMARY KEY, value BLOB NOT NULL, checksum BLOB NOT NULL, zipped INTEGER NOT NULL",
    "about": "name TEXT PRIMARY KEY, value TEXT NOT NULL",
    # What curation took away, until it is purged; and all that it ever did.
    "archive": "start INTEGER PRIMARY KEY, stop INTEGER, floor INTEGER, time INTEGER, value BLOB, checksum BLOB",
    "log": "id INTEGER PRIMARY KEY, time INTEGER, action TEXT, start INTEGER, stop INTEGER, reason TEXT",
}
WAIT = 30.0  # seconds for another process that writes


class Missing(ValueError):
    """A page is not there."""


class PageFile:
    """One database. Two threads may each have their own connection to it.

    Args:
        path: of the file.
        new: make it; else it must be there.

    Raises:
        ValueError: it is no database of pages.
    """

    tier, readers = "disk", 1  # where pages come from; threads that read ahead, of which each needs a connection

    def __init__(self, path: Path, new: bool = False):
        self.path, self.where = path, str(path.parent)
        self.db = self._connected("rwc" if new else "rw")
        if new:  # nobody knows of it before it is whole and on the disk
            self.db.execute("PRAGMA page_size=4096")
            self.db.execute("PRAGMA journal_mode=OFF")
            self.db.execute("PRAGMA synchronous=OFF")
            for name, columns in TABLES.items():
                self.db.execute(f"CREATE TABLE {name} ({columns})")

    def _connected(self, mode: str) -> sqlite3.Connection:
        name = self.path.absolute().as_uri()
        alone = not any(self.path.with_name(self.path.name + end).exists() for end in ("-wal", "-journal"))
        if mode == "rw" and alone and not os.access(self.path.parent, os.W_OK):
            mode = "ro&immutable=1"  # nobody can write there, and SQLite would want a file for its readers
        try:
            db = sqlite3.connect(
                f"{name}?mode={mode}", uri=True, isolation_level=None, timeout=WAIT, check_same_thread=False
            )
            db.execute("PRAGMA synchronous=FULL")
            db.execute("PRAGMA trusted_schema=OFF")
            if mode != "rwc":
                db.execute("SELECT value FROM about LIMIT 1").fetchone()
        except sqlite3.Error as error:
            full = getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL)
            # Readers of a database need a small file beside it, too.
            what = "cannot be opened, the disk is full or fails: make room" if full else "is damaged, or cannot be read"
            raise ValueError(f"{self.path.name} {what} ({error})") from error
        return db

    def again(self) -> "PageFile":
        """Another connection to the same file."""
        return PageFile(self.path)

    def publish(self) -> None:
        """All of a new file is on the disk, and readers may come."""
        self.db.execute("PRAGMA journal_mode=WAL")
        self.db.execute("PRAGMA synchronous=FULL")
        self.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        handle = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    @contextmanager
    def step(self) -> Iterator[None]:
        """What the block changes is done as a whole or not at all; one writer at a time."""
        self.db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.db.execute("COMMIT")
        except BaseException:
            if self.db.in_transaction:
                self.db.execute("ROLLBACK")
            raise

    @contextmanager
    def reading(self) -> Iterator[None]:
        """What the block reads is of one moment, whoever writes meanwhile."""
        self.db.execute("BEGIN")
        try:
            yield
        finally:
            self.db.execute("COMMIT")

    def about(self, name: str):
        """A JSON value that is kept beside the pages; ``None``: there is none of that name."""
        found = self.db.execute("SELECT value FROM about WHERE name=?", (name,)).fetchone()
        return None if found is None else json.loads(found[0])

    def say(self, name: str, value) -> None:
        self.db.execute("INSERT OR REPLACE INTO about VALUES (?, ?)", (name, json.dumps(value)))

    def put(self, pages: Iterable[tuple[int, str, int, bytes]], zipped: bool = False) -> None:
        """Write pages (level, part, number, bytes); ``zipped``: those that become smaller by it."""
        self.db.executemany("INSERT OR REPLACE INTO page VALUES (?, ?, ?, ?)", _rows(pages, zipped))

    def get(self, lod: int, part: str, number: int) -> bytes:
        """The bytes of a page.

        Raises:
            ValueError: it is not there, or not what was written.
        """
        own = page_id(lod, part, number)
        try:
            found = self.db.execute("SELECT value, checksum, zipped FROM page WHERE id=?", (own,)).fetchone()
        except sqlite3.DatabaseError as error:
            raise ValueError(f"it is damaged ({error})") from error
        if found is None:
            raise Missing("it is missing")
        value, checksum, zipped = found
        return checked(own, value, checksum, zipped)

    def found(self, lod: int, part: str, number: int) -> tuple[str, bytes]:
        """``get``, and the tier that had the page."""
        return self.tier, self.get(lod, part, number)

    def size(self) -> int:
        """Bytes on the disk."""
        return self.path.stat().st_size

    def rows(self) -> Iterator[tuple[int, bytes, bytes, int]]:
        """(id, value, checksum, zipped) of all pages as they lie there, in the order of their ids."""
        yield from self.db.execute("SELECT id, value, checksum, zipped FROM page ORDER BY id")

    def sizes(self) -> dict[str, int]:
        """Bytes of tokens, gists, facts, keys and signals as they lie there, and of the archive."""
        found = dict.fromkeys(("tokens", "gists", "facts", "keys", "signals"), 0)
        query = "SELECT id >> 48, SUM(LENGTH(value)) FROM page GROUP BY id >> 48"
        for place, size in self.db.execute(query):
            lod, part = place >> 8, PARTS[place & 255]
            found["tokens" if lod == 0 else {"body": "gists", "key": "keys"}.get(part, part)] += size
        found["archive"] = self.db.execute("SELECT COALESCE(SUM(LENGTH(value)), 0) FROM archive").fetchone()[0]
        return found

    def numbers(self, lod: int, part: str, first: int = 0) -> list[int]:
        """Numbers of the pages that are there, from ``first`` on."""
        low, high = page_id(lod, part, first), page_id(lod, part, 0) + 2**48
        return [i & (2**48 - 1) for (i,) in self.db.execute("SELECT id FROM page WHERE id>=? AND id<?", (low, high))]

    def remove(self, lod: int, part: str, first: int = 0) -> None:
        """Remove pages from ``first`` on."""
        low, high = page_id(lod, part, first), page_id(lod, part, 0) + 2**48
        self.db.execute("DELETE FROM page WHERE id>=? AND id<?", (low, high))

    def changes(self) -> int:
        """A number that changes when another connection has written."""
        return self.db.execute("PRAGMA data_version").fetchone()[0]

    def close(self) -> None:
        self.db.close()


def _rows(pages, zipped: bool) -> Iterator[tuple]:
    for *name, value in pages:
        own, smaller = page_id(*name), zlib.compress(value, 1) if zipped else value
        short = len(smaller) < 0.9 * len(value)
        value = smaller if short else value
        yield own, value, _checksum(own, value), int(short)


def _unzipped(value: bytes) -> bytes:
    stream = zlib.decompressobj()
    try:
        whole = stream.decompress(value, LARGEST)
    except zlib.error as error:
        raise ValueError(f"it is damaged ({error})") from error
    if not stream.eof:
        raise ValueError(f"it is damaged, or larger than {LARGEST:,} bytes")
    return whole


def page_id(lod: int, part: str, number: int) -> int:
    """A page's name: its level, part and number."""
    return (lod << 56) + (PARTS.index(part) << 48) + number


def checked(own: int, value, checksum: bytes, zipped) -> bytes:
    """A page as it was written.

    Raises:
        ValueError: it is another one.
    """
    if not isinstance(value, bytes) or _checksum(own, value) != checksum:
        raise ValueError("it is damaged: its checksum is another one")
    return _unzipped(value) if zipped else value


def _checksum(own: int, value: bytes) -> bytes:
    return hashlib.blake2b(value, digest_size=CHECK, key=own.to_bytes(8, "little")).digest()
