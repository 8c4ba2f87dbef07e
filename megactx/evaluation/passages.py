"""Documents made from held-out ones, for two figures that ordinary blocks cannot give (method 5).

**Copy recovery.** A block at s comes back word for word at c = s + K + distance. Its second occurrence is scored with
the first one in place, replaced by its gist, and dropped:

    recovery = 1 - sum(NLL_gist - NLL_full) / sum(NLL_drop - NLL_full)     over x[c..c+K), all copies

**Hierarchical consistency.** dNLL@H behind a span of K^2 tokens on the K^2 grid that one gist of K gists replaces.

Both go through ``measure``, so every carrier and control stands beside the gist here too.
"""

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch

from megactx.data.spans import eligible_starts, evenly
from megactx.gist import GistNet
from megactx.lm import BaseLM
from megactx.memory.pyramid import PLAIN, Attention

from .measure import measure
from .scores import BlockScores

DISTANCES = (64, 256)  # tokens from the end of the first occurrence to the start of the second


def copies(
    batches: Iterable[dict], block: int, distance: int, blocks: int | None = None, attention: Attention = PLAIN
) -> list[dict]:
    """Documents in which blocks come back, as batches of one document.

    The copy overwrites what stood there, so a document keeps its length. A passage, from the first token of a block
    to the last of its copy, never reaches into the next one of the same document.

    Args:
        batches: as ``measure`` takes them; their ``block_starts`` are not used.
        block: K.
        distance: tokens between the two occurrences.
        blocks: so many at most, evenly spaced, from as many documents as possible; ``None`` takes all that fit.
        attention: how they will be read; with MegaAttention all of a passage is live.

    Raises:
        ValueError: a distance below 1.
    """
    if distance < 1:
        raise ValueError(f"copies: distance={distance} is not allowed: at least 1 token")
    passage = 2 * block + distance
    stride = -(-passage // block) * block  # the next start on the grid

    def starts_of(length):
        return np.arange(max(block, attention.live_from(length)), length - passage + 1, stride)

    out = documents_with(batches, starts_of, blocks)
    for document in out:
        first = document["block_starts"][0, :, None] + torch.arange(block)  # [N, K]
        document["ids"] = document["ids"].clone()
        document["ids"][0, first + block + distance] = document["ids"][0, first]
    return out


def measure_copies(
    base: BaseLM,
    nets: Mapping[str, GistNet],
    batches: Iterable[dict],
    distances: Iterable[int] = DISTANCES,
    blocks: int | None = None,
    attention: Attention = PLAIN,
    **settings,
) -> dict[int, BlockScores]:
    """How well the second occurrence of a block is read when the first one is a gist.

    Args:
        base, nets: as for ``measure``, and ``settings`` too (``seed``, ``with_controls``, ``progress``).
        batches: held-out documents, as ``measure`` takes them.
        distances: tokens between the two occurrences, one measurement each.
        blocks: so many per distance at most.
        attention: as of ``measure``.

    Returns:
        Distance -> scores whose K columns are the tokens of the second occurrence; recovery over all of them is copy
        recovery. A distance that no document has room for is left out.
    """
    batches, block = list(batches), next(iter(nets.values())).block_size
    out = {}
    for distance in distances:
        if documents := copies(batches, block, distance, blocks, attention):
            horizon = distance + block
            out[distance] = measure(base, nets, documents, horizon, first=distance, attention=attention, **settings)
    return out


def measure_level(
    base: BaseLM,
    nets: Mapping[str, GistNet],
    batches: Iterable[dict],
    horizon: int,
    lod: int = 2,
    blocks: int | None = None,
    attention: Attention = PLAIN,
    **settings,
) -> BlockScores | None:
    """What it costs to replace spans of K^lod tokens by one gist of that LOD: hierarchical consistency.

    Spans lie on their own grid, and never over the sink. A gist sits where its net was trained to: in the centre, or
    at the end, of the whole span.

    Args:
        base, nets, settings: as for ``measure``.
        batches: held-out documents; their ``block_starts`` are not used.
        horizon: H.
        blocks: so many spans at most.
        attention: as of ``measure``.

    Returns:
        Scores [spans, H]; ``None``, undefined, where no document has 2 K^lod + H tokens.
    """
    tokens = next(iter(nets.values())).block_size ** lod
    documents = documents_with(
        batches, lambda length: eligible_starts(length, tokens, horizon, attention.live_from), blocks
    )
    return measure(base, nets, documents, horizon, lod=lod, attention=attention, **settings) if documents else None


def documents_with(batches, starts_of, blocks: int | None) -> list[dict]:
    """Batches of one document with new starts, of the documents that have any."""
    found = [(document, starts_of(document["ids"].shape[1])) for document in _single(batches)]
    found = [(document, starts) for document, starts in found if len(starts)]
    if blocks is not None:
        if blocks < 1:
            raise ValueError(f"blocks={blocks} is not allowed: it must be 1 or more")
        found = found[:blocks]
        each, more = divmod(blocks, max(1, len(found)))
        found = [(document, evenly(starts, each + (i < more))) for i, (document, starts) in enumerate(found)]
    return [{**document, "block_starts": torch.from_numpy(starts)[None]} for document, starts in found]


def _single(batches: Iterable[dict]) -> Iterator[dict]:
    for batch in batches:
        for row, length in enumerate(batch["lengths"].tolist()):
            yield {
                "ids": batch["ids"][row : row + 1, :length].cpu(),
                "lengths": batch["lengths"][row : row + 1].cpu(),
                "domain": [batch["domain"][row]],
                "document": batch["document"][row : row + 1].cpu(),
            }
