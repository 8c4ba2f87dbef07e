"""Measure carriers and every control on the same blocks, through the packed pass (method 5)."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from megactx.gist import GistNet
from megactx.gist.carrier import Compressor, SoftTokens
from megactx.gist.carriers.last_token import LastToken
from megactx.gist.carriers.mean_token import MeanToken
from megactx.gist.carriers.random_gist import RandomGist
from megactx.gist.reading import read_carriers
from megactx.gist.substitution import check_blocks, dropped
from megactx.lm import BaseLM
from megactx.lm.chunked_head import score_exactly
from megactx.lm.eval_mode import in_eval_mode
from megactx.lm.prefill import Prefill, blocks, prefill, rows_at, unread
from megactx.memory.pyramid import PLAIN, Attention
from megactx.memory.trunk import trunk

from .scores import DROP, BlockScores

LAST_TOKEN, OTHER = "last token", "another block's gist"
MEAN_BELOW = "mean of its gists"
AT_POINTS = "at points"  # behind the first net's name: its positions without their spread, Gaussian RoPE off


@torch.inference_mode()
def measure(
    base: BaseLM,
    nets: Mapping[str, Compressor],
    batches: Iterable[dict],
    horizon: int,
    seed: int = 0,
    with_controls: bool = True,
    progress: Callable[[Iterable], Iterable] = iter,
    first: int = 0,
    lod: int = 1,
    attention: Attention = PLAIN,
) -> BlockScores:
    """Score every block of the batches with each net and, on the same blocks, each untrained control.

    Args:
        base: the frozen base LM.
        nets: name -> compressor, all of one block size; the untrained controls sit where the first net's carriers do.
            All are measured in eval mode, without dropout.
        batches: dicts ``ids`` [B, T], ``lengths`` [B], ``block_starts`` [B, N], ``domain`` (B strings),
            ``document`` [B].
        horizon: H.
        seed: of the random gist and of the choice of another document's block.
        with_controls: measure the untrained controls too.
        progress: wraps the batches, to show a bar.
        first: only offsets h = first..H-1 are scored, where the rest of the horizon is not asked for.
        lod: what is replaced is a span of K^level tokens, by a gist of that level.
        attention: how documents and branches are read; with MegaAttention the first net's gists are the summaries, and
            all blocks are live.

    Returns:
        ``BlockScores`` with a row per block and a column per scored offset. With controls and Gaussian RoPE, the first
        net's gists are also read without it. From level 2 on, with controls, there are also the first net's K gists of
        the level below, each at its own position, the same in another order, and their mean.

    Raises:
        ValueError: a block that is not eligible, or a level above 1 and a net that makes no gists of gists.
    """
    batches = list(batches)
    leader = next(iter(nets.values()))
    tokens, device = leader.block_size**lod, base.model.device
    with_states = any(net.needs_hidden for net in nets.values())
    parts, others = [], None
    with in_eval_mode(*nets.values()):
        if with_controls and leader.makes_one_vector:
            others = _other_documents(base, leader, batches, lod, seed)
        for index, batch in enumerate(progress(batches)):
            ids, starts = batch["ids"].to(device), batch["block_starts"].to(device)
            lengths = batch["lengths"].to(device)
            read = trunk(base, leader, ids, lengths, attention, with_states)
            check_blocks(starts, lengths, tokens, horizon, read.first)
            carriers = {name: net.compress_level(base, read, starts, lod) for name, net in nets.items()}
            if with_controls:
                at = {"offset": leader.offset_in(tokens), "sigma": leader.sigma(lod)}
                for name, net in untrained(base, tokens, leader.position, seed).items():
                    carriers[name] = net.compress(base, read, starts)
                    if name != LAST_TOKEN:  # a token: its position is a point
                        carriers[name] = replace(carriers[name], **at)
                if others is not None:
                    carriers[OTHER] = SoftTokens(others[index].to(device), **at)
                if lod > 1:
                    carriers |= _below(base, leader, read, starts, lod, seed)
                if at["sigma"] is not None:
                    name = next(iter(nets))
                    carriers[f"{name} {AT_POINTS}"] = replace(carriers[name], sigma=None)
            parts.append(_score_batch(base, batch, read, starts, carriers, tokens, horizon, first))
    return BlockScores.concatenate(parts)


def untrained(base: BaseLM, block: int, position: str, seed: int = 0) -> dict[str, Compressor]:
    """The untrained controls that stand beside every carrier (method 5); the drop control is no carrier."""
    rms = base.embedding_rms()
    return {
        LAST_TOKEN: LastToken(block),
        "random gist": RandomGist(rms, block, position, seed),
        "untrained mean (raw)": MeanToken(block, position),
        "untrained mean (rescaled)": MeanToken(block, position, rms),
    }


def _below(base, net: GistNet, prefill: Prefill, starts: Tensor, lod: int, seed: int) -> dict[str, SoftTokens]:
    """The K gists that a gist of gists was made of, and their mean at its place: what it has to be better than.

    And the K gists in one random order, each at a position that is another's: it is worse where positions matter.
    """
    k, tokens = net.block_size, net.block_size**lod
    each = torch.arange(0, tokens, tokens // k, device=starts.device)
    below = net.compress(base, prefill, (starts[..., None] + each).flatten(1), lod - 1)
    gists = below.vectors.view(*starts.shape, k, -1)
    at = {"offset": net.offset_in(tokens), "sigma": net.sigma(lod)}
    mean = gists.mean(dim=2)
    order = torch.randperm(k, generator=torch.Generator().manual_seed(seed)).to(gists.device)
    places = [below.offset + int(start) for start in each]
    return {
        f"{MEAN_BELOW} (raw)": SoftTokens(mean, **at),
        f"{MEAN_BELOW} (rescaled)": SoftTokens(F.rms_norm(mean, mean.shape[-1:]) * net.embedding_rms, **at),
        f"its {k} gists": SoftTokens(gists, places, below.sigma),
        f"its {k} gists, shuffled": SoftTokens(gists[:, :, order], places, below.sigma),
    }


def _other_documents(base, net, batches: list[dict], lod: int, seed: int) -> list[Tensor]:
    """For each block the gist of a block of another text."""
    gists = []
    for batch in batches:
        ids, starts = batch["ids"].to(base.model.device), batch["block_starts"].to(base.model.device)
        read = prefill(base, ids, with_states=True) if net.needs_hidden else unread(ids)
        gists.append(net.compress_level(base, read, starts, lod).vectors)
    return _exchanged(batches, gists, seed)


def _exchanged(batches, gists, seed) -> list[Tensor]:
    """For each block a gist of another text of the same domain (of any other text, where the domain has but one)."""
    rows = [
        (batch["domain"][b], int(batch["document"][b]), g[b])
        for batch, g in zip(batches, gists, strict=True)
        for b in range(len(g))
    ]
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for domain, document, own in rows:
        same = [g for d, t, g in rows if t != document and d == domain] or [g for _, t, g in rows if t != document]
        pool = torch.cat(same) if same else own.flip(0)
        chosen.append(pool[torch.randint(len(pool), (len(own),), generator=generator).to(pool.device)])
    out, at = [], 0
    for g in gists:
        out.append(torch.stack(chosen[at : at + len(g)]))
        at += len(g)
    return out


def _score_batch(base, batch, prefill: Prefill, starts, carriers, tokens, horizon, first) -> BlockScores:
    hidden = read_carriers(base, prefill, starts, list(carriers.values()), tokens, horizon)
    hidden = torch.cat([hidden, dropped(base, prefill, starts, tokens, horizon)[None]])
    numbers = score_exactly(
        base,
        hidden[..., first:, :].flatten(1, 3),
        rows_at(prefill.hidden, starts + tokens - 1 + first, horizon - first).flatten(0, 2),
        blocks(prefill.ids, starts + tokens + first, horizon - first).flatten(),
    )

    return scores_of(batch, starts, numbers, list(carriers))


def scores_of(batch: dict, starts: Tensor, numbers: dict[str, Tensor], carriers: list[str]) -> BlockScores:
    """What ``score_exactly`` gave of the carriers and, behind them, of nothing in place, [carriers + 1, ...], by block.

    Args:
        batch: of which ``domain`` and ``document`` [B] are taken.
        starts: of the blocks, [B, N].
    """
    b, n = starts.shape
    tables = {
        name: values.reshape(-1, b * n, numbers["full"].numel() // (b * n)).cpu() for name, values in numbers.items()
    }
    named = {name: dict(zip([*carriers, DROP], tables[name], strict=True)) for name in ("nll", "kl", "agree")}
    drop = named["nll"].pop(DROP)
    return BlockScores(
        full=tables["full"][0],
        drop=drop,
        carriers=named["nll"],
        kl=named["kl"],
        agree=named["agree"],
        domain=[domain for domain in batch["domain"] for _ in range(n)],
        document=batch["document"].repeat_interleave(n).cpu(),
        start=starts.flatten().cpu(),
    )
