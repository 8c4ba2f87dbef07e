"""What was taken away from a tree, in the same database: how it goes there, comes back, or goes for good.

    compact   tokens of a span, and its gists below the floor -> archive
    restore   archive -> back in their places, bit for bit
    purge     what has been in the archive for long is gone

Each is one transaction of the tree's database, killed at any moment it is done or not done. ``LiveArchive`` does it to
a tree that a session has open: its pages in memory change with those on disk, and what is not saved of it is written in
the same transaction. So there is one writer still.

K tokens of a block, n blocks of a span.
"""

import hashlib
import math
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from megactx.framework.files import writing

from . import storage
from .page_cache import packed
from .page_file import PageFile
from .pages import Pages

FORMAT = 1  # of a plan
RECENT = 16_384  # newest tokens that are never touched: windows hold them raw
RUN = 8_192  # tokens that are archived together, at most
REMEDY = "copy the folder to another disk"


class Archive:
    """A tree of one row whose spans may be archived.

    Args:
        folder: of the tree.
        file: its database.
        levels: its pages.
        size: K.
        tokens: that it has.
        about: what the database says of it.
    """

    def __init__(self, folder: Path, file: PageFile, levels: list[Pages], size: int, tokens: int, about: dict):
        self.folder, self.file, self.levels, self.size, self.tokens, self.about = (
            folder,
            file,
            levels,
            size,
            tokens,
            about,
        )

    def _free(self, first: int, end: int, floor: int, opened: bool) -> Tensor:
        """Whether blocks first .. end - 1 may get a floor, [n]: not the first one, protected or new ones, those that
        have one, and without ``opened`` those that a window has opened."""
        blocks, number = self.levels[1], torch.arange(first, end)
        names = ("protected", "floor", "opened")[: 2 if opened else 3]
        there = [blocks.span(name, first, end)[0].cpu() > 0 for name in names]
        return (number > 0) & ((number + 1) * self.size <= self.tokens - RECENT) & ~torch.stack(there).any(0)

    def apply(self, plan: dict) -> int:
        """Do what a plan says, all of it or nothing; what has been protected or opened since stays. -> bytes."""
        if plan.get("format") != FORMAT or plan.get("tokens", 0) > self.tokens:
            raise ValueError("the plan is not one of this tree, or of another version")
        freed = 0
        with self._step():
            for action in plan["actions"]:
                start, stop, floor = (int(action[name]) for name in ("start", "stop", "floor"))
                wide = self.size**floor
                if action["action"] != "compact" or start % wide or stop % wide or not 0 <= start < stop <= self.tokens:
                    raise ValueError(f"the plan has an action that cannot be done: {action}")
                for first, end in self._runs(start, stop, floor, action.get("opened") is True):
                    freed += self._compact(first, end, floor, action["reason"])
            self._write_changes(taken=True)
        return freed

    def restore(self, start: int, stop: int) -> int:
        """Bring back what the archive has of tokens start .. stop - 1; -> spans.

        Raises:
            ValueError: the archive is damaged there. Nothing was restored.
        """
        query = "SELECT start, stop, floor, value, checksum FROM archive WHERE start < ? AND stop > ? ORDER BY start"
        count = 0
        with self._step():
            for first, end, floor, value, checksum in self.file.db.execute(query, (stop, start)).fetchall():
                if hashlib.blake2b(value).digest() != checksum:
                    raise ValueError(f"{self.folder}: the archive of tokens {first} to {end - 1} is damaged")
                self._put_back(first, end, floor, zlib.decompress(value))
                self.file.db.execute("DELETE FROM archive WHERE start = ?", (first,))
                self._log("restore", first, end, "")
                count += 1
            self._write_changes(taken=True)
        return count

    def purge(self, days: float) -> int:
        """What has been in the archive for so many days goes for good; -> spans.

        Raises:
            ValueError: days that are not allowed.
        """
        if not 0 <= days < math.inf:
            raise ValueError(f"days={days:g} is not allowed: at least 0")
        before = int(time.time() - days * 86_400)
        with writing(self.folder, REMEDY), self.file.step():
            gone = self.file.db.execute("SELECT start, stop FROM archive WHERE time <= ?", (before,)).fetchall()
            self.file.db.execute("DELETE FROM archive WHERE time <= ?", (before,))
            for start, stop in gone:
                self._log("purge", start, stop, f"{days:g} days")
        return len(gone)

    def log(self) -> list[tuple]:
        """(time, action, start, stop, reason) of all that was done, the oldest first."""
        return self.file.db.execute("SELECT time, action, start, stop, reason FROM log ORDER BY id").fetchall()

    def _runs(self, start: int, stop: int, floor: int, opened: bool) -> Iterator[tuple[int, int]]:
        """Spans of start .. stop - 1 that may still get a floor, in whole nodes of that level. None is longer than
        ``RUN`` tokens or one node, for each is restored as a whole."""
        wide = self.size**floor
        first, end = start // self.size, stop // self.size
        may = self._free(first, end, floor, opened).view(-1, wide // self.size).all(1)
        first = None
        for node, free in enumerate([*may.tolist(), False]):
            if first is not None and (not free or (node - first) * wide >= RUN):
                yield start + first * wide, start + node * wide
                first = None
            if free and first is None:
                first = node

    def _compact(self, start: int, stop: int, floor: int, reason: str) -> int:
        parts = []
        for level, name, first, end in self._below(start, stop, floor):
            part = level.span(name, first, end).contiguous()
            parts.append(part.view(-1).view(torch.uint8).cpu().numpy().tobytes())
            self._write(level, name, first, torch.zeros_like(part))
        value = zlib.compress(b"".join(parts), 6)
        row = (start, stop, floor, int(time.time()), value, hashlib.blake2b(value).digest())
        self.file.db.execute("INSERT INTO archive VALUES (?, ?, ?, ?, ?, ?)", row)
        self._floor(start, stop, floor)
        self._log("compact", start, stop, reason)
        return sum(map(len, parts))

    def _put_back(self, start: int, stop: int, floor: int, value: bytes) -> None:
        at = 0
        for level, name, first, end in self._below(start, stop, floor):
            shape, dtype = level.columns[name]
            count = (end - first) * prod(shape)
            flat = torch.frombuffer(bytearray(value[at : at + count * dtype.itemsize]), dtype=dtype)
            self._write(level, name, first, flat.view(1, end - first, *shape))
            at += count * dtype.itemsize
        self._floor(start, stop, 0)

    def _below(self, start: int, stop: int, floor: int) -> Iterator[tuple[Pages, str, int, int]]:
        """(level, column, first entry, end) of what lies below a floor."""
        for lod in range(floor):
            level, wide = self.levels[lod], self.size**lod
            for name in level.parts()["body"]:
                yield level, name, start // wide, stop // wide

    def _write(self, level: Pages, name: str, first: int, values: Tensor) -> None:
        index = torch.arange(first, first + values.shape[1], device=level.device)
        level.write(torch.zeros_like(index), index, **{name: values[0].to(level.device)})

    def _floor(self, start: int, stop: int, floor: int) -> None:
        first, count = start // self.size, (stop - start) // self.size
        self._write(self.levels[1], "floor", first, torch.full((1, count), floor, dtype=torch.uint8))
        self.about["compacted"] = self.about.get("compacted", 0) + (count if floor else -count)

    def _log(self, action: str, start: int, stop: int, reason: str) -> None:
        row = (int(time.time()), action, start, stop, reason)
        self.file.db.execute("INSERT INTO log (time, action, start, stop, reason) VALUES (?, ?, ?, ?, ?)", row)

    @contextmanager
    def _step(self) -> Iterator[None]:
        with writing(self.folder, REMEDY), self.file.step():
            yield

    def _write_changes(self, taken: bool = False) -> None:
        """Write the pages that have changed. ``taken``: who reads the tree must know, for something is gone or back."""
        for level in self.levels:
            pages = ((level.lod, part, n, packed(level, part, n)) for part, n in sorted(level.dirty))
            self.file.put(pages, zipped=True)
            level.dirty = set()
        self.about["commit"], self.about["epoch"] = self.about["commit"] + 1, self.about.get("epoch", 0) + taken
        self.file.say("tree", self.about)


class LiveArchive(Archive):
    """That of a tree that is open and goes on. It was saved, or opened, and this process alone writes it.

    Args:
        tree: with what is in memory of it.
        saved: tokens that its session has saved. What lies behind them may be forgotten, so it is not touched.
        shown: floor -> numbers of blocks that a window shows finer than that.
    """

    def __init__(self, tree, saved: int, shown: Callable[[int], Tensor] = lambda floor: torch.zeros(0)):
        file, _ = tree.home
        tokens = min(saved, int(tree.lengths[0]))
        super().__init__(file.path.parent, file, tree.levels, tree.block_size, tokens, file.about("tree"))
        self.tree, self.shown = tree, shown
        self._undo: list[tuple[Pages, str, int, Tensor]] = []

    def _free(self, first: int, end: int, floor: int, opened: bool) -> Tensor:
        return super()._free(first, end, floor, opened) & ~torch.isin(torch.arange(first, end), self.shown(floor).cpu())

    def _write(self, level: Pages, name: str, first: int, values: Tensor) -> None:
        self._undo.append((level, name, first, level.span(name, first, first + values.shape[1]).clone()))
        super()._write(level, name, first, values)

    @contextmanager
    def _step(self) -> Iterator[None]:
        """As it is on the disk it is in memory, whatever happens."""
        commit, self._undo = self.tree.home[1], []
        try:
            with writing(self.folder, REMEDY), self.file.step():
                self.about = self.file.about("tree")
                if self.about["commit"] != commit:
                    raise ValueError(f"{self.folder}: another process has written there; save the session anew")
                yield
        finally:
            if self.file.about("tree")["commit"] > commit:
                self.tree.compacted = self.about["compacted"]
                storage.written(self.tree)
            else:
                for level, name, first, values in reversed(self._undo):
                    super()._write(level, name, first, values)

    def _write_changes(self, taken: bool = False) -> None:
        self.about["epoch"] = self.about.get("epoch", 0) + taken
        storage.put_changes(self.tree, self.about | storage.grown(self.tree))
