"""DataModule of the stage ``base_lm``."""

from torch.utils.data import DataLoader

from .documents import VALIDATION, tokenised
from .pretraining import PretrainingBatches
from .resumable import Resumable


class PretrainingData(Resumable):
    """Training and validation batches for a base LM, resumed to the exact batch.

    Args:
        source: a document source (``Files``, ``Embedded``, ``Hub``).
        tokenizer: a Hugging Face tokenizer.
        phases, weights, repeat, skip, max_position, seed: see ``PretrainingBatches``.
        validation_batches: fixed batches per validation, each of the last phase's shape, all with a passage
            that returns.
    """

    def __init__(
        self, source, tokenizer, phases, weights, repeat, skip, max_position, seed=0, validation_batches=8, workers=0
    ):
        super().__init__()
        self.source, self.tokenizer, self.workers = source, tokenizer, workers
        self.settings = dict(
            phases=list(phases), weights=dict(weights), skip=skip, max_position=max_position, seed=seed
        )
        self.repeat, self.validation_batches = repeat, validation_batches

    def setup(self, stage=None):
        if not hasattr(self, "training"):
            self.rows = rows = self.read()
            settings = self.settings | dict(repeat=self.repeat, each=self.each)
            self.training = PretrainingBatches(rows, self.tokenizer, **settings)
            fixed = self.settings | dict(phases=self.settings["phases"][-1:], skip=0.0)
            self.validation = PretrainingBatches(rows, self.tokenizer, **fixed, repeat=1.0, split=VALIDATION)

    def read(self):
        """The texts as rows of ids, see ``tokenised``."""
        return tokenised(self.source, self.tokenizer)

    def limit_to(self, positions: int) -> None:
        """Positions are those that a base LM takes, where no others were asked for."""
        if self.settings["max_position"] is None:
            self.settings["max_position"] = positions

    @property
    def phases(self) -> list[dict]:
        return self.settings["phases"]

    def tokens(self, steps: int) -> int:
        """Tokens served in the first ``steps`` steps."""
        total = 0
        for phase in self.phases[:-1]:
            total += min(steps, phase["steps"]) * phase["tokens"] * phase["batch"]
            steps -= min(steps, phase["steps"])
        return (total + steps * self.phases[-1]["tokens"] * self.phases[-1]["batch"]) * self.each

    def train_dataloader(self):
        return DataLoader(self.training, batch_size=None, sampler=self.indices(), num_workers=self.workers)

    def val_dataloader(self):
        mine = self.share(self.validation_batches, f"datamodule.validation_batches={self.validation_batches}")
        return DataLoader(self.validation, batch_size=None, sampler=mine)
