"""Composite: several trees in one window, each read where it lies (method 21).

    address   0 ...[ part 0 ]......[ part 1 ]......  ........[ the session's own tree ........
    rank           [0      ..       ][       ..      ][                     ..

Each part has a *slot*, which begins at a multiple of K^P. So a node (lod, index) of any level belongs to one part, and
nothing about a node changes when other parts come and go. A *rank* counts the same tokens through, part after part, the
session last: positions follow it. All parts are read only; the session's own tree is the only one that grows.

Every part has a share of the budget, and the session at least half of it. A part's entries never exceed its share.

K children of a node, M nodes, W entries of a window, D width, P a level.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .tree import MegaContextTree

if TYPE_CHECKING:
    from .working_context import WorkingContext

HIGHEST = 2**37  # addresses begin below: names of nodes have 40 bits for an index
SLOTS = 32  # parts at most
HALF = 0.5  # of the budget, at most, is the parts'


@dataclass(frozen=True)
class Part:
    """A tree of a composite.

    Args:
        name: of the part.
        tree: of one row, read only.
        slot: 0 to ``SLOTS`` - 1; parts stand in a window in the order of their slots.
        share: of the budget; ``None``: what the others leave of half, in equal parts.
        closed: its gists stay as they are, as those of a preset do.
        overruled: spans (first token, end), ascending and apart: another part has them newer, or they are gone. Gists
            within them stay closed.
        licence: of its text, for who looks at a window; empty where none is known.
    """

    name: str
    tree: MegaContextTree
    slot: int
    share: float | None = None
    closed: bool = False
    overruled: tuple[tuple[int, int], ...] = ()
    licence: str = ""

    def within(self, lod: Tensor, index: Tensor) -> Tensor:
        """Whether all that nodes, lod and index [M], stand for is overruled, [M]."""
        if not self.overruled:
            return torch.zeros_like(lod, dtype=torch.bool)
        firsts, ends = torch.tensor(self.overruled, device=lod.device).T.contiguous()
        width = self.tree.block_size**lod
        place = torch.bucketize(index * width, firsts, right=True) - 1
        return (place >= 0) & ((index + 1) * width <= ends[place.clamp(min=0)])

    @property
    def tokens(self) -> int:
        """All that it has."""
        return int(self.tree.lengths[0])


class Composite:
    """Parts and a session's own tree, with the read interface of one ``MegaContextTree``.

    Args:
        own: the session's tree, of one row.
        parts: at least one; none shares a slot or a name.
        budget: entries of a window at most, W_max.
        least: entries of them that parts without a share leave to the session, if that is more than half.

    Attributes:
        caps: entries of each part at most, in the order of the slots.

    Raises:
        ValueError: shares of more than half, or a part whose coarsest view does not fit its share; rows, a block size
            or a width that do not fit; a part that is too long.
    """

    rows = 1

    def __init__(self, own: MegaContextTree, parts: list[Part], budget: int, least: int = 0):
        self.own, self.budget = own, budget
        self.parts = sorted(parts, key=lambda part: part.slot)
        self.block_size, self.width, self.encoder, self.base = own.block_size, own.width, own.encoder, own.base
        self.device, self.keys = own.device, own.keys
        self.slot, first = slots(self.block_size)
        self._check()
        self.trees = [*(part.tree for part in self.parts), own]
        self.bases = [*(part.slot * self.slot for part in self.parts), first]  # address of each tree's token 0
        self.caps = caps(self.parts, budget, least)
        self.ranks = [0]  # of each tree's token 0
        for part in self.parts:
            self.ranks.append(self.ranks[-1] + part.tokens)
        self._bases, self._ranks = (torch.tensor(n, device=self.device) for n in (self.bases, self.ranks))

    @property
    def lengths(self) -> Tensor:
        """Tokens of all trees, [1], on the CPU."""
        return self.own.lengths + self.ranks[-1]

    @property
    def depth(self) -> int:
        """The highest level that any of the trees has."""
        return max(tree.depth for tree in self.trees)

    @property
    def compacted(self) -> int:
        """Blocks of which something was taken away."""
        return sum(tree.compacted for tree in self.trees)

    @property
    def levels(self) -> list["_Level"]:
        """Each reads columns of its nodes, as ``Pages.read`` does."""
        return [_Level(self, lod) for lod in range(self.depth + 1)]

    @property
    def front(self) -> int:
        """A window begins with a part, so the sink is not at its beginning."""
        return 0

    @property
    def sink(self) -> int:
        """Address of the session's block 0."""
        return self.bases[-1]

    @cached_property
    def spent(self) -> int:
        """Entries of all parts at most: the session has the rest of the budget."""
        return sum(self.caps)

    def part_of(self, address: Tensor) -> Tensor:
        """The number of the tree that each address lies in; that of the session is the last."""
        return (torch.bucketize(address, self._bases, right=True) - 1).clamp(min=0)

    def rank(self, address: Tensor) -> Tensor:
        """How many tokens a window of all has before an address."""
        number = self.part_of(address)
        return address - self._bases[number] + self._ranks[number]

    def address(self, rank: Tensor) -> Tensor:
        """Where the token stands that has so many before it."""
        number = torch.bucketize(rank, self._ranks, right=True) - 1
        return rank - self._ranks[number] + self._bases[number]

    def name_of(self, number: int) -> str | None:
        """A part's name; ``None``: the session."""
        return self.parts[number].name if number < len(self.parts) else None

    def usable(self, row: Tensor, lod: Tensor, index: Tensor) -> Tensor:
        """Whether nodes, lod and index [M] each, may stand in a working context, [M]."""
        out = torch.zeros_like(lod, dtype=torch.bool)
        known = (lod >= 0) & (lod <= self.depth) & (index >= 0)
        for number, here, local in self._split(lod.clamp(0, self.depth), index.clamp(min=0)):
            tree, zero = self.trees[number], torch.zeros_like(local)
            out[here] = tree.usable(zero, lod[here], local, sink=number == len(self.parts))
        return out & known

    def floors(self, row: Tensor, lod: Tensor, index: Tensor) -> Tensor:
        """The finest level that is there of the spans of nodes, lod and index [M], [M]."""
        return self._of_each("floors", lod, index, torch.long)

    def openable(self, row: Tensor, lod: Tensor, index: Tensor) -> Tensor:
        """Whether gists, lod and index [M], may be opened, [M]: their children are there, no part is closed, and nobody
        else has what they stand for newer."""
        out = self._of_each("openable", lod, index, torch.bool)
        for number, here, local in self._split(lod, index):
            if number < len(self.parts):
                part = self.parts[number]
                out[here] &= ~(part.within(lod[here], local) | part.closed)
        return out

    def note_opened(self, row: Tensor, lod: Tensor, index: Tensor) -> None:
        """A window has opened gists, lod and index [M]; blocks of the session's own tree count it."""
        for number, here, local in self._split(lod, index):
            self.trees[number].note_opened(torch.zeros_like(local), lod[here], local)

    def note_worth(self, row: Tensor, index: Tensor, worth: Tensor) -> None:
        """LensNet has said what the tokens of blocks, index [M], are worth above their gists, nats [M]; those of the
        session's own tree keep it."""
        for number, here, local in self._split(torch.ones_like(index), index):
            self.trees[number].note_worth(torch.zeros_like(local), local, worth[here])

    def gather(self, lod: int | Tensor, index: Tensor) -> Tensor:
        """Nodes (lod, index), [1, M] or one lod for all -> the vectors that the base LM reads for them, [1, M, D]."""
        index = index.to(self.device)
        lod = torch.as_tensor(lod, device=self.device).expand(index.shape)
        if not self.usable(torch.zeros_like(lod[0]), lod[0], index[0]).all():
            raise ValueError("a node is not in the trees, holds the session's block 0, or is protected")
        return self.embeddings(torch.zeros_like(lod[0]), lod[0], index[0])[None]

    def embeddings(self, row: Tensor, lod: Tensor, index: Tensor) -> Tensor:
        """The vectors of nodes, lod and index [M] -> [M, D]. The caller has checked that they are there."""
        out = None
        for number, here, local in self._split(lod, index):
            found = self.trees[number].embeddings(torch.zeros_like(local), lod[here], local)
            out = found.new_empty(len(lod), self.width) if out is None else out
            out.index_copy_(0, here, found)
        return self.own.embeddings(row, lod, index) if out is None else out

    def check_ids(self, ids: Tensor) -> None:
        """Raises ValueError where the base cannot embed an id."""
        self.own.check_ids(ids)

    def entries(self, budget: int) -> tuple[Tensor, Tensor, Tensor]:
        """The cold start, lod and index [1, W] and lengths [1]: each part as fine as its share allows, the session's
        newest text in the rest of ``budget``.

        Raises:
            ValueError: not even the coarsest levels fit.
        """
        segments = [cover(part, cap) for part, cap in zip(self.parts, self.caps, strict=True)]
        return self.joined([*segments, self.own_entries(budget - self.spent)])

    def own_entries(self, budget: int) -> tuple[Tensor, Tensor]:
        """The cold start of the session's own tree within ``budget`` entries: lod and index [W] there."""
        from . import cold_start

        return tuple(part[0] for part in cold_start.entries(self.own, budget)[:2])

    def joined(self, segments: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
        """Entries of each tree, lod and index [W] there -> of the composite, [1, W] each and lengths [1]."""
        lods, indices = [], []
        for base, (lod, index) in zip(self.bases, segments, strict=True):
            lods.append(lod.to(self.device))
            indices.append(index.to(self.device) + base // self.block_size ** lods[-1])
        lod, index = torch.cat(lods)[None], torch.cat(indices)[None]
        return lod, index, torch.tensor([lod.shape[1]])

    def segments(self, context) -> list[tuple[Tensor, Tensor]]:
        """Entries of a window by tree, lod and index [W] there: what ``joined`` puts together."""
        count = int(context.counts[0])
        lod, index = context.lod[0, :count], context.index[0, :count]
        number = self.part_of(index * self.block_size**lod)
        out = []
        for place, base in enumerate(self.bases):
            own = lod[number == place]
            out.append((own, index[number == place] - base // self.block_size**own))
        return out

    def alone(self, context) -> Iterator[tuple[str | None, "WorkingContext"]]:
        """The window of each tree by itself, with the name of the part, ``None`` for the session."""
        for number, (lod, index) in enumerate(self.segments(context)):
            own = copy.copy(context)
            own.tree, own.lod, own.index = self.trees[number], lod[None], index[None]
            own.counts = torch.tensor([len(lod)])
            yield self.name_of(number), own

    def _split(self, lod: Tensor, index: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """The trees of nodes, lod and index [M]: number, which of M it holds, and their indices there."""
        number = self.part_of(index * self.block_size**lod)
        for place in number.unique().tolist():
            here = (number == place).nonzero().squeeze(1)
            yield place, here, index[here] - self.bases[place] // self.block_size ** lod[here]

    def _of_each(self, what: str, lod: Tensor, index: Tensor, dtype) -> Tensor:
        out = torch.zeros(len(lod), dtype=dtype, device=lod.device)
        for number, here, local in self._split(lod, index):
            out[here] = getattr(self.trees[number], what)(torch.zeros_like(local), lod[here], local)
        return out

    def _check(self) -> None:
        names, taken = [part.name for part in self.parts], [part.slot for part in self.parts]
        if not self.parts or len({*names}) < len(names) or len({*taken}) < len(taken):
            raise ValueError(f"parts {', '.join(names) or 'none'}: at least one is needed, each name and slot once")
        if self.own.rows != 1:
            raise ValueError(f"parts: a history of {self.own.rows} rows has none; allowed is one row")
        for part in self.parts:
            tree = part.tree
            if tree.rows != 1 or tree.block_size != self.block_size or tree.width != self.width:
                raise ValueError(
                    f"part {part.name}: {tree.rows} rows, blocks of {tree.block_size} and width {tree.width}; allowed"
                    f" are 1, {self.block_size} and {self.width}"
                )
            if not 0 <= part.slot < SLOTS:
                raise ValueError(f"part {part.name}: slot={part.slot} is not allowed, there are {SLOTS} parts at most")
            if not 0 < part.tokens <= self.slot:
                raise ValueError(f"part {part.name}: {part.tokens:,} tokens, allowed are 1 to {self.slot:,}")


class _Level:
    """Columns of one level of all trees."""

    def __init__(self, composite: Composite, lod: int):
        self.composite, self.lod = composite, lod

    def read(self, column: str, row: Tensor, index: Tensor) -> Tensor:
        """index [M] -> entries [M, ...]. The caller has checked that they are there."""
        out, lod = None, torch.full_like(index, self.lod)
        for number, here, local in self.composite._split(lod, index):
            found = self.composite.trees[number].levels[self.lod].read(column, torch.zeros_like(local), local)
            out = found.new_empty(len(index), *found.shape[1:]) if out is None else out
            out[here] = found
        return self.composite.own.levels[self.lod].read(column, row, index) if out is None else out


def slots(block_size: int) -> tuple[int, int]:
    """Addresses of one part, and the address of the session's own tree: powers of K, the second ``SLOTS`` times the
    first or more."""
    top = int(math.log(HIGHEST, block_size) + 1e-9)
    below = math.ceil(math.log(SLOTS, block_size) - 1e-9)
    return block_size ** (top - below), block_size**top


def caps(parts: list[Part], budget: int, least: int = 0) -> list[int]:
    """Entries of each part at most. What nobody has taken of half the budget is divided evenly among those without a
    share; nobody is given more entries than it has tokens.

    Args:
        least: entries that are left to the session; named shares may take more, and its settings then refuse them.

    Raises:
        ValueError: the shares are more than half, or a part does not fit its share at its coarsest.
    """
    given = sum(part.share for part in parts if part.share is not None)
    if given > HALF + 1e-9 or any(part.share is not None and not part.share > 0 for part in parts):
        shares = ", ".join(f"{part.name} {part.share:g}" for part in parts if part.share is not None)
        raise ValueError(f"shares of the parts ({shares}) are not allowed: above 0, and at most {HALF:g} together")
    need = [len(cover(part, part.tokens, coarsest=True)[0]) for part in parts]
    preset = [part.closed and part.share is None for part in parts]  # they take what they need
    taken = int(budget * given) + sum(own for own, takes in zip(need, preset, strict=True) if takes)
    left = min(int(budget * HALF), budget - least) - taken
    others = sum(part.share is None and not part.closed for part in parts)
    out = []
    for part, needs, takes in zip(parts, need, preset, strict=True):
        room = int(budget * part.share) if part.share is not None else left // max(1, others)
        room = needs + min(left, 0) if takes else room
        if needs > room:
            raise ValueError(
                f"part {part.name}: {part.tokens:,} tokens take at least {needs} entries, its share of budget={budget}"
                f" is {max(0, room)}; give it more, drop another part, or raise the budget"
            )
        out.append(needs if part.closed else min(room, part.tokens))
    return out


def cover(part: Part, budget: int, coarsest: bool = False) -> tuple[Tensor, Tensor]:
    """All of a part within ``budget`` entries, lod and index [W]: the finest level that fits, and the newest of its
    nodes one level finer. What is behind the last node of a level stands in finer ones.

    Raises:
        ValueError: not even the coarsest levels fit.
    """
    tree, k, length = part.tree, part.tree.block_size, part.tokens

    def runs(level: int) -> list[tuple[int, int, int]]:
        """(level, first node, end)"""
        out, done = [], 0
        for lod in range(level, -1, -1):
            end = length // k**lod
            out.append((lod, done // k**lod, end))
            done = end * k**lod
        return out

    def cost(level: int) -> int:
        return sum(end - first for _, first, end in runs(level))

    levels = [tree.depth] if coarsest or part.closed else range(tree.depth + 1)
    level = next((level for level in levels if cost(level) <= budget), None)
    if level is None:
        raise ValueError(f"part {part.name}: budget={budget} is too small, its coarsest view has {cost(tree.depth)}")
    found = runs(level)
    if level and not coarsest and not part.closed:
        _, first, end = found[0]
        opened = min(end - first, (budget - cost(level)) // (k - 1))
        found[:1] = [(level, first, end - opened), (level - 1, (end - opened) * k, end * k)]
    lod = torch.cat([torch.full((max(0, end - first),), n) for n, first, end in found])
    index = torch.cat([torch.arange(first, max(first, end)) for _, first, end in found])
    if tree.compacted:
        from .cold_start import above_floors

        lod, index = above_floors(tree, 0, lod, index)
    if part.overruled:  # their blocks are not shown raw
        up = (lod == 0) & part.within(torch.ones_like(lod), index // k) & (index < length // k * k)
        nodes = torch.stack([torch.where(up, 1, lod), torch.where(up, index // k, index)])
        lod, index = torch.unique_consecutive(nodes, dim=1)
    return lod, index
