"""MegaPrediction: the gist of what comes next, from the state in which the base LM leaves what is there.

    state of the last row of a block            -> the gist of the next block
    state of the last row of K blocks, aligned  -> the gist of the next K blocks

A readout is judged by where the true gist stands among others, so only its direction counts.

D width, K tokens of a block, N nodes of a level, E examples.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le
from torch import Tensor, nn

from megactx.framework.config.types import declared
from megactx.lm import BaseLM
from megactx.lm.prefill import prefill

from .encoding import Encoder
from .tree import MegaContextTree

CONTROL = "map of the newest gist"
AMONG = 256  # gists that the true one is ranked among, itself one of them
NEWEST = 4096  # blocks of a history that are compared with what is expected, while a session goes on


@declared("prediction")
class Readout(nn.Module):
    """D -> D per level, and the same from the newest gist, which is the control that learns beside it.

    Args:
        width: D.
        head: ``linear``, or ``mlp`` with one hidden layer of 2 D. The control is linear.
        levels: 1: gists of blocks; 2: those of K blocks too.

    Raises:
        ValueError: a setting that is not allowed.
    """

    def __init__(self, width: int, head: Literal["linear", "mlp"] = "linear", levels: Annotated[int, Ge(1), Le(2)] = 1):
        super().__init__()
        self.width, self.levels = width, levels
        self.readouts = nn.ModuleList(_head(width, head) for _ in range(levels))
        self.controls = nn.ModuleList(_head(width, "linear") for _ in range(levels))
        self.scale = nn.Parameter(torch.full((levels, 2), 3.0))  # log: cosines are too close for a softmax
        self.register_buffer("total", torch.zeros(levels, width))  # of the directions of gists learned from: their mean

    def forward(self, states: Tensor, lod: int = 1) -> Tensor:
        """Final hidden states [.., D] -> the direction of the next gist, unit vectors [.., D]."""
        return _direction(self.readouts[lod - 1], states)

    def from_newest(self, gists: Tensor, lod: int = 1) -> Tensor:
        """The control: newest gists [.., D] -> unit vectors [.., D]."""
        return _direction(self.controls[lod - 1], gists)

    def count(self, example: "Example") -> None:
        """Take the gists of a text into their mean, the control that asks for nothing."""
        for lod in range(1, self.levels + 1):
            self.total[lod - 1] += F.normalize(example.of(lod)[1], dim=-1).sum(0)

    def both(self, example: "Example", lod: int = 1) -> tuple[Tensor, Tensor]:
        """Of one text: predictions of all its gists but the first, by the readout and by the control, [N - 1, D]."""
        states, gists = example.of(lod)
        return self(states[:-1], lod), self.from_newest(gists[:-1], lod)


@dataclass(frozen=True)
class Example:
    """A text as the readout sees it: per level, states [N, D] at the end of each node, and gists [N, D] of them."""

    levels: tuple[tuple[Tensor, Tensor], ...]

    def of(self, lod: int) -> tuple[Tensor, Tensor]:
        return self.levels[lod - 1]

    def half(self) -> "Example":
        return Example(tuple((states.half(), gists.half()) for states, gists in self.levels))

    def float(self) -> "Example":
        return Example(tuple((states.float(), gists.float()) for states, gists in self.levels))


@torch.no_grad()
def example_of(base: BaseLM, encoder: Encoder, ids: Tensor, levels: int = 1, states: Tensor | None = None) -> Example:
    """Read a text ids [T] in one pass; what is no whole node of a level has no part in it.

    Args:
        states: final hidden states [T, D], where the text was read before.
    """
    states = prefill(base, ids[None]).hidden[0] if states is None else states
    tree = MegaContextTree.from_tokens(ids[None], encoder, base, max_level=levels)
    found = []
    for lod in range(1, levels + 1):
        count, width = int(tree.counts(lod)[0]), tree.block_size**lod
        gists = tree.gists(lod)[0] if count else states.new_zeros(0, tree.width)
        found.append((states[width - 1 : count * width : width], gists))
    return Example(tuple(found))


def info_nce(readout: Readout, examples: list[Example], lod: int = 1) -> Tensor:
    """InfoNCE (Oord et al. 2018) of the readout and of its control, [2]: the true gist among all of the texts'.

    Texts with fewer than two nodes of that level have no part in it; where that are all of them, it is 0.
    """
    examples = [example for example in examples if len(example.of(lod)[1]) > 1]
    if not examples:
        return readout.scale.sum() * torch.zeros(2, device=readout.scale.device)
    gists = F.normalize(torch.cat([example.of(lod)[1] for example in examples]), dim=-1)  # [E, D]
    first, right = 0, []
    for example in examples:
        count = len(example.of(lod)[1])
        right.append(torch.arange(first + 1, first + count, device=gists.device))
        first += count
    losses = []
    for kind, predicted in enumerate(zip(*(readout.both(example, lod) for example in examples), strict=True)):
        found = readout.scale[lod - 1, kind].exp() * torch.cat(predicted) @ gists.T
        losses.append(F.cross_entropy(found, torch.cat(right)))
    return torch.stack(losses)


def ranks(predicted: Tensor, gists: Tensor, others: Tensor) -> Tensor:
    """Where the true gists stand among all candidates by cosine, [N - 1]: 1 is the nearest, ties count against it.

    Args:
        predicted: [N - 1, D], of each gist but the first.
        gists: of the text, [N, D].
        others: of other texts, [C, D].
    """
    candidates = F.normalize(torch.cat([gists, others]), dim=-1)
    near = F.normalize(predicted, dim=-1) @ candidates.T  # [N - 1, N + C]
    own = near[torch.arange(len(near)), torch.arange(1, len(gists))]
    return (near >= own[:, None]).sum(1)


@torch.no_grad()
def rank_of(readout: Readout, tree: MegaContextTree, row: int, block: int, state: Tensor) -> Tensor:
    """Where the gist of a block that came stands among the ``AMONG`` gists of its row up to it, by cosine.

    Args:
        row, block: in the tree.
        state: final hidden state of the last token before the block, [D].

    Returns:
        Reciprocal ranks by the readout and by its control, [2]; ties count against it. NaN where the gist of the block
        or of the one before is not there.
    """
    index, gists = directions(tree, row, range(max(0, block + 1 - AMONG), block + 1))
    if index[-2:].tolist() != [block - 1, block]:
        return torch.full((2,), torch.nan, device=tree.device)
    foretold = torch.stack([readout(state.float()), readout.from_newest(gists[-2])])  # [2, D]
    near = gists @ foretold.T  # [N, 2]
    return 1 / (near >= near[-1]).sum(0)


@torch.no_grad()
def expected(
    readout: Readout, tree: MegaContextTree, state: Tensor, count: int, row: int = 0, among: range | None = None
) -> list[tuple[int, float]]:
    """The blocks of a row that are nearest to what comes next, and their cosines; the nearest first.

    Blocks whose tokens were taken away are left out.

    Args:
        state: final hidden state of the newest token, [D].
        count: how many, at most.
        row: of the tree.
        among: blocks of the tree that are asked; ``None``: all.
    """
    among = range(int(tree.counts(1)[row])) if among is None else among
    if not among:
        return []
    index, gists = directions(tree, row, among, 0)
    best = (gists @ readout(state.float())).topk(min(count, len(index)))
    return list(zip(index[best.indices].tolist(), best.values.tolist(), strict=True))


def directions(tree: MegaContextTree, row: int, blocks: range, lod: int = 1) -> tuple[Tensor, Tensor]:
    """Blocks that are there, [N], and unit vectors of their gists, [N, D].

    Args:
        row: of the tree.
        lod: 0: their tokens must be there too.
    """
    index = torch.arange(blocks.start, blocks.stop, device=tree.device)
    gists = tree.levels[1].span("gist", blocks.start, blocks.stop, slice(row, row + 1))[0]
    if tree.compacted:
        there = tree.floors(torch.full_like(index, row), torch.ones_like(index), index) <= lod
        index, gists = index[there], gists[there]
    return index, F.normalize(gists.float(), dim=-1)


def _head(width: int, kind: str) -> nn.Module:
    if kind == "linear":
        return nn.Linear(width, width)
    return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


def _direction(head: nn.Module, vectors: Tensor) -> Tensor:
    # Of unit rms, as layers like their input: gists of some bases are a hundred times shorter than states.
    return F.normalize(head(F.normalize(vectors, dim=-1) * vectors.shape[-1] ** 0.5), dim=-1)
