"""What of a stored tree is in memory: pages come when they are needed, and leave when there is no room.

    disk -- fetch --> memory, at most ``budget`` bytes: least recently used out first, never the window's, never changed
      \\-- one worker reads ahead what the window may open next --/

B rows, N entries of a page.
"""

import time
from collections import OrderedDict, deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice, zip_longest
from math import prod

import torch
from torch import Tensor

from .page_file import Missing, PageFile
from .pages import SIGNALS

MEMORY = 2**28  # bytes of pages in memory, if nobody says otherwise
QUEUE = 256  # pages that are asked for ahead, at most
LOOKED = 64  # pages that are looked at for one that may leave
TIMES = 4096  # of the newest reads, for the metrics

Key = tuple[int, str, int]  # level, part, number of the page


class PageCache:
    """Pages of the levels of one tree.

    Args:
        file: where the pages are.
        levels: the tree's, see ``Pages``.
        budget: bytes of pages in memory, at most. The window's pages and those that are not saved yet may exceed it.
        check: called with each page of tokens that is read, [B, N].

    Attributes:
        damaged: pages that could not be read, and what was said of each.
        counts: ``hit``, ``ahead`` (read by the worker in time), ``miss``, ``evicted``, ``asked`` (of the worker).
        seconds: of the newest reads that something waited for.
        used: where it is a list, every use of a page is put there, in order.
    """

    def __init__(self, file: PageFile, levels: list, budget: int = MEMORY, check=None):
        self.file, self.levels, self.budget, self.check = file, levels, budget, check
        self.held: OrderedDict[Key, int] = OrderedDict()  # bytes of each page that may leave, oldest use first
        self.bytes = 0
        self.pinned: set[Key] = set()
        self.damaged: dict[Key, str] = {}
        self.counts = dict.fromkeys(("hit", "ahead", "miss", "evicted", "asked"), 0)
        self.seconds: deque[float] = deque(maxlen=TIMES)
        self.used: list[Key] | None = None
        self.coming: dict[Key, Future] = {}
        self.asked: set[Key] = set()  # what the worker has brought, and nobody has used yet
        self.worker: ThreadPoolExecutor | None = None
        self.seen, self.epoch = file.changes(), _epoch(file)

    def touch(self, lod: int, part: str, number: int) -> None:
        """A page that is in memory was used."""
        key = (lod, part, number)
        if self.used is not None:
            self.used.append(key)
        if key in self.held:
            self.held.move_to_end(key)
        if key in self.asked:
            self.asked.discard(key)
            self.counts["ahead"] += 1
        else:
            self.counts["hit"] += 1

    def fetch(self, pages, part: str, number: int) -> None:
        """Bring a part of a page into memory.

        Raises:
            ValueError: it is damaged or missing; the message names it. All others stay as they are.
        """
        began, key = time.perf_counter(), (pages.lod, part, number)
        if self.used is not None:
            self.used.append(key)
        self._check_epoch()
        future = self.coming.pop(key, None)
        try:
            if future is None or future.cancel():
                columns = read(self.file, pages, part, number, self.check)
                self.counts["miss"] += 1
            else:
                columns = future.result()
                self.counts["ahead"] += 1
        except ValueError as error:
            first, end = number * pages.size, number * pages.size + pages.used(number)
            what = "tokens" if pages.lod == 0 else f"gists of level {pages.lod}"
            self.damaged[key] = (
                f"{self.file.path.parent}: page {number} of level {pages.lod} ({part} of {what} {first} to {end - 1}):"
                f" {error}. The other pages can be read"
            )
            raise ValueError(self.damaged[key]) from error
        self.seconds.append(time.perf_counter() - began)
        self._hold(pages, key, columns)

    def look(self, lod: Tensor, index: Tensor, block: int) -> None:
        """A window shows nodes, lod and index [M]: their pages stay in memory, those of their children are fetched
        ahead."""
        self.pinned, children = set(), []
        for n in lod.unique().tolist():
            here, level = index[lod == n], self.levels[n]
            for number in (here // level.size).unique().tolist():
                self.pinned |= {(n, part, number) for part in level.parts() if part != "key"}
            if n:
                below = self.levels[n - 1]
                first = here * block
                numbers = torch.cat([first // below.size, (first + block - 1) // below.size]).unique().flip(0)
                children.append([(n - 1, part, number) for number in numbers.tolist() for part in ("body", "facts")])
        # In turn from all levels, the newest first: the queue has an end.
        self.ahead(key for step in zip_longest(*children) for key in step if key and (key[0] or key[1] == "body"))

    def ahead(self, keys: Iterable[Key]) -> None:
        """Ask the worker for pages that may be needed. What does not fit the queue is not asked for."""
        self._collect()
        for key in keys:
            lod, part, number = key
            if len(self.coming) >= QUEUE:
                return
            there = lod < len(self.levels) and number < len(self.levels[lod].pages)
            if not there or key in self.coming or key in self.damaged or self._in_memory(key):
                continue
            if self.worker is None:
                try:
                    self.second = self.file.again()
                except ValueError:  # a newer version took its place, and this one is read on by who has it open
                    return
                self.worker = ThreadPoolExecutor(1, "megactx-pages")
            self.counts["asked"] += 1
            self.coming[key] = self.worker.submit(read, self.second, self.levels[lod], part, number, self.check)

    def _check_epoch(self) -> None:
        """Others may append while this reads. What they take away would be missed."""
        if (now := self.file.changes()) != self.seen:
            if _epoch(self.file) != self.epoch:
                raise ValueError(f"{self.file.path.parent} was curated meanwhile; open it again")
            self.seen = now

    def adopt(self) -> None:
        """Pages that were new are saved now, and may leave memory."""
        for pages in self.levels:
            for part, number in pages.dirty:
                key = (pages.lod, part, number)
                if self._in_memory(key):
                    size = self._size(key)
                    self.bytes += size - self.held.get(key, 0)
                    self.held[key] = size
            pages.dirty.clear()
        self._make_room()

    def forget(self, lod: int, first: int) -> None:
        """Pages of a level from ``first`` on are no more."""
        for key in [key for key in self.held if key[0] == lod and key[2] >= first]:
            self.bytes -= self.held.pop(key)

    def close(self) -> None:
        """Wait for the worker, and read nothing more ahead."""
        if self.worker is not None:
            self.worker.shutdown(cancel_futures=True)
            self.second.close()
            self.worker, self.coming = None, {}

    def move(self, file: PageFile) -> None:
        """The same pages lie in another file now."""
        self.close()
        self.file, self.seen, self.epoch = file, file.changes(), _epoch(file)

    def _collect(self) -> None:
        """What the worker has brought is in memory now."""
        for key in [key for key, future in self.coming.items() if future.done()]:
            future = self.coming.pop(key)
            if future.exception() is None and key[2] < len(self.levels[key[0]].pages) and not self._in_memory(key):
                self.asked.add(key)
                self._hold(self.levels[key[0]], key, future.result())

    def _hold(self, pages, key: Key, columns: dict[str, Tensor]) -> None:
        pages.give(key[2], columns)
        self.held[key] = size = self._size(key)
        self.bytes += size
        self._make_room(key)

    def _make_room(self, newest: Key | None = None) -> None:
        for key in list(islice(self.held, LOOKED)) if self.bytes > self.budget else ():
            if self.bytes <= self.budget:
                return
            lod, part, number = key
            if key == newest or key in self.pinned or (part, number) in self.levels[lod].dirty:
                self.held.move_to_end(key)
                continue
            page = self.levels[lod].pages[number]
            for name in self.levels[lod].parts()[part]:
                page.pop(name, None)
            self.bytes -= self.held.pop(key)
            self.asked.discard(key)
            self.counts["evicted"] += 1

    def _in_memory(self, key: Key) -> bool:
        lod, part, number = key
        return self.levels[lod].parts()[part][0] in self.levels[lod].pages[number]

    def _size(self, key: Key) -> int:
        lod, part, number = key
        page = self.levels[lod].pages[number]
        return sum(page[name].nbytes for name in self.levels[lod].parts()[part])


def _epoch(file: PageFile) -> int:
    """How often something was taken away, or brought back."""
    return (file.about("tree") or {}).get("epoch", 0)


def read(file: PageFile, pages, part: str, number: int, check=None) -> dict[str, Tensor]:
    """The columns of a part of a page, from the disk.

    Raises:
        ValueError: the page is damaged, or too short.
    """
    columns = _ordered(pages, part)
    each = pages.rows * sum(prod(shape) * dtype.itemsize for shape, dtype in columns.values())
    try:
        value = bytearray(file.get(pages.lod, part, number))
    except Missing:
        if part != SIGNALS:
            raise
        value = bytearray(each * pages.used(number))  # of before there were any
    there, rest = divmod(len(value), each)
    if rest or not pages.used(number) <= there <= pages.size:
        raise ValueError(f"it has {len(value)} bytes, {pages.used(number)} entries of {each} bytes are needed")
    out, at = {}, 0
    for name, (shape, dtype) in columns.items():
        count = pages.rows * there * prod(shape)
        flat = torch.frombuffer(value, dtype=dtype, count=count, offset=at)
        out[name] = flat.view(pages.rows, there, *shape).to(pages.device)
        at += count * dtype.itemsize
    if check is not None and "token" in out:
        check(out["token"])
    return out


def packed(pages, part: str, number: int) -> bytes:
    """The bytes of a part of a page that is in memory, for ``PageFile.put``."""
    used, parts = pages.used(number), []
    for name in _ordered(pages, part):
        column = pages.column(number, name)[:, :used].contiguous().cpu()
        parts.append(column.view(-1).view(torch.uint8).numpy().tobytes())
    return b"".join(parts)


def _ordered(pages, part: str) -> dict[str, tuple]:
    """The columns of a part, those of the widest numbers first: so each begins where its numbers may."""
    names = sorted(pages.parts()[part], key=lambda name: (-pages.columns[name][1].itemsize, name))
    return {name: pages.columns[name] for name in names}
