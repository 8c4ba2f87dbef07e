"""Plain causal attention at any positions, by SDPA's own causal kernels.

transformers does without a mask only if positions do not jump: it reads a jump as a border between packed sequences. A
dense mask works at any positions, but it takes T^2 of memory, and SDPA computes the hidden half too. So we name an
attention function of our own (``AttentionInterface``), which drops the mask.
"""

from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "megactx_plain_causal"


class PlainCausal:
    """Counts the layers of one pass that went through ``attend``. 0 means that the model does not use the interface."""

    layers = 0


def attend(module, query, key, value, attention_mask, plain_causal: PlainCausal, is_causal=None, **kwargs):
    """The attention function: each row sees itself and those before it, whatever ``attention_mask`` says."""
    assert key.shape[2] == query.shape[2], "nothing is cached before a plain causal pass"
    plain_causal.layers += 1
    return sdpa_attention_forward(module, query, key, value, None, is_causal=True, **kwargs)


AttentionInterface.register(NAME, attend)
