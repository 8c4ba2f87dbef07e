"""How a tree takes up tokens: every complete block gets its node, bottom up.

B rows, T tokens, E blocks of a batch, K children of a node, D width, M nodes.
"""

import time

import torch
from torch import Tensor

from . import encoding

STALE = -1  # version of a node that was made from nodes of another version
PIECE = 65_536  # tokens that are taken up at a time, so that little memory is needed on the way


def extend(tree, tokens: Tensor, lengths: Tensor, known=None) -> None:
    """Append the first ``lengths`` [B] of tokens [B, T]. Nodes of ``known`` (see ``slice_merge``) are not encoded.

    If an encoder fails on the way, or at Ctrl-C, the tree is left as it was.
    """
    before = [level.lengths for level in tree.levels]
    try:
        step = max(tree.block_size, PIECE // tree.rows)
        for start in range(0, int(lengths.max()), step):
            piece = tokens[:, start : start + step].to(tree.device, torch.int32)
            row, index = run(torch.zeros_like(lengths), (lengths - start).clamp(0, piece.shape[1]))
            at = tree.lengths[row] + index
            new = tree.lengths + torch.bincount(row, minlength=tree.rows)
            tree.levels[0].reserve(new)
            row, index = row.to(tree.device), index.to(tree.device)
            tree.levels[0].write(row, at.to(tree.device), token=piece[row, index])
            tree.levels[0].lengths = new
            fill(tree, known)
    except BaseException:
        del tree.levels[len(before) :]
        for level, count in zip(tree.levels, before, strict=True):
            level.lengths = count
        raise


def fill(tree, known=None) -> None:
    """Make all nodes whose children are complete and that are not there yet."""
    lod = 1
    while tree.max_level is None or lod <= tree.max_level:
        new = tree.counts(lod - 1) // tree.block_size
        row, index = run(tree.counts(lod), new)
        if len(row) == 0:
            return
        if lod <= tree.depth:
            tree.levels[lod].reserve(new)  # first: pages behind short-lived tensors would leave holes in memory
        missing = torch.ones_like(row, dtype=torch.bool)
        if known is not None:
            found, values = known.find(lod, row, index)
            if found.any():
                store(tree, lod, row[found], index[found], **values)
            missing = ~found
        without_key, row, index = (row, index), row[missing], index[missing]
        if known is not None and "key" in values:
            without_key = row, index
        if len(row):
            encode(tree, lod, row, index)
            facts = untouched(lod, row) | {"protected": protected_below(tree, lod, row, index)}
            store(tree, lod, row, index, **facts)
        if lod == 1 and tree.keys is not None:
            make_keys(tree, *without_key)
        tree.levels[lod].lengths = new
        lod += 1


def encode(tree, lod: int, row: Tensor, index: Tensor) -> None:
    """Make the gists of nodes row [M], index [M], both on the CPU, from their children."""
    if tree.hidden and lod == 1 and len(row):
        raise ValueError("encoder: it needs hidden states, so level-1 gists must come ready made")
    if len(row) and encoding.stamp(tree.encoder) != tree.stamp:
        raise ValueError("encoder: its weights have changed since it made this tree; refresh the tree first")
    left = encoding.left_of(tree.encoder, lod)
    below, device = tree.levels[lod - 1], tree.device
    window = torch.arange(-left, tree.block_size)  # [left + K]
    for rows, nodes, slot in encoding.slots(row, index, tree.rows):
        at = nodes[:, None] * tree.block_size + window
        seen = torch.zeros(encoding.BATCH, left, dtype=torch.bool)
        seen[slot] = at[:, :left] >= 0
        flat = (rows.repeat_interleave(len(window)).to(device), at.clamp(min=0).flatten().to(device))
        slot = slot.to(device)
        if lod == 1:
            ids = torch.zeros(encoding.BATCH, len(window), dtype=torch.long, device=device)
            ids[slot] = below.read("token", *flat).view(at.shape).long()
            with torch.no_grad():
                children = encoding.embedder(tree.base)(ids)  # [E, left + K, D]
            version = torch.full_like(slot, tree.version)
        else:
            children = torch.zeros(encoding.BATCH, len(window), tree.width, dtype=tree.dtype, device=device)
            children[slot] = below.read("gist", *flat).view(*at.shape, tree.width)
            fresh = (below.read("version", *flat).view(at.shape) == tree.version).all(1)
            version = torch.where(fresh, tree.version, STALE)
        gists = encoding.encode(tree.encoder, lod, children, left, seen.to(device))[slot]
        store(tree, lod, rows, nodes, gist=gists, version=version, time=torch.full_like(slot, int(time.time())))


def untouched(lod: int, like: Tensor) -> dict[str, Tensor]:
    """What is said of nodes that nobody has read, opened, protected or taken anything from, each [M]."""
    names = ("access", "floor", "opened") if lod == 1 else ("access",)
    return {name: torch.zeros_like(like) for name in names} | {"protected": torch.zeros_like(like, dtype=torch.bool)}


def make_keys(tree, row: Tensor, index: Tensor) -> None:
    """Keys of blocks row [M], index [M], from their tokens."""
    k = tree.block_size
    for rows, nodes in zip(row.split(PIECE // k), index.split(PIECE // k), strict=True):
        at = (nodes[:, None] * k + torch.arange(k)).flatten().to(tree.device)
        ids = tree.levels[0].read("token", rows.repeat_interleave(k).to(tree.device), at).view(-1, k)
        store(tree, 1, rows, nodes, key=tree.keys.encode(ids))


def protected_below(tree, lod: int, row: Tensor, index: Tensor) -> Tensor:
    """Whether any child of nodes row [M], index [M] is protected, [M]. A node with such a child is protected too."""
    if lod == 1:
        return torch.zeros(len(row), dtype=torch.bool)
    at = index[:, None] * tree.block_size + torch.arange(tree.block_size)
    flat = row.repeat_interleave(tree.block_size).to(tree.device), at.flatten().to(tree.device)
    return tree.levels[lod - 1].read("protected", *flat).view(at.shape).any(1)


def renew(tree) -> int:
    """Encode again, bottom up, the nodes that another version made; -> how many."""
    encoded = 0
    # A node has the current version only if all of its children have it. So each level can be judged by itself.
    for lod in range(1, tree.depth + 1):
        row, index = stale(tree, lod).nonzero().unbind(1)
        encode(tree, lod, row, index)
        encoded += len(row)
    return encoded


def stale(tree, lod: int) -> Tensor:
    """Which nodes of a level another version made, bool [B, N] on the CPU."""
    version = tree.about(lod, "version").cpu()
    return (version != tree.version) & (torch.arange(version.shape[1]) < tree.counts(lod)[:, None])


def store(tree, lod: int, row: Tensor, index: Tensor, **values: Tensor) -> None:
    """Write columns of nodes row [M], index [M]."""
    if lod > tree.depth:
        tree.dtype = tree.dtype or values["gist"].dtype
        tree.new_level().reserve(tree.counts(lod - 1) // tree.block_size)
    # A tree with keys and one without may take over each other's nodes; keys are made anew.
    values = {name: value.to(tree.device) for name, value in values.items() if name in tree.levels[lod].columns}
    tree.levels[lod].write(row.to(tree.device), index.to(tree.device), **values)


def run(first: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """first [B], end [B] -> row [M] and index [M] of all entries first .. end - 1."""
    counts = (end - first).clamp(min=0)
    row = torch.arange(len(counts)).repeat_interleave(counts)
    return row, torch.arange(len(row)) - (counts.cumsum(0) - counts - first)[row]
