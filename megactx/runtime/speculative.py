"""Speculative decoding: tokens of a draft are verified by the base LM in one pass (Leviathan et al. 2023).

A draft says one token for each place. So token x of it is taken with the base LM's own probability p(x); where it is
not, another one is drawn from p without x. What comes out is distributed as the base LM's own tokens, whatever a draft
holds, and greedy decoding gives the same tokens.

T tokens, K of a block, D width, V vocabulary.
"""

import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megactx.lm import BaseLM
from megactx.lm.masks import BEHIND, CAUSAL
from megactx.memory import MegaContextTree
from megactx.memory.prediction import Readout
from megactx.parts.models import Models

from .cache import KeyCache

LONGEST, MATCH = 8, 3  # tokens of a draft, and newest tokens that are looked for
LOOKED = 16_384  # newest tokens of a session in which they are looked for


def behind_match(tokens: list[int], where: list[int], most: int = LONGEST) -> list[int]:
    """What stands in ``where`` behind the newest place of the longest end of ``tokens``, ``MATCH`` tokens at most."""
    for length in range(min(MATCH, len(tokens)), 0, -1):
        end = tokens[-length:]
        for at in range(len(where) - length - 1, -1, -1):
            if where[at : at + length] == end:
                return where[at + length : at + length + most]
    return []


class Drafter:
    """Says what may come next. ``block``: tokens after which it wants to know the state of the base LM; 0: never."""

    block = 0

    def draft(self, tokens: list[int]) -> list[int]:
        """Of all tokens so far -> up to ``LONGEST`` that may follow."""
        return []

    def block_done(self, tokens: list[int], state: Tensor) -> None:
        """A block is complete: all tokens up to its end, and the final hidden state [D] of its last."""


class Lookup(Drafter):
    """Tokens behind the newest place where the newest tokens stood before (prompt lookup, Saxena 2023).

    Every run of ``MATCH`` tokens and less is known by the place behind it, so a draft costs the new tokens only.
    """

    def __init__(self):
        self.behind: dict[tuple[int, ...], int] = {}
        self.known = 1  # places of which the runs before them are known

    def draft(self, tokens: list[int]) -> list[int]:
        for place in range(self.known, len(tokens)):
            for length in range(1, min(MATCH, place) + 1):
                self.behind[tuple(tokens[place - length : place])] = place
        self.known = max(self.known, len(tokens))
        for length in range(min(MATCH, len(tokens)), 0, -1):
            if (place := self.behind.get(tuple(tokens[-length:]))) is not None:
                return tokens[place : place + LONGEST]
        return []


class Gists(Drafter):
    """Tokens of one past block: that behind the block whose gist is nearest to the newest one, or, with a readout, that
    whose gist is nearest to the foretold one.

    Args:
        models: base LM and GistNet.
        readout: of the next gist; ``None``: the newest gist is what is looked for.
    """

    def __init__(self, models: Models, readout: Readout | None = None):
        self.tree = MegaContextTree(models.gistnet, models.base, device=models.base.model.device, max_level=1)
        self.block, self.readout, self.begin = self.tree.block_size, readout, None

    def block_done(self, tokens: list[int], state: Tensor) -> None:
        self.tree.append(torch.tensor([tokens[int(self.tree.lengths[0]) :]], device=self.tree.device))
        gists = F.normalize(self.tree.gists(1)[0].float(), dim=-1)  # [N, D]
        if len(gists) < 2:
            return
        if self.readout is None:  # the newest block itself has nothing behind it
            self.begin = (int((gists[:-1] @ gists[-1]).argmax()) + 1) * self.block
        else:
            self.begin = int((gists @ self.readout(state.float())).argmax()) * self.block

    def draft(self, tokens: list[int]) -> list[int]:
        if self.begin is None:
            return []
        if len(tokens) % self.block == 0:
            return tokens[self.begin : self.begin + LONGEST]
        # Its first tokens may be those behind the end of the block before.
        return behind_match(tokens, tokens[max(0, self.begin - MATCH) : self.begin + self.block])


@dataclass
class Tally:
    """What decoding took."""

    tokens: int = 0
    passes: int = 0
    drafted: int = 0
    accepted: int = 0
    seconds: float = 0.0

    @property
    def per_pass(self) -> float:
        """Tokens per pass of the base LM; 1 without drafts."""
        return self.tokens / self.passes if self.passes else float("nan")


class Speculative:
    """One text that goes on, by drafts.

    Args:
        base: frozen.
        drafter: ``Drafter()`` has no drafts, which is plain decoding.
        temperature: 0 is greedy.
        seed: of the draws.
    """

    def __init__(self, base: BaseLM, drafter: Drafter, temperature: float = 0.0, seed: int = 0):
        self.base, self.drafter, self.temperature = base, drafter, temperature
        self.draw = torch.Generator().manual_seed(seed)
        self.cache, self.tokens, self.tally = KeyCache(), [], Tally()
        self.read = 0  # tokens whose keys and values are in the cache

    @torch.no_grad()
    def generate(self, prompt: list[int], count: int) -> list[int]:
        """The next ``count`` tokens behind a prompt, which is read first, up to its last token.

        Raises:
            ValueError: an empty prompt, or more tokens than the base LM takes.
        """
        if not prompt:
            raise ValueError("prompt: it is empty, give at least one token, such as BOS")
        if len(prompt) + count > self.base.max_positions:
            raise ValueError(
                f"prompt and answer have {len(prompt) + count} tokens, the base LM takes {self.base.max_positions}"
            )
        self.tokens = list(prompt)
        if len(prompt) > 1:
            self._pass(prompt[:-1])
        began, end = time.perf_counter(), len(prompt) + count
        while len(self.tokens) < end:
            room = end - len(self.tokens) - 1  # the pass itself gives one token
            draft = self.drafter.draft(self.tokens)[: min(LONGEST, room)] if room else []
            newest = self.tokens[self.read :]
            hidden = self._pass([*newest, *draft], noted=len(newest))
            logits = self.base.logits(hidden[len(newest) - 1 :]).float()
            taken = verified(logits, draft, self.temperature, self.draw)
            self.tokens += taken
            kept = len(newest) + len(taken) - 1
            self._note(hidden[len(newest) : kept], self.read + len(newest))
            self.read += kept
            self.cache.keep(self.read)
            self.tally.passes += 1
            self.tally.drafted += len(draft)
            self.tally.accepted += len(taken) - 1
            self.tally.tokens += len(taken)
        self.tally.seconds += time.perf_counter() - began
        return self.tokens[len(prompt) :]

    def _pass(self, ids: list[int], noted: int | None = None) -> Tensor:
        """Read tokens behind what is read; -> hidden [N, D]. Of the first ``noted`` of them the drafter is told."""
        device, start = self.base.model.device, self.cache.get_seq_length()
        embedded = self.base.embed(torch.tensor([ids], device=device))
        positions = torch.arange(start, start + len(ids), device=device)[None]
        hidden = self.base(embedded, positions, BEHIND if start else CAUSAL, self.cache)[0]
        self._note(hidden[:noted], start)
        if noted is None:
            self.read = start + len(ids)
        return hidden

    def _note(self, hidden: Tensor, start: int) -> None:
        """Tell the drafter of blocks that end among tokens from ``start`` on, whose states are hidden [N, D]."""
        if not (block := self.drafter.block):
            return
        for row in range(len(hidden)):
            if (end := start + row + 1) % block == 0:
                self.drafter.block_done(self.tokens[:end], hidden[row])


def verified(logits: Tensor, draft: list[int], temperature: float, draw: torch.Generator) -> list[int]:
    """The tokens behind a text: those of the draft up to the first that is not taken, and one of the base LM's own.

    Args:
        logits: [N + 1, V] in fp32, of the N places of the draft and of the one behind it.
        temperature: 0 is greedy, and draws nothing.
    """
    if temperature == 0:
        best = logits.argmax(-1).tolist()
        right = next((n for n, token in enumerate(draft) if token != best[n]), len(draft))
        return best[: right + 1]
    share = (logits.double() / temperature).softmax(-1).cpu()
    for place, token in enumerate(draft):
        if torch.rand((), generator=draw, dtype=torch.double) >= share[place, token]:
            share[place, token] = 0.0  # the draft says nothing of the other tokens
            return [*draft[:place], int(torch.multinomial(share[place], 1, generator=draw))]
    return [*draft, int(torch.multinomial(share[len(draft)], 1, generator=draw))]
