"""Batches for the base LM: real windows in which real passages come back, with skips in position.

A base that does not use its context cannot show what a gist is worth. Small models learn to copy late; two things make
it come sooner. Passages return later in the window, whole or with one token changed. And position skips (PoSE, Zhu et
al. 2023, arXiv 2309.10400) show the model far distances in short windows, so that it is usable beyond its training
length and at home with the jumps of a working context.

Batch ``i`` is a function of (seed, i) alone: that is what makes resuming exact.
"""

from dataclasses import dataclass

import numpy as np

from .documents import TRAIN, Views, where
from .resumable import Endless
from .tokenizer import bos_id

SHORTEST = 128  # tokens of a window: room for a passage of 32 twice, something before it and between


@dataclass(frozen=True)
class Phase:
    """``steps`` steps with batches of ``batch`` windows of ``tokens`` tokens."""

    steps: int
    tokens: int
    batch: int


class PretrainingBatches(Endless):
    """Map-style dataset of whole batches.

    Args:
        rows: tokenised texts, as ``documents.tokenised`` returns them.
        phases: lengths over time; the last one goes on for ever.
        each: batches that make one step; a phase's steps are steps, however many batches one takes.
        weights: domain -> share of windows.
        repeat: share of windows in which a passage of 32..tokens/3 tokens comes back.
        skip: share of windows with position skips.
        max_position: positions stay below it.

    Each item is a dict of int64 arrays ``ids``, ``positions`` [B, T] and ``copied`` bool [B, T] (the token is part of a
    passage that came back).
    """

    def __init__(self, rows, tokenizer, phases, weights, repeat, skip, max_position, seed, split=TRAIN, each=1):
        self.phases = [Phase(**phase) for phase in phases]
        for phase in self.phases:
            if phase.tokens < SHORTEST:
                raise ValueError(f"datamodule.phases: tokens={phase.tokens} is not allowed: at least {SHORTEST}")
        self.repeat, self.skip, self.max_position, self.seed, self.each = repeat, skip, max_position, seed, each
        self.bos = bos_id(tokenizer)
        self.texts = Views(rows)
        lengths, side = self.texts.lengths, where(rows, "split", split)
        shortest = max(phase.tokens for phase in self.phases)
        self.pools = {}
        for domain, weight in weights.items():
            index = np.flatnonzero(side & where(rows, "domain", domain) & (lengths >= shortest))
            if weight > 0 and len(index) == 0:
                asked = f"datamodule.weights.{domain}={weight}"
                raise ValueError(f"{asked}: no {split} document of that domain has {shortest} tokens; set it to 0")
            if weight > 0:
                # What ``Generator.choice`` makes of these shares at each call; at size that would be all of its time.
                ends = (lengths[index] / lengths[index].sum()).cumsum()
                self.pools[domain] = (index, ends / ends[-1], weight)
        total = sum(weight for *_, weight in self.pools.values())
        if total <= 0:
            raise ValueError(f"datamodule.weights={dict(weights)}: at least one weight must be above 0")
        self.lengths = lengths
        self.domains = list(self.pools)
        self.shares = [self.pools[domain][2] / total for domain in self.domains]

    def __getitem__(self, index: int) -> dict:
        rng = np.random.default_rng([self.seed, index])
        phase = self._phase(index // self.each)
        windows = [self._window(rng, phase.tokens) for _ in range(phase.batch)]
        return {name: np.stack([window[name] for window in windows]) for name in windows[0]}

    def _phase(self, step: int) -> Phase:
        for phase in self.phases[:-1]:
            if step < phase.steps:
                return phase
            step -= phase.steps
        return self.phases[-1]

    def _window(self, rng, tokens: int) -> dict:
        index, ends, _ = self.pools[self.domains[rng.choice(len(self.domains), p=self.shares)]]
        row = int(index[ends.searchsorted(rng.random(), side="right")])
        start = int(rng.integers(0, self.lengths[row] - tokens + 2))
        ids = np.concatenate([[self.bos], self.texts[row][start : start + tokens - 1]]).astype(np.int64)
        copied = np.zeros(tokens, dtype=bool)
        if rng.random() < self.repeat:
            self._bring_back(rng, ids, copied)
        return {"ids": ids, "positions": self._positions(rng, tokens), "copied": copied}

    def _bring_back(self, rng, ids, copied) -> None:
        length = int(rng.integers(32, max(33, len(ids) // 3)))
        first = int(rng.integers(1, len(ids) - 2 * length))
        # Near distances are as frequent as far ones on a log scale: copying is learned near first.
        gap = int(np.exp(rng.uniform(0, np.log(len(ids) - first - 2 * length + 1))))
        second = first + length + gap - 1
        passage = ids[first : first + length].copy()
        if rng.random() < 0.2:
            passage[rng.integers(0, length)] = ids[rng.integers(1, len(ids))]
        ids[second : second + length] = passage
        copied[second : second + length] = True

    def _positions(self, rng, tokens: int):
        positions = np.arange(tokens)
        if rng.random() < self.skip:
            cuts = rng.integers(1, tokens, size=rng.integers(1, 4))
            room = self.max_position - tokens
            for at in np.sort(cuts):
                gap = int(np.exp(rng.uniform(0, np.log(room + 1)))) - 1
                positions[at:] += gap
                room -= gap
        return positions
