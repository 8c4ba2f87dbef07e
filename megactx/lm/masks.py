"""Every attention mask of the project is built here. bool, True = sees: [B, 1, Q, S] with S = cache columns + Q."""

import torch
from torch import Tensor

CAUSAL = "causal"  # ``BaseLM.forward`` takes it in place of ``causal(Q)``, and makes no mask then
BEHIND = "behind"  # likewise: every row sees all cached columns and the rows of the pass up to itself


def causal(length: int, device=None) -> Tensor:
    """Plain causal mask [1, 1, T, T]. A pass needs it whenever positions jump."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()[None, None]


def packed(conversation: Tensor) -> Tensor:
    """Several texts in a row, none of which sees another: which one each token is of [B, T] -> [B, 1, T, T]."""
    same = conversation[:, None, :, None] == conversation[:, None, None, :]
    return same & causal(conversation.shape[1], conversation.device)


def branches(
    cache_len: Tensor, rows: int, columns: int, cache_start: Tensor | None = None, slots: bool = False
) -> Tensor:
    """Mask of the packed pass: N independent branches over one cached prefix.

    Row (k, r) sees cache columns cache_start[k] <= t < cache_len[k], the slot of its branch, and rows r' <= r of its
    own branch. It sees nothing else.

    Args:
        cache_len: end of the visible cache columns of each branch, [B, N].
        rows: rows R of each branch.
        columns: cache columns C.
        cache_start: first visible cache column of each branch, [B, N]; ``None``: 0.
        slots: there is one more column per branch, between the cache and the rows.

    Returns:
        [B, 1, N * R, C + N * R], with slots [B, 1, N * R, C + N + N * R].
    """
    b, n = cache_len.shape
    device = cache_len.device
    column = torch.arange(columns, device=device)
    cached = column < cache_len[:, :, None]  # [B, N, C]
    if cache_start is not None:
        cached &= column >= cache_start[:, :, None]
    cached = cached[:, :, None].expand(b, n, rows, columns).reshape(b, n * rows, columns)
    branch = torch.arange(n * rows, device=device) // rows
    row = torch.arange(n * rows, device=device) % rows
    own = (branch[:, None] == branch) & (row[:, None] >= row)  # [N * R, N * R]
    parts = [cached, own.expand(b, -1, -1)]
    if slots:
        parts.insert(1, (branch[:, None] == torch.arange(n, device=device)).expand(b, -1, -1))
    return torch.cat(parts, dim=-1)[:, None]


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask -> what SDPA adds to the scores, 0 or -inf. SDPA would make it in every layer; this makes it once."""
    return torch.where(mask, 0.0, -torch.inf).to(dtype)
