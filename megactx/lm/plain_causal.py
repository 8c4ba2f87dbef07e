"""Plain causal attention at any positions, by SDPA's own causal kernels.

transformers leaves the mask away only where positions do not jump (a jump would be read as a border between packed
sequences). A dense mask says the same at any positions, but takes T^2 of memory, and the half that nobody sees is
computed too. So the attention function, which transformers lets us name (``AttentionInterface``), drops the mask.
"""

from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "megactx_plain_causal"


class PlainCausal:
    """Of one pass: how many layers went through ``attend``. 0 says that the model does not use the interface."""

    layers = 0


def attend(module, query, key, value, attention_mask, plain_causal: PlainCausal, is_causal=None, **kwargs):
    """The attention function: each row sees itself and those before it, whatever ``attention_mask`` says."""
    assert key.shape[2] == query.shape[2], "nothing is cached before a plain causal pass"
    plain_causal.layers += 1
    return sdpa_attention_forward(module, query, key, value, None, is_causal=True, **kwargs)


AttentionInterface.register(NAME, attend)
