"""What an observer of a session is told, once per refocus: a web page, telemetry and a replay all stand on this.

    session = Session(controller, observers=[print])      # any function of one ``Refocused``

B rows, E edits, W entries.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from megactx.focus import Edits
from megactx.focus.allocator import Refocus
from megactx.focus.lensnet import Scores
from megactx.focus.replay import Step, View
from megactx.memory import WorkingContext
from megactx.memory.page_cache import News

from .foretelling import Foretold


@dataclass(frozen=True)
class Refocused:
    """New tokens were taken up, room was made for them where needed, and the window was refocused."""

    number: int  # of this refocus, from 1
    tokens: Tensor  # [B] of each history, after it
    new: Tensor  # [B] of these, taken up now
    before: tuple[View, ...]  # windows as the last refocus left them, one per row; empty at the first
    started: Tensor  # bool [B]: put together anew by recency, no edit led from the last window to this one
    room: Edits | None  # collapses that made room for the new tokens; None: none was needed, or no LensNet
    scored: tuple[View, ...]  # windows with the new tokens, which LensNet saw; one per row
    scores: Scores | None  # of ``scored``, [B, W]; None without LensNet, while all is raw, and between ``edit_every``
    edits: Edits | None  # of the allocator, in their order; None likewise
    threshold: float  # of scores: what is closer to 0 stays as it is
    after: tuple[View, ...]  # one per row
    budget: int  # entries of a window at most
    telemetry: Refocus | None  # what the allocator says of its edits; None likewise
    seconds: dict[str, float]  # decode (the new tokens), gist, room, score, allocate, read: what of these there was
    reused: Tensor | None  # [B] entries whose keys and values were kept; None: nothing was read yet
    read: Tensor | None  # [B] entries of the windows that were read; with attention=mega summaries and strips too
    pairs: Tensor | None = None  # [B] share of the pairs of plain attention that attention=mega sees; None: plain
    earned: Tensor | None = None  # [B] of them not the sink or the newest tokens; None: all of the window is read
    drafts: tuple[int, int] | None = None  # tokens of drafts that were taken, and not; None: there are no drafts
    pages: tuple[News, ...] = ()  # of each tree of the window that is on disk, or elsewhere
    foretold: Foretold | None = None  # what the readout of the next gist says; None: there is no readout

    @property
    def utilisation(self) -> list[float]:
        """Entries over the budget, of each row."""
        return [len(view.lod) / self.budget for view in self.after]

    @property
    def reuse(self) -> float | None:
        """Share of all entries whose keys and values were kept."""
        return None if self.reused is None else float(self.reused.sum() / self.read.sum().clamp(min=1))

    def step(self, row: int = 0) -> Step | None:
        """The same for ``focus.replay`` and its pictures; ``None`` without LensNet."""
        if self.scores is None:
            return None
        edits = self.edits[self.edits.row == row]
        before = self.scored[row]
        return Step(
            before=before,
            score=self.scores.score[row, : len(before.lod)].float().cpu(),
            threshold=self.threshold,
            price=float(self.scores.price[row]),
            edits=Edits(edits.row.cpu(), edits.lod.cpu(), edits.index.cpu(), edits.expand.cpu()),
            after=self.after[row],
        )


Observer = Callable[[Refocused], None]


def views(context: WorkingContext | None) -> tuple[View, ...]:
    """Copies of all rows on the CPU."""
    return () if context is None else tuple(View.of(context, row) for row in range(len(context.counts)))
