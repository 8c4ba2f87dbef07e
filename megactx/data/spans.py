"""Batches for a gist stage: documents, and in each of them the starts of blocks to replace (method 3).

Batch ``i`` is a function of (seed, i) alone: that is what makes resuming exact.
"""

import logging
from collections import Counter
from collections.abc import Callable

import numpy as np

from megactx.framework.config.types import Count, declared

from .documents import length_of
from .questions import QuestionBatches
from .resumable import Endless
from .segments import draw_copied_blocks, eligible_segments

log = logging.getLogger(__name__)


def eligible_starts(length: int, block: int, horizon: int, first: Callable[[int], int] | None = None) -> np.ndarray:
    """Starts s of the blocks that can be replaced and scored: block <= s, s % block = 0, s + block + horizon <= length.

    Block 0 holds the attention sink and is never replaced, nor is what begins before token ``first(length)``, where
    that is given. -> int64 [n], ascending; empty where nothing fits.
    """
    starts = np.arange(block, length - block - horizon + 1, block, dtype=np.int64)
    return starts if first is None else starts[starts >= first(length)]


def evenly(starts: np.ndarray, count: int) -> np.ndarray:
    """``count`` of the starts, evenly spaced from the first to the last; all of them where they are no more."""
    if len(starts) <= count:
        return starts
    return starts[np.linspace(0, len(starts) - 1, count).round().astype(int)]


def single(document: dict, starts: np.ndarray) -> dict:
    """A batch of one document: the form of ``SpanBatches`` items, with [1, n] ``block_starts``."""
    ids = document["input_ids"]
    return {
        "ids": ids[None],
        "lengths": np.asarray([len(ids)]),
        "block_starts": starts[None],
        "domain": [document["domain"]],
        "document": np.asarray([document["text"]]),
    }


@declared("preset")
class SpanBatches(Endless):
    """Map-style dataset of whole batches without end.

    Args:
        documents: as ``documents.cut`` returns them; each must have an eligible block.
        weights: domain -> share of documents; ``None`` takes a domain as often as it occurs, 0 or no entry never.
        batch: documents B per batch.
        spans: blocks N per document. A document that has fewer gives all it has, then some of them again.
        block: tokens K of a block.
        horizon: tokens H that are scored after a block.
        seed: the batches are a function of it.
        compose: ``(document, rng) -> document``, applied to every document that is drawn, see ``Composed``.
        level2_spans: spans of K^2 tokens per document, in addition; 0 for none.
        history: ``segments`` per document for history mode, of ``segment`` tokens behind ``recency`` raw ones; ``None``
            for none.
        questions: questions behind contexts of their own, a batch for each of these; ``None`` for none.
        first: tokens of a document -> the first of these at which a block or span may begin; ``None``: 0 always.

    Each item is a dict: ``ids`` int64 [B, T], padded with 0; ``lengths`` int64 [B]; ``block_starts`` int64 [B, N];
    ``domain``, a list of B strings; ``document`` int64 [B], the index of the source text; and, with ``level2_spans``,
    ``span_starts`` int64 [B, N2], on the grid of K^2; with ``history``, ``segments`` int64 [B, N3], starts of
    segments, and ``copied_blocks``, of the same shape, an old block for each of them; with ``questions``, the entries
    of ``QuestionBatches``.

    Raises:
        ValueError: a weight above 0 for a domain without documents, or no weight above 0.
    """

    def __init__(
        self,
        documents,
        weights,
        batch: Count,
        spans: Count,
        block: int,
        horizon: int,
        seed: int,
        compose=None,
        level2_spans: int = 0,
        history: dict | None = None,
        questions: QuestionBatches | None = None,
        first: Callable[[int], int] | None = None,
    ):
        self.batch, self.spans, self.block, self.horizon, self.seed = batch, spans, block, horizon, seed
        self.compose, self.level2_spans, self.history, self.questions = compose, level2_spans, history, questions
        self.first = first
        weights = check_weights(weights, documents)
        self.domains = list(weights)
        self.shares = np.asarray(list(weights.values()))
        self.pools = {domain: [] for domain in self.domains}
        # By length: documents that are drawn together are then about equally long, and little is padding.
        for document in sorted(documents, key=length_of):
            if document["domain"] in self.pools:
                self.pools[document["domain"]].append(document)
        kept = [document for pool in self.pools.values() for document in pool]
        if few := sum(len(eligible_starts(length_of(d), block, horizon, first)) < spans for d in kept):
            log.info("%d documents have fewer than %d eligible blocks: they give some blocks twice", few, spans)

    def __getitem__(self, index: int) -> dict:
        rng = np.random.default_rng([self.seed, index])
        near = rng.random()
        documents = [self._document(rng, near) for _ in range(self.batch)]
        lengths = np.asarray([length_of(document) for document in documents])
        ids = np.zeros((self.batch, lengths.max()), dtype=np.int64)
        for row, length, document in zip(ids, lengths, documents, strict=True):
            row[:length] = document["input_ids"]
        item = {
            "ids": ids,
            "lengths": lengths,
            "block_starts": np.stack([self._starts(rng, length, self.block, self.spans) for length in lengths]),
            "domain": [document["domain"] for document in documents],
            "document": np.asarray([document["text"] for document in documents]),
        }
        if self.level2_spans:  # drawn last, so that without them a batch is the same
            found = [self._starts(rng, length, self.block**2, self.level2_spans) for length in lengths]
            item["span_starts"] = np.stack(found)
        if self.history:
            item["segments"] = np.stack([self._segments(rng, length) for length in lengths])
            item["copied_blocks"] = draw_copied_blocks(rng, item["segments"], self.block, self.history["recency"])
        if self.questions:
            item |= self.questions[index]
        return item

    def _document(self, rng, near: float) -> dict:
        pool = self.pools[self.domains[rng.choice(len(self.domains), p=self.shares)]]
        # A rank near the batch's own; reflected at both ends, so that every document is as likely as any other.
        rank = abs(near + rng.uniform(-0.1, 0.1))
        rank = 2 - rank if rank > 1 else rank
        document = pool[min(int(rank * len(pool)), len(pool) - 1)]
        return self.compose(document, rng) if self.compose else document

    def _starts(self, rng, length: int, tokens: int, count: int) -> np.ndarray:
        return _draw(rng, eligible_starts(length, tokens, self.horizon, self.first), count)

    def _segments(self, rng, length: int) -> np.ndarray:
        found = eligible_segments(length, self.block, self.history["segment"], self.history["recency"])
        return _draw(rng, found, self.history["segments"])


def _draw(rng, starts: np.ndarray, count: int) -> np.ndarray:
    """``count`` of them without repetition; where there are fewer, some twice."""
    starts = rng.permutation(starts)
    if len(starts) < count:
        starts = np.concatenate([starts, rng.choice(starts, count - len(starts))])
    return starts[:count]


def check_weights(weights, documents) -> dict[str, float]:
    """-> domain -> share, above 0 and with sum 1. A weight of ``None`` is the domain's share of the documents.

    Raises:
        ValueError: names the weight that is not allowed.
    """
    count = Counter(document["domain"] for document in documents)
    shares = {}
    for domain, weight in dict(weights).items():
        weight = count[domain] / max(1, count.total()) if weight is None else float(weight)
        if not 0 <= weight < float("inf"):
            raise ValueError(f"data.weights.{domain}={weight} is not allowed: it must be 0 or more")
        if weight > 0 and not count[domain]:
            raise ValueError(
                f"data.weights.{domain}={weight}: there is no document of that domain, only of"
                f" {', '.join(sorted(count))}; set it to 0 and give one of those a weight, or, with data=files, set"
                f" data.domain={domain}"
            )
        shares[domain] = weight
    total = sum(shares.values())
    if total <= 0:
        raise ValueError(f"data.weights={dict(weights)}: at least one weight must be above 0")
    return {domain: share / total for domain, share in shares.items() if share > 0}
