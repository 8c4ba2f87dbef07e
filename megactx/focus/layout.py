"""A window by a rule: raw where a number per block says so, gists elsewhere, within the budget.

The sink, the newest ``recent`` tokens and a partial tail are raw. All other blocks are gists of level 1. If these do
not fit, the oldest become gists of level 2. The rest of the budget opens the blocks with the highest numbers. Every
rule that scores blocks gets its window in this way, and random windows are drawn so.

B rows, N blocks of level 1, M nodes of level 2.
"""

import torch
from torch import Tensor

from megactx.memory import MegaContextTree, WorkingContext

from .edits import PROTECTED


def by_value(
    tree: MegaContextTree,
    budget: int,
    values: Tensor,
    coarse: Tensor | None = None,
    recent: int = PROTECTED,
) -> WorkingContext:
    """The window of the blocks with the highest values.

    Args:
        budget: the most entries of a row.
        values: of each block of level 1, [B, N]; ties go to the newer block; -inf never opens.
        coarse: bool [B, M]: nodes of level 2 that stand as one gist from the start, where they may.
        recent: newest tokens that are raw in any case.

    Raises:
        ValueError: values of another number of blocks, or not even gists of level 2 fit the budget.
    """
    k, rows = tree.block_size, []
    expected = [tree.rows, int(tree.counts(1).max())]
    if list(values.shape) != expected:
        raise ValueError(f"values have shape {list(values.shape)}, expected {expected}: one per block")
    for row, length in enumerate(tree.lengths.tolist()):
        count = length // k
        raw = torch.zeros(count, dtype=torch.bool)
        raw[:1] = True
        raw[max(0, length - recent) // k :] = True
        merged = _merged(tree, row, raw, None if coarse is None else coarse[row].cpu())
        cost = _cost(raw, merged, k, length)
        for node in range(1, len(merged)):
            if cost <= budget:
                break
            if not merged[node] and _may_merge(raw, k, node):
                merged[node] = True
                cost = _cost(raw, merged, k, length)
        if cost > budget:
            raise ValueError(
                f"budget={budget} is too small: {length} tokens take at least {cost} entries with {recent} raw ones at"
                " the end"
            )
        inside = merged.repeat_interleave(k)[:count]  # blocks within a gist of level 2
        inside = torch.nn.functional.pad(inside, (0, count - len(inside)))
        worth = values[row, :count].cpu().double().masked_fill(raw | inside, -torch.inf)
        order = torch.argsort(worth.flip(0), descending=True, stable=True)  # newer first among equals
        best = (count - 1 - order)[: (budget - cost) // (k - 1)]
        raw[best[worth[best] > -torch.inf]] = True
        rows.append(_entries(raw, merged, k, length))
    lengths = torch.tensor([len(lod) for lod, _ in rows])
    out = torch.zeros(2, len(rows), int(lengths.max()), dtype=torch.long)
    for row, (lod, index) in enumerate(rows):
        out[0, row, : len(lod)], out[1, row, : len(lod)] = lod, index
    return WorkingContext(tree, out[0].to(tree.device), out[1].to(tree.device), lengths, budget)


def least_entries(tokens: int, block: int, recent: int = PROTECTED) -> int:
    """Entries that ``by_value`` takes at least for a history of so many tokens."""
    count = tokens // block
    raw = torch.zeros(count, dtype=torch.bool)
    raw[:1] = True
    raw[max(0, tokens - recent) // block :] = True
    merged = torch.tensor([_may_merge(raw, block, node) for node in range(count // block)])
    return _cost(raw, merged, block, tokens)


def check_shares(setting: str, shares: list[float], fewest: int, most: int, block: int) -> None:
    """See that windows of some shares of their tokens have room, before anything is trained.

    Args:
        setting: its name.
        shares: its value, entries of a window over its tokens.
        fewest, most: tokens before a cursor.

    Raises:
        ValueError: a share is too small for a length in between; it says which length would do.
    """
    share = min(shares)
    short = [tokens for tokens in range(fewest, most + 1) if int(share * tokens) < least_entries(tokens, block)]
    if short:
        tokens, least = short[-1], least_entries(short[-1], block)
        instead = f"a datamodule.min_tokens of at least {tokens + 1}, or " if tokens < most else ""
        raise ValueError(
            f"{setting}={list(shares)}: {share} of {tokens} tokens are {int(share * tokens)} entries, but they take"
            f" at least {least}, of which {PROTECTED} and the first {block} are tokens; take {instead}larger shares"
        )


def free_edits(tree: MegaContextTree, budget: int, recent: int = PROTECTED) -> Tensor:
    """How many blocks each row can open beyond what is always raw, [B]: what a policy has to decide on."""
    nothing = torch.full((tree.rows, int(tree.counts(1).max())), -torch.inf)
    cost = by_value(tree, budget, nothing, recent=recent).counts
    return (budget - cost) // (tree.block_size - 1)


def _merged(tree, row: int, raw: Tensor, coarse: Tensor | None) -> Tensor:
    nodes = int(tree.counts(2)[row]) if tree.depth >= 2 else 0
    merged = torch.zeros(nodes, dtype=torch.bool)
    if coarse is not None:
        for node in coarse[:nodes].nonzero()[:, 0].tolist():
            merged[node] = _may_merge(raw, tree.block_size, node)
    return merged


def _may_merge(raw: Tensor, k: int, node: int) -> bool:
    return node > 0 and not bool(raw[node * k : (node + 1) * k].any())


def _cost(raw: Tensor, merged: Tensor, k: int, length: int) -> int:
    return int((~raw).sum()) + int(raw.sum()) * k + length % k - int(merged.sum()) * (k - 1)


def _entries(raw: Tensor, merged: Tensor, k: int, length: int) -> tuple[Tensor, Tensor]:
    """-> lod [W], index [W]."""
    count = len(raw)
    inside = torch.nn.functional.pad(merged.repeat_interleave(k), (0, count - len(merged) * k))
    block = torch.arange(count)
    repeat = torch.where(raw, k, 1)
    repeat[inside & (block % k > 0)] = 0
    lod = torch.where(raw, 0, 1) + inside.long()
    index = torch.where(raw, block * k, torch.where(inside, block // k, block))
    taken = torch.repeat_interleave(repeat)
    place = torch.arange(len(taken)) - (repeat.cumsum(0) - repeat)[taken]
    tail = torch.arange(count * k, length)
    return torch.cat([lod[taken], torch.zeros_like(tail)]), torch.cat([index[taken] + place, tail])
