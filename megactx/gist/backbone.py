"""The backbone of GistNet: pre-norm transformer blocks with full attention over one block of tokens.

B blocks, K tokens, D width, A heads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROTARY_BASE = 10_000.0


def rotary(x: Tensor, positions: Tensor) -> Tensor:
    """Rotate pairs of channels by position (Su et al. 2021, arXiv 2104.09864). x [B, A, K, D/A], positions [K]."""
    half = x.shape[-1] // 2
    frequency = ROTARY_BASE ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = positions.to(torch.float32)[:, None] * frequency  # [K, half]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Block(nn.Module):
    """x + MHA(norm(x)), then x + MLP(norm(x)). Attention is full, not causal: every token reaches every state."""

    def __init__(self, width: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:  # [B, K, D], [K] -> [B, K, D]
        query, key, value = self._heads(x, positions)
        dropout = self.dropout if self.training else 0.0
        return self._residual(x, F.scaled_dot_product_attention(query, key, value, dropout_p=dropout))

    def with_attention(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The same states, and the weights [B, A, K, K] in fp32 that the fast attention never shows."""
        query, key, value = self._heads(x, positions)
        weights = torch.softmax((query @ key.transpose(-1, -2)).float() * query.shape[-1] ** -0.5, dim=-1)
        return self._residual(x, weights.to(value.dtype) @ value), weights

    def _heads(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, k, d = x.shape
        query, key, value = (
            self.qkv(self.norm1(x)).view(b, k, 3, self.num_heads, d // self.num_heads).permute(2, 0, 3, 1, 4)
        )
        return rotary(query, positions), rotary(key, positions), value

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

    def forward(self, x: Tensor) -> Tensor:  # [B, K, D] -> [B, K, D], or [B, 1 + K, D] with CLS
        x, positions = self._enter(x)
        for block in self.blocks:
            x = block(x, positions)
        return self.norm(x)

    def with_attention(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The same states, and the last layer's weights [B, A, K, K] (1 + K with CLS, which comes first)."""
        x, positions = self._enter(x)
        for block in self.blocks[:-1]:
            x = block(x, positions)
        x, weights = self.blocks[-1].with_attention(x, positions)
        return self.norm(x), weights

    def _enter(self, x: Tensor) -> tuple[Tensor, Tensor]:
        positions = torch.arange(x.shape[1], device=x.device)
        if self.cls is not None:
            x = torch.cat([self.cls.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
            positions = torch.cat([positions.new_tensor([-1]), positions])
        return x, positions
