"""What goes into each layer of a base LM, and the keys and values that a layer makes of it.

No line of a modelling file is copied: states are recorded by hooks, and keys and values are what the layer's own
attention module hands to its attention function, after its projections, its norms and its rotation.

Shapes: B batch, M rows, D width, L layers, G key-value heads, W head width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn
from transformers import AttentionInterface

NAME = "megactx_keys"


@contextmanager
def recorded(decoder: nn.Module) -> Iterator[list[Tensor]]:
    """Record the states of every pass inside: the list gets L + 1 tensors [B, M, D].

    Entry l is the input of layer l; entry L is what the last layer gives, before the final norm.
    """
    states: list[Tensor] = []

    def last(module, args, output):
        states.append(output[0] if isinstance(output, tuple) else output)

    hooks = [layer.register_forward_pre_hook(lambda module, args: states.append(args[0])) for layer in decoder.layers]
    hooks.append(decoder.layers[-1].register_forward_hook(last))
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


def keys_values(decoder: nn.Module, inputs: Sequence[Tensor], positions: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Keys and values that each layer would cache for these rows.

    Args:
        decoder: the base LM's stack of layers.
        inputs: of each layer, L tensors [B, M, D].
        positions: [B, M].

    Returns:
        Per layer, each [B, G, M, W].
    """
    assert len(inputs) == len(decoder.layers), "one input per layer"
    rotation = decoder.rotary_emb(inputs[0], position_ids=positions)
    made: list[tuple[Tensor, Tensor]] = []
    usual = decoder.config._attn_implementation
    decoder.config._attn_implementation = NAME
    try:
        for layer, x in zip(decoder.layers, inputs, strict=True):
            layer.self_attn(
                hidden_states=layer.input_layernorm(x), position_embeddings=rotation, attention_mask=None, made=made
            )
    finally:
        decoder.config._attn_implementation = usual
    return made


def _keep(module, query: Tensor, key: Tensor, value: Tensor, attention_mask, made: list, **kwargs):
    made.append((key, value))
    return query.transpose(1, 2), None  # in place of an output that nobody reads


AttentionInterface.register(NAME, _keep)
