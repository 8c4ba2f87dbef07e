"""Ragged rows that grow for ever: columns [B, N, ...] in pages of one fixed size.

A tensor that doubles when it is full takes up to three times its content while it is copied. Pages are never copied,
except for the first: it grows by an eighth at a time, so that a short text takes little. So appending costs O(1) per
entry, and memory stays close to the bytes of the entries.

B rows, N entries, P entries of a page, M entries that are read or written.
"""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

SMALLEST = 8  # entries of the first allocation of a page
CHANGES = itertools.count()


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
        self.pages: list[dict[str, Tensor]] = []  # column -> [B, P, ...]
        self.stamps: list[int] = []  # a number per page, new after each change; no two changes of any tree share one
        self.lengths = torch.zeros(rows, dtype=torch.long)  # [B], never changed in place

    def reserve(self, lengths: Tensor) -> None:
        """Make room for ``lengths`` [B] entries. They are entries once ``self.lengths`` says so."""
        needed = int(lengths.max())
        while (room := self._room()) < needed:
            if room % self.size == 0:
                self.put_page({})
            if len(self.pages) > 1:
                self._enlarge(self.size)
            else:
                self._enlarge(min(self.size, max(needed, room + room // 8, SMALLEST)))

    def _room(self) -> int:
        if not self.pages:
            return 0
        return (len(self.pages) - 1) * self.size + next(iter(self.pages[-1].values())).shape[1]

    def _enlarge(self, capacity: int) -> None:
        page, self.stamps[-1] = self.pages[-1], next(CHANGES)
        for name, (shape, dtype) in self.columns.items():
            new = torch.zeros(self.rows, capacity, *shape, dtype=dtype, device=self.device)
            if name in page:
                new[:, : page[name].shape[1]] = page[name]
            page[name] = new

    def read(self, column: str, row: Tensor, index: Tensor) -> Tensor:
        """row [M], index [M] -> entries [M, ...]. The caller has checked that they are there."""
        shape, dtype = self.columns[column]
        parts = [(here, page[column].flatten(0, 1)[at]) for page, here, at in self._by_page(row, index)]
        if len(parts) == 1:
            return parts[0][1]
        out = torch.empty(len(index), *shape, dtype=dtype, device=self.device)
        for here, values in parts:
            out.index_copy_(0, here, values)
        return out

    def write(self, row: Tensor, index: Tensor, **values: Tensor) -> None:
        """Put ``values`` [M, ...], one per column, at row [M], index [M]."""
        for page, here, at in self._by_page(row, index, changed=True):
            for name, value in values.items():
                page[name].view(-1, *page[name].shape[2:]).index_copy_(0, at, value[here].to(page[name].dtype))

    def add(self, column: str, row: Tensor, index: Tensor) -> None:
        """Add 1 to the entries at row [M], index [M]; an entry that is named twice gets 2."""
        for page, _, at in self._by_page(row, index, changed=True):
            page[column].view(-1).index_add_(0, at, torch.ones_like(at, dtype=page[column].dtype))

    def _by_page(
        self, row: Tensor, index: Tensor, changed: bool = False
    ) -> Iterator[tuple[dict[str, Tensor], Tensor, Tensor]]:
        """The pages of entries row [M], index [M]: each page, which of M it holds, and their places in its B x P."""
        number = index // self.size
        for p in number.unique().tolist():
            here = (number == p).nonzero().squeeze(1)
            page = self.pages[p]
            if changed:
                self.stamps[p] = next(CHANGES)
            room = next(iter(page.values())).shape[1]
            yield page, here, row[here] * room + index[here] - p * self.size

    def span(self, column: str, start: int, stop: int) -> Tensor:
        """Entries start .. stop - 1 of all rows, [B, stop - start, ...]; 0 where a row is shorter."""
        shape, dtype = self.columns[column]
        first, last = start // self.size, -(-stop // self.size)
        parts = [
            page[column][:, max(0, start - p * self.size) : stop - p * self.size]
            for p, page in enumerate(self.pages[first:last], first)
        ]
        parts = [part for part in parts if part.shape[1]]
        return torch.cat(parts, 1) if parts else torch.empty(self.rows, 0, *shape, dtype=dtype, device=self.device)

    def whole(self, column: str) -> Tensor:
        """[B, N, ...], N of the longest row; 0 where a row is shorter."""
        return self.span(column, 0, int(self.lengths.max()))

    def put_page(self, page: dict[str, Tensor]) -> None:
        """Add a page as it was read from a file. All pages but the last must be full."""
        self.pages.append(page)
        self.stamps.append(next(CHANGES))

    def used(self, number: int) -> int:
        """Entries of a page that are in use, in its longest row."""
        return min(self.size, int(self.lengths.max()) - number * self.size)

    def entry_bytes(self) -> int:
        """Bytes of one entry in all rows and columns."""
        return self.rows * sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self.columns.values())

    def bytes(self, column: str) -> int:
        """Bytes of the entries of a column, without the room to grow."""
        shape, dtype = self.columns[column]
        return int(self.lengths.max()) * self.rows * torch.Size(shape).numel() * dtype.itemsize
