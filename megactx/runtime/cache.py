"""Keys and values of what the base LM has read, in buffers that are filled, cut back and filled again.

transformers' own dynamic cache copies everything for each new token; here a token costs the bytes of a token, and what
is cut off leaves its room behind for what comes next. So memory stays that of the longest window.

B rows, S columns, M columns that are kept.
"""

from collections.abc import Sequence

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

STEP = 64  # columns: buffers grow by whole steps


class Layer(DynamicLayer):
    """Keys and values [B, heads, S, head width] of one layer: the first S columns of a buffer."""

    def __init__(self):
        super().__init__()
        self.buffers: list[Tensor] = []  # of keys and of values
        self.first = 0  # columns before it are there, and not shown

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append columns; -> all keys and all values, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        first, new = self.first + self.get_seq_length(), (key_states, value_states)
        end = first + key_states.shape[2]
        self.reserve(end, new)
        for buffer, part in zip(self.buffers, new, strict=True):
            buffer[:, :, first:end] = part
        self.keys, self.values = (buffer[:, :, self.first : end] for buffer in self.buffers)
        return self.keys, self.values

    def reserve(self, end: int, like: Sequence[Tensor] | None = None) -> None:
        """Make room for ``end`` columns; ``like``: keys and values, where there are none yet."""
        if self.buffers and self.buffers[0].shape[2] >= end:
            return
        first, room = self.first + self.get_seq_length(), -(-end // STEP) * STEP
        # Zeros: what reads a whole buffer under a mask would make NaN of a NaN in a column that nobody sees.
        grown = [part.new_zeros(*part.shape[:2], room, part.shape[3]) for part in like or self.buffers]
        for buffer, old in zip(grown, self.buffers, strict=False):
            buffer[:, :, :first] = old[:, :, :first]
        self.buffers = grown

    def show(self, first: int) -> None:
        """Show columns from this one on; passes see no others."""
        end = self.first + self.get_seq_length()
        self.first = first
        if self.buffers:
            self.keys, self.values = (buffer[:, :, first:end] for buffer in self.buffers)

    def swap(self, one: Tensor, other: Tensor) -> None:
        """Exchange columns [M] and [M], none of which is in both."""
        for buffer in self.buffers:
            kept = buffer[:, :, one].clone()
            buffer[:, :, one] = buffer[:, :, other]
            buffer[:, :, other] = kept

    def keep(self, count: int) -> None:
        """Keep the first ``count`` columns of the buffers, and show them."""
        self.first = 0
        self.keys, self.values = (buffer[:, :, :count] for buffer in self.buffers)

    def select(self, columns: Tensor) -> None:
        """Keep columns [B, M], another choice in each row."""
        for buffer in self.buffers:
            index = columns[:, None, :, None].expand(-1, buffer.shape[1], -1, buffer.shape[3])
            buffer[:, :, : columns.shape[1]] = buffer.gather(2, index)
        self.keep(columns.shape[1])


class KeyCache(Cache):
    """The cache of all layers, as transformers' models take it."""

    def __init__(self):
        super().__init__(layer_class_to_replicate=Layer)

    def keep(self, count: int) -> None:
        """Drop all columns behind the first ``count`` of every layer."""
        for layer in self.layers:
            layer.keep(count)

    def select(self, columns: Tensor) -> None:
        """Keep columns [B, M] of every layer."""
        for layer in self.layers:
            layer.select(columns)

    def show(self, first: int) -> None:
        """Show columns from this one on in every layer; passes see no others."""
        for layer in self.layers:
            layer.show(first)

    def swap(self, one: Tensor, other: Tensor) -> None:
        """Exchange columns [M] and [M] of every layer, none of which is in both."""
        for layer in self.layers:
            layer.swap(one, other)

    def bytes(self) -> int:
        """Of all buffers, their free room included."""
        return sum(buffer.nbytes for layer in self.layers for buffer in layer.buffers)
