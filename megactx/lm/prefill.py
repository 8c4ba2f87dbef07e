"""One pass of the base LM over whole documents. All losses read the keys, values and states that it leaves (method 3).

B documents, T tokens, N blocks per document, K block, D width.
"""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from .base import BaseLM
from .kv_hooks import recorded
from .masks import CAUSAL


@dataclass(frozen=True)
class Prefill:
    """One pass of the base LM over whole documents: final ``hidden`` [B, T, D], keys and values per layer.

    ``states``, where asked for: the input of each layer, and the last one's output before the final norm.
    ``first``: the token of each document from which on its rows see every token before them, [B, 1]. Branches read the
    keys and values of tokens, so they begin there or behind.
    """

    ids: Tensor  # [B, T]
    hidden: Tensor  # [B, T, D]
    cache: tuple[tuple[Tensor, Tensor], ...]  # per layer, each [B, key-value heads, T, head width]
    states: tuple[Tensor, ...] = ()  # L + 1, each [B, T, D]
    first: Tensor | int = 0

    def document(self, index: int) -> "Prefill":
        """One document of the batch, as a batch of one."""
        one = slice(index, index + 1)
        cache = tuple((keys[one], values[one]) for keys, values in self.cache)
        states = tuple(states[one] for states in self.states)
        first = self.first[one] if isinstance(self.first, Tensor) else self.first
        return Prefill(self.ids[one], self.hidden[one], cache, states, first)


@torch.no_grad()
def prefill(base: BaseLM, ids: Tensor, with_states: bool = False) -> Prefill:
    """Run the frozen base LM over documents ids [B, T]; padding on the right is harmless under causal attention."""
    cache = DynamicCache()
    with recorded(base.model.get_decoder()) if with_states else nullcontext(()) as states:
        hidden = base(base.embed(ids), torch.arange(ids.shape[1], device=ids.device).expand_as(ids), CAUSAL, cache)
    return Prefill(ids, hidden, tuple((layer.keys, layer.values) for layer in cache.layers), tuple(states))


def unread(ids: Tensor) -> Prefill:
    """Documents that the base LM has not read, for compressors that look at tokens only."""
    return Prefill(ids, ids.new_empty(0), ())


def blocks(ids: Tensor, starts: Tensor, block: int) -> Tensor:
    """Token ids of blocks: ids [B, T], starts [B, N] -> [B, N, K]."""
    index = starts[..., None] + torch.arange(block, device=ids.device)  # [B, N, K]
    return ids.gather(1, index.flatten(1)).view(*starts.shape, block)


def rows_at(hidden: Tensor, starts: Tensor, rows: int) -> Tensor:
    """hidden [B, T, D], starts [B, N] -> the ``rows`` states from each start on, [B, N, rows, D]."""
    index = (starts[..., None] + torch.arange(rows, device=hidden.device)).flatten(1)  # [B, N * rows]
    # The index is expanded, not repeated: it takes no memory of its own for the D channels.
    return hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1])).view(*starts.shape, rows, -1)
