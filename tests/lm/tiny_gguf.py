"""Writes a small Llama and its byte-level tokenizer as a GGUF file, the way llama.cpp's converter does."""

import json
from pathlib import Path

import numpy as np


def write_gguf(path: Path, model, tokenizer, kind: str = "F32", arch: str = "llama", divided=None, **fields) -> Path:
    """-> ``path``.

    Args:
        kind: of the matrices, ``F32``, ``F16`` or ``Q8_0``.
        divided: by how much each frequency of the rotation is divided, ``None``: nothing is said of it.
        fields: written in place of what the model says, or besides it; ``None``: left out. ``__`` stands for a dot.
    """
    import gguf

    config, state = model.config, json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    special = {added["content"] for added in state["added_tokens"] if added["special"]}
    values = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "rope.dimension_count": config.hidden_size // config.num_attention_heads,
        "vocab_size": config.vocab_size,
    }
    values = {f"{arch}.{name}": value for name, value in values.items()}
    values |= {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens],
        "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in state["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": tokenizer.bos_token_id,
        "tokenizer.ggml.padding_token_id": tokenizer.pad_token_id,
        "tokenizer.chat_template": tokenizer.chat_template,
    }
    values |= {name.replace("__", "."): value for name, value in fields.items()}
    writer = gguf.GGUFWriter(path, arch)
    for name, value in values.items():
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif value is not None:
            writer.add_uint32(name, value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, _, ending = name.rpartition(".")
        array = tensor.float().numpy()
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:
                array = _permuted(array, heads)
        stored = gguf.GGMLQuantizationType["F32" if array.ndim == 1 else kind]
        writer.add_tensor(f"{names.get_name(stem)}.{ending}", gguf.quantize(array, stored), raw_dtype=stored)
    if divided is not None:
        writer.add_tensor("rope_freqs.weight", np.asarray(divided, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _permuted(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a rotation's halves side by side, as llama.cpp has them."""
    return array.reshape(heads, 2, len(array) // heads // 2, -1).swapaxes(1, 2).reshape(array.shape)
