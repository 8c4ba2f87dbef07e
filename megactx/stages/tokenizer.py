"""Stage ``tokenizer``: train a byte-level BPE tokenizer on the texts of any source."""

import hashlib
import logging
from pathlib import Path

from megactx.data.documents import TRAIN, VALIDATION, split_of
from megactx.data.tokenizer import train_tokenizer
from megactx.framework.files import IN_RUN, replacing
from megactx.framework.run.next_command import next_command

from .chain_page import write_page

log = logging.getLogger(__name__)


class TokenizerStage:  # no ``Stage``: it does not train in steps
    """Train on the training side of the split, measure on the held-out side. It brings a chat template.

    Args:
        source: a document source (``Files``, ``Embedded``, ``Hub``, ``Mixture``).
        vocab_size: number of ids, special tokens included.
        sample_bytes: training reads about so many bytes; texts are picked by hash, so that domains keep their shares.
    """

    timed, takes, gives = False, {}, {"tokenizer": "tokenizer"}
    stock = True
    conclude = staticmethod(write_page)

    def __init__(self, source, vocab_size: int = 8192, sample_bytes: int = 30_000_000):
        if vocab_size < 262:
            raise ValueError(f"stage.vocab_size={vocab_size} is not allowed: 262 or more (256 bytes, 6 special tokens)")
        if sample_bytes < 1:
            raise ValueError(f"stage.sample_bytes={sample_bytes} is not allowed: it must be 1 or more")
        self.source, self.vocab_size, self.sample_bytes = source, vocab_size, sample_bytes

    def run(self, folder: str | Path) -> Path:
        """Train and save. -> the Hugging Face folder, ``folder/tokenizer``."""
        rows = self.source.load()
        texts = sorted(rows["text"], key=lambda text: hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
        sides = {TRAIN: [], VALIDATION: []}
        for text in texts:
            sides[split_of(text)].append(text)
        if not sides[TRAIN]:
            raise ValueError("data: the source has no text on the training side of the split; give more documents")
        tokenizer = train_tokenizer(_first(sides[TRAIN], self.sample_bytes), self.vocab_size, chat=True)
        if len(tokenizer) < self.vocab_size:
            log.warning("stage.vocab_size=%d: the text gave only %d ids", self.vocab_size, len(tokenizer))
        final = _save(tokenizer, Path(folder) / "tokenizer")
        for domain, figure in characters_per_token(tokenizer, rows).items():
            print(f"{domain:>12}: {figure:.2f} characters per token on held-out texts")
        print(f"tokenizer with {len(tokenizer)} ids: {final}")
        changes = {"base.name": final, "stage.config.vocab_size": len(tokenizer)}
        print(f"next: {next_command(Path(folder), 'base_lm', changes, keep=('data', 'trainer'), options=('preset',))}")
        return final


def characters_per_token(tokenizer, rows) -> dict[str, float]:
    """domain -> characters per token of its held-out texts; of all its texts where none is held out."""
    held, every = {}, {}
    for row in rows:
        every.setdefault(row["domain"], []).append(row["text"])
        if split_of(row["text"]) == VALIDATION:
            held.setdefault(row["domain"], []).append(row["text"])
    figures = {}
    for domain in sorted(every):
        texts = held.get(domain) or every[domain]
        tokens = sum(len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) for text in texts)
        figures[domain] = sum(map(len, texts)) / max(1, tokens)
    return figures


def _first(texts, size: int):
    for text in texts:
        yield text
        size -= len(text.encode("utf-8", "surrogatepass"))
        if size <= 0:
            return


def _save(tokenizer, final: Path) -> Path:
    with replacing(final, IN_RUN) as part:
        tokenizer.save_pretrained(part)
    return final
