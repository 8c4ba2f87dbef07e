"""How much memory a training step of a GistNet takes, computed from the shapes before anything is built.

B documents of T tokens, N blocks each, C nets, H rows per branch; L layers, D width, F width of the MLP, A heads of
width W, of which G have keys and values of their own; two bytes per number in bf16.

    base       its weights
    cache      2 L G W B T                the documents' keys and values, kept by the teacher pass
    attention  2 L A W B (groups T + NCH) keys and values that the branches see, kept for backward, and the mask. They
                                          are repeated to all heads: with a mask, SDPA has no kernel that shares keys
                                          and values between heads. On a CPU 2 L G W B (T + NCH): the cached ones only
                                          where they are not in fp32
    rows       L B N C H (12 D + 6 F)     bytes of the other states that backward reads: fp32 inputs of two norms, query
                                          and output of attention, three states of the MLP
    history    the same for history mode and recall, where they are on. Per net and document: N segments of R + S - 1
               rows and one stream of T / K carriers, or N cases of a window each
    nets       16 per parameter           fp32 weights, gradients, two moments of AdamW
    head       5 chunks of fp32 logits
    scores     8 A B Q (T + H)            on a CPU: of the Q rows of a group, twice, in memory that all layers share

The base is frozen, so no linear layer keeps its input for backward. Documents shorter than T take less.
"""

from collections.abc import Iterable

from torch import nn

from megactx.lm import BaseLM
from megactx.lm.chunked_head import CHUNK_ELEMENTS
from megactx.lm.packed_attention import ROWS_PER_GROUP


def memory_estimate(
    base: BaseLM,
    nets: Iterable[nn.Module],
    batch: int,
    tokens: int,
    spans: int,
    horizon: int,
    device: str = "cuda",
    history: dict | None = None,
) -> dict[str, float]:
    """About how many bytes a training step takes, by part: base, cache, attention, rows, nets, head, scores, history.

    Args:
        base: the base LM in the dtype that it runs in; the meta device will do.
        nets: all nets that are trained on the same blocks.
        batch, tokens, spans: documents, tokens of the longest, blocks per document.
        horizon: H.
        device: ``cuda`` or ``cpu``; the packed pass groups its rows differently.
        history: ``weight``, ``recall``, ``segments``, ``segment`` and ``recency`` of history mode; ``None``: it is off.
    """
    config, nets = base.config.get_text_config(), list(nets)
    size = base.model.dtype.itemsize
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    shared = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or base.width // heads
    inner = getattr(config, "intermediate_size", None) or 4 * base.width
    rows = spans * sum(horizon + getattr(net, "slots", 1) - 1 for net in nets)  # of one document
    groups = -(-spans * len(nets) // max(1, ROWS_PER_GROUP.get(device, 256) // horizon))
    chunk = min(batch * rows // len(nets) * base.vocab_size, CHUNK_ELEMENTS.get(device, 2**21))
    per_row = 2 * 4 * base.width + size * (heads * width + 3 * inner) + (4 if device == "cpu" else size) * heads * width

    def attention(columns: int, groups: int, rows: int) -> int:
        """Bytes of one document's packed pass."""
        if device != "cpu":
            repeated = 2 * layers * heads * width * (groups * columns + rows) * size
            return repeated + rows * (columns + rows // groups) * size
        copied = 0 if size == 4 else 4 * columns
        return 2 * layers * shared * width * (copied + size * rows)

    parts = {
        "base": sum(p.numel() * p.element_size() for p in base.parameters()),
        "cache": 2 * layers * shared * width * batch * tokens * size,
        "attention": batch * attention(tokens, groups, rows),
        "rows": layers * batch * rows * per_row,
        "nets": 16 * sum(p.numel() for net in nets for p in net.parameters()),
        "head": 5 * 4 * chunk,
    }
    if device == "cpu":
        parts["scores"] = 8 * heads * batch * min(rows, max(horizon, ROWS_PER_GROUP["cpu"])) * (tokens + horizon)
    if history is None:
        return parts
    block = next(net.block_size for net in nets)
    n, segment, recency = (history[name] for name in ("segments", "segment", "recency"))
    old = max(1, (tokens - segment - recency) // block)  # carriers of a document, at most
    wide, kept = 2 * layers * heads * width * size, 0  # of a column that attention reads, all layers
    if history["weight"]:
        long = recency + segment - 1
        groups = -(-n // max(1, ROWS_PER_GROUP.get(device, 256) // long))
        columns = block + old  # of the stream
        kept += wide * columns + attention(columns, groups, n * long)
        kept += layers * per_row * (columns + n * long) + 2 * layers * shared * width * columns * size
    if history.get("recall"):
        window = 3 * block + recency + old - 2
        kept += n * window * (wide + layers * per_row)
    return parts | {"history": batch * len(nets) * kept}


def in_words(parts: dict[str, float]) -> str:
    """``memory_estimate`` as one line: the sum and each part, in GB (1e9 bytes), or MB where the sum is below 1 GB."""
    total = sum(parts.values())
    unit, size = ("GB", 1e9) if total >= 1e9 else ("MB", 1e6)
    each = ", ".join(f"{name} {value / size:.1f}" for name, value in parts.items())
    return f"about {total / size:.1f} {unit} ({each})"
