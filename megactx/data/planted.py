"""Documents in which something was told far back and is needed now: what focus is for (method 10).

    copy        ... [ a foreign passage, 32 tokens ] ...            its first 12 tokens | the other 20
    passage     ... [ a foreign passage, ][ 64 tokens ] ...         its first 32 tokens | the other 32
    key-value   ... [ The port of Alder is 4821. ] ...              The port of Alder is | 4821
                           far back                             up to the cursor     scored

Three more passages of the same kind stand elsewhere and are not asked for: that a block is foreign to its text does not
tell that it is needed. All text is real but the sentences of key-value, which are those of ``probes``.

K block, T tokens before the cursor, A tokens of the answer.
"""

import numpy as np
import torch

from .probes import KINDS as SENTENCES
from .probes import TOPICS

KINDS = ("copy", "passage", "key-value")
CUE = {"copy": 12 / 32, "passage": 1.0}  # of a block, at the end of the text before the cursor
BLOCKS = {"copy": 1, "passage": 2, "key-value": 1}
DISTRACTORS = 3
NEAR = 0.25  # share of the text, the newest, in which nothing is planted


def plant(document: dict, others: list[np.ndarray], tokenizer, kind: str, block: int, rng) -> dict | None:
    """Plant a fact into a document with a cursor.

    Args:
        document: ``ids`` [T + H], ``cursor`` T and more, which is kept.
        others: token ids of other documents, to take foreign passages from.
        kind: of ``KINDS``.
        block: K.
        rng: a numpy generator.

    Returns:
        The document with ``ids`` [T + A], ``kind``, ``needed``, the indices of the blocks that hold the answer,
        ``cue``, how many tokens at the end of T ask, and ``told``: (first token, ids) of all that was planted, the fact
        first.
        ``None`` where a sentence is longer than a block, or no block is free.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"a planted fact of kind {kind} is not known, allowed are {', '.join(KINDS)}")
    cursor, width = document["cursor"], BLOCKS[kind]
    ids = document["ids"][:cursor].numpy().copy()
    free = np.arange(1, int(cursor * (1 - NEAR)) // block - width, width + 1)
    if len(free) < 1 + DISTRACTORS:
        return None
    places = rng.permutation(free)[: 1 + DISTRACTORS]
    facts = (
        _sentences(tokenizer, block, rng)
        if kind == "key-value"
        else [_passage(others, width * block, rng) for _ in places]
    )
    if facts is None:
        return None
    planted = []
    for place, fact in zip(places.tolist(), facts, strict=True):
        told = fact if kind != "key-value" else fact[0]
        ids[place * block : place * block + len(told)] = told
        planted.append((place * block, torch.from_numpy(told)))
    if kind == "key-value":
        told, asked = facts[0]
        cue, answer = told[:asked], told[asked:]
    else:
        length = round(CUE[kind] * block)
        cue, answer = facts[0][:length], facts[0][length:]
    ids[cursor - len(cue) :] = cue
    needed = [int(places[0]) + width - 1]
    ids = torch.from_numpy(np.concatenate([ids, answer]))
    return document | {"ids": ids, "kind": kind, "needed": needed, "cue": len(cue), "told": planted}


def _passage(others: list[np.ndarray], tokens: int, rng) -> np.ndarray:
    other = others[int(rng.integers(len(others)))]
    start = int(rng.integers(1, len(other) - tokens + 1))  # behind BOS
    return other[start : start + tokens]


def _sentences(tokenizer, block: int, rng) -> list[tuple[np.ndarray, int]] | None:
    """A told sentence per topic, of one class, and the place of the answer in each; ``None`` where one is too long."""
    what, draw = SENTENCES[list(SENTENCES)[int(rng.integers(len(SENTENCES)))]]
    out = []
    for topic in rng.permutation(TOPICS)[: 1 + DISTRACTORS]:
        question = f"\nThe {what} of {topic} is"
        asked = tokenizer.encode(question, add_special_tokens=False)
        told = tokenizer.encode(f"{question} {draw(rng)}", add_special_tokens=False)
        if told[: len(asked)] != asked or len(told) > block:
            return None
        out.append((np.asarray(told), len(asked)))
    return out
