"""Ragged rows that grow for ever: columns [B, N, ...] in pages of one fixed size.

A tensor that doubles when it is full takes up to three times its content while it is copied. Pages are never copied,
except for the first: it grows by an eighth at a time, so that a short text takes little. So appending costs O(1) per
entry, and memory stays close to the bytes of the entries.

Pages of a stored tree come from a *source* when they are first needed, and may leave memory again. What is read
together comes together: the columns of a page fall into *parts*.

B rows, N entries, P entries of a page, M entries that are read or written.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

SMALLEST = 8  # entries of the first allocation of a page
# What is written when a node is made; what every reading changes; keys, which few sessions read.
PARTS = {"token": "body", "gist": "body", "version": "body", "time": "body"}
PARTS |= {"access": "facts", "protected": "facts", "floor": "facts", "opened": "facts", "key": "key"}
SIGNALS = "signals"  # a part that a level may get later: 0 in pages of before
# Of each block: what LensNet says that its tokens are worth above its gist, summed, and how often it said so; what
# collapsing it was measured to cost, its own NLL, and whether both were measured. All in nats per token.
SIGNAL_COLUMNS = {"worth": ((), torch.float32), "scored": ((), torch.int32), "dnll": ((), torch.float32)}
SIGNAL_COLUMNS |= {"nll": ((), torch.float32), "measured": ((), torch.bool)}
PARTS |= dict.fromkeys(SIGNAL_COLUMNS, SIGNALS)


class Pages:
    """Named columns of the same ragged length.

    Args:
        columns: name -> (shape of one entry, dtype).
        rows: B.
        size: P.
        device: of the columns. ``lengths`` stays on the CPU, because shapes depend on it.
    """

    def __init__(self, columns: dict[str, tuple[tuple[int, ...], torch.dtype]], rows: int, size: int, device):
        self.columns, self.rows, self.size, self.device = columns, rows, size, torch.device(device)
        self.pages: list[dict[str, Tensor]] = []  # column -> [B, P, ...]; of a stored tree, those that are in memory
        self.dirty: set[tuple[str, int]] = set()  # parts of pages that the source does not have as they are
        self.room = 0  # entries that there is room for
        self.lengths = torch.zeros(rows, dtype=torch.long)  # [B], never changed in place
        self.source, self.lod = None, 0  # where pages come from that are not in memory, and which level they ask for

    def reserve(self, lengths: Tensor) -> None:
        """Make room for ``lengths`` [B] entries. They are entries once ``self.lengths`` says so."""
        needed = int(lengths.max())
        while self.room < needed:
            if self.room == len(self.pages) * self.size:
                self.pages.append({})
                self._enlarge(0, self.size if len(self.pages) > 1 else min(self.size, max(needed, SMALLEST)))
            else:
                there = self.room - (len(self.pages) - 1) * self.size
                small = min(self.size, max(needed, there + there // 8, SMALLEST))
                self._enlarge(there, self.size if len(self.pages) > 1 else small)

    def _enlarge(self, there: int, capacity: int) -> None:
        """Give the last page room for ``capacity`` entries; ``there`` it had."""
        number, page = len(self.pages) - 1, {}
        for name, (shape, dtype) in self.columns.items():
            page[name] = torch.zeros(self.rows, capacity, *shape, dtype=dtype, device=self.device)
            if there:
                page[name][:, :there] = self.column(number, name)[:, :there]
        self.pages[number] = page
        self.room = number * self.size + capacity
        self._change(number, self.columns)

    def column(self, number: int, name: str) -> Tensor:
        """A column of a page, [B, P, ...]; P may be smaller in the last page."""
        page = self.pages[number]
        if self.source is not None:
            if name in page:
                self.source.touch(self.lod, PARTS[name], number)
            else:
                self.source.fetch(self, PARTS[name], number)
        elif name not in page:
            shape, dtype = self.columns[name]
            room = min(self.size, self.room - number * self.size)
            page[name] = torch.zeros(self.rows, room, *shape, dtype=dtype, device=self.device)
        return page[name]

    def _change(self, number: int, names) -> None:
        self.dirty.update((PARTS[name], number) for name in names)

    def read(self, column: str, row: Tensor, index: Tensor) -> Tensor:
        """row [M], index [M] -> entries [M, ...]. The caller has checked that they are there."""
        shape, dtype = self.columns[column]
        parts = []
        for number, here in self._by_page(index):
            page = self.column(number, column)
            at = row[here] * page.shape[1] + index[here] - number * self.size
            parts.append((here, page.flatten(0, 1)[at]))
        if len(parts) == 1:
            return parts[0][1]
        out = torch.empty(len(index), *shape, dtype=dtype, device=self.device)
        for here, values in parts:
            out.index_copy_(0, here, values)
        return out

    def write(self, row: Tensor, index: Tensor, **values: Tensor) -> None:
        """Put ``values`` [M, ...], one per column, at row [M], index [M]."""
        for number, here in self._by_page(index):
            for name, value in values.items():
                page = self.column(number, name)
                self._change(number, [name])  # first: what has changed does not leave memory
                at = row[here] * page.shape[1] + index[here] - number * self.size
                page.view(-1, *page.shape[2:]).index_copy_(0, at, value[here].to(page.dtype))

    def add(self, column: str, row: Tensor, index: Tensor, amount: Tensor | None = None) -> None:
        """Add ``amount`` [M], or 1, to the entries at row [M], index [M]; an entry that is named twice gets both."""
        for number, here in self._by_page(index):
            page = self.column(number, column)
            self._change(number, [column])
            at = row[here] * page.shape[1] + index[here] - number * self.size
            more = torch.ones_like(at, dtype=page.dtype) if amount is None else amount[here].to(page.dtype)
            page.view(-1).index_add_(0, at, more)

    def _by_page(self, index: Tensor) -> Iterator[tuple[int, Tensor]]:
        """The pages of entries index [M]: the number of each page, and which of M it holds."""
        number = index // self.size
        for p in number.unique().tolist():
            yield p, (number == p).nonzero().squeeze(1)

    def span(self, column: str, start: int, stop: int, rows: slice = slice(None)) -> Tensor:
        """Entries start .. stop - 1 of rows, of all where none are named, [B, stop - start, ...]; 0 where a row is
        shorter."""
        shape, dtype = self.columns[column]
        first, last = start // self.size, min(-(-stop // self.size), len(self.pages))
        parts = [
            self.column(p, column)[rows, max(0, start - p * self.size) : stop - p * self.size]
            for p in range(first, last)
        ]
        parts = [part for part in parts if part.shape[1]]
        if parts:
            return torch.cat(parts, 1)
        return torch.empty(len(range(self.rows)[rows]), 0, *shape, dtype=dtype, device=self.device)

    def whole(self, column: str) -> Tensor:
        """[B, N, ...], N of the longest row; 0 where a row is shorter."""
        return self.span(column, 0, int(self.lengths.max()))

    def put_page(self, page: dict[str, Tensor]) -> None:
        """Add a page as it was read from a file. All pages but the last must be full."""
        self.pages.append(page)
        self.room = (len(self.pages) - 1) * self.size + next(iter(page.values())).shape[1]
        self._change(len(self.pages) - 1, page)

    def give(self, number: int, columns: dict[str, Tensor]) -> None:
        """A part of a page came from the source; the last page has room for more than was written of it."""
        capacity = min(self.size, self.room - number * self.size)
        for name, column in columns.items():
            if (short := capacity - column.shape[1]) > 0:
                column = torch.cat([column, column.new_zeros(self.rows, short, *column.shape[2:])], dim=1)
            self.pages[number][name] = column

    def parts(self) -> dict[str, list[str]]:
        """Names of the columns by part."""
        found: dict[str, list[str]] = {}
        for name in self.columns:
            found.setdefault(PARTS[name], []).append(name)
        return found

    def used(self, number: int) -> int:
        """Entries of a page that are in use, in its longest row."""
        return min(self.size, int(self.lengths.max()) - number * self.size)

    def shorten(self, lengths: Tensor) -> None:
        """Forget all entries behind ``lengths`` [B]."""
        self.lengths, longest = lengths, int(lengths.max())
        if -(-longest // self.size) < len(self.pages):
            del self.pages[-(-longest // self.size) :]
            self.dirty = {(part, number) for part, number in self.dirty if number < len(self.pages)}
            self.room = min(self.room, len(self.pages) * self.size)

    def entry_bytes(self) -> int:
        """Bytes of one entry in all rows and columns."""
        return self.rows * sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self.columns.values())

    def bytes(self, column: str) -> int:
        """Bytes of the entries of a column, without the room to grow."""
        shape, dtype = self.columns[column]
        return int(self.lengths.max()) * self.rows * torch.Size(shape).numel() * dtype.itemsize
