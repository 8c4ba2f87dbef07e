"""A fact that was told far back in a history of any length: is it in detail when the answer begins?

A case is a fact of ``data.planted`` in a target document. In a longer history the same facts stand at the same share of
its length, so in the filler, and only the question stays at the end of the target.

    T = 4,096     [ ... fact ............. question ] answer
    T = 32,768    [ ............ fact ...................... [ target ...... question ]] answer

T tokens of a history, K of a block, A of the answer.
"""

import numpy as np
import torch
from torch import Tensor

from megactx.data.planted import KINDS, plant
from megactx.evaluation.focus import GISTS
from megactx.evaluation.planted import NEEDED, USABLE
from megactx.focus.edit_labels import continuation_nll
from megactx.focus.layout import by_value
from megactx.memory import MegaContextTree
from megactx.runtime import Models

from .length_text import Texts

TRIES = 8  # a sentence may be too long for a block


def cases(texts: Texts, tokenizer, count: int, block: int, seed: int) -> list[dict]:
    """Cases of all kinds in turn: ``target``, and what ``plant`` says of it.

    Raises:
        ValueError: there are not two targets of different texts, or nothing could be planted.
    """
    if count and len({target["text"] for target in texts.targets}) < 2:
        raise ValueError("--planted needs passages of another text: at least 2 --documents; or set --planted 0")
    out = []
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        for _ in range(TRIES):
            target = texts.targets[int(rng.integers(len(texts.targets)))]
            others = [other["ids"].numpy() for other in texts.targets if other["text"] != target["text"]]
            document = {"ids": target["ids"], "cursor": texts.near}
            if found := plant(document, others, tokenizer, KINDS[number % len(KINDS)], block, rng):
                out.append(found | {"target": target, "domain": target["domain"]})
                break
    if count and not out:
        raise ValueError(f"--lengths: no fact can be planted in {texts.near} tokens; the shortest length is too short")
    return out


def placed(texts: Texts, case: dict, length: int, block: int) -> tuple[Tensor, int]:
    """-> the history of a case, [T], and the block that holds the answer."""
    ids = texts.history(case["target"], length).clone()
    for first, told in case["told"]:
        start = _moved(first // block, length, texts.near) * block
        ids[start : start + len(told)] = told
    ids[length - case["cue"] :] = case["ids"][texts.near - case["cue"] : texts.near]
    first = case["told"][0][0] // block
    return ids, case["needed"][0] - first + _moved(first, length, texts.near)


def gain(models: Models, tree: MegaContextTree, needed: int, following: Tensor, budget: int) -> float:
    """What the needed block among gists is worth to the answer, nats per token: the base can use it from ``USABLE`` on.

    Args:
        tree: of the shortest history.
        following: [A]
    """
    values = torch.full((1, int(tree.counts(1)[0])), -torch.inf)
    opened = values.clone()
    opened[0, needed] = 1.0
    following = following.to(models.base.model.device)[None]
    found = {
        name: continuation_nll(models.base, by_value(tree, budget, worth), following).mean().item()
        for name, worth in ((GISTS, values), (NEEDED, opened))
    }
    return found[GISTS] - found[NEEDED]


def usable(case: dict) -> bool:
    """Whether a measured case counts."""
    return case["gain"] >= USABLE


def _moved(block: int, length: int, near: int) -> int:
    return block * length // near
