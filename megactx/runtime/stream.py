"""Histories that go on: B rows of tokens, a tree of all of them, a window of the tree, and what the base has read.

    decode 32 -> append -> gist -> score -> room -> allocate -> read what changed -> decode

Beside it a window may show *parts*: other trees, which are read where they lie and may be exchanged at any refocus.

A history is what the tree holds plus up to K - 1 *waiting* tokens that were read behind the window. ``hidden`` is what
the base gives for the newest token; a read that is not needed is not made.

B rows, T tokens, K of a block, W entries, D width, V vocabulary.
"""

import time
from collections.abc import Iterable

import torch
from torch import Tensor

from megactx.focus.keys import Questions
from megactx.framework.errors import RunFailed
from megactx.lm.chunked_head import nll
from megactx.memory import Composite, MegaContextTree, Selection, WorkingContext
from megactx.parts.models import Models

from .approximate_prefill import ApproximatePrefill
from .asking import Asking
from .events import Observer, Refocused, views
from .focusing import Focus
from .foretelling import Foretelling
from .incremental_prefill import IncrementalPrefill
from .node_prefill import NodePrefill
from .part_files import OpenPart
from .position_rebase import PositionRebase
from .recall import Recall
from .settings import Settings
from .shown_parts import ShownParts


class Stream(ShownParts):
    """Rows of history over one tree.

    Args:
        models: base LM, GistNet and, for ``focus``, LensNet.
        settings: checked against the models by ``Controller``.
        rows: B.
        tree: a history that is there already, of B rows.
        observers: called with a ``Refocused`` after each refocus.

    Raises:
        ValueError: drafts of several rows.
    """

    def __init__(
        self,
        models: Models,
        settings: Settings,
        rows: int = 1,
        tree: MegaContextTree | None = None,
        observers: Iterable[Observer] = (),
    ):
        if rows > 1 and settings.drafts != "none":
            raise ValueError(f"drafts={settings.drafts} is not allowed for {rows} texts at once, allowed is none")
        self.models, self.settings, self.observers = models, settings, list(observers)
        self.base, self.device = models.base, models.base.model.device
        keys = models.keys if settings.keys else None
        if tree is None:
            tree = MegaContextTree(models.gistnet, models.base, rows, device=self.device, keys=keys)
        self.tree = tree
        self.parts: dict[int, OpenPart] = {}  # by slot
        self.seen: MegaContextTree | Composite = self.tree  # what windows are of
        self.block, self.rows = self.tree.block_size, self.tree.rows
        self.context: WorkingContext | None = None
        self.focus = Focus(settings, self.block, models.lensnet)
        limit = settings.limit or self.base.max_positions
        self.rebase = PositionRebase(settings.positions, limit, settings.budget, self.block)
        kind = ApproximatePrefill if settings.reuse == "approximate" else IncrementalPrefill
        self.prefill: IncrementalPrefill | NodePrefill = kind(self.base, settings.graphs)
        if settings.attention == "mega":
            self.prefill = NodePrefill(self.base, settings.mega)
        self.asking = Asking(self.tree, settings, self.base) if settings.earn else None
        self.recall = Recall(self.asking.repeats) if settings.recall else None
        self.waiting = torch.zeros(self.rows, self.block, dtype=torch.long, device=self.device)
        self._grown_from: Tensor | None = None  # [B], tokens of the tree before it took what waits
        self.counts = torch.zeros(self.rows, dtype=torch.long)
        # A token that is pushed is read when somebody asks what follows it: with others, or with a draft.
        self.lazy = settings.drafts != "none"
        self.ahead: list[tuple[int, Tensor, Tensor]] = []  # tokens of a draft that were read, their states and logits
        self.drafts = [0, 0]  # tokens of drafts that were taken, and that were not, since the last refocus
        self.hidden: Tensor | None = None  # [B, D]; None: to be read
        self.refocuses = 0
        self.since = 0  # blocks since LensNet decided, see ``Settings.edit_every``
        self.keeper = None  # who takes away what nobody reads, see ``curation``
        self.foretelling = None if models.prediction is None else Foretelling(models.prediction, self.tree)
        self.shown: WorkingContext | None = None  # what of the window was read last
        self.earned: Tensor | None = None  # [B], entries above the newest tokens at the last reading, see ``Focus``
        self._found: list[list[int]] = []  # of each row, blocks that were found at the last reading
        self._following: Tensor | None = None  # [B], position of the first token behind the window
        self._decoded = 0.0  # seconds, of the waiting tokens
        self._before = ()  # windows as the last refocus left them, for observers
        self._ends = self.tree.lengths  # [B], tokens that they stood for

    @property
    def hidden(self) -> Tensor | None:
        """What the base gives for the newest token of each row, [B, D]; ``None``: that is still to be read."""
        return self._hidden

    @hidden.setter
    def hidden(self, hidden: Tensor | None) -> None:
        if self.ahead:  # what follows is something else; a stop in the middle finds nothing read
            count, newest = len(self.ahead), self._hidden
            self._hidden, self.unread, self.told, self.ahead = None, 0, None, []
            self.drafts[1] += count
            self.prefill.cut(count, newest)
        # ``unread``: so many of the waiting tokens are all that is to be read; 0 where the window may have changed.
        self._hidden, self.unread, self.told = hidden, 0, None

    @property
    def counts(self) -> Tensor:
        """Waiting tokens of each row, [B], on the CPU. What the tree has waits no more, wherever a stop came."""
        self._drop_taken()
        return self._counts

    @counts.setter
    def counts(self, counts: Tensor) -> None:
        self._counts = counts

    @property
    def lengths(self) -> Tensor:
        """Tokens of each history, [B], on the CPU."""
        return self.tree.lengths + self.counts

    @torch.no_grad()
    def logits(self) -> Tensor:
        """Of the next token, [B, V] in fp32.

        Raises:
            ValueError: a row has no token yet.
        """
        self._check_begun(torch.zeros_like(self.counts))
        self._notice()
        if self.hidden is None:
            self._take_up()
        told = self.base.logits(self.hidden).float() if self.told is None else self.told
        return told if self.recall is None else self.recall.logits(told, self.waiting, self.counts)

    @torch.no_grad()
    def push(self, tokens: Tensor, active: Tensor | None = None) -> None:
        """Append one token to each row and read it; every K tokens there is a refocus.

        Args:
            tokens: [B].
            active: bool [B], which rows take theirs; ``None``: all.
        """
        self._settle()
        if self.ahead and active is None and int(tokens[0]) == self.ahead[0][0]:
            self._take_from_draft()
        elif self.lazy and active is None and (self.hidden is not None or self.unread):
            self._put_off(tokens)
        else:
            self._follow(tokens[:, None], None if active is None else active[:, None])
        if int(self.counts.max()) == self.block:
            self._flush(read=True)

    @torch.no_grad()
    def foresee(self, draft: list[int]) -> None:
        """Read what may follow along with what is unread of the one row: pushed, it costs no pass of its own.

        What is not pushed is forgotten. So a draft changes nothing but the time, rounding aside. Where nothing is
        unread it would cost a pass, and is not read.

        Args:
            draft: ids; what is beyond the end of the block is left out.
        """
        draft = draft[: self.block - int(self.counts[0])]
        if not draft or (new := self.put_off()) is None:
            return
        (ids, positions), began, unread = new, self._now(), self.unread
        ids = torch.cat([ids, torch.tensor([draft], device=self.device)], dim=1)
        more = torch.arange(1, len(draft) + 1, device=self.device)
        positions = torch.cat([positions, positions[:, -1:] + more], dim=1)
        self.hidden = None  # a stop before the end: all is read again
        states = self.prefill.step(ids, positions)
        newest = states[0, unread - 1 :]  # [N + 1, D], of the newest token and of the draft
        told = self.base.logits(newest).float()
        ahead = [(token, newest[n : n + 1], told[n : n + 1]) for n, token in enumerate(draft, start=1)]
        first, logits = newest[:1], told[:1]
        self._decoded += self._now() - began
        # Nothing is called in between: a stop finds all of it, or nothing.
        self._hidden, self.told, self.ahead = first, logits, ahead
        self._hear(states[:, :unread], self.lengths - unread)

    def _take_from_draft(self) -> None:
        """Its next token becomes part of the history."""
        (token, hidden, told), *ahead = self.ahead
        self.waiting[0, self.counts[0]] = token
        counts, drafts = self.counts + 1, [self.drafts[0] + 1, self.drafts[1]]
        # As above.
        self.counts, self.drafts, self._hidden, self.told, self.ahead = counts, drafts, hidden, told, ahead
        self._hear(hidden[:, None], self.lengths - 1)

    @torch.no_grad()
    def append(
        self, tokens: Tensor, lengths: Tensor | None = None, score: bool = False, follow: bool = True
    ) -> Tensor | None:
        """Append known tokens. Without ``score`` they are not read before that is needed.

        Args:
            tokens: [B, T] ids.
            lengths: how many of each row are meant, [B]; ``None``: all.
            score: read them as if they were decoded, block by block with a refocus each.
            follow: the window follows them, where they are no more than it has room for; else it is put together anew
                when it is needed.

        Returns:
            With ``score`` their NLL [B, T] in nats; NaN where there is none: the first token of a history, and what is
            beyond a row's length.

        Raises:
            ValueError: shapes, or ids that the base cannot embed. Nothing was appended.
        """
        if tokens.ndim != 2 or len(tokens) != self.rows:
            raise ValueError(f"tokens have shape {list(tokens.shape)}, expected [{self.rows}, T]")
        tokens = tokens.to(self.device)
        lengths = torch.full((self.rows,), tokens.shape[1]) if lengths is None else lengths.cpu().long()
        if lengths.shape != (self.rows,) or lengths.min() < 0 or lengths.max() > tokens.shape[1]:
            raise ValueError(f"lengths={lengths.tolist()} are not allowed: {self.rows} numbers, 0 to {tokens.shape[1]}")
        self.tree.check_ids(tokens)
        self._check_begun(lengths)
        if score:
            return self._scored(tokens.long(), lengths)
        self._flush(read=False)
        if not follow or int(lengths.max()) > self.settings.budget:  # nothing of the old window would be left
            self.tree.append(tokens, lengths)
            self.context = self.hidden = None
        elif int(lengths.max()) > 0:
            self._grow(tokens, lengths, read=False)
        return None

    @torch.no_grad()
    def go_on(self, other: MegaContextTree, first: int, stop: int) -> None:
        """Append tokens up to ``stop`` whose gists another tree has, see ``MegaContextTree.go_on``. Nothing is read."""
        self._flush(read=False)
        self.tree.go_on(other, first, stop)
        self.context = self.hidden = None

    @torch.no_grad()
    def window(self) -> WorkingContext | None:
        """The working context up to the end of the tree, put together where that was left for later; ``None``: the
        tree is empty yet."""
        if int(self.seen.lengths.max()) == 0:
            return None
        if self.context is None or (self._ahead() > 0).any():
            self._catch_up({}, read=False)
        return self.context

    def newest(self, count: int) -> Tensor:
        """The last tokens of each row, [B, count]; rows that have not so many repeat their first."""
        place = (self.lengths[:, None] - count + torch.arange(count)).clamp(min=0).to(self.device)
        row = torch.arange(self.rows, device=self.device)[:, None].expand_as(place)
        behind = place - self.tree.lengths.to(self.device)[:, None]
        out = self.waiting[row, behind.clamp(0, self.block - 1)]
        stored = behind < 0
        out[stored] = self.tree.levels[0].read("token", row[stored], place[stored]).long()
        return out

    def questions(self) -> Questions | None:
        """What a reading asks of the past; ``None``: nothing, where no window is earned."""
        return self.asking and self.asking.questions(self.seen.sink // self.block)

    def restore(self, context: WorkingContext | None) -> None:
        """Go on with a window, and read it anew; ``None``: one is put together when it is needed."""
        self.context, self.hidden = context, None
        self._before = views(context) if self.observers else ()
        self._ends = self.tree.lengths if context is None else self._own_ends(context)
        self.prefill.forget()

    def _own_ends(self, context: WorkingContext) -> Tensor:
        """Tokens of each history that a window stands for, [B], without those of parts."""
        return context.ends().cpu() - (self.seen.lengths - self.tree.lengths)

    def _check_begun(self, new: Tensor) -> None:
        if (self.lengths + new == 0).any():
            raise ValueError("a row has no token yet: its first, such as BOS, comes with the first of all others")

    def _scored(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        out = torch.full(tokens.shape, torch.nan)
        first, total = 0, tokens.shape[1]
        self._settle()
        if self.hidden is None and (self.lengths > 0).any():
            self._take_up()
        while first < total:
            piece = tokens[:, first : first + self.block - int(self.counts.max())]
            n = piece.shape[1]
            mask = torch.arange(n) < (lengths - first)[:, None]
            before, waited = self.hidden, self.counts
            hidden = self._follow(piece, None if mask.all() else mask.to(self.device))
            begins = hidden[:, :1] if before is None else before[:, None]
            found = nll(self.base, torch.cat([begins, hidden[:, :-1]], dim=1).flatten(0, 1), piece.flatten())
            found = found.view(piece.shape).cpu()
            if self.recall is not None:
                found = self.recall.nll(found, self.waiting, waited, self.counts - waited)
            out[:, first : first + n] = torch.where(mask, found, torch.nan)
            if before is None:
                out[:, 0] = torch.nan
            first += n
            if int(self.counts.max()) == self.block:
                self._flush(read=True)
        return out

    def _follow(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Read tokens [B, N] behind the window; -> hidden [B, N, D]."""
        began = self._now()
        self._check_begun(torch.ones_like(self.counts) if mask is None else mask.any(1).cpu().long())
        self._notice()
        if self.hidden is None and (self.lengths > 0).any():
            self._take_up()
        start = self.counts.to(self.device)[:, None] + torch.arange(tokens.shape[1], device=self.device)
        following = 0 if self._following is None else self._following[:, None]
        self.hidden = None  # until the tokens are counted: what a stop leaves before that is read again
        hidden = self.prefill.step(tokens, following + start, mask)
        mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        row, column = mask.nonzero().unbind(1)
        self.waiting[row, start[row, column]] = tokens[row, column]
        before = self.lengths
        self.counts, self.hidden = self.counts + mask.sum(1).cpu(), self.prefill.hidden
        self._hear(hidden, before)
        self._decoded += self._now() - began
        return hidden

    def _put_off(self, tokens: Tensor) -> None:
        """Take one token for each row, [B]; it is read later."""
        self._notice()
        unread = self.unread + 1 if self.hidden is not None or self.unread else 0
        self.waiting[torch.arange(self.rows), self.counts] = tokens
        self.hidden = None
        self.counts, self.unread = self.counts + 1, unread

    def put_off(self) -> tuple[Tensor, Tensor] | None:
        """Tokens [B, N] that were put off, if nothing else is to be read, and their positions [B, N]."""
        self._notice()
        if not self.unread:
            return None
        place = self.counts[:, None] - self.unread + torch.arange(self.unread)
        following = 0 if self._following is None else self._following[:, None]
        place = place.to(self.device)
        return self.waiting.gather(1, place), following + place

    def took_up(self, states: Tensor, told: Tensor | None = None, seconds: float = 0.0) -> None:
        """What was put off has been read: final hidden states of the N tokens [B, N, D], and logits of what follows the
        last, [B, V] in fp32."""
        self.hidden, self._decoded = states[:, -1], self._decoded + seconds
        self.told = told
        self._hear(states, self.lengths - states.shape[1])

    def _hear(self, states: Tensor, before: Tensor) -> None:
        """Final hidden states [B, N, D] of all tokens behind the first ``before`` [B] of each history."""
        if self.foretelling is not None and self.observers:
            self.foretelling.hear(states, before, self.lengths)

    def _take_up(self) -> None:
        """Read what was put off, or all where more has changed."""
        if (new := self.put_off()) is None:
            self._read()
            return
        began, self.hidden = self._now(), None  # a stop before the end: all is read again
        self.took_up(self.prefill.step(*new), seconds=self._now() - began)

    def _notice(self) -> None:
        """What was read with other adapters than those that are on now is read again."""
        if not self.prefill.current():
            self.hidden = None
            self.prefill.forget()

    def _settle(self) -> None:
        """Take up a whole block that waits still, because a stop came before the tree had it."""
        if int(self.counts.max()) == self.block:
            self._flush(read=False)

    def _flush(self, read: bool) -> None:
        """What is waiting becomes part of the tree."""
        if (count := int(self.counts.max())) > 0:
            waiting, counts = self.waiting[:, :count].clone(), self.counts
            self._grow(waiting, counts, read)

    def _grow(self, tokens: Tensor, lengths: Tensor, read: bool) -> None:
        """Take tokens into the tree, all or none, and then into the window."""
        began, self._grown_from = self._now(), self.tree.lengths
        self.tree.append(tokens, lengths)
        self._drop_taken()
        self._catch_up({"gist": self._now() - began}, read)

    def _drop_taken(self) -> None:
        """Whatever happens, no token is there twice: in the tree, and waiting."""
        if self._grown_from is not None and not torch.equal(self.tree.lengths, self._grown_from):
            self._counts, self.hidden, self._grown_from = torch.zeros_like(self._counts), None, None

    def _ahead(self) -> Tensor:
        """Tokens of the tree that the window has not yet, [B]."""
        return self.seen.lengths - (0 if self.context is None else self.context.ends().cpu())

    def _catch_up(self, seconds: dict, read: bool) -> None:
        """Bring the window up to the end of the tree, a reserve at a time. A stop on the way is gone on from."""
        self.look()
        if self.keeper is not None:
            self.keeper.step()
        while (ahead := self._ahead()).any() or seconds:
            new = ahead if self.context is None else ahead.clamp(max=self.focus.reserve)
            self._take(seconds, new, read and bool((ahead == new).all()))
            seconds = {}

    def _take(self, seconds: dict, new: Tensor, read: bool) -> None:
        """Take new [B] tokens into the window and refocus it. What fails on the way leaves the old window."""
        self.hidden, began = None, self._now()
        room, started = None, torch.ones(self.rows, dtype=torch.bool)
        since = self.since + -(-int(new.max()) // self.block)
        due = self.context is None or since >= self.settings.edit_every
        if self.context is None:
            context = self.focus.start(self.seen)
        else:
            # Room that the blocks until the next decision will need is made with this one: LensNet is asked once.
            ahead = (self.settings.edit_every - 1) * self.block if due else 0
            context, room, started = self.focus.take(self.context.copy(), new, ahead)
        seconds["room"] = self._now() - began
        scored = views(context) if self.observers else ()
        due |= room is not None  # what stands behind the collapses is read again in any case
        scores, edits = self.focus.refocus(context) if due else (None, None)
        seconds |= self.focus.seconds if due else {}
        self.context, self.refocuses, self.since = context, self.refocuses + 1, 0 if due else since
        decoded, self._decoded = self._decoded, 0.0
        if read:
            began = self._now()
            self._read()
            seconds["read"] = self._now() - began
        before, self._ends = self._ends, (ends := self._own_ends(self.context))
        drafts, self.drafts = self.drafts, [0, 0]
        if self.observers:
            event = Refocused(
                number=self.refocuses,
                tokens=self.lengths,
                new=ends - before,
                before=self._before,
                started=started,
                room=room,
                scored=scored,
                scores=scores,
                edits=edits,
                threshold=self.focus.allocator.threshold,
                after=views(context),
                budget=context.budget,
                telemetry=None if scores is None else self.focus.allocator.telemetry,
                seconds={"decode": decoded} | seconds,
                reused=self.prefill.reused if read else None,
                read=self.prefill.lengths if read else None,
                pairs=self.prefill.pairs if read and isinstance(self.prefill, NodePrefill) else None,
                earned=self.earned if read else None,
                drafts=tuple(drafts) if self.settings.drafts != "none" else None,
                pages=tuple(tree.cache.news() for tree in self._trees() if tree.cache is not None),
                foretold=None if self.foretelling is None else self.foretelling.told(self.hidden),
            )
            self._before = event.after
            for observer in self.observers:
                observer(event)

    def _read(self) -> None:
        """Read the window, as far as it has changed, and what waits behind it."""
        if self.window() is not None:
            questions = self.questions()
            self.shown, self.earned = self.focus.shown(self.context, questions)
            self._note_found()
            self._read_window(self.shown)
        else:
            self.prefill.forget()
        if (count := int(self.counts.max())) > 0:  # of a session that was resumed
            place = torch.arange(count, device=self.device)
            following = 0 if self._following is None else self._following[:, None]
            mask = place < self.counts.to(self.device)[:, None]
            self.prefill.step(self.waiting[:, :count], following + place.expand(self.rows, -1), mask)
        self.hidden = self.prefill.hidden
        self._hear(self.hidden[:, None], self.lengths - 1)

    def _read_window(self, shown: WorkingContext) -> None:
        try:
            if isinstance(self.prefill, NodePrefill):
                bends, self._following = self.rebase.bends(shown)
                self.prefill.read(shown, bends)
            else:
                if isinstance(shown, Selection):
                    positions, self._following = self.rebase.close(shown)
                else:
                    positions, self._following = self.rebase.place(shown)
                entries, spread = shown.to_tensor(), self.models.gistnet.spread(shown.lods())
                self.prefill.read(entries, positions, shown.lengths, spread)
        except (ValueError, RunFailed):  # a damaged page, named once, is not opened again; or a server is away
            self.context = None
            raise

    def _note_found(self) -> None:
        """Blocks that were found, and had not been at the reading before, count as opened."""
        before, self._found = self._found, self.focus.found
        fresh = [
            (row, block)
            for row, own in enumerate(self._found)
            for block in own
            if row >= len(before) or block not in before[row]
        ]
        if fresh:
            row, block = torch.tensor(fresh, device=self.device).unbind(1)
            self.context.tree.note_opened(row, torch.ones_like(block), block)

    def _now(self) -> float:
        if self.device.type == "cuda" and self.observers:
            torch.cuda.synchronize()
        return time.perf_counter()
