"""New tokens one by one at fixed shapes, so that a CUDA graph holds the whole pass and a token costs one launch.

A pass for one token is hundreds of small kernels, and a card waits for the host that launches them. Keys and values go
into the reader's own buffers, at a column that is a number on the device. Every row attends to the whole buffer under a
mask. So nothing that the graph has recorded changes from token to token; only when the buffers grow, or other adapters
are on, is it recorded anew. Without a card the same pass runs without a graph.

B rows, C columns of a buffer, D width.
"""

import torch
from torch import Tensor

from megactx.lm import BaseLM

from .cache import KeyCache, Layer


class _Fixed(Layer):
    """A layer's buffers [B, heads, C, head width]: one column is written, all are read."""

    def __init__(self, layer: Layer, column: Tensor):
        super().__init__()
        self.buffers, self.column, self.is_initialized = layer.buffers, column, True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        for buffer, part in zip(self.buffers, (key_states, value_states), strict=True):
            buffer.index_copy_(2, self.column, part)
        return tuple(self.buffers)

    def get_seq_length(self) -> int:
        return self.buffers[0].shape[2]


class DecodeGraph:
    """One new token of each row behind all columns of a cache.

    Args:
        base: frozen.
        cache: filled by a reading; its buffers are used, and grown where they are full.
    """

    def __init__(self, base: BaseLM, cache: KeyCache):
        self.base, self.cache = base, cache
        rows, device = cache.layers[0].buffers[0].shape[0], base.model.device
        self.embeddings: Tensor | None = None  # [B, 1, D], as all of these where the graph looks for them
        self.positions = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.column = torch.zeros(1, dtype=torch.long, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.recorded = ()  # what the graph depends on
        self.hidden: Tensor | None = None

    @torch.no_grad()
    def step(self, embeddings: Tensor, positions: Tensor) -> Tensor:
        """embeddings [B, 1, D] at positions [B, 1] -> final hidden states [B, 1, D]; the cache has a column more."""
        first = self.cache.get_seq_length()
        for layer in self.cache.layers:
            layer.reserve(first + 1)
        if self.embeddings is None:
            self.embeddings = embeddings.clone()
        self.embeddings.copy_(embeddings)
        self.positions.copy_(positions)
        self.column.fill_(first)
        fixed = self.layers()
        # Room that was given back may be given out again: the same address alone does not make the same buffer.
        buffers = tuple((buffer.data_ptr(), buffer.shape) for layer in fixed for buffer in layer.buffers)
        if self.column.is_cuda:
            if self.recorded != buffers:
                self._record(fixed)
                self.recorded = buffers
            self.graph.replay()
            hidden = self.hidden.clone()  # the next replay writes there
        else:
            hidden = self._pass(fixed)
        for layer in self.cache.layers:
            layer.keep(first + 1)
        return hidden

    def layers(self) -> list[_Fixed]:
        return [_Fixed(layer, self.column) for layer in self.cache.layers]

    def _pass(self, layers: list[_Fixed]) -> Tensor:
        columns = torch.arange(layers[0].get_seq_length(), device=self.column.device)
        cache = KeyCache()
        cache.layers = layers
        mask = (columns <= self.column)[None, None, None]
        return self.base(self.embeddings, self.positions, mask, cache)

    def _record(self, layers: list[_Fixed]) -> None:
        """As https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs asks: warm up aside, then record."""
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                self._pass(layers)
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.hidden = self._pass(layers)
