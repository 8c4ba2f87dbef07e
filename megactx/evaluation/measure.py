"""Measure carriers and every control on the same blocks, through the packed pass (SPEC 5)."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby

import torch
from torch import Tensor

from megactx.gist import GistNet, controls
from megactx.gist.scoring import score
from megactx.gist.substitution import blocks, check_blocks, dropped, rows_at, substituted, teach
from megactx.lm import BaseLM

from .scores import BlockScores

MEAN_BELOW = "mean of its gists"


@torch.inference_mode()
def measure(
    base: BaseLM,
    nets: Mapping[str, GistNet],
    batches: Iterable[dict],
    horizon: int,
    seed: int = 0,
    with_controls: bool = True,
    progress: Callable[[Iterable], Iterable] = iter,
    first: int = 0,
    level: int = 1,
) -> BlockScores:
    """Score every block of the batches with each net and, on the same blocks, each untrained control.

    Args:
        base: the frozen base LM.
        nets: name -> GistNet, all of one block size; the untrained controls sit where the first net's gists do. All are
            measured in eval mode, without dropout.
        batches: dicts ``ids`` [B, T], ``lengths`` [B], ``starts`` [B, N], ``domain`` (B strings), ``document`` [B].
        horizon: H.
        seed: of the random gist and of the choice of another document's block.
        with_controls: measure the untrained controls too.
        progress: wraps the batches, to show a bar.
        first: only offsets h = first..H-1 are scored, where the rest of the horizon is not asked for.
        level: what is replaced is a block of K^level tokens, by a gist of that level.

    Returns:
        ``BlockScores`` with a row per block and a column per scored offset. From level 2 on, with controls, there are
        also the first net's K gists of the level below, each at its own position, and their mean.
    """
    batches = list(batches)
    leader = next(iter(nets.values()))
    tokens, device = leader.block_size**level, base.model.device
    at = leader.offset_in(tokens), leader.sigma(level)
    with in_eval_mode(*nets.values()):
        gists = [_encode(base, nets, batch, tokens, level) for batch in batches]
    others = (
        _other_documents(batches, [g["gistnet"] for g in gists], seed) if with_controls and "gistnet" in nets else None
    )
    parts = []
    for index, batch in enumerate(progress(batches)):
        ids, starts = batch["ids"].to(device), batch["starts"].to(device)
        check_blocks(starts, batch["lengths"].to(device), tokens, horizon)
        carriers = {
            name: (vectors, nets[name].offset_in(tokens), nets[name].sigma(level))
            for name, vectors in gists[index].items()
        }
        if with_controls:
            embedded = base.embed(blocks(ids, starts, tokens))
            rms = leader.embedding_rms
            carriers |= {
                "last token": (controls.last_token(embedded), tokens - 1, None),  # a token: its position is a point
                "random gist": (controls.random_gist(embedded, rms, seed + index), *at),
                "untrained mean (raw)": (controls.mean_raw(embedded), *at),
                "untrained mean (rescaled)": (controls.mean_rescaled(embedded, rms), *at),
            }
            if others is not None:
                carriers["another block's gist"] = (others[index].to(device), *at)
            if level > 1:
                carriers |= _below(leader, embedded, level)
        parts.append(_score_batch(base, batch, ids, starts, carriers, tokens, horizon, first))
    return BlockScores.concatenate(parts)


@contextmanager
def in_eval_mode(*modules: torch.nn.Module) -> Iterator[None]:
    """Without dropout inside, as they were afterwards."""
    training = [module for module in modules if module.training]
    for module in training:
        module.eval()
    try:
        yield
    finally:
        for module in training:
            module.train()


def _encode(base, nets, batch, tokens, level) -> dict[str, Tensor]:
    ids, starts = (batch[name].to(base.model.device) for name in ("ids", "starts"))
    embedded = base.embed(blocks(ids, starts, tokens)).flatten(0, 1)
    return {name: net.encode_level(embedded, level).view(*starts.shape, -1) for name, net in nets.items()}


def _below(net: GistNet, embedded: Tensor, level: int) -> dict[str, tuple]:
    """The K gists that a gist of gists was made of, and their mean at its place: what it has to be better than."""
    b, n, tokens, d = embedded.shape
    with in_eval_mode(net):
        gists = net.encode_levels(embedded.flatten(0, 1), level)[-2].view(b, n, net.block_size, d)
    each = tokens // net.block_size
    offsets = [net.offset_in(each) + each * index for index in range(net.block_size)]
    at = net.offset_in(tokens), net.sigma(level)
    return {
        f"{MEAN_BELOW} (raw)": (controls.mean_raw(gists), *at),
        f"{MEAN_BELOW} (rescaled)": (controls.mean_rescaled(gists, net.embedding_rms), *at),
        f"its {net.block_size} gists": (gists, offsets, net.sigma(level - 1)),
    }


def _other_documents(batches, gists, seed) -> list[Tensor]:
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


def _score_batch(base, batch, ids, starts, carriers, tokens, horizon, first) -> BlockScores:
    teacher = teach(base, ids)
    b, n = starts.shape
    names, hidden = sorted(carriers, key=lambda name: carriers[name][0].ndim), []
    for _, same in groupby(names, key=lambda name: carriers[name][0].ndim):  # one vector per block, then K
        vectors, offsets, sigmas = zip(*(carriers[name] for name in same), strict=True)
        hidden.append(substituted(base, teacher, starts, torch.stack(vectors), offsets, tokens, horizon, sigmas))
    hidden = torch.cat([*hidden, dropped(base, teacher, starts, tokens, horizon)[None]])
    _, numbers = score(
        base,
        hidden[..., first:, :].flatten(1, 3),
        rows_at(teacher.hidden, starts + tokens - 1 + first, horizon - first).flatten(0, 2),
        blocks(ids, starts + tokens + first, horizon - first).flatten(),
    )

    def table(name, row=None):
        values = numbers[name] if row is None else numbers[name][row]
        return values.view(b * n, horizon - first).cpu()

    return BlockScores(
        full=table("full"),
        drop=table("nll", len(names)),
        carriers={name: table("nll", i) for i, name in enumerate(names)},
        kl={name: table("kl", i) for i, name in enumerate([*names, "drop"])},
        agree={name: table("agree", i) for i, name in enumerate([*names, "drop"])},
        domain=[domain for domain in batch["domain"] for _ in range(n)],
        document=batch["document"].repeat_interleave(n).cpu(),
        start=starts.flatten().cpu(),
    )
