"""DataModule of the gist stages: training batches, fixed held-out documents, documents for the evaluation."""

import hashlib
import logging
from collections.abc import Callable
from itertools import zip_longest

import numpy as np
from torch.utils.data import default_convert

from megactx.framework.config.types import Count, NonNegative, Seed, Share, Whole, declared

from .adversarial import Vocabulary
from .composed import Composed
from .documents import TRAIN, VALIDATION, cut, length_of, tokenised
from .knowledge_module import prose
from .questions import QuestionBatches
from .resumable import Resumable
from .segments import check_history, check_room
from .spans import SpanBatches, check_weights, eligible_starts, evenly, single
from .tokenizer import load_tokenizer

log = logging.getLogger(__name__)

LONGEST_DOCUMENT = 16_384
PRESET = {name: f"preset.{name}" for name in ("batch", "spans", "validation_documents")}  # where they are set
PRESET |= {name: f"data.{name}" for name in ("min_tokens", "max_tokens", "workers")}

# Of an evaluation. The blocks of a document share the teacher's pass over it, so few blocks are of few documents; a
# report on fewer than 20 of them claims nothing.
BLOCKS_PER_DOCUMENT = 8


@declared("datamodule", block="block_size", horizon="horizon.tokens", weights="data.weights", **PRESET)
class SpanData(Resumable):
    """Documents with block starts for training, validation and evaluation, resumed to the exact batch.

    Args:
        source: a document source (``Files``, ``Embedded``, ``Hub``, ``Mixture``).
        tokenizer: a Hugging Face tokenizer, or its name or folder.
        block, horizon: K and H in tokens.
        min_tokens: shorter texts are dropped; at least 2 K + H, so that every document has an eligible block.
        max_tokens: documents are cut to it; ``None`` takes the smaller of 16,384 and what ``limit_to`` said.
        batch, spans: documents per batch, blocks per document.
        weights: domain -> share of training documents, see ``SpanBatches``.
        validation_documents: held-out documents per validation, in equal parts of every domain that has a weight.
        validation_blocks: blocks per validation document, evenly spaced.
        interleave, adversarial: shares of the training documents that are ``mixed`` and ``adversarial``, see
            ``Composed``; the rest is plain. Where a share is above 0, held-out documents of that label exist too.
        level2_spans: spans of K^2 tokens per training document, for gists of gists; 0 for none. ``min_tokens`` is then
            at least 2 K^2 + H.
        history: ``weight`` of history mode, and ``segments`` per training document, of ``segment`` tokens behind
            ``recency`` raw ones; with a ``weight`` and a ``recall`` of 0, or ``None``, there are none.
        questions: ``weight`` of questions behind contexts of their own, and what ``QuestionBatches`` takes; with a
            ``weight`` of 0, or ``None``, there are none.

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
        spans: Count,
        weights: dict[str, NonNegative | None],
        seed: Seed = 0,
        workers: Whole = 0,
        validation_documents: Count = 100,
        validation_blocks: Count = 8,
        interleave: Share = 0.0,
        adversarial: Share = 0.0,
        level2_spans: Whole = 0,
        history: dict | None = None,
        questions: dict | None = None,
    ):
        super().__init__()
        self.source, self.workers, self.seed = source, workers, seed
        self.tokenizer = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
        self.block, self.horizon, self.min_tokens = block, horizon, min_tokens
        self.batch, self.spans, self.weights = batch, spans, dict(weights)
        self.validation_documents, self.validation_blocks = validation_documents, validation_blocks
        self.asked_tokens = max_tokens
        self.interleave, self.adversarial, self.level2_spans = interleave, adversarial, level2_spans
        self.history = history if history and (history["weight"] or history.get("recall")) else None
        self.questions = questions if questions and questions["weight"] else None
        if interleave + adversarial > 1:
            raise ValueError(
                f"datamodule.interleave={interleave} and datamodule.adversarial={adversarial}: their sum is at most 1"
            )
        self.first: Callable[[int], int] | None = None
        self.limit_to(LONGEST_DOCUMENT)

    def limit_to(self, tokens: int) -> None:
        """Say how long a document the base LM takes; called before ``setup``.

        Raises:
            ValueError: ``max_tokens`` is longer.
        """
        self.positions, longest = tokens, min(LONGEST_DOCUMENT, tokens)
        self.max_tokens = longest if self.asked_tokens is None else self.asked_tokens
        if self.max_tokens > longest:
            raise ValueError(
                f"data.max_tokens={self.max_tokens} is not allowed: {longest} at most, the smaller of"
                f" {LONGEST_DOCUMENT} and what the base takes ({tokens})"
            )
        self._check_lengths()

    def begin_at(self, first: Callable[[int], int]) -> None:
        """Say where the blocks of a document may begin: tokens of it -> the first of these; called before ``setup``."""
        self.first = first

    def setup(self, stage=None):
        if hasattr(self, "training"):
            return
        rows = tokenised(self.source, self.tokenizer)
        documents = self._cut(rows, TRAIN)
        make = self._composed(check_weights(self.weights, documents))
        sizes = (self.batch, self.spans, self.block, self.horizon, self.seed)
        compose = make and make(documents)
        questions, self.held_questions = (self._questions(rows, split) for split in (TRAIN, VALIDATION))
        more = (compose, self.level2_spans, self.history, questions, self.first)
        self.training = SpanBatches(documents, self.weights, *sizes, *more)
        held = self._cut(rows, VALIDATION)
        self.held = held_in_turn(held, self.training.domains, self.weights)
        for domain in set(self.training.domains) - {document["domain"] for document in self.held}:
            log.warning("no document of the domain %s is held out: it is trained on, but not validated", domain)
        if make:
            self.held = in_turn(self.held + make(self.held).held_out(self.held))

    def train_dataloader(self):
        return self.loader(self.training, sampler=self.indices(), num_workers=self.workers)

    def val_dataloader(self):
        documents = self.held[: self.validation_documents]
        setting = f"preset.validation_documents={self.validation_documents}"
        documents = [documents[index] for index in self.share(len(documents), setting)]
        return self.loader([single(one, evenly(self._starts(one), self.validation_blocks)) for one in documents])

    def evaluation_documents(self, blocks: int | None = None) -> list[dict]:
        """Every held-out document as a batch of one, with tensors.

        Args:
            blocks: about so many blocks in all, evenly spaced, eight of each document, from as many documents as that
                takes; ``None`` takes every eligible block.
        """
        self.setup()
        return self._batches(self.held, blocks)

    def held_out(self, source, blocks: int | None = None) -> list[dict]:
        """Every text of another source, in the same form: nothing of it was trained on, so there is no split."""
        return self._batches(in_turn(self._cut(tokenised(source, self.tokenizer), None)), blocks)

    def _composed(self, weights):
        if not (self.interleave or self.adversarial):
            return None
        vocabulary = Vocabulary(self.tokenizer) if self.adversarial else None
        shares = (self.interleave, self.adversarial)
        return lambda documents: Composed(documents, weights, *shares, self.block, vocabulary)

    def _questions(self, rows, split: str) -> QuestionBatches | None:
        if not self.questions:
            return None
        asked = {name: value for name, value in self.questions.items() if name != "weight"}
        try:
            text = prose(rows, self.tokenizer, split)
        except ValueError as error:
            weight = self.questions["weight"]
            raise ValueError(
                f"loss.questions.weight={weight} needs prose between the facts. {error}, or set it to 0"
            ) from None
        made = QuestionBatches(text, self.tokenizer, self.block, **asked, seed=self.seed, split=split)
        if made.longest > self.positions:
            raise ValueError(
                f"loss.questions.tokens={made.tokens} is not allowed: with its question a context has {made.longest}"
                f" tokens, and the base takes {self.positions}"
            )
        return made

    def _batches(self, documents, blocks) -> list[dict]:
        starts = [self._starts(document) for document in documents]
        if blocks is not None:
            if blocks < 1:
                raise ValueError(f"blocks={blocks} is not allowed: it must be 1 or more")
            few = np.cumsum([min(len(s), BLOCKS_PER_DOCUMENT) for s in starts])
            enough = np.searchsorted(few, blocks) + 1
            documents, starts = documents[:enough], starts[:enough]
            counts = np.asarray([len(s) for s in starts])
            each = next((n for n in range(1, counts.max() + 1) if np.minimum(counts, n).sum() >= blocks), counts.max())
            starts = [evenly(s, int(each)) for s in starts]
        return [default_convert(single(document, s)) for document, s in zip(documents, starts, strict=True)]

    def _starts(self, document) -> np.ndarray:
        return eligible_starts(length_of(document), self.block, self.horizon, self.first)

    def _cut(self, rows, split) -> list[dict]:
        return documents_of(rows, split, self.tokenizer, self.min_tokens, self.max_tokens)

    def _check_lengths(self) -> None:
        if self.min_tokens > self.max_tokens:
            most = f"documents have at most {self.max_tokens} tokens (data.max_tokens, or what the base takes)"
            raise ValueError(f"data.min_tokens={self.min_tokens} is not allowed: {most}")
        if self.level2_spans:
            what = f"datamodule.level2_spans={self.level2_spans}"
            check_room(what, 2 * self.block**2 + self.horizon, self.min_tokens)
        if self.history:
            check_history(self.history, self.block, self.min_tokens)
        check_room(f"horizon.tokens={self.horizon}", 2 * self.block + self.horizon, self.min_tokens)


def in_turn(documents: list[dict]) -> list[dict]:
    """A fixed order in which every beginning is balanced: domains in turn, first the first document of every text."""
    seen, by_domain = {}, {}
    for document in documents:
        text = document["domain"], document["text"]
        piece = seen[text] = seen.get(text, -1) + 1
        key = hashlib.sha256(document["input_ids"].tobytes()).digest()
        by_domain.setdefault(document["domain"], []).append((piece, key, document))
    columns = [sorted(by_domain[domain], key=lambda entry: entry[:2]) for domain in sorted(by_domain)]
    return [entry[2] for row in zip_longest(*columns) for entry in row if entry is not None]


def held_in_turn(documents: list[dict], domains, weights: dict) -> list[dict]:
    """The held-out documents of some domains, ``in_turn``; ``weights`` are named where there is none."""
    if not (held := in_turn([document for document in documents if document["domain"] in domains])):
        raise ValueError(f"data.weights={weights}: no held-out document is of these domains; give more texts")
    return held


def documents_of(rows, split, tokenizer, min_tokens: int, max_tokens: int, more: int = 0) -> list[dict]:
    """The documents of ``cut``, each with ``more`` tokens in addition to these numbers; says how many there are.

    Raises:
        ValueError: there is none.
    """
    documents, dropped = cut(rows, split, tokenizer, min_tokens + more, max_tokens + more)
    what = {TRAIN: "training", VALIDATION: "held-out", None: "other"}[split]
    if dropped:
        log.info("%d %s texts are shorter than data.min_tokens=%d: dropped", dropped, what, min_tokens + more)
    log.info("%d %s documents of at most %d tokens", len(documents), what, max_tokens + more)
    if not documents and not dropped:
        raise ValueError(
            f"data: there is no {what} text; one in ten is held out by a hash of the text, so give more texts, or cut"
            " long ones into several files"
        )
    if not documents:
        raise ValueError(
            f"data.min_tokens={min_tokens}: none of the {dropped} {what} texts is that long"
            f"{f', with {more} tokens more' if more else ''}; lower it, or give more or longer texts"
        )
    return documents
