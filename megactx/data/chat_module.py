"""DataModules with conversations: of the stage ``sft``, and of base training that goes on with them."""

import numpy as np
from torch.utils.data import DataLoader

from megactx.framework.config.types import AtLeast2, Count, NonNegative, Whole

from .conversations import Conversations, Together, fingerprint_of
from .documents import TRAIN, VALIDATION, Part, Views, parts_of
from .packing import ConversationBatches
from .pretraining_module import PretrainingData
from .resumable import Resumable
from .turns import tokenised_conversations, unmarked

CONVERSATIONS = "conversations"  # their domain


class ChatData(Resumable):
    """Training and validation batches of conversations, resumed to the exact batch.

    Args:
        sources: name -> source of conversations; all of them together, each conversation once in an epoch.
        tokenizer: a Hugging Face tokenizer with a chat template.
        tokens: T of a row, and of a conversation at most, see ``Turns``.
        batch: B, rows.
        validation_batches: of held-out conversations, per validation.
        seed: of what shares a row, and of the order.
        workers: processes that build batches.
    """

    def __init__(
        self,
        sources: dict,
        tokenizer,
        tokens: AtLeast2,
        batch: Count,
        validation_batches: Count = 8,
        seed: Whole = 0,
        workers: Whole = 0,
    ):
        super().__init__()
        self.source, self.tokenizer = Together(sources), tokenizer
        self.row, self.batch, self.validation_batches = tokens, batch, validation_batches
        self.seed, self.workers = seed, workers

    def limit_to(self, positions: int) -> None:
        """Rows are no longer than a base LM takes.

        Raises:
            ValueError: they are.
        """
        if self.row > positions:
            raise ValueError(f"datamodule.tokens={self.row} is not allowed: the base LM takes {positions} at most")

    def setup(self, stage=None) -> None:
        if not hasattr(self, "training"):
            self.rows = tokenised_conversations(self.source, self.tokenizer, self.row, CONVERSATIONS)
            padding = self.tokenizer.pad_token_id
            padding = 0 if padding is None else padding  # any id: nobody reads it
            settings = (self.rows, self.row, self.batch, padding, self.seed)
            self.training = ConversationBatches(*settings)
            self.validation = ConversationBatches(*settings, split=VALIDATION)

    def tokens(self, steps: int) -> int:
        """Tokens served in the first ``steps`` steps, padding too."""
        return steps * self.each * self.batch * self.row

    def train_dataloader(self):
        return self.loader(self.training, sampler=self.indices(), num_workers=self.workers)

    def val_dataloader(self):
        count = min(self.validation_batches, self.validation.whole())
        mine = self.share(count, f"datamodule.validation_batches={count}")
        return DataLoader(self.validation, batch_size=None, sampler=mine)


class MidData(PretrainingData):
    """Windows of texts and of conversations, one behind the other, every token of which carries loss.

    Args:
        source: a source of texts.
        conversations: domain -> source of conversations, written by the chat template of the tokenizer.
        weights: domain -> share of windows, of the texts and of these.
        tokenizer, phases, repeat, skip, max_position, seed, validation_batches, workers: as of ``PretrainingData``.
    """

    def __init__(
        self,
        source,
        conversations: dict,
        tokenizer,
        phases,
        weights: dict[str, NonNegative],
        repeat,
        skip,
        max_position=None,
        seed=0,
        validation_batches=8,
        workers=0,
    ):
        super().__init__(
            source, tokenizer, phases, weights, repeat, skip, max_position, seed, validation_batches, workers
        )
        self.conversations = {name: one for name, one in conversations.items() if self.settings["weights"].get(name)}
        self.source = TextsAndTalk(source, self.conversations)

    def read(self):
        from datasets import concatenate_datasets

        longest = max(phase["tokens"] for phase in self.phases)
        rows = [super().read()]
        for domain, source in self.conversations.items():
            own = tokenised_conversations(source, self.tokenizer, longest, domain)
            rows.append(joined(own, 4 * longest))
        return concatenate_datasets(rows)


class TextsAndTalk:
    """A source of texts with sources of conversations beside it: one identity."""

    def __init__(self, texts, conversations: dict[str, Conversations]):
        self.texts, self.conversations = texts, conversations

    def fingerprint(self) -> str:
        return fingerprint_of({"texts": self.texts, **self.conversations})

    def parts(self) -> list[Part]:
        return parts_of(self.texts)


def joined(rows, tokens: int):
    """Conversations one behind the other, each with its BOS, as documents of at least ``tokens`` tokens where there are
    so many; of one domain and one side of the split each."""
    from datasets import Dataset, Features, List, Value

    sides: dict[str, list[list[np.ndarray]]] = {TRAIN: [[]], VALIDATION: [[]]}
    for ids, side in zip(Views(rows), rows.data.column("split").to_pylist(), strict=True):
        if sum(map(len, sides[side][-1])) >= tokens:
            sides[side].append([])
        sides[side][-1].append(unmarked(np.asarray(ids))[0])
    found, domain = [], rows[0]["domain"]
    for side, documents in sides.items():
        if len(documents) > 1 and sum(map(len, documents[-1])) < tokens:
            rest = documents.pop()
            documents[-1] += rest
        for parts in filter(None, documents):
            ids = np.concatenate(parts)[1:].astype(np.int32)  # the BOS of a document is not kept
            found.append({"input_ids": ids, "domain": domain, "source": domain, "split": side})
    strings = {name: Value("string") for name in ("domain", "source", "split")}
    return Dataset.from_list(found, features=Features(strings | {"input_ids": List(Value("int32"))}))
