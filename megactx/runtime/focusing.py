"""Room for new tokens, and detail where LensNet wants it: everything that changes a window.

    entries   |------------------- budget -------------------|
              |---- detail: the allocator's ----|-- reserve --|     new tokens fill the reserve, 32 at a time;
              |---------------------------------|             |     when it is full, room is made: back to here

The allocator fills what it is given, so it is given the budget less a reserve. While the reserve fills, it only swaps:
a collapse pays for each expand. When no more tokens fit, *room is made* at once for all of the next ones. Between,
nothing but swaps changes what is old, and its keys and values stay valid.

Tokens are taken in first, so that LensNet is asked by the newest of them, and once for all that a refocus does: where
room was made, what it said of entries that stay holds on. What siblings would have lost is what their gist would win.

Room is made by collapsing the siblings of the least value in LensNet's own estimate, whatever the price: the allocator
makes no lone collapses above price 0 so that it comes to rest, and it still does, for after room was made there is none
left for a lone expand. The finest entries outside the sink and the protected tail always stand as whole sets of
siblings, so there is something to collapse until only the coarsest view is left. Without LensNet the window is put
together anew by recency, which coarsens the oldest detail.

B rows, W entries, K children of a node.
"""

import copy
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from megactx.focus import Edits, FocusAllocator, LensNet, moves
from megactx.focus.by_part import PartRows, of_window
from megactx.focus.earned import Found, earned
from megactx.focus.edits import Moves
from megactx.focus.finding import found_by_keys
from megactx.focus.keys import Questions
from megactx.focus.lensnet import Scores
from megactx.memory import Composite, MegaContextTree, WorkingContext

from .mean_embedding_cache import MeanEmbeddingCache
from .settings import Settings

SETTLE = 8  # refocuses of a cold start, at most


class Reserving(FocusAllocator):
    """A ``FocusAllocator`` that leaves ``reserve`` entries of the budget to new tokens."""

    def __init__(self, reserve: int, **settings):
        super().__init__(**settings)
        self.reserve = reserve

    def propose(self, context: WorkingContext, scores: Tensor, price: Tensor | None = None) -> Edits:
        lower = lowered(context, self.reserve)
        if not isinstance(context.tree, Composite):
            return super().propose(lower, scores, price)
        rows = PartRows(lower)  # each part spends its own share
        return of_window(super().propose(rows, rows.of(scores), price))


@dataclass(frozen=True)
class Known:
    """What LensNet said of a window, by the names of its entries: [B, W] each."""

    name: Tensor  # -1 in the padding
    legal: Moves
    v_down: Tensor
    v_keep: Tensor

    @classmethod
    def of(cls, context: WorkingContext, legal: Moves, scores: Scores) -> "Known":
        return cls(
            torch.where(context.mask, _names(context.lod, context.index), -1), legal, scores.v_down, scores.v_keep
        )

    def holds_for(self, context: WorkingContext, legal: Moves) -> tuple[Moves, Tensor, Tensor]:
        """Of the same windows after collapses: what of ``legal`` something is known of, and the values."""
        lod, index = context.lod, context.index
        place, there = self._found(torch.where(context.mask, _names(lod, index), -2))
        child, made = self._found(
            torch.where(context.mask & (lod > 0), _names(lod - 1, index * context.tree.block_size), -2)
        )
        opens = there & self.legal.expand.gather(1, place)
        keeps = there & (self.legal.first.gather(1, place) >= 0)
        made &= ~there & (self.legal.first.gather(1, child) >= 0)
        down = torch.where(made, self.v_keep.gather(1, child), self.v_down.gather(1, place))
        left = Moves(legal.expand & (opens | made), torch.where(keeps, legal.first, -1))
        keep = torch.where(left.first >= 0, self.v_keep.gather(1, place), 0.0)
        return left, torch.where(left.expand, down, 0.0), keep

    def _found(self, name: Tensor) -> tuple[Tensor, Tensor]:
        ranked, order = self.name.sort(dim=1)
        at = torch.searchsorted(ranked, name.contiguous()).clamp(max=ranked.shape[1] - 1)
        return order.gather(1, at), ranked.gather(1, at) == name


class Focus:
    """Changes windows of one tree, and remembers what it changed.

    Args:
        settings: ``budget`` and ``allocator`` count.
        block_size: K.
        lensnet: in eval mode; ``None``: recency.
    """

    def __init__(self, settings: Settings, block_size: int, lensnet: LensNet | None):
        self.budget, self.reserve = settings.budget, settings.reserve(block_size)
        self.lensnet = lensnet if settings.megacontext == "focus" else None
        self.earn, self.keys = settings.earn, settings.keys
        self.allocator = Reserving(self.reserve, **settings.allocator)
        self.mean_embeddings = MeanEmbeddingCache()
        self.seconds: dict[str, float] = {}  # of the last refocus
        self.known: Known | None = None  # what LensNet said when room was made, for the refocus behind it
        self.found: list[list[int]] = []  # of each row, blocks that were found and opened at the last reading

    def start(self, tree: MegaContextTree) -> WorkingContext:
        """The cold start of a whole tree: recency, then refocused until LensNet rests; the reserve is free.

        Raises:
            ValueError: not even the coarsest view fits.
        """
        context = WorkingContext.recency(tree, self.budget - self.reserve)
        context.budget = self.budget
        if self.lensnet is not None:
            still = 0
            for _ in range(SETTLE):
                _, edits = self.refocus(context)
                still = 0 if edits is not None and len(edits) else still + 1
                if still > self.allocator.cooldown:  # an edit may still wait for its turn
                    break
        return context

    def take(self, context: WorkingContext, new: Tensor, ahead: int = 0) -> tuple[WorkingContext, Edits | None, Tensor]:
        """Take ``new`` [B] tokens in, in place, and make room in the rows into which they do not fit.

        Args:
            ahead: tokens that are to fit behind them too.

        Returns:
            The window; the collapses that were made, ``None`` where no row needed room; and the rows, bool [B], that
            were started anew instead: without LensNet those that were full.
        """
        self.known = None
        parts = parts_in(context)
        budget = self.budget - (context.tree.spent - parts if parts else 0)  # of what is not kept for the parts
        least = budget - new.clamp(min=self.reserve) + new  # entries of a row in which the reserve is free
        full = context.counts + new > budget
        if self.lensnet is not None:
            full |= (context.counts + new + ahead > budget) & (context.counts + new > least)
        context.budget = self.budget + int(new.max())
        context.append(new)
        target = torch.where(full, least, context.counts)
        room, started = (None, full) if self.lensnet is None or not full.any() else self._room(context, target, parts)
        context.budget = self.budget
        return self.anew(context, started) if started.any() else context, room, started

    def _room(self, context: WorkingContext, target: Tensor, parts: int) -> tuple[Edits, Tensor]:
        """Collapse until each row has ``target`` [B] entries -> the collapses; rows, bool [B], in which that fails."""
        k, made, stuck = context.tree.block_size, [], torch.zeros(len(target), dtype=torch.bool)
        while (over := (context.counts - target).clamp(min=0) * ~stuck).any():
            legal = moves(context, self.allocator.protected)
            leads = legal.leads
            leads[:, :parts] = False  # only the history has new tokens
            scores = self.score(context, legal)
            self.known = Known.of(context, legal, scores)
            worth = torch.where(leads, scores.v_keep, torch.inf)
            there = leads.sum(1).cpu()
            stuck |= (over > 0) & (there == 0)
            count = torch.minimum(-(-over // (k - 1)), there).to(worth.device)
            cheapest = worth.argsort(dim=1, stable=True)  # among equals the oldest
            row, place = (torch.arange(worth.shape[1], device=worth.device) < count[:, None]).nonzero().unbind(1)
            column = cheapest[row, place]
            lod, index = context.lod[row, column] + 1, context.index[row, column] // k
            edits = Edits(row, lod, index, torch.zeros_like(row, dtype=torch.bool))
            edits.apply(context)
            made.append(edits)
        if stuck.any():
            self.known = None
        return joined(made), stuck

    def anew(self, context: WorkingContext, rows: Tensor) -> WorkingContext:
        """The window with rows, bool [B], put together anew from the whole tree by recency; parts stay as they are."""
        if isinstance(tree := context.tree, Composite):
            own = tree.own_entries(self.budget - self.reserve - tree.spent)
            return WorkingContext(tree, *tree.joined([*tree.segments(context)[:-1], own]), self.budget)
        fresh = WorkingContext.recency(context.tree, self.budget - self.reserve)
        if not rows.all():
            counts = torch.where(rows, fresh.counts, context.counts)
            w, at = int(counts.max()), rows.to(context.lod.device)[:, None]
            lod, index = (
                torch.where(at, _cut(getattr(fresh, name), w), _cut(getattr(context, name), w))
                for name in ("lod", "index")
            )
            fresh = WorkingContext(context.tree, lod, index, counts, self.budget)
        fresh.budget = self.budget
        return fresh

    def score(self, context: WorkingContext, legal: Moves) -> Scores:
        """What LensNet says, with the reserve left free.

        Raises:
            ValueError: its values are NaN or infinite.
        """
        mean_embeddings = self.mean_embeddings(context) if self.lensnet.content is not None else None
        scores = self.lensnet.score(
            lowered(context, self.reserve), legal, self.allocator.margin(self.lensnet.tau), mean_embeddings
        )
        if not (scores.v_down.isfinite().all() and scores.v_keep.isfinite().all()):
            raise ValueError(
                "lensnet: its values are NaN or infinite; its weights, or the gists that it reads, are broken"
            )
        return scores

    def needed(self, context: WorkingContext) -> bool:
        """Whether there is anything to decide: not while all of every history is raw and there is room for more."""
        room = self.budget - self.reserve
        if parts := parts_in(context):
            room -= context.tree.spent - parts
        return bool((context.lod > 0).any() or (context.counts > room).any())

    def refocus(self, context: WorkingContext) -> tuple[Scores | None, Edits | None]:
        """One refocus of a window, in place; ``(None, None)`` without LensNet, or where nothing is to decide."""
        self.seconds = {"score": 0.0, "allocate": 0.0}
        known, self.known = self.known, None
        if self.lensnet is None or not self.needed(context):
            return None, None
        began = time.perf_counter()
        legal = moves(context, self.allocator.protected)
        if known is None:
            scores = self.score(context, legal)
        else:
            legal, *values = known.holds_for(context, legal)
            margin = self.allocator.margin(self.lensnet.tau)
            scores = self.lensnet.scored(lowered(context, self.reserve), legal, *values, margin)
        note_worth(context, legal, scores)
        bool(scores.price[0] > 0)  # a GPU is done before the clock is read
        scored = time.perf_counter()
        edits = self.allocator.refocus(context, scores.score, scores.price)
        self.seconds = {"score": scored - began, "allocate": time.perf_counter() - scored}
        return scores, edits

    def shown(
        self, context: WorkingContext, questions: Questions | None = None
    ) -> tuple[WorkingContext, Tensor | None]:
        """What is read of a window: all of it; with ``earn`` what LensNet puts above the newest tokens, and these.

        Args:
            questions: by which keys are searched, and what else is to be read; ``None``: nothing.

        Returns:
            Also the entries of each row that were earned, [B]; ``None``: nothing was compared.
        """
        if not self.earn:
            return context, None
        legal = moves(context, self.allocator.protected)
        scores = self.score(context, legal) if self.lensnet is not None and self.needed(context) else None
        margin = 0.0 if scores is None else self.allocator.margin(self.lensnet.tau)
        protected, found = self.allocator.protected, None
        if questions is not None:
            blocks = questions.repeated
            most = [self.keys + len(own) for own in blocks]
            if self.keys:
                by_keys = found_by_keys(context, questions, self.keys, self.budget, protected)
                blocks = [[*dict.fromkeys(first + more)] for first, more in zip(blocks, by_keys, strict=True)]
            found = Found(blocks, most, questions.newest)
        shown, count, self.found = earned(context, self.budget, legal, scores, margin, protected, found)
        return shown, count


def note_worth(context: WorkingContext, legal: Moves, scores: Scores) -> None:
    """The tree keeps what LensNet says of blocks: of one that stands as a gist what its tokens would win, of one that
    is open what its gist would lose."""
    k = context.tree.block_size
    for where, worth, width in (
        (legal.expand & (context.lod == 1), scores.v_down, 1),
        (legal.leads & (context.lod == 0), scores.v_keep, k),
    ):
        row, column = where.nonzero().unbind(1)
        context.tree.note_worth(row, context.index[row, column] // width, worth[row, column])


def lowered(context: WorkingContext, reserve: int) -> WorkingContext:
    """The same window, with a smaller budget: for those who only look at it."""
    other = copy.copy(context)
    other.budget = context.budget - reserve
    return other


def parts_in(context: WorkingContext) -> int:
    """Entries of a window that are of parts: its first ones; 0 where there are no parts."""
    if not isinstance(context.tree, Composite):
        return 0
    return int((context.starts()[0, : int(context.counts[0])] < context.tree.sink).sum())


def _names(lod: Tensor, index: Tensor) -> Tensor:
    """One number for each node."""
    return lod * 2**48 + index


def joined(parts: list[Edits]) -> Edits:
    """One behind the other."""
    return Edits(*(torch.cat([getattr(p, name) for p in parts]) for name in ("row", "lod", "index", "expand")))


def _cut(tensor: Tensor, columns: int) -> Tensor:
    """[B, W] -> [B, columns], cut or padded."""
    return torch.nn.functional.pad(tensor, (0, columns - tensor.shape[1]))
