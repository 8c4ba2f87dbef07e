"""What of a stored tree is in memory: pages come when they are needed, and leave when there is no room.

    disk -- fetch --> memory, at most ``budget`` bytes: least recently used out first, never the window's, never changed
      \\-- one worker reads ahead what the window may open next --/

The pages of a published tree come from a server, and stay on this disk: remote -> disk -> memory. Where the tree is on
a device, such as a card, pages that are used are copied there, at most ``device`` bytes: what is said above of the
window and of changes then holds for the device, and memory is one tier more. So every use of a page was served by one
*tier*; ``metrics`` says what each of them did.

B rows, N entries of a page.
"""

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice, zip_longest
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from .page_file import Missing, PageFile
from .pages import SIGNALS

MEMORY, DEVICE = 2**28, 2**28  # bytes of pages in memory, and on a device, if nobody says otherwise
QUEUE = 256  # pages that are asked for ahead, at most
LOOKED = 64  # pages that are looked at for one that may leave
TIMES = 4096  # of the newest reads, for the metrics

Key = tuple[int, str, int]  # level, part, number of the page


@dataclass
class Tier:
    """A place that pages are in.

    Attributes:
        uses: of pages that were found here, and not nearer.
        evicted: pages that left for want of room.
        reads: from here.
        seconds: how long the newest of them took.
        bytes: that are here, as ``news`` found it.
    """

    uses: int = 0
    evicted: int = 0
    reads: int = 0
    bytes: int = 0
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=TIMES))


class Shelf:
    """Pages in memory that stand ready for a device: at most ``budget`` bytes, least recently used out first."""

    def __init__(self, budget: int):
        self.budget, self.bytes, self.evicted = budget, 0, 0
        self.pages: OrderedDict[Key, dict[str, Tensor]] = OrderedDict()

    def get(self, key: Key) -> dict[str, Tensor] | None:
        """The columns of a part of a page; ``None``: it is not here."""
        if key in self.pages:
            self.pages.move_to_end(key)
        return self.pages.get(key)

    def put(self, key: Key, columns: dict[str, Tensor]) -> None:
        self.drop(key)
        self.pages[key] = columns
        self.bytes += sum(column.nbytes for column in columns.values())
        while self.bytes > self.budget:
            self.drop(next(iter(self.pages)))
            self.evicted += 1

    def drop(self, key: Key) -> None:
        self.bytes -= sum(column.nbytes for column in self.pages.pop(key, {}).values())


class News(NamedTuple):
    """What happened in a while.

    Attributes:
        tiers: what each of them did; ``seconds`` has every read, the newest first, ``TIMES`` at most.
        queue: pages that were asked for ahead and are not there yet.
        precision: see ``PageCache``.
    """

    tiers: dict[str, Tier]
    queue: int
    precision: float | None


class PageCache:
    """Pages of the levels of one tree.

    Args:
        file: where the pages are: a ``PageFile`` or ``PublishedPages``.
        levels: the tree's, see ``Pages``.
        budget: bytes of pages in memory, at most. The window's pages and those that are not saved yet may exceed it.
        check: called with each page of tokens that is read, [B, N].
        device: bytes of pages on the levels' device, at most, beside those in memory. ``None``: ``DEVICE``, and nothing
            where that device is the CPU.

    Attributes:
        damaged: pages that could not be read, and what was said of each.
        counts: ``hit``, ``ahead`` (read by the worker in time), ``miss``, ``evicted``, ``asked`` (of the worker).
        seconds: of the newest reads that something waited for.
        tiers: ``device`` where there is one, ``memory``, ``disk`` and, of a published tree, ``remote``; what each did.
        used: where it is a list, every use of a page is put there, in order.
    """

    def __init__(self, file: PageFile, levels: list, budget: int = MEMORY, check=None, device: int | None = None):
        self.file, self.levels, self.check = file, levels, check
        if device is None and levels[0].device.type != "cpu":
            device = DEVICE
        # The levels' own pages are in the nearest tier; ``shelf`` has those in memory where that is another one.
        self.nearest, self.budget = ("memory", budget) if device is None else ("device", device)
        self.shelf = None if device is None else Shelf(budget)
        self.held: OrderedDict[Key, int] = OrderedDict()  # bytes of each page that may leave, oldest use first
        self.bytes = 0
        self.pinned: set[Key] = set()
        self.damaged: dict[Key, str] = {}
        self.counts = dict.fromkeys(("hit", "ahead", "miss", "evicted", "asked"), 0)
        self.seconds: deque[float] = deque(maxlen=TIMES)
        self.tiers = {name: Tier() for name in dict.fromkeys((self.nearest, "memory", "disk", file.tier))}
        self.lock, self.told = threading.Lock(), {name: Tier() for name in self.tiers}
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
        self._count(key, self.nearest)

    def _count(self, key: Key, tier: str) -> None:
        """A page was used that was in memory, or nearer."""
        self.counts["ahead" if key in self.asked else "hit"] += 1
        self.asked.discard(key)
        self.tiers[tier].uses += 1

    def fetch(self, pages, part: str, number: int) -> None:
        """Bring a part of a page into memory.

        Raises:
            ValueError: it is damaged or missing; the message names it. All others stay as they are.
        """
        began, key = time.perf_counter(), (pages.lod, part, number)
        if self.used is not None:
            self.used.append(key)
        self._check_epoch()
        if self.shelf is not None and (columns := self.shelf.get(key)) is not None:
            self._give(pages, key, columns)
            self._count(key, "memory")
            self._time("memory", began)
            return
        future = self.coming.pop(key, None)
        try:
            if future is None or future.cancel():
                tier, columns = self._read(self.file, pages, part, number)
                self.counts["miss"] += 1
            else:
                tier, columns = future.result()
                self.counts["ahead"] += 1
        except ValueError as error:
            first, end = number * pages.size, number * pages.size + pages.used(number)
            what = "tokens" if pages.lod == 0 else f"gists of level {pages.lod}"
            self.damaged[key] = (
                f"{self.file.where}: page {number} of level {pages.lod} ({part} of {what} {first} to {end - 1}):"
                f" {error}. The other pages can be read"
            )
            raise ValueError(self.damaged[key]) from error
        self.seconds.append(time.perf_counter() - began)
        self.tiers[tier].uses += 1
        self._hold(pages, key, columns)

    def _read(self, file, pages, part: str, number: int) -> tuple[str, dict[str, Tensor]]:
        """The tier that had a part of a page, and its columns."""
        began = time.perf_counter()
        try:
            tier, value = file.found(pages.lod, part, number)
        except Missing:
            if part != SIGNALS:
                raise
            tier, value = file.tier, bytes(_each(pages, part) * pages.used(number))  # of before there were any
        columns = unpacked(value, pages, part, number, self.check)
        self._time(tier, began)
        return tier, columns

    def _time(self, tier: str, began: float) -> None:
        with self.lock:
            self.tiers[tier].reads += 1
            self.tiers[tier].seconds.append(time.perf_counter() - began)

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
        if self.file.readers > 1:  # what the window shows comes at once, not one after the other
            self.ahead(key for key in sorted(self.pinned) if key[0] or key[1] == "body")
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
                self.worker = ThreadPoolExecutor(self.file.readers, "megactx-pages")
            self.counts["asked"] += 1
            self.coming[key] = self.worker.submit(self._read, self.second, self.levels[lod], part, number)

    def _check_epoch(self) -> None:
        """Others may append while this reads. What they take away would be missed."""
        if (now := self.file.changes()) != self.seen:
            if _epoch(self.file) != self.epoch:
                raise ValueError(f"{self.file.where} was curated meanwhile; open it again")
            self.seen = now

    def adopt(self) -> None:
        """Pages that were new are saved now, and may leave memory."""
        for pages in self.levels:
            for part, number in pages.dirty:
                key = (pages.lod, part, number)
                if self.shelf is not None:
                    self.shelf.drop(key)  # that was before the change
                if self._is_near(key):
                    size = self._size(key)
                    self.bytes += size - self.held.get(key, 0)
                    self.held[key] = size
            pages.dirty.clear()
        self._make_room()

    def forget(self, lod: int, first: int) -> None:
        """Pages of a level from ``first`` on are no more."""
        for key in [key for key in self.held if key[0] == lod and key[2] >= first]:
            self.bytes -= self.held.pop(key)
        for key in [] if self.shelf is None else [*self.shelf.pages]:
            if key[0] == lod and key[2] >= first:
                self.shelf.drop(key)

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
                columns = future.result()[1]
                if self.shelf is not None:  # it goes to the device when it is used
                    self.shelf.put(key, columns)
                else:
                    self._hold(self.levels[key[0]], key, columns)

    def _hold(self, pages, key: Key, columns: dict[str, Tensor]) -> None:
        """A page came from below, to be used."""
        if self.shelf is not None:
            self.shelf.put(key, columns)
        self._give(pages, key, columns)

    def _give(self, pages, key: Key, columns: dict[str, Tensor]) -> None:
        copied = self.shelf is not None
        pages.give(key[2], {name: column.to(pages.device, copy=copied) for name, column in columns.items()})
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
            self.tiers[self.nearest].evicted += 1

    def metrics(self) -> dict[str, dict[str, float | None]]:
        """By tier, the nearest first.

        Returns:
            ``uses`` of pages that it served; ``hit_rate``, of the uses that no nearer tier served; ``p50`` and ``p99``
            of its newest reads, s; ``bytes`` that it holds; ``evicted`` pages. ``None``: nothing was read from it.
            Under ``ahead``: ``queue``, pages that are asked for and not there yet; ``precision``, the share of pages
            asked for ahead that were used.
        """
        self._measure()
        left, out = sum(tier.uses for tier in self.tiers.values()), {}
        for name, tier in self.tiers.items():
            times = torch.tensor(tier.seconds or [torch.nan])
            p50, p99 = (float(times.quantile(share)) if tier.seconds else None for share in (0.5, 0.99))
            rate = tier.uses / left if left else None
            left -= tier.uses
            out[name] = {"uses": tier.uses, "hit_rate": rate, "p50": p50, "p99": p99}
            out[name] |= {"bytes": tier.bytes, "evicted": tier.evicted}
        out["ahead"] = {"queue": len(self.coming), "precision": self.precision}
        return out

    @property
    def precision(self) -> float | None:
        """Share of the pages asked for ahead that were used; ``None``: none was asked for."""
        return self.counts["ahead"] / self.counts["asked"] if self.counts["asked"] else None

    def news(self) -> News:
        """What happened since this was last asked; bytes as they are now."""
        self._measure()
        out = {}
        with self.lock:
            for name, tier in self.tiers.items():
                told, reads = self.told[name], tier.reads - self.told[name].reads
                newest = deque(islice(reversed(tier.seconds), reads))
                out[name] = Tier(tier.uses - told.uses, tier.evicted - told.evicted, reads, tier.bytes, newest)
                self.told[name] = Tier(tier.uses, tier.evicted, tier.reads)
        return News(out, len(self.coming), self.precision)

    def _measure(self) -> None:
        """How many bytes each tier has of this tree, and what left the disk."""
        self.tiers[self.nearest].bytes, self.tiers[self.file.tier].bytes = self.bytes, self.file.size()
        if self.shelf is not None:
            self.tiers["memory"].bytes, self.tiers["memory"].evicted = self.shelf.bytes, self.shelf.evicted
        if (kept := getattr(self.file, "kept", None)) is not None:
            self.tiers["disk"].bytes, self.tiers["disk"].evicted = (
                kept.bytes(self.file.data),
                kept.evicted[self.file.data],
            )

    def _in_memory(self, key: Key) -> bool:
        """Or nearer."""
        return self._is_near(key) or self.shelf is not None and key in self.shelf.pages

    def _is_near(self, key: Key) -> bool:
        lod, part, number = key
        return self.levels[lod].parts()[part][0] in self.levels[lod].pages[number]

    def _size(self, key: Key) -> int:
        lod, part, number = key
        page = self.levels[lod].pages[number]
        return sum(page[name].nbytes for name in self.levels[lod].parts()[part])


def _epoch(file: PageFile) -> int:
    """How often something was taken away, or brought back."""
    return (file.about("tree") or {}).get("epoch", 0)


def _each(pages, part: str) -> int:
    """Bytes of an entry of a part, all rows."""
    return pages.rows * sum(prod(shape) * dtype.itemsize for shape, dtype in _ordered(pages, part).values())


def unpacked(value: bytes, pages, part: str, number: int, check=None) -> dict[str, Tensor]:
    """The columns of a part of a page, of its bytes, in memory.

    Raises:
        ValueError: the page is too short, or has what ``check`` refuses.
    """
    value = bytearray(value)
    columns, each = _ordered(pages, part), _each(pages, part)
    there, rest = divmod(len(value), each)
    if rest or not pages.used(number) <= there <= pages.size:
        raise ValueError(f"it has {len(value)} bytes, {pages.used(number)} entries of {each} bytes are needed")
    out, at = {}, 0
    for name, (shape, dtype) in columns.items():
        count = pages.rows * there * prod(shape)
        flat = torch.frombuffer(value, dtype=dtype, count=count, offset=at)
        out[name] = flat.view(pages.rows, there, *shape)
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
