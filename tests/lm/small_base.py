"""Base LMs of four families, small enough that the obvious loop beside a fast pass takes no time."""

import torch

from megactx.lm import BaseLM

WIDTH = 64
SMALL = dict(
    vocab_size=97,
    hidden_size=WIDTH,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=2,
)
FAMILIES = ("llama", "qwen3", "smollm3", "nanochat")


def small(kind: str = "llama", **settings) -> BaseLM:
    """Frozen, with random weights, the same for the same settings."""
    torch.manual_seed(0)
    return BaseLM.from_config({**SMALL, "model_type": kind, **settings}).freeze()
