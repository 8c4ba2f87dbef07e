"""Raw text -> token documents, tokenised once and cached on disk; the split into train and validation.

A document opens with BOS. A long text is cut into consecutive documents that share its ``source`` and its side of the
split; the split is by hash of the source text, never by window.
"""

import hashlib
import logging
import os
from pathlib import Path

from .tokenizer import bos_id, tokenizer_hash

log = logging.getLogger(__name__)

TRAIN, VALIDATION = "train", "validation"
VALIDATION_PERCENT = 10


def cache_folder() -> Path:
    """Where tokenised corpora are kept: ``$MEGACTX_CACHE``, or ``~/.cache/megactx``."""
    return Path(os.environ.get("MEGACTX_CACHE", "~/.cache/megactx")).expanduser()


def tokenised(source, tokenizer):
    """Tokenise a source once; later calls read the cache.

    Args:
        source: anything with ``fingerprint() -> str`` and ``load() -> Dataset(text, domain, source)``.
        tokenizer: a Hugging Face tokenizer.

    Returns:
        ``datasets.Dataset`` with ``input_ids`` (list of int32, without BOS), ``domain``, ``source``, ``split``.
    """
    from datasets import Dataset, Features, Sequence, Value

    key = hashlib.sha256(f"v1 {source.fingerprint()} {tokenizer_hash(tokenizer)}".encode()).hexdigest()[:20]
    folder = cache_folder()
    final = folder / f"{key}.arrow"
    if not final.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"{key}.{os.getpid()}.part"
        raw = source.load()
        if len(raw) == 0:
            raise ValueError("data: the source has no documents")
        features = Features(
            {name: Value("string") for name in ("domain", "source", "split")} | {"input_ids": Sequence(Value("int32"))}
        )
        try:
            raw.map(
                lambda rows: {
                    "input_ids": tokenizer(rows["text"], add_special_tokens=False, verbose=False)["input_ids"],
                    "split": [split_of(text) for text in rows["text"]],
                },
                batched=True,
                batch_size=64,
                remove_columns=["text"],
                features=features,
                cache_file_name=str(part),
                new_fingerprint=key,
                desc="tokenising (once; cached)",
            )
            os.replace(part, final)
        finally:
            part.unlink(missing_ok=True)
    return Dataset.from_file(str(final))


def split_of(text: str) -> str:
    """The side of the split that a source text is on: a hash of the text decides, 90 / 10."""
    bucket = int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:4], "big") % 100
    return VALIDATION if bucket < VALIDATION_PERCENT else TRAIN


def cut(rows, split: str | None, tokenizer, min_tokens: int, max_tokens: int):
    """Cut the texts of one split (``None``: of both) into documents of ``min_tokens..max_tokens`` tokens, BOS included.

    Returns:
        ``(documents, dropped)``: a list of dicts ``input_ids`` (numpy int64, [T]), ``domain``, ``source``, ``text``
        (index of the source text), and the number of texts that were too short.
    """
    import numpy as np

    if not 0 < min_tokens <= max_tokens:
        raise ValueError(
            f"data.min_tokens={min_tokens} is not allowed with data.max_tokens={max_tokens}: 0 < min <= max"
        )
    bos = bos_id(tokenizer)
    documents, dropped = [], 0
    for index, row in enumerate(rows.with_format("numpy")):
        if split is not None and row["split"] != split:
            continue
        ids = np.asarray(row["input_ids"], dtype=np.int64)
        pieces = [ids[start : start + max_tokens - 1] for start in range(0, len(ids), max_tokens - 1)]
        pieces = [piece for piece in pieces if len(piece) + 1 >= min_tokens]
        dropped += not pieces
        for piece in pieces:
            documents.append(
                {
                    "input_ids": np.concatenate([[bos], piece]),
                    "domain": str(row["domain"]),
                    "source": str(row["source"]),
                    "text": index,
                }
            )
    return documents, dropped
