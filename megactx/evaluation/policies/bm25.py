"""Blocks that share rare words with the newest text."""

import bm25s
import torch
from torch import Tensor

from megactx.evaluation.policy import Policy, Seen

QUERY = 128  # newest tokens, which are the question


class Bm25(Policy):
    """Blocks whose words match the newest 128 tokens, by Okapi BM25 (Robertson & Zaragoza 2009)."""

    title = "BM25 of the tail"

    def values(self, seen: Seen) -> Tensor:
        return bm25(seen.base.tokenizer, seen.ids[0], seen.blocks, seen.tree.block_size)


def bm25(tokenizer, ids: Tensor, count: int, block: int) -> Tensor:
    """Okapi BM25 of each of the first ``count`` blocks of ids [T], for its last ``QUERY`` tokens: [N]."""
    ids = ids.cpu()
    # ``batch_decode`` of no blocks is one empty text.
    texts = [tokenizer.decode(ids[n * block : (n + 1) * block].tolist()) for n in range(count)]
    return okapi(texts, tokenizer.decode(ids[-QUERY:].tolist()))


def okapi(texts: list[str], question: str) -> Tensor:
    """Okapi BM25 of texts for the words of a question: [N]."""
    # Words of one letter or digit count too, which bm25s drops unless it is told.
    split = {"stopwords": None, "token_pattern": r"(?u)\b\w+\b", "show_progress": False}
    corpus = bm25s.tokenize(texts, **split, return_ids=False)
    if not any(corpus):
        return torch.zeros(len(texts))
    index = bm25s.BM25()
    index.index(corpus, show_progress=False)
    known = [word for word in bm25s.tokenize([question], **split, return_ids=False)[0] if word in index.vocab_dict]
    return torch.from_numpy(index.get_scores(known).copy()).float() if known else torch.zeros(len(texts))
