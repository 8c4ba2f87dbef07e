"""``megacontext=none``: the plain base LM with its own cache, and its own end.

The passes are the model's own ``forward`` on token ids: no embedding, mask or position of ours is in them.

B rows, T tokens, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from megactx.lm import BaseLM

CHUNK = 256  # tokens of a scored pass: logits [B, CHUNK, V] are all there at once


class Stock:
    """Histories of B rows, as ``Stream`` but without tree and window; all rows have one length.

    Args:
        base: frozen.
        rows: B.
    """

    def __init__(self, base: BaseLM, rows: int = 1):
        self.base, self.rows, self.device = base, rows, base.model.device
        self.tokens = torch.zeros(rows, 0, dtype=torch.long, device=self.device)
        self.cache, self._last = DynamicCache(config=base.config), None

    @property
    def lengths(self) -> Tensor:
        """Tokens of each history, [B]."""
        return torch.full((self.rows,), self.tokens.shape[1])

    def logits(self) -> Tensor:
        """Of the next token, [B, V] in fp32.

        Raises:
            ValueError: there is no token yet.
        """
        if self._last is None:
            raise ValueError("a row has no token yet: append at least one, such as BOS")
        return self._last.float()

    def push(self, tokens: Tensor, active: Tensor | None = None) -> None:
        """Append one token to each row, tokens [B]; rows that have stopped go on too, and nobody looks at them."""
        self.append(tokens[:, None])

    @torch.no_grad()
    def append(self, tokens: Tensor, lengths: Tensor | None = None, score: bool = False) -> Tensor | None:
        """Append tokens [B, T] and read them; with ``score`` -> their NLL [B, T] in nats, NaN for the very first.

        Raises:
            ValueError: rows of several lengths, ids that the base cannot embed, or more tokens than the base takes.
        """
        tokens = tokens.to(self.device).long()
        if lengths is not None and (lengths != tokens.shape[1]).any():
            raise ValueError(f"megacontext=none takes rows of one length, got {lengths.tolist()}")
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.base.vocab_size:
            raise ValueError(f"tokens: ids 0 to {self.base.vocab_size - 1} are allowed, got {int(tokens.max())}")
        total = self.tokens.shape[1] + tokens.shape[1]
        if total > self.base.max_positions:
            raise ValueError(
                f"the history has {total} tokens, megacontext=none takes at most {self.base.max_positions}: what the"
                " base LM was made for; focus and recency have no such end"
            )
        found = []
        for piece in tokens.split(CHUNK, dim=1) if tokens.shape[1] else ():
            logits = self.base.model(input_ids=piece, past_key_values=self.cache, use_cache=True).logits
            if score:
                first = torch.full_like(logits[:, :1], torch.nan) if self._last is None else self._last[:, None]
                before = torch.cat([first, logits[:, :-1]], dim=1).float()
                found.append(F.cross_entropy(before.flatten(0, 1), piece.flatten(), reduction="none").view(piece.shape))
            self._last = logits[:, -1]
            self.tokens = torch.cat([self.tokens, piece], dim=1)
        return torch.cat(found, dim=1).cpu() if found else (torch.zeros(self.rows, 0) if score else None)

    def newest(self, count: int) -> Tensor:
        """The last tokens of each row, [B, <= count]."""
        return self.tokens[:, -count:]
