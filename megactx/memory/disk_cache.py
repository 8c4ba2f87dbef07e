"""Pages of published trees that were fetched before: one SQLite database on this disk, never above its budget.

Least recently used out first. All processes of a person share it. What it holds can be fetched again, so nothing here
waits for the disk, and a database that is damaged is made anew.
"""

import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

DISK = 2**32  # bytes, if nobody says otherwise
WAIT = 5.0  # seconds for another process that writes
TABLE = """
CREATE TABLE IF NOT EXISTS page (
    tree TEXT, id INTEGER, size INTEGER, used INTEGER, value BLOB, PRIMARY KEY (tree, id)
)
"""
OLDEST = "CREATE INDEX IF NOT EXISTS oldest ON page (used, size)"
BYTES = "CREATE INDEX IF NOT EXISTS bytes ON page (tree, size)"


class DiskCache:
    """One database; any number of threads may use it.

    Args:
        path: of the file; made if it is not there.
        budget: bytes of pages, at most.

    Attributes:
        evicted: pages of each tree that left for want of room.
    """

    def __init__(self, path: Path, budget: int = DISK):
        self.path, self.budget, self.evicted, self.lock = path, budget, Counter(), threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._open()
        except sqlite3.DatabaseError:
            self._anew()

    def _open(self) -> None:
        self.db = sqlite3.connect(self.path, isolation_level=None, timeout=WAIT, check_same_thread=False)
        for line in (
            "PRAGMA journal_mode=WAL",
            "PRAGMA synchronous=OFF",
            "PRAGMA trusted_schema=OFF",
            TABLE,
            OLDEST,
            BYTES,
        ):
            self.db.execute(line)

    def _anew(self) -> None:
        self.db.close()
        for end in ("", "-wal", "-shm"):
            self.path.with_name(self.path.name + end).unlink(missing_ok=True)
        self._open()

    @contextmanager
    def _using(self) -> Iterator[None]:
        """One thread at a time. Where the disk is full or another process is slow, nothing is kept, and that is all."""
        with self.lock:
            try:
                yield
            except sqlite3.OperationalError:
                pass
            except sqlite3.DatabaseError:
                self._anew()

    def get(self, tree: str, page: int) -> bytes | None:
        """A page as it was put; ``None``: it is not here."""
        value = None
        with self._using():
            found = self.db.execute("SELECT value FROM page WHERE tree=? AND id=?", (tree, page)).fetchone()
            value = None if found is None else found[0]
            if value is not None:
                self.db.execute("UPDATE page SET used=? WHERE tree=? AND id=?", (time.time_ns(), tree, page))
        return value if isinstance(value, bytes) else None

    def put(self, tree: str, pages: Iterable[tuple[int, bytes]]) -> None:
        """Keep pages (id, value) of a tree, and let the oldest go where there is no room."""
        now = time.time_ns()
        rows = [(tree, page, len(value), now, value) for page, value in pages]
        with self._using():
            try:
                self.db.execute("BEGIN IMMEDIATE")
                self.db.executemany("INSERT OR REPLACE INTO page VALUES (?, ?, ?, ?, ?)", rows)
                self._make_room()
                self.db.execute("COMMIT")
            finally:
                if self.db.in_transaction:
                    self.db.execute("ROLLBACK")

    def drop(self, tree: str, page: int) -> None:
        """Forget a page, which was not what it should be."""
        with self._using():
            self.db.execute("DELETE FROM page WHERE tree=? AND id=?", (tree, page))

    def bytes(self, tree: str) -> int:
        """Of the pages of a tree that are here."""
        size, query = 0, "SELECT COALESCE(SUM(size), 0) FROM page INDEXED BY bytes WHERE tree=?"
        with self._using():
            size = self.db.execute(query, (tree,)).fetchone()[0]
        return size

    def close(self) -> None:
        self.db.close()

    def _make_room(self) -> None:
        over = self.db.execute("SELECT COALESCE(SUM(size), 0) FROM page INDEXED BY oldest").fetchone()[0] - self.budget
        oldest = self.db.execute("SELECT tree, id, size FROM page INDEXED BY oldest ORDER BY used")
        leaving = []
        while over > 0:
            tree, page, size = oldest.fetchone()
            leaving.append((tree, page))
            over -= size
        oldest.close()
        self.db.executemany("DELETE FROM page WHERE tree=? AND id=?", leaving)
        self.evicted.update(tree for tree, _ in leaving)
