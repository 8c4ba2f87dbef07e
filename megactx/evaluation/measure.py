"""Measure carriers and every control on the same blocks, through the packed pass (SPEC 5)."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from megactx.gist import GistNet, controls
from megactx.gist.scoring import score
from megactx.gist.substitution import blocks, check_blocks, dropped, rows_at, substituted, teach
from megactx.lm import BaseLM

from .scores import BlockScores


@torch.inference_mode()
def measure(
    base: BaseLM,
    nets: Mapping[str, GistNet],
    batches: Iterable[dict],
    horizon: int,
    seed: int = 0,
    with_controls: bool = True,
    progress: Callable[[Iterable], Iterable] = iter,
) -> BlockScores:
    """Score every block of the batches with each net and, on the same blocks, each untrained control.

    Args:
        base: the frozen base LM.
        nets: name -> GistNet, all of one block size; the untrained controls sit at the first net's position.
        batches: dicts ``ids`` [B, T], ``lengths`` [B], ``starts`` [B, N], ``domain`` (B strings), ``document`` [B].
        horizon: H.
        seed: of the random gist and of the choice of another document's block.
        with_controls: measure the untrained controls too.
        progress: wraps the batches, to show a bar.

    Returns:
        ``BlockScores`` with a row per block.
    """
    batches = list(batches)
    first = next(iter(nets.values()))
    block, device = first.block_size, base.model.device
    gists = [_encode(base, nets, batch, device) for batch in batches]
    others = (
        _other_documents(batches, [g["gistnet"] for g in gists], seed) if with_controls and "gistnet" in nets else None
    )
    parts = []
    for index, batch in enumerate(progress(batches)):
        ids, starts = batch["ids"].to(device), batch["starts"].to(device)
        check_blocks(starts, batch["lengths"].to(device), block, horizon)
        carriers = {name: (vectors, nets[name].offset) for name, vectors in gists[index].items()}
        if with_controls:
            embedded = base.embed(blocks(ids, starts, block))
            rms, at = first.embedding_rms, first.offset
            carriers |= {
                "last token": (controls.last_token(embedded), block - 1),
                "random gist": (controls.random_gist(embedded, rms, seed + index), at),
                "untrained mean (raw)": (controls.mean_raw(embedded), at),
                "untrained mean (rescaled)": (controls.mean_rescaled(embedded, rms), at),
            }
            if others is not None:
                carriers["another block's gist"] = (others[index].to(device), at)
        parts.append(_score_batch(base, batch, ids, starts, carriers, block, horizon))
    return BlockScores.concatenate(parts)


def _encode(base, nets, batch, device) -> dict[str, Tensor]:
    ids, starts = batch["ids"].to(device), batch["starts"].to(device)
    out = {}
    for name, net in nets.items():
        embedded = base.embed(blocks(ids, starts, net.block_size))
        out[name] = net.encode_span(embedded.flatten(0, 1)).view(*starts.shape, -1)
    return out


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


def _score_batch(base, batch, ids, starts, carriers, block, horizon) -> BlockScores:
    teacher = teach(base, ids)
    b, n = starts.shape
    hidden = substituted(
        base,
        teacher,
        starts,
        torch.stack([v for v, _ in carriers.values()]),
        [o for _, o in carriers.values()],
        block,
        horizon,
    )
    hidden = torch.cat([hidden, dropped(base, teacher, starts, block, horizon)[None]])
    _, numbers = score(
        base,
        hidden.flatten(1, 3),
        rows_at(teacher.hidden, starts + block - 1, horizon).flatten(0, 2),
        blocks(ids, starts + block, horizon).flatten(),
    )

    def table(name, row=None):
        values = numbers[name] if row is None else numbers[name][row]
        return values.view(b * n, horizon).cpu()

    names = list(carriers)
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
