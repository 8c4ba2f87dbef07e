"""What goes into each layer of a base LM, and the keys and values that a layer makes of it.

No line of a modelling file is copied. Hooks record the states. Keys and values are what the layer's own attention
module hands to its attention function, after its projections, its norms and its rotation.

Shapes: B batch, M rows, D width, L layers, G key-value heads, W head width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn
from transformers import AttentionInterface

NAME = "megactx_keys"


def layers_of(decoder: nn.Module) -> nn.ModuleList:
    """The stack of layers, whatever a family calls it.

    Raises:
        ValueError: there is no list of as many modules as the config has layers.
    """
    count = decoder.config.num_hidden_layers
    for child in decoder.children():
        if isinstance(child, nn.ModuleList) and len(child) == count:
            return child
    raise ValueError(f"base: {decoder.config.model_type} keeps its {count} layers in no list that could be found")


def attention_of(layer: nn.Module) -> nn.Module:
    """The attention module of a layer, whatever a family calls it.

    Raises:
        ValueError: there is none, or there are several.
    """
    found = [child for child in layer.children() if type(child).__name__.endswith("Attention")]
    if len(found) != 1:
        raise ValueError(f"base: {type(layer).__name__} has {len(found)} attention modules, one is needed")
    return found[0]


def refuse_without_keys(decoder: nn.Module, what: str) -> None:
    """See that keys and values can be made: a layer must be a norm, then attention with the decoder's rotation.

    Args:
        what: who asks for them, for the message.

    Raises:
        ValueError: this family is built in another way.
    """
    if not (hasattr(decoder, "rotary_emb") and hasattr(layers_of(decoder)[0], "input_layernorm")):
        raise ValueError(
            f"{what}: it makes keys and values, which base {decoder.config.model_type} makes in a way that is not"
            " supported; Llama, Qwen, SmolLM, NanoChat and GPT-NeoX are, and a GistNet takes any base"
        )


@contextmanager
def recorded(decoder: nn.Module) -> Iterator[list[Tensor]]:
    """Record the states of every pass inside: the list gets L + 1 tensors [B, M, D].

    Entry l is the input of layer l; entry L is what the last layer gives, before the final norm.
    """
    states: list[Tensor] = []

    def last(module, args, output):
        states.append(output[0] if isinstance(output, tuple) else output)

    def first(module, args, kwargs):
        states.append(args[0] if args else kwargs["hidden_states"])

    layers = layers_of(decoder)
    hooks = [layer.register_forward_pre_hook(first, with_kwargs=True) for layer in layers]
    hooks.append(layers[-1].register_forward_hook(last))
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

    Raises:
        ValueError: a family for which this is not supported.
    """
    refuse_without_keys(decoder, "base")
    layers = layers_of(decoder)
    assert len(inputs) == len(layers), "one input per layer"
    rotation = decoder.rotary_emb(inputs[0], position_ids=positions)
    made: list[tuple[Tensor, Tensor]] = []
    usual = decoder.config._attn_implementation
    decoder.config._attn_implementation = NAME
    try:
        for layer, x in zip(layers, inputs, strict=True):
            attention_of(layer)(
                hidden_states=layer.input_layernorm(x), position_embeddings=rotation, attention_mask=None, made=made
            )
    finally:
        decoder.config._attn_implementation = usual
    return made


def _keep(module, query: Tensor, key: Tensor, value: Tensor, attention_mask, made: list, **kwargs):
    made.append((key, value))
    return query.transpose(1, 2), None  # of the right shape; nobody reads it


AttentionInterface.register(NAME, _keep)
