"""What collapsing blocks of a saved tree costs, measured: the signal that curation trusts most.

    what stands before [ tokens of a block ] what follows      its own NLL, and that of what follows
    what stands before [    its gist       ] what follows      the difference is its dNLL

N blocks, K tokens of a block, C of context before it, H tokens that follow.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from megactx.gist import GistNet
from megactx.gist.substitution import substituted
from megactx.lm import BaseLM
from megactx.lm.chunked_head import nll
from megactx.lm.prefill import blocks, prefill, rows_at
from megactx.memory.curation import Curated

BEFORE, FOLLOWING = 8, 1  # blocks
BATCH = 16


def sample(tree: Curated, count: int, seed: int) -> Tensor:
    """Numbers of the blocks that are to be measured still, [M]: those of a sample of ``count``, without what is known.

    A sample is the beginning of one order of all blocks, which the seed decides: a larger one holds the smaller. It has
    only blocks whose tokens, and those around them, are there.
    """
    there = torch.nn.functional.pad((tree.floor == 0).long().cumsum(0), (1, 0))
    span = BEFORE + 1 + FOLLOWING
    first = torch.arange(max(0, len(tree.floor) - span + 1))
    whole = first[there[first + span] - there[first] == span] + BEFORE
    order = torch.randperm(len(tree.floor), generator=torch.Generator().manual_seed(seed))
    chosen = order[torch.isin(order, whole)][:count]
    return chosen[tree.dnll[chosen].isnan()]


@torch.no_grad()
def measure(
    tree: Curated,
    base: BaseLM,
    gistnet: GistNet,
    numbers: Tensor,
    progress: Callable[[Iterable], Iterable] = iter,
) -> None:
    """Measure blocks, numbers [M], and keep it with the tree, batch by batch: a stop loses one batch."""
    for some in progress(numbers.split(BATCH)):
        tree.note_measured(some, *(value.cpu() for value in cost(tree, base, gistnet, some)))


@torch.no_grad()
def cost(tree: Curated, base: BaseLM, gistnet: GistNet, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """dNLL and own NLL of blocks, numbers [M] -> [M] each, nats per token."""
    k, device = tree.size, base.model.device
    before, following, level = BEFORE * k, FOLLOWING * k, tree.levels[0]
    bos = level.span("token", 0, 1)
    texts = [level.span("token", n * k - before + 1, n * k + k + following) for n in numbers.tolist()]
    ids = torch.cat([torch.cat([bos, text], 1) for text in texts]).long().to(device)  # [M, C + K + H]
    gists = torch.cat([tree.levels[1].span("gist", n, n + 1) for n in numbers.tolist()]).to(device)  # [M, 1, D]
    read, starts = prefill(base, ids), torch.full((len(ids), 1), before, device=device)
    collapsed = substituted(base, read, starts, gists[None], [gistnet.offset_in(k)], k, following, [gistnet.sigma(1)])

    def mean(hidden: Tensor, first: int, tokens: int) -> Tensor:
        targets = blocks(ids, starts + first, tokens)
        return nll(base, hidden.flatten(0, -2), targets.flatten()).view(len(ids), -1).mean(1)

    own = mean(rows_at(read.hidden, starts - 1, k), 0, k)
    full = mean(rows_at(read.hidden, starts + k - 1, following), k, following)
    return mean(collapsed[0], k, following) - full, own
