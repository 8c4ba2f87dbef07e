"""The backbone of GistNet: pre-norm transformer blocks with full attention over one block of tokens.

B blocks, K tokens (of the block, and of the context to its left where there is any), D width, A heads.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROTARY_BASE = 10_000.0


def rotary(x: Tensor, positions: Tensor, sigma: Tensor | None = None, share: float = 1.0) -> Tensor:
    """Rotate pairs of channels by position (Su et al. 2021, arXiv 2104.09864).

    x [B, A, K, D/A]; positions [K], or [B, 1, K]. sigma, of the same shape, is the standard deviation of the positions,
    and damps each frequency as ``megactx.lm.gaussian_rope`` does; ``None``: points. Only the fastest ``share`` of the
    pairs turns.
    """
    half = x.shape[-1] // 2
    turning = math.ceil(share * half)
    pair = torch.arange(turning, device=x.device, dtype=torch.float32)
    frequency = ROTARY_BASE ** (-pair / half)
    angle = positions.to(torch.float32)[..., None] * frequency  # [K, turning]
    cos, sin = angle.cos(), angle.sin()
    if sigma is not None:
        damping = torch.exp(-(sigma.to(torch.float32)[..., None] * frequency).square() / 2)
        cos, sin = cos * damping, sin * damping
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    first, second = x[..., :turning], x[..., half : half + turning]
    turned = first * cos - second * sin, second * cos + first * sin
    return torch.cat([turned[0], x[..., turning:half], turned[1], x[..., half + turning :]], dim=-1)


class Block(nn.Module):
    """x + MHA(norm(x)), then x + MLP(norm(x)). Attention is full, not causal: every token reaches every state.

    ``rotary_share`` of the pairs of channels turn with position, the fastest ones. The others see content only.
    """

    def __init__(self, width: int, num_heads: int, dropout: float, rotary_share: float = 1.0):
        super().__init__()
        self.num_heads, self.dropout, self.rotary_share = num_heads, dropout, rotary_share
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        mask: Tensor | None = None,
        sigma: Tensor | None = None,
        columns: Tensor | None = None,
    ) -> Tensor:
        """x [B, K, D] -> [B, K, D]; positions, sigma: see ``rotary``; mask bool [B, 1, 1, K]: what there is to see.

        With ``columns`` [C] only their states are worked out, from what all hold: [B, C, D].
        """
        query, key, value = self._heads(x, positions, sigma, columns)
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, mask, dropout)
        return self._residual(x if columns is None else x[:, columns], attended)

    def with_attention(self, x: Tensor, positions: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The states of ``forward``, and the weights [B, A, K, K] in fp32, which the fast attention never shows."""
        query, key, value = self._heads(x, positions)
        scores = (query @ key.transpose(-1, -2)).float() * query.shape[-1] ** -0.5
        weights = torch.softmax(scores if mask is None else scores.masked_fill(~mask, -torch.inf), dim=-1)
        return self._residual(x, weights.to(value.dtype) @ value), weights

    def _heads(
        self, x: Tensor, positions: Tensor, sigma: Tensor | None = None, columns: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, at, wide = self.norm1(x), positions, sigma
        if columns is None:
            parts = self.qkv(x).chunk(3, dim=-1)
        else:
            at, wide = at[..., columns], None if wide is None else wide[..., columns]
            parts = map(F.linear, (x[:, columns], x, x), self.qkv.weight.chunk(3))
        query, key, value = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts)
        return rotary(query, at, wide, self.rotary_share), rotary(key, positions, sigma, self.rotary_share), value

    def _residual(self, x: Tensor, attended: Tensor) -> Tensor:  # [B, K, D], [B, A, K, D/A] -> [B, K, D]
        x = x + self._drop(self.out(attended.transpose(1, 2).reshape(x.shape)))
        return x + self._drop(self.down(F.gelu(self.up(self.norm2(x)))))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class Backbone(nn.Module):
    """``layers`` blocks and a final norm; prepends one learned CLS vector where the pooling needs it."""

    def __init__(self, width: int, layers: int, num_heads: int, dropout: float, needs_cls: bool):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, num_heads, dropout) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.cls = nn.Parameter(torch.randn(width)) if needs_cls else None

    def forward(self, x: Tensor, mask: Tensor | None = None, left: int = 0) -> Tensor:
        """States of blocks, and of some context to their left.

        Args:
            x: [B, left + K, D].
            mask: bool [B, left + K], False where there is no token; ``None``: all are there.
            left: tokens in front of the block; their own states are not returned.

        Returns:
            [B, K, D], or [B, 1 + K, D] with CLS.
        """
        x, positions, seen = self._enter(x, mask, left)
        for block in self.blocks:
            x = block(x, positions, seen)
        return self._leave(x, left)

    def with_attention(self, x: Tensor, mask: Tensor | None = None, left: int = 0) -> tuple[Tensor, Tensor]:
        """The states of ``forward``, and the last layer's weights [B, A, K, left + K]; CLS adds a row and a column."""
        x, positions, seen = self._enter(x, mask, left)
        for block in self.blocks[:-1]:
            x = block(x, positions, seen)
        x, weights = self.blocks[-1].with_attention(x, positions, seen)
        return self._leave(x, left), self._own(weights, left)

    def _enter(self, x: Tensor, mask: Tensor | None, left: int) -> tuple[Tensor, Tensor, Tensor | None]:
        positions = torch.arange(-left, x.shape[1] - left, device=x.device)
        if self.cls is not None:
            x = torch.cat([self.cls.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
            positions = torch.cat([positions[:1] - 1, positions])
            mask = None if mask is None else F.pad(mask, (1, 0), value=True)
        return x, positions, None if mask is None else mask[:, None, None]

    def _leave(self, x: Tensor, left: int) -> Tensor:
        return self.norm(self._own(x.unsqueeze(1), left)[:, 0])

    def _own(self, rows: Tensor, left: int) -> Tensor:  # [B, A, rows, ...] -> the rows of CLS and of the block
        if not left:
            return rows
        own = rows[:, :, left + (self.cls is not None) :]
        return own if self.cls is None else torch.cat([rows[:, :, :1], own], dim=2)
