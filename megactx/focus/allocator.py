"""FocusAllocator: turns scores into edits that keep a working context within its budget (method 11).

    expands    score > +threshold, best first         0.9   0.7   0.4   0.3
    collapses  mean of K siblings < -threshold       -0.8  -0.5  -0.3
    edits      two free places: e e, then pairs c e c e; a collapse pays for the expand behind it

If an entry is to be expanded, its siblings are not collapsed. So no two edits of a refocus concern the same entries,
and only the order of each queue matters: there is no loop over rows, entries or edits.

**Why it comes to rest.** Let every gist have one fixed value: v_down while it stands, v_keep while its children stand.
An expand is made only above the price, a collapse only below it. So the total worth of all expanded gists grows with
every expand, and with every pair of a collapse and an expand. A lone collapse could undo that. Take a gist of little
worth whose children are worth much. The children keep the price up, so the gist is collapsed. Without them it looks
cheap, and is expanded, and so on for ever. Hence, where the price is known and above 0, a collapse is made only to pay
for an expand. At 0 only siblings go whose parent is better than they are. Then the worth rises with each refocus that
changes a row, so there is an end. If v_down and v_keep of one gist contradict each other, nothing can promise an end;
``cooldown`` then makes the changes slow.

B rows, W entries, K children of a node, E edits, R remembered edits, M edits of a row at most.
"""

import math
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Lt
from torch import Tensor

from megactx.framework.config.types import AtLeast2, NonNegative, Whole, declared
from megactx.memory import WorkingContext

from .edits import PROTECTED, Edits, Moves, moves

SWAP_RATE, SWAP_RATE_ALARM = (0.05, 0.20), 0.25  # healthy from .. to, and too restless (method 11)
RESIDENCY = 3  # refocuses that an entry should stand on average, at least
UTILISATION = (0.80, 1.00)  # share of the budget that should be in use
REMEMBERED = 16  # refocuses for which edits are remembered: residency is counted up to this


@dataclass(frozen=True)
class Refocus:
    """What a refocus did to each row."""

    expands: Tensor  # [B]
    collapses: Tensor  # [B]
    swap_rate: Tensor  # [B] fine entries created or removed, K per edit, over the entries before
    utilisation: Tensor  # [B] entries after, over the budget
    residency: Tensor  # [B] mean refocuses since the edited gists last changed, REMEMBERED at most; NaN without edits
    price: Tensor | None  # [B] that of ``refocus``


@declared("allocator")
class FocusAllocator:
    """The best expands that fit, and the worst details collapsed to pay for them (method 11).

    It edits a batch of working contexts, and remembers the edits that it made.

    Args:
        threshold: of scores: what is closer to 0 stays as it is. Method 11 has 0.2, but estimates of expected values
            are small beside tau: at 0.2 the needed block was in detail in 0.83 of 60 planted cases, at 0.1 in 0.90, and
            the swap rate rose from 0.06 to 0.09 (RESULTS.md).
        max_edits: of a row and refocus, better an even number, as a swap takes two; ``None``: max(4, W_max / 512).
        cooldown: refocuses for which a gist that was expanded or collapsed stays as it is.
        protected: newest tokens that do not collapse.
        temperature: in units of the score. 0 makes the best edits; above 0 edits are drawn, better ones more often.
        seed: of the draws. A draw depends on it and on the number of refocuses so far, and on nothing else.
        recompute: score that the edits of a refocus must bring together for every 1,000 entries that are read again
            because of them: all from the first that changes to the end of the row. 0: reading costs nothing.

    Raises:
        ValueError: a setting that is not allowed; the message names it.
    """

    def __init__(
        self,
        threshold: Annotated[float, Ge(0), Lt(1)] = 0.1,
        max_edits: AtLeast2 | None = None,
        cooldown: Whole = 2,
        protected: Whole = PROTECTED,
        temperature: NonNegative = 0.0,
        seed: int = 0,
        recompute: NonNegative = 0.0,
    ):
        self.recompute = recompute
        self.threshold, self.max_edits, self.cooldown = threshold, max_edits, cooldown
        self.protected, self.temperature, self.seed = protected, temperature, seed
        self.telemetry: Refocus | None = None  # of the last refocus
        self.refocuses = 0
        self._node, self._age = torch.zeros(2, 0, dtype=torch.long)  # [R], ascending nodes: names of ``_name``

    def margin(self, tau: float | Tensor) -> float | Tensor:
        """How far a value must be from the price for an edit, in nats: ``margin`` of ``price``."""
        return math.atanh(self.threshold) * tau * 1.001  # a little more, so that no rounding decides

    @torch.no_grad()
    def propose(self, context: WorkingContext, scores: Tensor, price: Tensor | None = None) -> Edits:
        """The edits that are due. The budget holds after every single one. Nothing is changed.

        Args:
            context: what would be edited. Row b must be the same text at every call.
            scores: from -1 (collapse) to 1 (expand), [B, W].
            price: behind the scores, [B]. Where it is above 0, a collapse is made only to pay for an expand.

        Returns:
            Edits in the order in which they are to be made, row after row.

        Raises:
            ValueError: scores of another shape, NaN or infinite.
        """
        if scores.shape != context.lod.shape:
            raise ValueError(f"scores have shape {list(scores.shape)}, expected {list(context.lod.shape)}")
        if not (scores.isfinite() | ~context.mask).all():
            raise ValueError("scores: NaN or infinite ones are not allowed")
        scores, k = torch.where(context.mask, scores, 0).float(), context.tree.block_size
        legal = moves(context, self.protected)
        means = _of_siblings(scores, k).mean(-1)  # [B, W]; they say something at the first of K siblings
        wanted = legal.expand & (scores > self.threshold) & self._rested(context, legal, True)  # [B, W]
        spared = legal.leads & (means < -self.threshold) & self._rested(context, legal, False)  # [B, W]
        # Siblings stay while one of them is to be expanded: else the order of the edits would decide what is legal.
        spared &= ~_of_siblings(wanted, k).any(-1)
        noise = self._noise(scores)
        # Ties: the nearest to the end of the row is expanded, the farthest from it collapsed. A stable sort keeps the
        # first of equals, so expands are sorted from the end of the row, and their columns counted back: [B, W] each.
        expands = scores.shape[1] - 1 - _queue(wanted.flip(1), (scores + noise[0]).flip(1))
        collapses = _queue(spared, noise[1] - means)

        most = self.max_edits or max(4, int(torch.as_tensor(context.budget).sum()) // 512)
        room = (context.budget - context.lengths) // (k - 1)  # of so many expands
        # Where detail costs something nothing goes but for something better: see "why it comes to rest" above.
        lone = most if price is None else torch.where(price > 0, 0, most)
        made, expand, place, unit = _turns(room.clamp(min=0), wanted.sum(1), spared.sum(1), lone, most)  # [B, M] each
        place = torch.where(made, place, 0)
        column = torch.where(expand, expands.gather(1, place), collapses.gather(1, place))
        if self.recompute:
            gain = torch.where(expand, scores.gather(1, column), -means.gather(1, column))
            made = _worth_reading(made, unit, gain, column, context.lengths, self.recompute / 1000)
        row, step = made.nonzero().unbind(1)  # [E], row after row, in the order of the turns
        column, expand = column[row, step], expand[row, step]
        lod, index = context.lod[row, column], context.index[row, column]
        # A collapse is named by the parent that comes, not by the siblings that go.
        return Edits(row, torch.where(expand, lod, lod + 1), torch.where(expand, index, index // k), expand)

    def refocus(self, context: WorkingContext, scores: Tensor, price: Tensor | None = None) -> Edits:
        """Make the edits that ``propose`` gives, and remember them. ``telemetry`` then tells what was done."""
        edits, before = self.propose(context, scores, price), context.lengths
        residency = self._age_of(_name(edits.row, edits.lod, edits.index), context).float()
        edits.apply(context)
        self.refocuses += 1
        self._remember(_name(edits.row, edits.lod, edits.index))

        def per_row(values: Tensor) -> Tensor:  # [E] -> [B]
            return torch.zeros(len(before), device=values.device).index_add_(0, edits.row, values.float())

        expands, collapses = per_row(edits.expand), per_row(~edits.expand)
        count = expands + collapses
        self.telemetry = Refocus(
            expands=expands.long(),
            collapses=collapses.long(),
            swap_rate=context.tree.block_size * count / before.clamp(min=1),
            utilisation=context.lengths / context.budget,
            residency=per_row(residency) / count,
            price=price,
        )
        return edits

    def state_dict(self) -> dict[str, Tensor]:
        """The memory of edits: a saved session goes on with it as if it had never stopped."""
        row, lod, index = _unname(self._node)
        return {
            "refocuses": torch.tensor(self.refocuses),
            "row": row,
            "lod": lod,
            "index": index,
            "age": self._age,
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from what ``state_dict`` gave."""
        self.refocuses = int(state["refocuses"])
        self._node, order = _name(state["row"], state["lod"], state["index"]).sort()
        self._age = state["age"][order]

    def forget(self, start: int, stop: int, block_size: int) -> None:
        """Remember nothing of gists of tokens start .. stop - 1: others stand there now."""
        _, lod, index = _unname(self._node)
        first = index * block_size**lod
        kept = (first < start) | (first >= stop)
        self._node, self._age = self._node[kept], self._age.to(kept.device)[kept]

    def _noise(self, scores: Tensor) -> Tensor:
        """What is added to the scores [B, W] of expands and of collapses, [2, B, W]."""
        if not self.temperature:
            return torch.zeros(2, 1, 1, device=scores.device)
        # The best by score + Gumbel noise are draws without replacement, by softmax(score / temperature): no loop over
        # draws. The generator of a CPU takes 32 bits of a seed, and gives the same draw for every device.
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.refocuses) % 2**32)
        drawn = torch.empty(2, *scores.shape).exponential_(generator=generator)
        gumbel = -drawn.clamp(min=torch.finfo(drawn.dtype).tiny).log()
        return self.temperature * gumbel.to(scores.device)

    def _rested(self, context: WorkingContext, legal: Moves, expand: bool) -> Tensor:
        """Whether each entry's gist, or the parent of the siblings that begin there, may change again: bool [B, W]."""
        lod, index = context.lod, context.index
        if not expand:
            lod, index = lod + 1, index // context.tree.block_size
        return self._age_of(_name(context.number, lod, index), context) > self.cooldown

    def _age_of(self, node: Tensor, context: WorkingContext) -> Tensor:
        """How many refocuses ago each of the nodes [...] was changed, [...]; 1 is the last refocus."""
        forgotten = torch.full_like(node, self._horizon)
        if len(self._node) == 0:
            return forgotten
        self._node, self._age = self._node.to(node.device), self._age.to(node.device)
        # The remembered names ascend, so each node is looked up by bisection, and not compared with all of them.
        place = torch.searchsorted(self._node, node).clamp(max=len(self._node) - 1)
        return torch.where(self._node[place] == node, self._age[place], forgotten)

    def _remember(self, node: Tensor) -> None:
        """Nodes [E] were changed now; all others grow older, and some are forgotten."""
        age = self._age.to(node.device) + 1
        kept = (age < self._horizon) & ~torch.isin(self._node.to(node.device), node)
        self._node, order = torch.cat([self._node.to(node.device)[kept], node]).sort()
        self._age = torch.cat([age[kept], torch.ones_like(node)])[order]

    @property
    def _horizon(self) -> int:
        return max(REMEMBERED, self.cooldown + 1)


def _turns(room: Tensor, wanted: Tensor, spared: Tensor, lone: Tensor | int, most: int) -> tuple[Tensor, ...]:
    """The order of the edits: expands while there is room, then pairs of a collapse and an expand, then lone collapses.

    Args:
        room: expands that fit, [B].
        wanted, spared: lengths of both queues, [B].
        lone: the most collapses that no expand follows, [B] or one number for all rows.
        most: M.

    Returns:
        Whether there is an edit at each turn, whether it is an expand, its place in its queue, and the unit of edits
        that are made together or not at all, [B, M] each.
    """
    at_once = torch.minimum(room, wanted).clamp(max=most)  # [B]
    # A pair takes two edits and leaves the budget as it was, so pairs go on while both queues last.
    pairs = torch.minimum(torch.minimum(wanted - at_once, spared), (most - at_once) // 2)
    lone = torch.minimum(spared - pairs, most - at_once - 2 * pairs).clamp(max=lone)
    at_once, pairs, lone = at_once[:, None], pairs[:, None], lone[:, None]
    turn = torch.arange(most, device=room.device).expand(len(room), -1)
    then = turn - at_once  # the turn among pairs, and behind them among lone collapses
    expand = (then < 0) | (then < 2 * pairs) & (then % 2 == 1)
    gone = torch.where(then < 2 * pairs, (then + 1) // 2, then - pairs).clamp(min=0)  # collapses before this turn
    place = torch.where(expand, turn - gone, gone)
    unit = torch.where(then < 0, turn, torch.where(then < 2 * pairs, at_once + then // 2, turn - pairs))
    return turn < at_once + 2 * pairs + lone, expand, place, unit


def _worth_reading(made: Tensor, unit: Tensor, gain: Tensor, column: Tensor, lengths: Tensor, cost: float) -> Tensor:
    """The edits that bring more than reading again from the first of them on costs, bool [B, M].

    The row is read from its first change on, whatever changes behind it. So of units from the end of the row on, as
    many are made as bring most above what reading back to the last of them costs. No other choice brings more.

    Args:
        made, unit, gain, column: [B, M], of each edit.
        lengths: entries of each row, [B].
        cost: of an entry that is read again, in the unit of ``gain``.
    """
    end = lengths[:, None].to(column.device)
    first = end.expand_as(unit).clone()
    first.scatter_reduce_(1, unit, torch.where(made, column, end), "amin")  # of each unit
    brings = torch.zeros_like(gain).scatter_add_(1, unit, gain * made)
    order = first.argsort(dim=1, descending=True, stable=True)
    above = brings.gather(1, order).cumsum(1) - cost * (end - first.gather(1, order))
    best, last = above.max(dim=1, keepdim=True)
    rank = torch.arange(unit.shape[1], device=unit.device)
    kept = torch.zeros_like(made).scatter_(1, order, (rank <= last) & (best > 0))
    return made & kept.gather(1, unit)


def _queue(mask: Tensor, key: Tensor) -> Tensor:
    """Columns in the order of their keys, the highest first, those of the mask before all others: [B, W]."""
    return torch.where(mask, key, -torch.inf).argsort(dim=1, descending=True, stable=True)


def _of_siblings(values: Tensor, k: int) -> Tensor:
    """values [B, W] -> the values of each entry and of the K - 1 entries behind it, [B, W, K]."""
    return F.pad(values, (0, k - 1)).unfold(1, k, 1)


def _name(row: Tensor, lod: Tensor, index: Tensor) -> Tensor:
    """One number per node, for sorting and searching: 40 bits of index, 6 of level, the rest is the row."""
    return (row << 46) + (lod << 40) + index


def _unname(node: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return node >> 46, node >> 40 & 63, node & (1 << 40) - 1
