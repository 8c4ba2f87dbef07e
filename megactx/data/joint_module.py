"""DataModule of the stages in which the parts learn together: one set of documents, batches for whoever learns next."""

from megactx.framework.config.types import Count, Whole, declared

from .resumable import Endless
from .spans import SpanBatches
from .windows_module import WindowData

SPANS, PICKS, WINDOWS = "spans", "picks", "windows"  # kinds of batches
KEY = 2**30  # of documents for windows, beside those whose windows are measured ahead


@declared("datamodule")
class JointData(WindowData):
    """Documents, and three kinds of training batches of them. Batch i is a function of (seed, i) and of its kind.

    - ``spans``: for GistNet, ``{"spans": an item of SpanBatches}``.
    - ``picks``: for LensNet, ``{"picks": [B] numbers in [0, 1)}``, which choose among the windows that were measured.
    - ``windows``: for what learns from working contexts, ``{"windows": documents with a cursor, "index": i}``.

    ``kind_at`` says which kind batch i is; the stage sets it before training.

    Args:
        documents: per batch of the first and the last kind.
        spans: blocks per document, of the first kind; 0 where it is not asked for.
        settings: of ``WindowData``; its ``batch`` is that of picks.

    Raises:
        ValueError: a number that is not allowed; it names the setting.
    """

    def __init__(self, documents: Count, spans: Whole = 0, **settings):
        super().__init__(**settings)
        self.documents, self.spans = documents, spans
        self.kind_at = lambda index: WINDOWS

    def setup(self, stage=None):
        if hasattr(self, "blocks"):
            return
        super().setup(stage)
        self.blocks = self._spans() if self.spans else None

    def _spans(self) -> SpanBatches:
        texts = [document for pool in self.pools.values() for document in pool]
        shares = dict(zip(self.domains, self.shares.tolist(), strict=True))
        return SpanBatches(texts, shares, self.documents, self.spans, self.block, self.horizon, self.seed)

    def train_dataloader(self):
        return self.loader(Endless(self._batch), sampler=self.indices())

    def _batch(self, index: int) -> dict:
        kind = self.kind_at(index)
        if kind == SPANS:
            return {SPANS: self.blocks[index]}
        if kind == PICKS:
            return {PICKS: self.picks(index)}
        numbers = range(index * self.documents, (index + 1) * self.documents)
        return {WINDOWS: [self.training_document([KEY, number]) for number in numbers], "index": index}
