"""Keys of blocks from the states of a sentence encoder, where a bag of words is not enough: a block that says what the
question asks in other words.

    key(block) = unit(project(sum over its tokens of  softmax(weight(state)) x state) + MLP)

The encoder is frozen and reads the text of the block; what is learned is which of its tokens count, and 64 numbers that
tell blocks apart. All else is as in ``focus.keys``.
"""

import re
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le
from torch import Tensor, nn

from megactx.framework.config.types import declared
from megactx.lm.sentences import SentenceEncoder, remembered

from .keys import Keys

KNOWN = 2**15  # blocks whose states are remembered while keys are trained
LOOKED = 2**11  # texts, and questions, that a second look remembers: an answer's asks the same again, 80 MB


@declared("keys")
class SentenceKeys(Keys):
    """Tokens of a block -> its key.

    Args:
        tokenizer: of the base LM, whose ids become text.
        encoder: what reads the text.
        size: S.
        width: of the encoder's states; ``None``: it is asked, which reads its weights.

    Raises:
        ValueError: a setting that is not allowed.
    """

    reads, piece = "sentences", 1024
    looks_again = True

    def __init__(
        self,
        tokenizer,
        encoder: SentenceEncoder,
        size: Annotated[int, Ge(16), Le(64)] = 64,
        width: Annotated[int, Ge(1)] | None = None,
    ):
        super().__init__()
        width = encoder.width if width is None else width
        self.size, self.tokenizer, self.encoder = size, tokenizer, encoder
        self.known: dict[tuple[int, ...], Tensor] | None = None  # states by ids; a dict remembers them
        self.looked: dict[str, Tensor] = {}  # unit states by text
        self.project = nn.Linear(width, size, bias=False)
        nn.init.orthogonal_(self.project.weight)
        self.weight = nn.Linear(width, 1)
        nn.init.zeros_(self.weight.weight)
        self.up, self.down = nn.Linear(size, 2 * size), nn.Linear(2 * size, size)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)
        self.scale, self.null = nn.Parameter(torch.tensor(15.0)), nn.Parameter(torch.tensor(5.0))

    def ready(self) -> "SentenceKeys":
        self.encoder.ready()
        return self

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """ids [E, K], mask bool [E, K] of the tokens that are there -> unit keys [E, S]."""
        device = self.project.weight.device
        rows = ids.tolist() if mask is None else [row[there].tolist() for row, there in zip(ids, mask, strict=True)]
        states = nn.utils.rnn.pad_sequence(self._states(rows), batch_first=True).to(device)  # [E, T, width]
        there = states.abs().amax(-1) > 0
        score = self.weight(states)[..., 0].masked_fill(~there, -torch.inf)
        mixed = torch.einsum("et,etd->ed", score.softmax(-1), states)
        x = F.normalize(self.project(mixed), dim=-1)
        return self.unit(x)

    def alike(self, texts: Tensor, questions: list[Tensor]) -> Tensor:
        """How like texts, ids [E, T], are to the likest of the questions, ids [Q] each: [E]. A token of a question is
        compared with the token of the text that is likest to it, by the encoder's own states, and the mean of these
        cosines counts (late interaction: Khattab and Zaharia 2020)."""
        several = [self.tokenizer.batch_decode([ids.tolist() for ids in part]) for part in (texts, questions)]
        found, asked = (remembered(self.looked, part, self._unit, LOOKED) for part in several)
        found = nn.utils.rnn.pad_sequence(found, batch_first=True)  # [E, T, width]
        there = found.abs().amax(-1) > 0
        each = [torch.einsum("qw,etw->eqt", own, found).masked_fill(~there[:, None], -torch.inf) for own in asked]
        return torch.stack([like.amax(-1).mean(-1) for like in each]).amax(0)

    def words(self, ids: list[int]) -> set[str]:
        """Words of three letters or digits at least, as they are told apart from each other."""
        return {*re.findall(r"\w{3,}", self.tokenizer.decode(ids).casefold())}

    def _unit(self, texts: list[str]) -> list[Tensor]:
        return [F.normalize(states, dim=-1) for states in self.encoder.states(texts)]

    def _states(self, rows: list[list[int]]) -> list[Tensor]:
        if self.known is None:
            return self.encoder.states([self.tokenizer.decode(row) for row in rows])

        def half(new: list[tuple[int, ...]]) -> list[Tensor]:
            return [states.half() for states in self.encoder.states([self.tokenizer.decode(row) for row in new])]

        return [states.float() for states in remembered(self.known, [tuple(row) for row in rows], half, KNOWN)]
