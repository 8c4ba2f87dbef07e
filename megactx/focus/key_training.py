"""What keys are trained on: questions about blocks of a text, told facts among them, by InfoNCE (Oord et al. 2018).

    loss = -log  sum of exp(likeness) over blocks that hold the answer
               / (exp(null) + sum of exp(likeness) over all candidates)

Candidates are all blocks of the step's texts and what BM25 takes for the answer elsewhere. A question about nothing,
such as text that just goes on, is to find ``null`` first.

D documents, N blocks of each, K tokens of a block, Q questions, C candidates.
"""

import random
from dataclasses import dataclass

import bm25s
import torch
import torch.nn.functional as F
from torch import Tensor

from .keys import QUESTION, KeyNet, padded

SPLIT = {"stopwords": None, "token_pattern": r"(?u)\b\w+\b", "show_progress": False, "return_ids": False}


@dataclass(frozen=True)
class Asked:
    """A question about a document."""

    kind: str
    ids: list[int]
    blocks: list[int]  # of its document, that hold the answer; none: it asks for nothing
    told: bool = False  # a fact that was put there: other documents may hold one that is alike


class Pool:
    """Blocks of many texts, and what BM25 finds among them.

    Args:
        documents: ids [T] each, T a multiple of K.
    """

    def __init__(self, documents: list[Tensor], tokenizer, block: int):
        self.documents, self.tokenizer, self.block = documents, tokenizer, block
        self.blocks = torch.cat([ids.view(-1, block) for ids in documents])  # [N, K]
        self.index = bm25s.BM25()
        texts = tokenizer.batch_decode(self.blocks.tolist())
        self.index.index(bm25s.tokenize(texts, **SPLIT), show_progress=False)

    def counts(self, vocabulary: int) -> Tensor:
        """How often each token stands there, [V]."""
        return torch.bincount(self.blocks.flatten(), minlength=vocabulary)

    def hard(self, questions: list[list[int]], most: int) -> Tensor:
        """The blocks that BM25 takes for the answers, [Q, most, K]."""
        words = bm25s.tokenize([self.tokenizer.decode(ids) for ids in questions], **SPLIT)
        words = [[w for w in own if w in self.index.vocab_dict] or [next(iter(self.index.vocab_dict))] for own in words]
        found, _ = self.index.retrieve(words, k=most, show_progress=False)
        return self.blocks[torch.from_numpy(found.astype("int64"))]


def put(ids: Tensor, facts: list[list[int]], block: int, draw: random.Random) -> list[list[int]]:
    """Write facts over tokens of a document [T], in place, none over another; -> blocks of each."""
    room = len(ids) // len(facts)
    out, order = [[] for _ in facts], draw.sample(range(len(facts)), len(facts))
    for slot, n in enumerate(order):
        fact = facts[n][:room]
        start = slot * room + draw.randrange(room - len(fact) + 1)
        ids[start : start + len(fact)] = torch.tensor(fact)
        out[n] = [*range(start // block, (start + len(fact) - 1) // block + 1)]
    return out


def of_text(ids: Tensor, block: int, frames: list[tuple[list[int], list[int]]], draw: random.Random) -> Asked:
    """A question made of some words of a passage, with some of them left out."""
    length = draw.randrange(6, 20)
    start = draw.randrange(0, len(ids) - length)
    share = draw.choice([0.0, 0.2, 0.4])
    words = [token for token in ids[start : start + length].tolist() if draw.random() >= share]
    before, behind = draw.choice(frames)
    held = [n for n in range(start // block, (start + length - 1) // block + 1)]
    # A block that holds only the rim of the passage does not hold the answer.
    held = [n for n in held if min((n + 1) * block, start + length) - max(n * block, start) >= length / 3]
    return Asked("text", [*before, *words, *behind][-QUESTION:], held)


def loss(net: KeyNet, documents: Tensor, asked: list[list[Asked]], hard: Tensor) -> Tensor:
    """Mean InfoNCE of all questions.

    Args:
        documents: ids [D, N, K].
        asked: the questions about each document.
        hard: blocks of other texts, [C, K].
    """
    d, n, k = documents.shape
    questions = [question for own in asked for question in own]
    keys = net(torch.cat([documents.view(-1, k), hard.view(-1, k)]))
    found = net.likeness(net(*padded([question.ids for question in questions])), keys)  # [Q, D N + C]
    right, out = torch.zeros_like(found, dtype=torch.bool), torch.zeros_like(found, dtype=torch.bool)
    told = torch.zeros(d, n, dtype=torch.bool)
    for number, own in enumerate(asked):
        for question in own:
            if question.told:
                told[number, question.blocks] = True
    row = 0
    for number, own in enumerate(asked):
        others = told.clone()
        others[number] = False
        for question in own:
            right[row, [number * n + block for block in question.blocks]] = True
            if question.told:
                out[row, : d * n] = others.view(-1)
            row += 1
    found = torch.cat([found.masked_fill(out, -torch.inf), net.null.expand(len(found), 1)], dim=1)
    right = torch.cat([right, ~right.any(1, keepdim=True)], dim=1)
    return (found.logsumexp(1) - found.masked_fill(~right, -torch.inf).logsumexp(1)).mean()


def start_weights(net: KeyNet, counts: Tensor) -> None:
    """Weigh rare tokens more, by smooth inverse frequency (Arora et al. 2017): what training begins with."""
    share = counts.float() / counts.sum().clamp(min=1)
    net.weight.data = torch.log(1e-3 / (1e-3 + F.pad(share, (0, len(net.weight) - len(share)))))
