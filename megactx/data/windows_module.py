"""DataModule of the lens stage: long documents cut at a cursor, before which a window is focused and after which it is
judged.
"""

import numpy as np
import torch

from megactx.framework.config.types import Count, NonNegative, Seed, Share, declared

from .documents import TRAIN, VALIDATION, IdsOf, length_of, tokenised
from .planted import KINDS, plant
from .resumable import Endless, Resumable
from .spans import check_weights
from .spans_module import LONGEST_DOCUMENT, documents_of, held_in_turn, in_turn
from .tokenizer import load_tokenizer


@declared("datamodule", block="block_size", horizon="horizon.tokens", weights="data.weights", batch="preset.batch")
class WindowData(Resumable):
    """Documents with a cursor, and for training numbers that choose among the windows that were measured so far.

    Which windows there are is the stage's matter, for its LensNet has a say in them. So a training batch is ``batch``
    numbers in [0, 1), a function of (seed, index), and a validation batch the indices of held-out windows.

    Args:
        source: a document source (``Files``, ``Embedded``, ``Hub``, ``Mixture``).
        tokenizer: a Hugging Face tokenizer, or its name or folder.
        block: K, tokens of a block.
        horizon: H tokens behind the cursor.
        min_tokens: the least tokens before the cursor; shorter texts are dropped.
        max_tokens: the most; ``None``: the smaller of 16,384 and what ``limit_to`` said, less the horizon.
        batch: windows per batch.
        weights: domain -> share of documents.
        validation_windows: held-out windows per validation.
        planted: share of the training documents in which a fact is planted, see ``plant``.

    Raises:
        ValueError: a length that does not fit, or nothing left that is long enough; it names the setting.
    """

    def __init__(
        self,
        source,
        tokenizer,
        block: Count,
        horizon: Count,
        min_tokens: Count,
        max_tokens: Count | None,
        batch: Count,
        weights: dict[str, NonNegative | None],
        seed: Seed = 0,
        validation_windows: Count = 32,
        planted: Share = 0.0,
    ):
        super().__init__()
        self.source, self.seed, self.block, self.horizon = source, seed, block, horizon
        self.tokenizer = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
        self.min_tokens, self.asked, self.weights = min_tokens, max_tokens, dict(weights)
        self.batch, self.validation_windows, self.planted = batch, validation_windows, planted
        self.limit_to(LONGEST_DOCUMENT)

    def limit_to(self, tokens: int) -> None:
        """Say how many positions the base LM has; called before ``setup``.

        Raises:
            ValueError: ``max_tokens`` and the horizon are more, or ``min_tokens`` is above ``max_tokens``.
        """
        longest = min(LONGEST_DOCUMENT, tokens) - self.horizon
        self.max_tokens = longest if self.asked is None else self.asked
        if not self.min_tokens <= self.max_tokens <= longest:
            raise ValueError(
                f"data.min_tokens={self.min_tokens}, data.max_tokens={self.asked} are not allowed: at most {longest}"
                f" tokens before the cursor, and {self.horizon} behind it"
            )

    def setup(self, stage=None):
        if hasattr(self, "pools"):
            return
        rows = tokenised(self.source, self.tokenizer)
        training, held = self._cut(rows, TRAIN), self._cut(rows, VALIDATION)
        shares = check_weights(self.weights, training)
        self.domains, self.shares = list(shares), np.asarray(list(shares.values()))
        self.pools = {domain: [d for d in training if d["domain"] == domain] for domain in self.domains}
        self.held = held_in_turn(held, shares, self.weights)

    def training_document(self, key: list[int]) -> dict:
        """A training document with a random cursor: a function of (seed, key).

        Returns:
            ``ids`` int64 [T + H], or [T + A] where a fact is planted; ``cursor`` T, ``domain``, ``text``.
        """
        rng = np.random.default_rng([self.seed, *key])
        pool = self.pools[self.domains[rng.choice(len(self.domains), p=self.shares)]]
        document = pool[rng.integers(len(pool))]
        found = self._at(document, int(rng.integers(self.min_tokens, length_of(document) - self.horizon + 1)))
        if rng.random() < self.planted:
            others = [pool[rng.integers(len(pool))]["input_ids"] for _ in range(8)]
            found = self._planted(found, others, KINDS[int(rng.integers(len(KINDS)))], rng) or found
        return found

    def held_documents(self, count: int | None = None, tokens: int | None = None) -> list[dict]:
        """Held-out documents in the same form, in a fixed order, the first ones of all domains.

        Args:
            count: how many at most; ``None``: all.
            tokens: T; ``None``: as many as a document has.
        """
        return self._placed(self.held, count, tokens)

    def other(self, source, count: int | None = None, tokens: int | None = None) -> list[dict]:
        """Documents of another source, in the same form: nothing of it was trained on, so there is no split."""
        return self._placed(in_turn(self._cut(tokenised(source, self.tokenizer), None)), count, tokens)

    def planted_cases(self, count: int, tokens: int | None = None) -> list[dict]:
        """Held-out documents with a planted fact, of all kinds in turn; foreign passages are held out too.

        Args:
            count: how many; a document may be used again, with another fact.
            tokens: T; ``None``: as many as a document has.
        """
        rng, documents = np.random.default_rng(self.seed), self.held_documents(tokens=tokens)
        others, out = IdsOf(self.held), []
        for number in range(4 * count):  # a sentence may be too long for a block
            if len(out) == count or not documents:
                break
            document = documents[int(rng.integers(len(documents)))]
            if found := self._planted(document, others, KINDS[number % len(KINDS)], rng):
                out.append(found)
        return out

    def _planted(self, document: dict, others: list, kind: str, rng) -> dict | None:
        return plant(document, others, self.tokenizer, kind, self.block, rng)

    def train_dataloader(self):
        return self.loader(Endless(self.picks), sampler=self.indices())

    def picks(self, index: int) -> torch.Tensor:
        """``batch`` numbers in [0, 1), a function of (seed, index)."""
        return torch.from_numpy(np.random.default_rng([self.seed, index]).random(self.batch))

    def val_dataloader(self):
        return self.loader(torch.arange(self.validation_windows).split(self.batch))

    def _placed(self, documents: list[dict], count: int | None, tokens: int | None) -> list[dict]:
        found = []
        for document in documents:
            cursor = length_of(document) - self.horizon if tokens is None else tokens
            if cursor + self.horizon <= length_of(document):
                found.append(self._at(document, cursor))
            if len(found) == count:
                break
        return found

    def _at(self, document: dict, cursor: int) -> dict:
        ids = torch.from_numpy(document["input_ids"][: cursor + self.horizon])
        return {"ids": ids, "cursor": cursor, "domain": document["domain"], "text": document["text"]}

    def _cut(self, rows, split) -> list[dict]:
        return documents_of(rows, split, self.tokenizer, self.min_tokens, self.max_tokens, self.horizon)
