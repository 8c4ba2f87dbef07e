import torch

from megactx.lm.sentences import SentenceEncoder

from . import filled

KNOWN = 2**16  # blocks whose embeddings are remembered: cases of a task share most of their text


class Dense:
    """Raw blocks whose embedding by all-MiniLM-L6-v2 is most like the question's; a quarter is the newest tokens.

    The embedding is what its model card says: the mean of the last hidden states, normalised.

    Raises:
        ValueError: the package with the weights is not installed.
    """

    def __init__(self):
        self.encoder = SentenceEncoder("--policies=dense").ready()
        self.known: dict[str, torch.Tensor] = {}

    @torch.inference_mode()
    def embed(self, texts: list[str]) -> torch.Tensor:
        """-> [number of texts, 384], normalised."""
        new = [*{text: None for text in texts if text not in self.known}]
        if len(self.known) + len(new) > KNOWN:
            self.known.clear()
            new = [*dict.fromkeys(texts)]
        means = [torch.nn.functional.normalize(states.mean(0), dim=0) for states in self.encoder.states(new)]
        self.known |= zip(new, means, strict=True)
        return torch.stack([self.known[text] for text in texts])

    def order(self, asked) -> list[int]:
        """Blocks, the most alike first."""
        likeness = self.embed(asked.blocks) @ self.embed([asked.question])[0]
        return likeness.argsort(descending=True, stable=True).tolist()

    def keep(self, asked, budget):
        return filled(asked, budget, self.order(asked), budget // 4)
