"""A prompt in the forms in which it can be kept for the next time, and a greedy answer from each.

    again      token ids                              the whole prompt is read again
    cache      keys and values of every token         nothing is read again
    vectors    a vector per compressed block, ids     the entries are read again, fewer than the tokens
    keys       keys and values of those entries       nothing is read again: gist caching (Mu et al. 2023)

    prompt     [sink][ block 1 ] ... [ block n ][ block n+1 .... ]        the n oldest blocks are compressed
    entries    [sink]    c1    ...       cn     [ raw tokens ..... ]

The sink is never compressed (method 1), so compression is that of what lies behind it: K : 1 where all blocks are.
Carriers have one block size each; compressions in between leave the newest blocks raw, as a working context does.

B prompts, T tokens, N blocks behind the sink, n of them compressed, K block, A tokens of an input, Q rows, D width.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from megactx.gist.carrier import BYTES, Compressor, SoftTokens
from megactx.gist.history import stream
from megactx.lm import BaseLM, masks
from megactx.lm.prefill import Prefill

ID_BYTES = 4


@dataclass(frozen=True)
class Prompt:
    """What is kept of prompts: columns of keys and values, and rows that are still to be read behind them."""

    tokens: int  # T: the input begins there
    stored: int  # bytes of one prompt
    layers: Sequence[tuple[Tensor, Tensor]]  # per layer, each [B, key-value heads, columns, head width]; or none
    rows: Tensor  # [B, Q, D]
    positions: Tensor | None  # [B, Q]; None: plain text from position 0 on, nothing before it
    sigma: Tensor | None = None  # [B, Q], standard deviation of the positions; None: points

    @property
    def entries(self) -> int:
        """What an answer attends to, tokens and carriers."""
        return self.rows.shape[1] + (self.layers[0][0].shape[2] if self.layers else 0)


def levels(tokens: int, block: int, compressions: Iterable[float]) -> dict[float, int]:
    """Compressions that a prompt of ``tokens`` tokens can have, near the given ones -> n, blocks that are compressed.

    Raises:
        ValueError: a compression below 1, or above K, which all blocks as one entry each give.
    """
    out, blocks = {}, tokens // block - 1
    for compression in compressions:
        if not 1 <= compression <= block:
            raise ValueError(f"--compression={compression:g} is not allowed: 1 to {block}, the block size")
        count = round(blocks * block * (1 - 1 / compression) / max(1, block - 1))
        out[round(blocks * block / (count + (blocks - count) * block), 2)] = count
    return out


def again(base: BaseLM, ids: Tensor) -> Prompt:
    """ids [B, T] as they are."""
    return Prompt(ids.shape[1], ID_BYTES * ids.shape[1], (), base.embed(ids), None)


def cached(base: BaseLM, prefill: Prefill) -> Prompt:
    """The plain cache of prompts that the base LM has read."""
    return _columns(prefill.cache, base, prefill.ids.shape[1])


@torch.no_grad()
def compressed(base: BaseLM, net: Compressor, prefill: Prefill, count: int) -> dict[str, Prompt]:
    """Prompts whose ``count`` oldest blocks are carriers: ``vectors`` where they are, and ``keys``.

    ``prefill``: of the prompts, with states where the compressor needs them.
    """
    ids, (b, t), block = prefill.ids, prefill.ids.shape, net.block_size
    old = torch.arange(block, (count + 1) * block, block, device=ids.device).expand(b, -1)
    if not count:
        return {"keys": cached(base, prefill)}
    carriers = net.compress(base, prefill, old)
    raw = torch.arange((count + 1) * block, t, device=ids.device).expand(b, -1)
    if isinstance(carriers, SoftTokens):
        vectors = _vectors(base, prefill, old, carriers, block, raw)
        return {"vectors": vectors, "keys": filled(base, vectors)}
    layers = stream(base, prefill, old, carriers, block)
    return {"keys": filled(base, Prompt(t, 0, layers, base.embed(ids[:, raw[0]]), raw))}


def filled(base: BaseLM, prompt: Prompt) -> Prompt:
    """The same prompt with all its rows read: only columns are left."""
    if not prompt.rows.shape[1]:
        return _columns(prompt.layers, base, prompt.tokens)
    _, cache = _read(base, prompt, prompt.rows, prompt.positions, prompt.sigma)
    return _columns([(layer.keys, layer.values) for layer in cache.layers], base, prompt.tokens)


@torch.no_grad()
def greedy(base: BaseLM, prompt: Prompt, ids: Tensor, tokens: int) -> Tensor:
    """Read an input ids [B, A] behind prompts and continue it greedily: [B, tokens]."""
    rows = torch.cat([prompt.rows, base.embed(ids)], dim=1)
    at = prompt.tokens + torch.arange(ids.shape[1] + tokens, device=ids.device).expand(len(ids), -1)
    own, positions, sigma = at[:, : ids.shape[1]], None, None
    if prompt.positions is not None:
        positions = torch.cat([prompt.positions, own], dim=1)
    if prompt.sigma is not None:
        sigma = torch.cat([prompt.sigma, torch.zeros_like(own, dtype=prompt.sigma.dtype)], dim=1)
    hidden, cache = _read(base, prompt, rows, positions, sigma)
    out = [base.logits(hidden[:, -1]).argmax(dim=-1)]
    for index in range(tokens - 1):
        place = ids.shape[1] + index
        mask = torch.ones(1, 1, 1, cache.get_seq_length() + 1, dtype=torch.bool, device=ids.device)
        hidden = base(base.embed(out[-1])[:, None], at[:, place : place + 1], mask, cache)
        out.append(base.logits(hidden[:, -1]).argmax(dim=-1))
    return torch.stack(out, dim=1)


def _vectors(base: BaseLM, prefill: Prefill, old: Tensor, carriers: SoftTokens, block: int, raw: Tensor) -> Prompt:
    ids, (b, t) = prefill.ids, prefill.ids.shape
    sink = torch.arange(block, device=ids.device).expand(b, -1)
    vectors, places = carriers.in_a_row(old)
    rows = [base.embed(ids[:, :block]), vectors.to(prefill.hidden.dtype), base.embed(ids[:, raw[0]])]
    positions = torch.cat([sink, places, raw], dim=1)
    sigma = None
    if carriers.sigma is not None:
        sigma = torch.zeros_like(positions, dtype=carriers.sigma.dtype)
        sigma[:, block : block + places.shape[1]] = carriers.sigma
    stored = ID_BYTES * (block + raw.shape[1]) + old.shape[1] * carriers.bytes_per_block()
    return Prompt(t, stored, (), torch.cat(rows, dim=1), positions, sigma)


def _columns(layers, base: BaseLM, tokens: int) -> Prompt:
    stored = BYTES * sum(part[0].numel() for layer in layers for part in layer)
    keys = layers[0][0]
    nothing = torch.zeros(len(keys), 0, base.width, dtype=keys.dtype, device=keys.device)
    places = torch.zeros(len(keys), 0, dtype=torch.long, device=keys.device)
    return Prompt(tokens, stored, layers, nothing, places)


@torch.no_grad()
def _read(base: BaseLM, prompt: Prompt, rows: Tensor, positions: Tensor | None, sigma: Tensor | None):
    """-> (hidden [B, Q, D] of the rows, the cache of everything)."""
    cache = DynamicCache()
    for index, (keys, values) in enumerate(prompt.layers):
        cache.update(keys, values, index)
    if positions is None:  # plain text: the base LM's own causal kernel, its best case
        return base(rows, None, cache=cache), cache
    columns = cache.get_seq_length()
    mask = masks.causal(columns + rows.shape[1], rows.device)[:, :, columns:]
    return base(rows, positions, mask, cache, sigma), cache
