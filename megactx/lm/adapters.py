"""LoRA on a base LM (Hu et al. 2021, arXiv 2106.09685), through ``peft``: put in, switched off for a while, merged.

    q, k, v, o of the chosen layers     W x  ->  W x + (alpha / r) B A x         B starts at zero: nothing changes
    the embeddings, where asked         E_i  ->  E_i + (alpha / r) B A_i         the LM head keeps its own rows

With the adapters off the model is what it was, so it can be its own teacher. Some models share one matrix between head
and embeddings. Merging adapted embeddings gives the head a matrix of its own, because the head was never adapted.
"""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from .base import BaseLM
from .kv_hooks import attention_of, layers_of

LAYERS = ("first_two", "last_two", "all")
RANKS = (4, 16)  # from, to
SCALE = 2  # alpha / r
LINEAR = (nn.Linear, Conv1D)  # GPT-2's is a linear layer with its matrix the other way round


def adapt(base: BaseLM, rank: int, layers: str = "last_two", embeddings: bool = False) -> list[nn.Parameter]:
    """Put LoRA into a frozen base LM, in place; -> the parameters of the adapters, in fp32.

    Args:
        rank: r, 4 to 16.
        layers: on the attention projections of which layers: ``first_two``, ``last_two``, ``all``.
        embeddings: on the input embeddings too.

    Raises:
        ValueError: a setting that is not allowed, or the base LM has adapters already.
    """
    if not RANKS[0] <= rank <= RANKS[1]:
        raise ValueError(f"stage.lora.rank={rank} is not allowed: from {RANKS[0]} to {RANKS[1]}")
    if layers not in LAYERS:
        raise ValueError(f"lora.layers={layers} is not known, allowed are {', '.join(LAYERS)}")
    if adapters_of(base):
        raise ValueError("lora: this base LM has adapters already")
    targets = _projections(base, layers)
    if embeddings:
        targets.append(_name_of(base, base.model.get_input_embeddings()))
    return list(_inject(base, rank, targets).values())


def lora_into(base: BaseLM, layers: nn.Module, rank: int, setting: str) -> dict[str, nn.Parameter]:
    """Put LoRA into all linear maps of some layers of a base LM, in place; -> name -> parameter, in fp32.

    Who else trains is left as it is: the weights may be shared with another model.

    Raises:
        ValueError: ``rank``, which ``setting`` gives, is not 1 to 128.
    """
    if not 1 <= rank <= 128:
        raise ValueError(f"{setting}={rank} is not allowed: from 1 to 128")
    inside = {id(m) for m in layers.modules() if isinstance(m, LINEAR)}
    learns = {p: p.requires_grad for p in base.parameters()}
    found = _inject(base, rank, [name for name, module in base.model.named_modules() if id(module) in inside])
    for p, was in learns.items():
        p.requires_grad_(was)
    return found


def _inject(base: BaseLM, rank: int, targets: list[str]) -> dict[str, nn.Parameter]:
    settings = LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules=targets, init_lora_weights=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*tie_word_embeddings.*")  # ``merged`` unties them
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False.*")  # peft finds out by itself, and says so
        inject_adapter_in_model(settings, base.model)
    found = adapters_of(base)
    for parameter in found.values():
        parameter.data = parameter.data.float()
    base.eval()
    return found


def adapters_of(base: BaseLM) -> dict[str, nn.Parameter]:
    """name -> parameter of all adapters of a base LM; empty where it has none."""
    return {name: p for name, p in base.named_parameters() if "lora_" in name}


def active_adapters(module: nn.Module) -> dict[str, torch.Tensor]:
    """name -> weight or scale of all adapters that change the module's output now.

    An adapter changes nothing while it is switched off, or while one of its two matrices is still zero.
    """
    found = {}
    for place, layer in module.named_modules():
        if not isinstance(layer, BaseTunerLayer) or layer.disable_adapters:
            continue
        for name in layer.active_adapters:
            pair = {key: p for key, p in layer.named_parameters() if "lora_" in key and name in key.split(".")}
            if pair and all(bool(p.any()) for p in pair.values()):
                found |= {f"{place}.{key}": p.detach() for key, p in pair.items()}
                found[f"{place}.{name}.scaling"] = torch.tensor(float(layer.scaling[name]))
    return found


def stamp_of(base: nn.Module) -> tuple:
    """A value that changes whenever adapters are put in, switched, scaled or trained."""
    return tuple(
        (id(layer), layer.disable_adapters, layer.merged, *layer.active_adapters, *sorted(layer.scaling.items()))
        + tuple((id(p), 0 if p.is_inference() else p._version) for key, p in layer.named_parameters() if "lora_" in key)
        for layer in base.modules()
        if isinstance(layer, BaseTunerLayer)
    )


@contextmanager
def switched_off(base: BaseLM) -> Iterator[BaseLM]:
    """Inside, the base LM works without its adapters. A base LM without any is left as it is."""
    layers = [module for module in base.modules() if isinstance(module, BaseTunerLayer)]
    # peft freezes adapters when it switches them off, and unfreezes all when it switches them on. What is trained is
    # decided elsewhere, so it is put back afterwards.
    asked = {name: p.requires_grad for name, p in adapters_of(base).items()}
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield base
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for name, p in adapters_of(base).items():
            p.requires_grad_(asked[name])


@torch.no_grad()
def merged(base: BaseLM) -> BaseLM:
    """A copy in fp32 with the adapters added to the weights: a plain model, frozen."""
    model = copy.deepcopy(base.model).float()
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, BaseTunerLayer):
            continue
        inner = layer.get_base_layer()
        if isinstance(inner, nn.Embedding):
            _untie(model, inner)
        layer.merge()
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, layer.get_base_layer())
    vars(model).pop("peft_config", None)  # which ``peft`` leaves, and then takes a plain model for an adapted one
    return BaseLM(model, base.tokenizer).freeze()


def _untie(model: nn.Module, embeddings: nn.Embedding) -> None:
    head = model.get_output_embeddings()
    if head.weight is embeddings.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False


def _projections(base: BaseLM, which: str) -> list[str]:
    layers = list(layers_of(base.model.get_decoder()))
    chosen = {"first_two": layers[:2], "last_two": layers[-2:], "all": layers}[which]
    inside = {id(m) for layer in chosen for m in attention_of(layer).modules() if isinstance(m, LINEAR)}
    return [name for name, module in base.model.named_modules() if id(module) in inside]


def _name_of(base: BaseLM, wanted: nn.Module) -> str:
    return next(name for name, module in base.model.named_modules() if module is wanted)
