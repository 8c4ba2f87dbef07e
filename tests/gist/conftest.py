"""Base LMs of four families, small enough that the obvious loop beside the packed pass takes no time."""

import pytest
import torch


@pytest.fixture(scope="session")
def make_base():
    """kind -> a frozen base LM of 4 layers, D = 64, with random weights that make it care about what it reads."""
    from megactx.lm import BaseLM

    config = dict(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4)
    config |= dict(num_key_value_heads=2, max_position_embeddings=512, bos_token_id=0, eos_token_id=1, pad_token_id=2)

    def make(kind="llama"):
        torch.manual_seed(0)
        base = BaseLM.from_config({**config, "model_type": kind}).freeze()
        for p in base.parameters():
            p.data *= 1.5
        return base

    return make
