"""Plain causal attention at any positions, by SDPA's own causal kernels.

transformers does without a mask only if positions do not jump: it reads a jump as a border between packed sequences. A
dense mask works at any positions, but it takes T^2 of memory, and SDPA computes the hidden half too. So we name an
attention function of our own (``AttentionInterface``), which drops the mask.

On a CPU with bf16 units, without a gradient, it is made of products of matrices, which are faster there.
"""

import math

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from megactx.framework.run.device import cpu_bf16_units

from . import products

NAME = "megactx_plain_causal"


class PlainCausal:
    """Counts the layers of one pass that went through ``attend``. 0 means that the model does not use the interface."""

    layers = 0


def attend(module, query, key, value, attention_mask, plain_causal: PlainCausal, is_causal=None, **kwargs):
    """The attention function: each row sees itself and those before it, whatever ``attention_mask`` says."""
    assert key.shape[2] == query.shape[2], "nothing is cached before a plain causal pass"
    plain_causal.layers += 1
    needs_grad = torch.is_grad_enabled() and any(part.requires_grad for part in (query, key, value))
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and cpu_bf16_units() and not needs_grad:
        scale = kwargs.get("scaling") or 1 / math.sqrt(query.shape[3])
        return products.causal(query, key, value, scale).transpose(1, 2), None
    return sdpa_attention_forward(module, query, key, value, None, is_causal=True, **kwargs)


AttentionInterface.register(NAME, attend)
