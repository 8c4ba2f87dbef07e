"""Histories of real text of any length, all of which end in the same documents.

    T = 4,096                                             [ target, 4,096 ]  512 are scored
    T = 32,768   BOS text  BOS text  BOS te [ filler ]    [ target, 4,096 ]  512 are scored
                 |--- other texts of the target's domain ---|

The shortest length is the target alone. All longer ones begin with the filler of its domain, so the first tokens of all
histories of a domain are the same, and their tree is made once.

T tokens of a history, S scored tokens, K of a block.
"""

import hashlib
import logging
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megactx.data.documents import TRAIN, VALIDATION, cut, tokenised
from megactx.data.embedded import Embedded
from megactx.data.files import Files
from megactx.data.spans_module import in_turn
from megactx.data.tokenizer import bos_id
from megactx.memory import MegaContextTree
from megactx.runtime import Models

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Texts:
    """What histories are made of."""

    targets: list[dict]  # ``ids`` [near + S] with BOS, ``domain``, ``text`` (index of the source text), ``source``
    fillers: dict[str, Tensor]  # domain -> ids [longest - near]
    learned: dict[str, int]  # domain -> tokens of its filler that are of the training part of the embedded text
    near: int  # tokens of a target that are history: the shortest T
    fingerprint: str  # of the text itself

    def history(self, target: dict, length: int) -> Tensor:
        """The first ``length`` tokens before the scored ones, [T]."""
        own = target["ids"][: self.near]
        return own if length == self.near else torch.cat([self.fillers[target["domain"]][: length - self.near], own])

    def scored(self, target: dict) -> Tensor:
        """What comes next, [S]."""
        return target["ids"][self.near :]


def gather(
    tokenizer,
    path: str | None,
    filler: str | None,
    near: int,
    scored: int,
    longest: int,
    documents: int,
    domains: list[str] | None,
    seed: int,
) -> Texts:
    """Targets and fillers.

    Args:
        path: files, see ``Files``, all of which may be targets; ``None``: the held-out tenth of the embedded text.
        filler: files for the text before the targets; ``None``: the texts of the same source that are no target, of the
            embedded text the held-out ones first.
        near, scored, longest: tokens.
        documents: how many targets at most, domains in turn.
        domains: to take; ``None``: all.
        seed: of the order of the filler's texts.

    Raises:
        ValueError: no text is long enough, or those of a domain are not enough for ``longest``.
    """
    source = Files(path) if path else Embedded()
    rows = tokenised(source, tokenizer)
    found, _ = cut(rows, None if path else VALIDATION, tokenizer, near + scored, near + scored)
    found = [document for document in found if domains is None or document["domain"] in domains]
    targets = [document | {"ids": torch.from_numpy(document["input_ids"])} for document in in_turn(found)[:documents]]
    for target in targets:
        del target["input_ids"]
    if not targets:
        of = f" of {', '.join(domains)}" if domains else ""
        raise ValueError(f"no text{of} has {near + scored} tokens; lower --lengths, or give longer texts with --path")
    if len(targets) < documents:
        log.warning("there are %d target documents of %d tokens, not %d", len(targets), near + scored, documents)
    taken = {_digest(rows[text]["input_ids"]) for text in {target["text"] for target in targets}}
    behind = tokenised(Files(filler), tokenizer) if filler else rows
    fillers, learned = {}, {}
    for domain in dict.fromkeys(target["domain"] for target in targets):
        if longest > near:
            fillers[domain], learned[domain] = _filler(behind, domain, taken, longest - near, bos_id(tokenizer), seed)
    if path or filler:
        learned = dict.fromkeys(learned, 0)  # what was learned from such text is not known here
    digest = hashlib.sha256()
    for ids in [*(target["ids"] for target in targets), *fillers.values()]:
        digest.update(ids.numpy().tobytes())
    return Texts(targets, fillers, learned, near, digest.hexdigest()[:12])


def tree_of(models: Models, ids: Tensor, known: MegaContextTree | None) -> MegaContextTree:
    """The tree of a history, ids [T]; it takes all nodes that it can from one that begins with nearly the same tokens.

    Pieces of K^2 tokens that are the same in both are copied with the gists above them, the others are encoded.
    """
    device = models.base.model.device
    ids = ids.to(device)
    new = MegaContextTree(models.gistnet, models.base, device=device, keys=models.keys)
    start = 0
    if known is not None:
        piece = new.block_size**2
        count = min(len(ids), int(known.lengths[0])) // piece
        theirs = known.levels[0].span("token", 0, count * piece)[0]
        same = (ids[: count * piece] == theirs).view(count, piece).all(1)
        runs = torch.unique_consecutive(same, return_counts=True)
        for alike, run in zip(*(part.tolist() for part in runs), strict=True):
            stop = start + run * piece
            if alike:
                new.merge(known.slice(start, stop))
            else:
                new.append(ids[None, start:stop])
            start = stop
    if start < len(ids):
        new.append(ids[None, start:])
    return new


def _filler(rows, domain: str, taken: set[bytes], tokens: int, bos: int, seed: int) -> tuple[Tensor, int]:
    """-> ids [tokens] of texts of a domain in a random order, held-out ones first; how many are of the others."""
    there = np.flatnonzero(np.asarray(rows["domain"]) == domain)
    there = np.random.default_rng(seed).permutation(there)
    learned = np.asarray(rows["split"])[there] == TRAIN
    parts, count, of_training = [], 0, 0
    for index, training in sorted(zip(there.tolist(), learned.tolist(), strict=True), key=lambda pair: pair[1]):
        ids = rows[index]["input_ids"]
        if _digest(ids) in taken or not ids:
            continue
        part = torch.tensor([bos, *ids])[: tokens - count]
        parts.append(part)
        count += len(part)
        of_training += len(part) * training
        if count == tokens:
            return torch.cat(parts), of_training
    raise ValueError(
        f"the texts of domain {domain} that are no target have {count:,} tokens, the longest history needs {tokens:,};"
        " give more text with --filler, shorter --lengths, fewer --documents or other --domains"
    )


def _digest(ids: list[int]) -> bytes:
    """A text that is there twice must not stand before itself."""
    return hashlib.sha256(np.asarray(ids, dtype=np.int32).tobytes()).digest()
