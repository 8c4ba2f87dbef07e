"""The plain base LM with its own cache: ``megacontext=none``, which has its own end; and without a GistNet recency,
which drops what is old.

The passes are the model's own ``forward`` on token ids: no embedding, mask or position of ours is in them.

B rows, T tokens, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from megactx.lm import BaseLM

CHUNK = 256  # tokens of a scored pass: logits [B, CHUNK, V] are all there at once
SINK = 32  # first tokens, which are never dropped
LEAST = 4 * SINK  # tokens of a window that drops


class PlainLM:
    """Histories of B rows, as ``Stream`` but without tree and window; all rows have one length.

    Args:
        base: frozen.
        rows: B.
    """

    kind = "megacontext=none"  # for messages
    step = CHUNK  # tokens that are read at a time, at most

    def __init__(self, base: BaseLM, rows: int = 1):
        self.base, self.rows, self.device = base, rows, base.model.device
        self.tokens = torch.zeros(rows, 0, dtype=torch.long, device=self.device)
        self.cache, self._last = DynamicCache(config=base.config), None

    @property
    def limit(self) -> float:
        """Tokens of a history, at most."""
        return self.base.max_positions

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
        tokens, found = self._checked(tokens, lengths), []
        for piece in tokens.split(self.step, dim=1) if tokens.shape[1] else ():
            self._make_room(piece.shape[1])
            logits = self.base.model(input_ids=piece, past_key_values=self.cache, use_cache=True).logits
            if score:
                first = torch.full_like(logits[:, :1], torch.nan) if self._last is None else self._last[:, None]
                before = torch.cat([first, logits[:, :-1]], dim=1).float()
                found.append(F.cross_entropy(before.flatten(0, 1), piece.flatten(), reduction="none").view(piece.shape))
            self._last = logits[:, -1]
            self.tokens = torch.cat([self.tokens, piece], dim=1)
        return torch.cat(found, dim=1).cpu() if found else (torch.zeros(self.rows, 0) if score else None)

    def _checked(self, tokens: Tensor, lengths: Tensor | None) -> Tensor:
        tokens = tokens.to(self.device).long()
        if lengths is not None and (lengths != tokens.shape[1]).any():
            raise ValueError(f"{self.kind} takes rows of one length, got {lengths.tolist()}")
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.base.vocab_size:
            raise ValueError(f"tokens: ids 0 to {self.base.vocab_size - 1} are allowed, got {int(tokens.max())}")
        total = self.tokens.shape[1] + tokens.shape[1]
        if total > self.limit:
            raise ValueError(
                f"the history has {total} tokens, megacontext=none takes at most {self.limit}: what the base LM was"
                " made for; focus and recency have no such end"
            )
        return tokens

    def _make_room(self, new: int) -> None:
        """Called before so many tokens are read."""

    def newest(self, count: int) -> Tensor:
        """The last tokens of each row, [B, <= count]."""
        return self.tokens[:, -count:]


class Dropping(PlainLM):
    """Histories without an end, of which the base LM sees the first ``SINK`` tokens and the newest.

    When the window is full, the newest tokens move up behind the first ones, as many as leave room for an eighth of the
    window, and all of it is read again, at positions from 0 on. What lies between is not seen any more.

    Args:
        base: frozen.
        rows: B.
        window: tokens that the base sees at most, ``LEAST`` or more.
        room: tokens that are read before the window moves again.
    """

    kind = "recency without a GistNet"

    def __init__(self, base: BaseLM, rows: int, window: int, room: int):
        super().__init__(base, rows)
        self.window, self.room, self.step = window, room, min(CHUNK, room)

    @property
    def limit(self) -> float:
        return float("inf")

    @torch.no_grad()
    def append(self, tokens: Tensor, lengths: Tensor | None = None, score: bool = False) -> Tensor | None:
        new = tokens.shape[1]
        if score or new <= self.room or self.cache.get_seq_length() + new <= self.window:
            return super().append(tokens, lengths, score)
        self.tokens = torch.cat([self.tokens, self._checked(tokens, lengths)], dim=1)
        self._last = self._move()  # what is dropped at once need not be read
        return None

    def _make_room(self, new: int) -> None:
        if self.cache.get_seq_length() + new > self.window:
            self._move()

    def _move(self) -> Tensor:
        """Read the window of what is there now; -> logits of the next token."""
        self.cache, newest = DynamicCache(config=self.base.config), self.window - self.room - SINK
        first = self.tokens[:, : min(SINK, self.tokens.shape[1] - newest)]
        for piece in torch.cat([first, self.tokens[:, -newest:]], dim=1).split(CHUNK, dim=1):
            logits = self.base.model(input_ids=piece, past_key_values=self.cache, use_cache=True).logits
        return logits[:, -1]
