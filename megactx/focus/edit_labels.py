"""What detail is worth, measured: the value of every edit of a working context, in nats per token (method 10).

    plain        [ entries of the window                         ] y0 y1 ... y(H-1)       one pass, its cache is kept
    an edit      cache of entries < c [ what comes ][ the others ] y0 y1 ... y(H-2)       one branch
    scored                                                         y0 y1 ... y(H-1)

Nothing in front of an edit depends on it, so a branch starts where the edit does. Short branches of like length share a
pass, padded to the longest; long ones share one without padding.

    v_down = NLL(as it is) - NLL(children in its place)               of a gist: what its detail would be worth
    v_keep = NLL(parent in the place of K siblings) - NLL(as it is)   of siblings: what their detail is worth

B rows, W entries, K children of a node, E edits, H scored tokens, D width.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import DynamicCache

from megactx.lm import BaseLM
from megactx.lm.chunked_head import nll
from megactx.lm.suffix_attention import Run
from megactx.memory import WorkingContext
from megactx.memory.pyramid import PLAIN, Attention

from .attended_rows import AttendedRows
from .edits import Edits, column_of
from .window_rows import rows_of, taken

ROWS = {"cpu": 2048, "cuda": 65_536}  # of one packed pass: they fill the machine, and more would only take memory
# Rows of a branch above which it is read without a mask, one by one. The limit was set so that windows of a few hundred
# entries keep their values to the last bit; where it is fastest was not measured. A GPU would rather have few launches
# than few scores.
LONG = {"cpu": 320}
RUNS = 1024  # rows of one pass over long branches: more of them leave the cache of the processor


def continuation_nll(base: BaseLM, context: WorkingContext, following: Tensor, attention: Attention = PLAIN) -> Tensor:
    """NLL of the tokens behind a working context: following [B, H] -> [B, H], in nats.

    Args:
        attention: how the working context is read.

    Raises:
        ValueError: ids of another number of rows.
    """
    rows = AttendedRows.of(attention, context)
    if rows is None:
        return _Read(base, context, following).nll()
    with torch.no_grad():
        hidden = rows.read(base, following)
        return nll(base, hidden.flatten(0, 1), following.flatten()).view(following.shape)


@torch.no_grad()
def measure_values(
    base: BaseLM, context: WorkingContext, edits: Edits, following: Tensor, attention: Attention = PLAIN
) -> tuple[Tensor, Tensor]:
    """The value of each edit, in nats per token: how it changes the NLL of the H true next tokens.

    Positions are absolute. An edit that breaks the budget is measured like any other.

    Args:
        base: the frozen base LM.
        context: what is edited; it is not changed.
        edits: E legal edits, each on its own.
        following: ids of the tokens that come next, [B, H].
        attention: how windows are read. Under another than plain each edited window is read as a whole: what stands
            before an edit may see it there, through a strip, so there is no branch to begin.

    Returns:
        Values [E], v_down of expands and v_keep of collapses, positive where detail helps; and the NLL behind the
        working context as it is, [B].

    Raises:
        ValueError: ids of another number of rows.
    """
    if attention.kind == "plain":
        read = _Read(base, context, following)
        plain, found = read.nll().mean(1), read.branches(edits)
    else:
        plain = continuation_nll(base, context, following, attention).mean(1)
        found = _whole(base, context, edits, following, attention)
    values = torch.empty(len(edits), device=plain.device)
    for part, edited in found:
        change = plain[edits.row[part]] - edited
        values[part] = torch.where(edits.expand[part], change, -change)
    return values, plain


def _whole(
    base: BaseLM, context: WorkingContext, edits: Edits, following: Tensor, attention: Attention
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every row with one edit, then with another -> (which edits [e], mean NLL after each [e])."""
    order = torch.argsort(edits.row, stable=True)
    row = edits.row[order]
    turn = torch.arange(len(row), device=row.device) - torch.searchsorted(row, row)
    for number in range(int(turn.max()) + 1 if len(row) else 0):
        part, edited = order[turn == number], context.copy()
        edited.budget = 10**9
        edits[part].apply(edited)
        yield part, continuation_nll(base, edited, following, attention).mean(1)[edits.row[part]]


class _Read:
    """One pass over working contexts and what follows them, and branches from its cache."""

    @torch.no_grad()
    def __init__(self, base: BaseLM, context: WorkingContext, following: Tensor):
        rows = rows_of(base, context, following)
        self.base, self.context, self.following = base, context, following
        self.lengths, self.horizon, self.rows = rows.lengths, following.shape[1], rows
        self.cache = DynamicCache()
        self.hidden = rows.scored(rows.read(base, self.cache))

    @torch.no_grad()
    def nll(self) -> Tensor:
        """[B, H]"""
        return self._nll(self.hidden, self.following)

    def branches(self, edits: Edits) -> Iterator[tuple[Tensor, Tensor]]:
        """Packed passes -> (which edits [e], mean NLL after each [e]), until all were measured."""
        k = self.context.tree.block_size
        # The column at which an edit begins: that of the gist, or of the first of the K children that go.
        first = torch.where(edits.expand, edits.index, edits.index * k)
        first = column_of(self.context, edits.row, edits.lod - (~edits.expand).long(), first)  # [E]
        # Entries that come and go, and those behind them that must be read again, for they saw what went: [E] each.
        comes, goes = torch.where(edits.expand, k, 1), torch.where(edits.expand, 1, k)
        rest = self.lengths[edits.row] - first - goes
        rows = comes + rest + self.horizon - 1  # of a branch
        sizes = (first, comes, goes, rest, rows)
        long = rows > LONG.get(rows.device.type, math.inf)
        yield from self._long(edits, long.nonzero()[:, 0], *sizes)
        yield from self._packed(edits, (~long).nonzero()[:, 0], *sizes)

    def _packed(self, edits, which, first, comes, goes, rest, rows) -> Iterator[tuple[Tensor, Tensor]]:
        """``branches`` for some edits, places [E'] of all; the other arguments [E] are what ``branches`` found."""
        b = len(self.lengths)
        # Places [B, N]: each row's edits from the shortest branch to the longest, the missing ones last. A pass pads
        # its branches to the longest of them, so those of like length share one.
        by_row = which[torch.argsort(edits.row[which] * (int(rows.max()) + 1 if len(edits) else 1) + rows[which])]
        counts = torch.bincount(edits.row[which], minlength=b)
        at = torch.arange(len(which), device=rows.device) - (counts.cumsum(0) - counts)[edits.row[by_row]]
        places = torch.full((b, int(counts.max()) if len(which) else 0), -1, device=rows.device)
        places[edits.row[by_row], at] = by_row
        # [N], over the rows. Ascending within a row; where rows have other numbers of edits it may fall again.
        longest = torch.where(places >= 0, rows[places], 0).amax(0).tolist()
        kv_cache = tuple((layer.keys, layer.values) for layer in self.cache.layers)
        most, done = ROWS.get(rows.device.type, 2048), 0
        while done < places.shape[1]:
            # As many edits as the machine takes at once, at least one per row, however long it is.
            stop, r = done + 1, longest[done]
            while stop < places.shape[1] and b * (stop + 1 - done) * max(r, longest[stop]) <= most:
                r, stop = max(r, longest[stop]), stop + 1
            place = places[:, done:stop]  # [B, n]
            mask, e = place >= 0, place.clamp(min=0)  # edit 0 stands in for a missing one; it is not yielded
            done = stop
            source = self._source(edits, e, first[e], comes[e], goes[e], rest[e], r)
            extra = self._replacements(edits, e)
            hidden = self.base.forward_branches(
                self._gathered(self.rows.embeddings, extra[0], source),
                self._gathered(self.rows.positions, extra[1], source),
                kv_cache,
                torch.where(mask, first[e], 0),  # nothing in front of an edit depends on it: that much is cached
                sigma=None if self.rows.sigma is None else self._gathered(self.rows.sigma, extra[2], source),
            )
            scored = (comes + rest)[e][..., None] - 1 + torch.arange(self.horizon, device=e.device)  # [B, n, H]
            scored = scored.clamp(max=r - 1)  # of missing edits, which may be longer than this pass
            hidden = hidden.gather(2, scored[..., None].expand(*scored.shape, hidden.shape[-1]))  # [B, n, H, D]
            nll = self._nll(hidden, self.following[:, None].expand_as(scored)).mean(-1)
            yield place[mask], nll[mask]

    def _long(self, edits, which, first, comes, goes, rest, rows) -> Iterator[tuple[Tensor, Tensor]]:
        """``_packed`` for branches that are long: each row attends to what it sees, and to nothing besides."""
        kv_cache = tuple((layer.keys, layer.values) for layer in self.cache.layers)
        k, w, device = self.context.tree.block_size, self.context.lod.shape[1], rows.device
        which = which[rows[which].argsort()]
        lengths, cached, documents = (numbers[which].tolist() for numbers in (rows, first, edits.row))
        done = 0
        while done < len(lengths):
            stop, total = done + 1, lengths[done]
            while stop < len(lengths) and total + lengths[stop] <= RUNS:
                total, stop = total + lengths[stop], stop + 1
            part, count = which[done:stop], torch.tensor(lengths[done:stop], device=device)
            ends = count.cumsum(0)
            runs = [
                Run(end - length, end, before, document)
                for end, length, before, document in zip(
                    ends.tolist(), *(numbers[done:stop] for numbers in (lengths, cached, documents)), strict=True
                )
            ]
            done = stop
            owner = torch.repeat_interleave(count, output_size=total)  # [M], the place in ``part`` of each row
            edit, r = part[owner], torch.arange(total, device=device) - (ends - count)[owner]
            new, entry = r < comes[edit], r < comes[edit] + rest[edit]
            column = torch.where(entry, first[edit] + goes[edit] - comes[edit], w - comes[edit] - rest[edit]) + r
            column, brought = column.clamp(0, w + self.horizon - 2), owner * k + r.clamp(max=k - 1)

            def rows_from(own: Tensor, extra: Tensor, edit=edit, new=new, column=column, brought=brought) -> Tensor:
                new = new if own.ndim == 2 else new[:, None]
                return torch.where(new, extra[0, brought].to(own.dtype), own[edits.row[edit], column])[None]

            embeddings, positions, sigma = self._replacements(edits, part[None])
            hidden = self.base.forward_runs(
                rows_from(self.rows.embeddings, embeddings),
                rows_from(self.rows.positions, positions),
                kv_cache,
                runs,
                self.horizon,
                None if sigma is None else rows_from(self.rows.sigma, sigma),
            )
            scored = (ends - self.horizon)[:, None] + torch.arange(self.horizon, device=device)  # [e, H]
            yield part, self._nll(hidden[0, scored], self.following[edits.row[part]]).mean(1)

    def _source(self, edits, e, first, comes, goes, rest, rows: int) -> Tensor:
        """Where each row of a branch comes from, [B, n, R]: of the window, what follows, and replacements behind."""
        w, n = self.context.lod.shape[1], e.shape[1]
        r = torch.arange(rows, device=e.device)
        first, comes, goes, rest = (t[..., None] for t in (first, comes, goes, rest))  # [B, n, 1]
        k, all_before = self.context.tree.block_size, w + self.horizon - 1
        # One table per row of the batch: W entries, H - 1 tokens that follow, K places for what each edit brings.
        new = all_before + torch.arange(n, device=e.device)[:, None] * k + r  # what comes
        old = first + goes + r - comes  # entries behind the edit, as they were
        after = w + r - comes - rest  # tokens that follow: they stand behind the padding of the entries
        found = torch.where(r < comes, new, torch.where(r < comes + rest, old, after))
        # A row without an n-th edit has the numbers of edit 0 here, which may be of another row. What they point to is
        # not read, but it must exist.
        return torch.where(r < comes + rest + self.horizon - 1, found, 0).clamp(max=all_before + n * k - 1)

    def _replacements(self, edits: Edits, e: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Embeddings [B, n * K, D], positions and sigma [B, n * K] of what comes; a parent has the first of K."""
        tree, k, b = self.context.tree, self.context.tree.block_size, len(e)
        opened = edits.expand[e]
        lod = edits.lod[e] - opened.long()
        index = torch.where(opened, edits.index[e] * k, edits.index[e])[..., None]
        index = index + torch.arange(k, device=e.device) * opened[..., None]  # [B, n, K]
        lod = lod[..., None].expand_as(index)
        row = edits.row[e][..., None].expand_as(index)
        embeddings = tree.embeddings(row.flatten(), lod.flatten(), index.flatten()).view(b, -1, tree.width)
        offsets = [tree.encoder.offset_in(k**n) for n in range(1, tree.depth + 1)]
        positions = index * k**lod + torch.tensor([0, *offsets], device=e.device)[lod]  # [B, n, K]
        spread = None if self.rows.sigma is None else tree.encoder.spread(lod.flatten(1))
        return embeddings, positions.flatten(1), spread

    def _gathered(self, own: Tensor, extra: Tensor, source: Tensor) -> Tensor:
        """own [B, W + H - 1, ...] and extra [B, n * K, ...], source [B, n, R] -> [B, n, R, ...]."""
        table = torch.cat([own, extra.to(own.dtype)], dim=1)
        return taken(table, source.flatten(1)).view(*source.shape, *table.shape[2:])

    def _nll(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return nll(self.base, hidden.flatten(0, -2), targets.flatten()).view(targets.shape)
