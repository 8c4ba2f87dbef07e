"""Gisting: a learned token after the block, whose keys and values at every layer stand for it."""

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from megactx.gist.carrier import Compressor, KVSlots
from megactx.lm import BaseLM
from megactx.lm.kv_hooks import keys_values, recorded, refuse_without_keys
from megactx.lm.prefill import Prefill


class Gisting(Compressor):
    """Gist tokens and a mask (Mu et al. 2023, arXiv 2304.08467), over a reading model that stays frozen.

    A gist token reads the keys and values that the base LM made of the full context, and is read in place of the block.
    The reader's layer l takes g^(l-1), the gist's state in front of layer l. That state has not yet seen what layer l
    attends to, so the summary that layer i makes reaches the reader at layer i + 2. ``shift`` mends this.

    Args:
        base: the base LM that reads; its weights are shared, never copied or changed.
        block_size, position: see ``Compressor``.
        shift: the reader's layer l takes g^l, one layer down (arXiv 2504.08934, fix 1).
        rank: of a LoRA on all linear layers, which only the gist token uses: parameters of its own for compressing
            (fix 2). With 0 it runs through the base LM's own weights, and only its embedding is trained.
        window: the gist token sees its own block only, not what comes before (fix 3).

    Raises:
        ValueError: a setting that is not allowed; the message names it.
    """

    makes_vectors = False

    def __init__(
        self,
        base: BaseLM,
        block_size: int = 32,
        position: str = "centre",
        shift: bool = False,
        rank: int = 0,
        window: bool = False,
    ):
        super().__init__(block_size, position)
        if rank < 0:
            raise ValueError(f"compressor.rank={rank} is not allowed: 0 (no LoRA) or more")
        refuse_without_keys(base.model.get_decoder(), f"compressor={type(self).__name__.lower()}")
        self.shift, self.window = shift, window
        mean = base.embeddings().mean(dim=0)
        self.token = nn.Parameter(mean + torch.randn_like(mean) * 0.1 * base.embedding_rms())
        twin = base.twin()
        adapters = []
        if rank:
            settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", init_lora_weights=True)
            inject_adapter_in_model(settings, twin.model.get_decoder())
            for name, module in twin.named_modules():
                if name.endswith(("lora_A", "lora_B")):
                    adapters.append(module.float())
        # Only trained modules are registered. The rest of the twin belongs to the base LM, and hides in a tuple.
        self.adapters = nn.ModuleList(adapters).requires_grad_(True)
        self._twin = (twin,)

    def compress(self, base: BaseLM, prefill: Prefill, starts: Tensor) -> KVSlots:
        states = self.summaries(prefill, starts)
        inputs = states[1:] if self.shift else states[:-1]
        return KVSlots(keys_values(base.model.get_decoder(), inputs, starts + self.offset))

    def summaries(self, prefill: Prefill, starts: Tensor) -> list[Tensor]:
        """The gist token's states g^0..g^L, each [B, N, D]."""
        (twin,) = self._twin
        b, n = starts.shape
        # Repeated, not expanded: a view of a parameter asks for a gradient even without grad mode, and the FLOP counter
        # cannot handle that.
        rows = self.token.to(prefill.hidden.dtype).repeat(b, n, 1, 1)
        cache_start = starts if self.window else None
        with recorded(twin.model.get_decoder()) as states:
            twin.forward_branches(
                rows,
                (starts + self.offset)[..., None],
                prefill.cache,
                starts + self.block_size,
                cache_start=cache_start,
            )
        return states
