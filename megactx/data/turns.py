"""Conversations -> token ids, and which of them are answers.

A turn is written as a talk with the model writes it (``apps.framing``): the signs of the template are special tokens,
and what somebody says is text, whatever it looks like. BOS comes once, in front. An answer is what the assistant says
and the id that ends its turn; a question and the rest of the template are none.
"""

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from .documents import Told, cache_folder, parts_of, split_of, write_rows
from .encoding import batches
from .tokenizer import TextEncoder, bos_id, tokenizer_hash

ASSISTANT = "assistant"
SAID = "\ue000{}\ue001"  # stands for what is said; private-use characters
RULES = 1  # of what a conversation gives; part of every name in the cache


class Turns:
    """Encodes conversations by the chat template of a tokenizer.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.

    Raises:
        ValueError: it has none.
    """

    def __init__(self, tokenizer):
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(f"tokenizer={tokenizer.name_or_path}: it has no chat template")
        self.tokenizer, self.encoder, self.bos = tokenizer, TextEncoder(tokenizer), bos_id(tokenizer)
        self.signs: dict[tuple[str, ...], list[list[int]]] = {}

    def __call__(self, messages: Sequence[dict], most: int | None = None) -> tuple[np.ndarray, np.ndarray] | None:
        """``role`` and ``content`` of turns -> ids int32 [t], answers bool [t]; ``None`` where no answer is left.

        Args:
            most: t at most. Turns at the end are left out until the rest fits and ends with an answer. Where the first
                answer alone is too long, it is cut and does not end; the template never is.

        Raises:
            ValueError: the template takes no such conversation.
        """
        said = [self.encoder(turn["content"], begins=False) for turn in messages]
        roles = tuple(turn["role"] for turn in messages)
        answered = [index + 1 for index, role in enumerate(roles) if role == ASSISTANT]
        for count in reversed(answered):
            signs = self._signs(roles[:count])
            if most is None or sum(map(len, signs)) + sum(map(len, said[:count])) <= most:
                return self._joined(signs, said[:count], roles)
        if not answered:
            return None
        first = answered[0]
        signs = self._signs(roles[:first])[:-1]
        room = most - sum(map(len, signs)) - sum(map(len, said[: first - 1]))
        return self._joined([*signs, []], [*said[: first - 1], said[first - 1][:room]], roles) if room > 0 else None

    def _joined(self, signs, said, roles) -> tuple[np.ndarray, np.ndarray]:
        ids, answers = [*signs[0]], [False] * len(signs[0])
        for role, text, after in zip(roles, said, signs[1:], strict=False):
            learned = role == ASSISTANT
            ids += [*text, *after]
            answers += [learned] * len(text) + [learned] * len(after[:1]) + [False] * len(after[1:])
        return np.asarray(ids, dtype=np.int32), np.asarray(answers, dtype=bool)

    def _signs(self, roles: tuple[str, ...]) -> list[list[int]]:
        """Ids of what stands before, between and behind the turns: one list more than there are turns."""
        if roles not in self.signs:
            said = [SAID.format(index) for index in range(len(roles))]
            messages = [{"role": role, "content": text} for role, text in zip(roles, said, strict=True)]
            try:
                rendered = self.tokenizer.apply_chat_template(messages, tokenize=False)
            except Exception as error:  # it is a program of whoever made the tokenizer
                raise ValueError(f"chat_template: it takes no turns of {', '.join(roles)} ({error})") from error
            bos = self.tokenizer.bos_token or ""
            pieces, rest = [], rendered.removeprefix(bos) if bos else rendered
            for text in said:
                if rest.count(text) != 1:
                    raise ValueError("chat_template: it does not show once, and in their order, what is said")
                before, _, rest = rest.partition(text)
                pieces.append(before)
            first, *others = [*pieces, rest]
            begun = [self.bos, *self.encoder.opening(first)]
            self.signs[roles] = [begun, *(self.encoder(p, begins=False, plain=False) for p in others)]
        return self.signs[roles]


def tokenised_conversations(source, tokenizer, most: int, domain: str):
    """Encode the conversations of a source once; later calls read the cache.

    Args:
        source: anything with ``fingerprint() -> str`` and ``documents()``, dicts of ``messages`` and ``source``; or
            with ``parts()`` of such.
        most: tokens of a conversation, see ``Turns``.
        domain: of all of them.

    Returns:
        ``datasets.Dataset`` with ``input_ids`` (list of int32; one of an answer is kept as its complement ``~id``),
        ``domain``, ``source``, ``split``: a hash of what is said decides it.

    Raises:
        ValueError: no conversation has an answer, or the cache may not be written.
        RunFailed: the disk of the cache is full.
    """
    from datasets import Dataset, concatenate_datasets

    turns, found, told = Turns(tokenizer), [], Told(len(parts_of(source)))
    about = repr((RULES, tokenizer_hash(tokenizer), tokenizer.chat_template, bos_id(tokenizer), most, domain))
    for part in parts_of(source):
        name = hashlib.sha256(f"turns {part.fingerprint} {about}".encode()).hexdigest()[:20]
        path = cache_folder() / f"{name}.arrow"
        if not path.exists():
            write_rows(path, _encoded(part.documents(), turns, most, domain), told)
        told.done += 1
        found.append(Dataset.from_file(str(path)))
    told.end()
    rows = concatenate_datasets(found) if len(found) > 1 else found[0]
    if not len(rows):
        raise ValueError(f"conversations: none has an answer that begins within {most} tokens")
    return rows


def _encoded(documents, turns: Turns, most: int, domain: str) -> Iterator[tuple[list, dict, int]]:
    for some in batches(documents, lambda row: sum(len(turn["content"]) for turn in row["messages"]), count=1000):
        ids, sources, splits, size = [], [], [], 0
        for row in some:
            text = "\0".join(turn["content"] for turn in row["messages"])
            size += len(text)
            if (found := turns(row["messages"], most)) is not None:
                ids.append(marked(*found))
                sources.append(row["source"])
                splits.append(split_of(text))
        yield ids, {"domain": [domain] * len(ids), "source": sources, "split": splits}, size


def marked(ids: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """Ids int32 [t] and answers bool [t] as one array, see ``tokenised_conversations``."""
    return np.where(answers, ~ids, ids)


def unmarked(row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What ``marked`` was given; ids int64 [t], answers bool [t]."""
    answers = row < 0
    return np.where(answers, ~row, row).astype(np.int64), answers
