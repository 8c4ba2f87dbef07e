"""Exact recall: is what one old block told still known when all old blocks are compressed (``data.probes``)?

Three readers answer: over gists only; with the block that told it expanded (all of them, where it took several); over
the full context. Accuracy is that of greedy decoding: every token of the answer is the argmax behind the true ones
before it.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from megactx.data.probes import Probe
from megactx.gist.carrier import KVSlots, SoftTokens
from megactx.gist.history import continued, read_stream, stream
from megactx.lm import BaseLM
from megactx.lm.eval_mode import in_eval_mode
from megactx.lm.prefill import prefill, rows_at

READERS = ("gists only", "block expanded", "full context")


@torch.inference_mode()
def measure_probes(base: BaseLM, net, probes: Iterable[Probe], recency: int) -> list[dict]:
    """A row per probe: ``kind``, and for each reader ``right`` (bool) and ``nll`` (nats per token of the answer).

    Args:
        net: a ``Compressor``, measured in eval mode.
        recency: R, as the probes were made for.
    """
    rows = []
    with in_eval_mode(net):
        for probe in probes:
            ids = torch.from_numpy(probe.ids)[None].to(base.model.device)
            start = torch.full((1, 1), probe.asked, device=ids.device)
            read = prefill(base, ids, getattr(net, "needs_hidden", False))
            old = torch.arange(net.block_size, probe.asked - recency, net.block_size, device=ids.device)[None]
            carriers = net.compress(base, read, old)
            kept = {
                READERS[0]: stream(base, read, old, carriers, net.block_size),
                READERS[1]: _expanded(base, read, old, carriers, net.block_size, probe),
            }
            hidden = {}
            for reader, cache in kept.items():
                columns = torch.full_like(start, cache[0][0].shape[2])
                hidden[reader] = continued(base, read, start, cache, columns, recency, probe.length)[0, 0]
            hidden[READERS[2]] = rows_at(read.hidden, start - 1, probe.length)[0, 0]
            rows.append(
                {"kind": probe.kind} | {name: _answer(base, h, ids[0, probe.asked :]) for name, h in hidden.items()}
            )
    return rows


def _answer(base: BaseLM, hidden: Tensor, targets: Tensor) -> dict:
    log_p = torch.log_softmax(base.logits(hidden).float(), dim=-1)  # [A, V]
    nll = -log_p.gather(1, targets[:, None]).mean()
    return {"right": bool((log_p.argmax(dim=-1) == targets).all()), "nll": nll.item()}


def _expanded(base: BaseLM, prefill, old: Tensor, carriers: SoftTokens | KVSlots, block: int, probe: Probe):
    """The stream with the tokens of the blocks that told the answer in place of their carriers."""
    first = probe.told // block - 1
    last = first + probe.blocks
    raw = torch.arange(probe.told, probe.told + probe.blocks * block, device=old.device)[None]
    if isinstance(carriers, KVSlots):
        # Between slots nothing is computed: the block's own keys and values are those of the full context.
        layers = []
        for cached, layer in zip(prefill.cache, carriers.layers, strict=True):
            parts = []
            for own, slots in zip(cached, layer, strict=True):
                tokens = own[:, :, raw[0]]
                parts.append(torch.cat([own[:, :, :block], slots[:, :, :first], tokens, slots[:, :, last:]], dim=2))
            layers.append(tuple(parts))
        return layers
    vectors, positions = carriers.in_a_row(old)
    first, last = first * carriers.slots, last * carriers.slots
    tokens = base.embed(prefill.ids.gather(1, raw)).to(vectors.dtype)
    rows = torch.cat([vectors[:, :first], tokens, vectors[:, last:]], dim=1)
    places = torch.cat([positions[:, :first], raw, positions[:, last:]], dim=1)
    sigma = None
    if carriers.sigma is not None:
        wide = carriers.sigma.expand(positions.shape)
        point = torch.zeros_like(raw, dtype=wide.dtype)
        sigma = torch.cat([wide[:, :first], point, wide[:, last:]], dim=1)
    return read_stream(base, prefill, rows, places, sigma, block)
