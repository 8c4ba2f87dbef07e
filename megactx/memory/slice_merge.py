"""Cutting, merging and editing trees. Nodes that are known need no encoding: ready gists, those of another tree.

``find(lod, row [M], index [M])``, on the CPU, says which nodes are known, bool [M], and gives their columns.
"""

import time

import torch
import torch.nn.functional as F
from torch import Tensor

from . import build, encoding


class Ready:
    """Level-1 gists that were made elsewhere.

    Args:
        gists: [B, N, D].
        first: index of the first gist's node in each row, [B].
        version: of the encoder that made the gists.
    """

    def __init__(self, gists: Tensor, first: Tensor, version: int):
        self.gists, self.first, self.version = gists, first.clone(), version

    def find(self, lod: int, row: Tensor, index: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if lod > 1:
            return torch.zeros_like(row, dtype=torch.bool), {}
        at = (index - self.first[row]).to(self.gists.device)
        gists = self.gists.detach()[row.to(at.device), at]
        version = torch.full_like(at, self.version)
        return torch.ones_like(row, dtype=torch.bool), {
            "gist": gists,
            "version": version,
            "time": torch.full_like(version, int(time.time())),
        } | build.untouched(lod, at)


class Shifted:
    """The nodes of another tree.

    Args:
        source: the other tree.
        shift: the token of the new tree that is token 0 of ``source``, [B]; may be negative.
        numbers: of each version of ``source``, its number in the new tree.
    """

    def __init__(self, source, shift: Tensor, numbers: list[int]):
        self.source, self.shift = source, shift
        self.counts = [level.lengths for level in source.levels]  # before it grows, where a tree is merged with itself
        self.numbers = torch.tensor(
            [*numbers, build.STALE], device=source.device
        )  # build.STALE is -1: it finds the last entry, which is itself

    def find(self, lod: int, row: Tensor, index: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        width = self.source.block_size**lod
        there = index - self.shift[row] // width
        alike = (torch.minimum(there, index) >= self._first_alike(lod)) | ((self.shift[row] == 0) & (there >= 0))
        found = (self.shift[row] % width == 0) & alike
        found &= there < self.counts[lod][row] if lod < len(self.counts) else False
        if not found.any():
            return found, {}
        level, at = self.source.levels[lod], (row[found].to(self.source.device), there[found].to(self.source.device))
        values = {column: level.read(column, *at) for column in level.columns if column != "key"}
        return found, values | {"version": self.numbers[values["version"].long()]}

    def _first_alike(self, lod: int) -> int:
        """The first node whose left context no start of a tree cuts off. Nodes before it see another context there."""
        first, k = 0, self.source.block_size
        for n in range(1, lod + 1):
            first = -(-(first + encoding.left_of(self.source.encoder, n)) // k)
        return first


class Unchanged:
    """Those nodes of another tree below which, and in whose left context, a text has the same tokens.

    Args:
        source: the other tree.
        tokens: of the text, [B, T].
        lengths: how many of them count, [B].
    """

    def __init__(self, source, tokens: Tensor, lengths: Tensor):
        self.source, k = source, source.block_size
        both = torch.minimum(source.lengths, lengths)
        old, new = source.levels[0].span("token", 0, int(both.max())).cpu(), tokens[:, : int(both.max())].cpu()
        same = (old == new) & (torch.arange(old.shape[1]) < both[:, None])
        self.same = [same]  # of each level, bool [B, N]
        for lod in range(1, len(source.levels)):
            left, whole = encoding.left_of(source.encoder, lod), same.shape[1] // k * k
            # What stands before the start of a text is the same in all texts.
            around = F.pad(same[:, :whole], (left, 0), value=True)
            same = around.unfold(1, left + k, k).all(2) if whole else same[:, :0]
            self.same.append(same)

    def find(self, lod: int, row: Tensor, index: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if lod >= len(self.same) or not self.same[lod].shape[1]:
            return torch.zeros_like(row, dtype=torch.bool), {}
        same, level = self.same[lod], self.source.levels[lod]
        found = (index < same.shape[1]) & same[row, index.clamp(max=same.shape[1] - 1)]
        at = row[found].to(self.source.device), index[found].to(self.source.device)
        found[found.clone()] = (level.read("version", *at) == self.source.version).cpu()
        at = row[found].to(self.source.device), index[found].to(self.source.device)
        made = {name: level.read(name, *at) for name in ("gist", "version", "time", "key") if name in level.columns}
        return found, made | build.untouched(lod, at[0])


def edited(tree, tokens: Tensor, lengths: Tensor):
    """The tree of another text; see ``MegaContextTree.edited``."""
    if tree.compacted:
        raise ValueError("edited: something was taken away from this tree; restore it first")
    if tree.hidden:
        raise ValueError("edited: the encoder needs hidden states, and those depend on all that came before")
    name, _ = tree.parts[0]
    new = type(tree)(tree.encoder, tree.base, tree.rows, tree.max_level, tree.dtype, tree.device, name, tree.keys)
    new.versions, new.version, new.stamp = list(tree.versions), tree.version, tree.stamp
    build.extend(new, tokens, lengths, Unchanged(tree, tokens, lengths))
    return new


def cut(tree, start: int, stop: int):
    """The tree of tokens start .. stop - 1 of another; see ``MegaContextTree.slice``."""
    k = tree.block_size
    if tree.compacted:
        raise ValueError("slice: something was taken away from this tree; restore it first")
    if start % k or not 0 <= start <= stop:
        raise ValueError(f"start={start} is not allowed: a multiple of {k}, from 0 to stop={stop}")
    new = type(tree)(tree.encoder, tree.base, tree.rows, tree.max_level, tree.dtype, tree.device, keys=tree.keys)
    new.parts = [(name, (first - start).clamp(min=0)) for name, first in tree.parts]
    new.versions, new.version, new.stamp = list(tree.versions), tree.version, tree.stamp
    counts = (tree.lengths.clamp(max=stop) - start).clamp(min=0)
    shifted = Shifted(tree, torch.full_like(counts, -start), list(range(len(tree.versions))))
    build.extend(new, tree.levels[0].span("token", start, stop), counts, shifted)
    return new


def merge(tree, other) -> None:
    """Append a tree to another; see ``MegaContextTree.merge``."""
    k = tree.block_size
    if (tree.lengths % k).any():
        raise ValueError(f"merge: the first tree has lengths {tree.lengths.tolist()}, allowed are multiples of {k}")
    _check_kinds(tree, other, "merge")
    shift = tree.lengths.clone()
    shifted = Shifted(other, shift, [tree.version_of(identity) for identity in other.identities()])
    parts = [(name, first + shift) for name, first in other.parts]
    build.extend(tree, other.tokens, other.lengths, shifted)
    tree.parts = tree.parts + parts


def go_on(tree, other, first: int, stop: int) -> None:
    """Append tokens that another tree has too; see ``MegaContextTree.go_on``."""
    _check_kinds(tree, other, "go_on")
    if tree.rows != 1:
        raise ValueError(f"go_on: the trees have {tree.rows} rows, allowed is 1")
    there, last = int(tree.lengths[0]), first + int(other.lengths[0])
    if first % tree.block_size or not 0 <= first <= there <= stop <= last:
        whole = f"first={first} is a multiple of {tree.block_size}, and first <= {there} <= stop <= {last}"
        raise ValueError(f"go_on: stop={stop} is not allowed: {whole}")
    known = tree.levels[0].span("token", first, there)
    if not torch.equal(known, other.levels[0].span("token", 0, there - first).to(known.device)):
        raise ValueError(f"go_on: tokens {first} to {there - 1} are others in the second tree")
    shift = torch.tensor([first])
    shifted = Shifted(other, shift, [tree.version_of(identity) for identity in other.identities()])
    build.extend(
        tree, other.levels[0].span("token", there - first, stop - first), torch.tensor([stop - there]), shifted
    )


def _check_kinds(tree, other, what: str) -> None:
    for name in ("block_size", "width", "rows"):
        mine, theirs = getattr(tree, name), getattr(other, name)
        if mine != theirs:
            raise ValueError(f"{what}: the first tree has {name} {mine}, the second {theirs}")
    if tree.base is not other.base and encoding.identity_of_base(tree.base) != encoding.identity_of_base(other.base):
        raise ValueError(f"{what}: the trees belong to different base LMs")
    if tree.compacted or other.compacted:
        raise ValueError(f"{what}: something was taken away from one of the trees; restore it first")
    if tree.hidden:
        raise ValueError(f"{what}: the encoder needs hidden states, and those depend on all that came before")
