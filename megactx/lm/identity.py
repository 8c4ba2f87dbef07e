"""Which base LM it is: the identity that nets, trees and checkpoints store of the base LM that they were made with.

All weights are hashed in bf16, because one model may be loaded in fp32 here and in bf16 there. Adapters count while
they are switched on and change something.
"""

import hashlib
import json

import torch
from torch import Tensor

from .adapters import active_adapters
from .base import BaseLM

ROWS = 16  # of each matrix, evenly spaced: training moves all of them
# Keys of a Hugging Face config that make another function of the same weights. They are listed, because a later version
# of the library has more keys for the same model.
FUNCTION = (
    *("model_type", "hidden_act", "activation_function", "hidden_activation", "num_attention_heads", "n_head"),
    *("num_key_value_heads", "head_dim", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps"),
    *("partial_rotary_factor", "final_logit_softcapping", "logits_scaling", "embedding_multiplier"),
    *("residual_multiplier", "attention_multiplier", "attn_logit_softcapping", "query_pre_attn_scalar"),
    *("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "use_parallel_residual", "do_layer_norm_before"),
    *("norm_epsilon", "clip_qkv", "no_rope_layers", "num_experts_per_tok", "norm_topk_prob"),
)
ROTATION = (
    *("rope_type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"),
    *("partial_rotary_factor", "original_max_position_embeddings", "attention_factor", "mscale", "mscale_all_dim"),
    *("truncate", "alpha"),
)


def of_embeddings(base: BaseLM) -> str:
    """Sixteen hex digits of the token embeddings. A tree depends on nothing else, if its GistNet reads embeddings."""
    embeddings = base.model.get_input_embeddings()
    digest = hashlib.sha256(f"{list(embeddings.weight.shape)}".encode())
    digest.update(raw(embeddings.weight.to(torch.bfloat16)))
    _add_adapters(digest, embeddings)
    return digest.hexdigest()[:16]


def record_of(base: BaseLM, name: str) -> dict:
    """What a checkpoint stores of its base LM: its name, the hash of its embeddings, and that of its layers."""
    return {"name": str(name), "width": base.width, "embeddings": of_embeddings(base), "weights": of_weights(base)}


@torch.no_grad()
def of_weights(base: BaseLM) -> str:
    """Sixteen hex digits of all layers: the shape and some rows of each tensor, and ``FUNCTION`` of the config."""
    config = base.config.get_text_config().to_dict()
    rotation = {"rope_theta": config.get("rope_theta")} | (
        config.get("rope_parameters") or config.get("rope_scaling") or {}
    )
    function = {key: config[key] for key in FUNCTION if config.get(key) is not None}
    function["rotation"] = {key: rotation[key] for key in ROTATION if rotation.get(key) is not None}
    digest = hashlib.sha256(json.dumps(function, sort_keys=True, default=str).encode())
    for name, tensor in sorted(base.model.named_parameters()):
        if "lora_" in name:
            continue
        digest.update(f"{name.replace('.base_layer', '')} {list(tensor.shape)}".encode())
        rows = tensor.detach().reshape(-1, tensor.shape[-1]) if tensor.ndim > 1 else tensor.detach()[None]
        chosen = torch.linspace(0, len(rows) - 1, min(ROWS, len(rows)), dtype=torch.float64).long()
        digest.update(raw(rows[chosen.to(rows.device)].to(torch.bfloat16)))
    _add_adapters(digest, base.model)
    return digest.hexdigest()[:16]


def of_net(net: torch.nn.Module) -> str:
    """Sixteen hex digits of the weights of a GistNet or LensNet, in bf16, the same before and after saving."""
    digest = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        digest.update(f"{name} {list(tensor.shape)}".encode())
        digest.update(raw(tensor.to(torch.bfloat16)))
    return digest.hexdigest()[:16]


def _add_adapters(digest, module: torch.nn.Module) -> None:
    for name, tensor in sorted(active_adapters(module).items()):
        digest.update(f"{name} {list(tensor.shape)}".encode())
        digest.update(raw(tensor.to(torch.bfloat16)))


def raw(tensor: Tensor):
    """The bytes of a tensor, as a numpy array."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
