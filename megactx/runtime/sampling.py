"""Which token comes next: greedy, or drawn by temperature, top-k and top-p, with a repetition penalty.

The filters are transformers' own. A draw is a function of (seed, row, place in the history) and nothing else, so a
session that was saved and resumed draws what it would have drawn.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Le
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from megactx.framework.config.types import NonNegative, PartOf, Positive, Whole, declared

RECENT = 256  # newest tokens that the repetition penalty counts


@declared()
@dataclass(frozen=True)
class Sampling:
    """How a token is chosen.

    Args:
        temperature: 0 is greedy.
        top_k: draw among so many of the likeliest; 0: all.
        top_p: draw among the likeliest that have so much probability together, 0 < top_p <= 1.
        repetition_penalty: of tokens among the ``RECENT`` newest; 1 is none (Keskar et al. 2019, arXiv 1909.05858).
        seed: of the draws.

    Raises:
        ValueError: a setting that is not allowed.
    """

    temperature: NonNegative = 0.0
    top_k: Whole = 0
    top_p: PartOf = 1.0
    repetition_penalty: Positive = 1.0
    seed: Annotated[int, Ge(0), Le(2**63 - 1)] = 0

    def choose(self, logits: Tensor, recent: Tensor, place: Tensor) -> Tensor:
        """The next token of each row.

        Args:
            logits: [B, V] fp32.
            recent: the newest tokens of each row, [B, N].
            place: tokens of each history so far, [B].

        Returns:
            [B].

        Raises:
            ValueError: logits are NaN.
        """
        if logits.isnan().any():
            raise ValueError(
                "the base LM gives NaN for the next token; its weights, or the gists that it read, are broken"
            )
        logits = self._filters()(recent, logits)
        if self.temperature == 0:
            return logits.argmax(-1)
        share = logits.double().softmax(-1).cumsum(-1)
        drawn = torch.stack([self._drawn(row, int(n)) for row, n in enumerate(place.tolist())]).to(share)
        chosen = torch.searchsorted(share, drawn[:, None] * share[:, -1:], right=True)[:, 0]
        return chosen.clamp(max=logits.shape[1] - 1)

    def _filters(self) -> LogitsProcessorList:
        filters = LogitsProcessorList()
        if self.repetition_penalty != 1:
            filters.append(RepetitionPenaltyLogitsProcessor(float(self.repetition_penalty)))
        if self.temperature > 0:
            if self.temperature != 1:
                filters.append(TemperatureLogitsWarper(float(self.temperature)))
            if self.top_k:
                filters.append(TopKLogitsWarper(self.top_k))
            if self.top_p < 1:
                filters.append(TopPLogitsWarper(self.top_p))
        return filters

    def _drawn(self, row: int, place: int) -> Tensor:
        """A number from 0 to 1."""
        # The generator of a CPU takes 32 bits of a seed; a draw is the same on every device.
        mixed = hash((self.seed, row, place)) % 2**32  # of whole numbers: the same in every process
        return torch.rand((), dtype=torch.double, generator=torch.Generator().manual_seed(mixed))
