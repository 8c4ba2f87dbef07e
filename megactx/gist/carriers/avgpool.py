"""AvgPool: at every layer, the mean over the block of what goes into that layer."""

from torch import Tensor

from megactx.gist.carrier import Compressor, KVSlots, windows
from megactx.lm import BaseLM
from megactx.lm.kv_hooks import keys_values
from megactx.lm.prefill import Prefill


class AvgPool(Compressor):
    """Keys and values of the block's mean state at every layer; nothing is trained.

    The baseline of arXiv 2504.08934: layer l pools its inputs h^(l-1), then applies its own norm, projections and the
    rotation of the carrier's position. With K = 1 it is the uncompressed model. Setting: ``experiment=ladder``.
    """

    needs_hidden, makes_vectors = True, False

    def compress(self, base: BaseLM, prefill: Prefill, starts: Tensor) -> KVSlots:
        pooled = [windows(states, starts, self.block_size).mean(dim=2) for states in prefill.states[:-1]]
        return KVSlots(keys_values(base.model.get_decoder(), pooled, starts + self.offset))
